"""Layers whose parents read their weights instead of calling them: adapters do nothing there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ortho.adapters.components import Named


@dataclass(frozen=True)
class Reader:
    """Children whose weights a parent reads.

    Attributes:
        children: their names in it.
        holds: whether this parent does, where not every one of its class does.
        when: the same in words.
    """

    children: tuple[str, ...]
    holds: Callable[[Any], bool] | None = None
    when: str = ""


def _in_slices(parent: Any) -> bool:
    return bool(parent.slow_but_exact) and int(parent.pretraining_tp) > 1


def _biased_apart(parent: Any) -> bool:
    return getattr(parent, "q_bias", None) is not None


_SLICED = "with `slow_but_exact` and `pretraining_tp` above 1"
_BIASED = "with a `q_bias`"
# By the class of the parent: of torch by its whole name, of packages of models by package and name,
# because they have one class of a name in many files.
READERS: dict[str, Reader] = {
    "torch.ao.nn.quantizable.modules.activation.MultiheadAttention": Reader(()),
    "torch.nn.modules.activation.MultiheadAttention": Reader(("out_proj",)),
    "torch.nn.modules.transformer.TransformerEncoderLayer": Reader(("linear1", "linear2")),
    "transformers.BloomAttention": Reader(("dense",), _in_slices, _SLICED),
    "transformers.BloomMLP": Reader(("dense_4h_to_h",), _in_slices, _SLICED),
    "transformers.ConditionalDetrMHAttentionMap": Reader(("k_proj",)),
    "transformers.DabDetrMHAttentionMap": Reader(("k_linear",)),
    "transformers.DetrMHAttentionMap": Reader(("k_proj",)),
    "transformers.FalconMambaMixer": Reader(("dt_proj",)),
    "transformers.JambaMambaMixer": Reader(("dt_proj",)),
    "transformers.LSHSelfAttention": Reader(("query_key", "value")),
    "transformers.LongcatFlashTopkRouter": Reader(("classifier",)),
    "transformers.MambaMixer": Reader(("dt_proj",)),
    "transformers.MaskFormerDetrMHAttentionMap": Reader(("k_proj",)),
    "transformers.MobileBertLMPredictionHead": Reader(("decoder", "dense")),
    "transformers.TDNNLayer": Reader(("kernel",)),
    "transformers.WavLMAttention": Reader(("q_proj", "k_proj", "v_proj", "out_proj")),
    "diffusers.FirDownsample2D": Reader(("Conv2d_0",)),
    "diffusers.FirUpsample2D": Reader(("Conv2d_0",)),
    "timm.Attention": Reader(("qkv",), _biased_apart, _BIASED),
    "timm.WindowAttention": Reader(("qkv",), _biased_apart, _BIASED),
    "torchvision.ShiftedWindowAttention": Reader(("qkv", "proj")),
}
# What diffusers' fuse_qkv_projections makes, and of which layers.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def uncalled(modules: Sequence[Named]) -> dict[int, str]:
    """Why adapters of a layer would do nothing, by the identity of each layer that has a reason."""
    by_name = {entry.name: entry.module for entry in modules}
    found: dict[int, str] = {}
    for entry in modules:
        above, _, child = entry.name.rpartition(".")
        parent = by_name.get(above)
        reason = None if parent is None or parent is entry.module else _why(parent, child)
        if reason is not None:
            found.setdefault(id(entry.module), reason)
    return found


def _why(parent: nn.Module, child: str) -> str | None:
    """Why a parent does not call this child; None where nothing is known against it."""
    kind = type(parent).__name__
    if getattr(parent, "fused_projections", False) is True:
        for fused, children in FUSED.items():
            if child in children and isinstance(getattr(parent, fused, None), nn.Module):
                return f"part of a {kind}, which calls {fused} instead (fuse_qkv_projections)"
    for base in type(parent).__mro__:
        package = base.__module__.partition(".")[0]
        names = (f"{base.__module__}.{base.__qualname__}", f"{package}.{base.__qualname__}")
        reader = next((READERS[name] for name in names if name in READERS), None)
        if reader is not None:
            reads = child in reader.children and (reader.holds is None or reader.holds(parent))
            reason = f"part of a {kind}, which reads its weights instead of calling it"
            return reason if reads else None
    return None
