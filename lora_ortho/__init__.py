"""Run-time merging of several LoRA adapters by Orthogonal Monte Carlo Dropout (arXiv 2510.03262).

The masks of the adapters are disjoint and random, a pure function of seed and coordinates, drawn
inside the kernels and never stored.
"""

from lora_ortho import backends, mask_stream
from lora_ortho.adapters import AdapterFileError, attach, detach, export, inject, load_adapter
from lora_ortho.module import Adapter, FusedOrthoLoRALinear
from lora_ortho.op import fused_ortho_lora

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterFileError",
    "FusedOrthoLoRALinear",
    "attach",
    "backends",
    "detach",
    "export",
    "fused_ortho_lora",
    "inject",
    "load_adapter",
    "mask_stream",
]
