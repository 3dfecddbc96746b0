"""On what the figures were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import lora_ortho
from lora_ortho.backends import cpu


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """Processor, cores, the kernels' instruction set."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "isa": instruction_set(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter; "absent" where one is not installed."""
    found = {"python": platform.python_version(), "lora_ortho": lora_ortho.__version__}
    for name in ("torch", "numpy", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def kind() -> str:
    """A name for machines of one kind, such as "cpu-x86_64-amx-2cores"."""
    return f"cpu-{platform.machine()}-{instruction_set()}-{cores()}cores"


def instruction_set() -> str:
    """The one that the kernels use here."""
    cap = os.environ.get(cpu.ISA_VARIABLE, "auto")
    return cap if cap != "auto" else (cpu.instruction_sets() or ["none"])[-1]


def _processor() -> str:
    """Its name, family, model and stepping where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    numbers = [f"{k} {fields[k]}" for k in ("cpu family", "model", "stepping") if k in fields]
    return ", ".join([fields.get("model name", "unknown"), *numbers])
