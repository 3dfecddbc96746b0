"""A few small calls, forward and backward, checked: what compute-sanitizer is run over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import checks, peers
from benchmarks.cases import DTYPES, Case, make
from benchmarks.device import device_of
from lora_ortho import backends

# Sizes that fit no tile, few tokens and many, one adapter's and many adapters' kernels.
_CASES = (Case(1, 64, 136, 3, 16), Case(19, 40, 131, 2, 5), Case(70, 64, 272, 8, 16))


def main(argv: Sequence[str] | None = None) -> int:
    """Run and check. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_probe", description=__doc__)
    parser.add_argument("--backend", choices=backends.names(), required=True)
    backend: str = parser.parse_args(argv).backend
    device = device_of(backend)
    for case in _CASES:
        for dtype in DTYPES:
            inputs = make(case, DTYPES[dtype], device)
            masks = checks.orthogonal(case, device.torch_device)
            found = peers.ours_training(inputs, backend)()
            checks.check_training(found, inputs, masks, joined=False)
            with torch.no_grad():
                checks.check_forward(peers.ours(inputs, backend)(), inputs, masks)
            print(f"{case} {dtype} {backend}: right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
