"""On what the figures were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import lora_ortho
from lora_ortho.backends import cpu

from .device import Device


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: Device | None = None) -> dict[str, str | int]:
    """Processor, cores, the kernels' instruction set; a GPU's name and sizes."""
    return _gpu(device) | {
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
    for name in ("torch", "numpy", "peft", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def kind(device: Device | None = None) -> str:
    """A name for machines of one kind, such as "cpu-x86_64-amx-2cores" or "gpu-nvidia-h200"."""
    if device is not None and device.label == "gpu":
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", str(_gpu(device)["gpu"]).lower()).strip("-")
    label = "cpu" if device is None else device.label
    return f"{label}-{platform.machine()}-{instruction_set()}-{cores()}cores"


def instruction_set() -> str:
    """The one that the kernels use here."""
    cap = os.environ.get(cpu.ISA_VARIABLE, "auto")
    return cap if cap != "auto" else (cpu.instruction_sets() or ["none"])[-1]


def _gpu(device: Device | None) -> dict[str, str | int]:
    if device is None or device.label != "gpu":
        return {}
    found = torch.cuda.get_device_properties(device.torch_device)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "cache": int(getattr(found, "L2_cache_size", 0)),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "driver": _ask("driver_version"),
        "clock_mhz": int(clock) if (clock := _ask("clocks.max.sm")).isdigit() else "unknown",
    }


def _ask(name: str) -> str:
    """A property of the first GPU by nvidia-smi, which only reads here; "unknown" without it."""
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def _processor() -> str:
    """Its name, family, model and stepping where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    numbers = [f"{k} {fields[k]}" for k in ("cpu family", "model", "stepping") if k in fields]
    return ", ".join([fields.get("model name", "unknown"), *numbers])
