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
from .record import Gpu, Machine, Result


def empty_result(device: Device) -> Result:
    """A result of this machine without rows."""
    versions = {"python": platform.python_version(), "lora_ortho": lora_ortho.__version__}
    for name in ("torch", "numpy", "peft", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    gpu = _gpu(device) if device.label == "gpu" else None
    cores = _cores()
    isa = _instruction_set()
    machine = Machine(
        processor=_processor(),
        architecture=platform.machine(),
        isa=isa,
        cores=cores,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release().split('-')[0]}",
        gpu=gpu,
    )
    kind = f"{device.label}-{machine.architecture}-{isa}-{cores}cores"
    if gpu is not None:
        kind = "gpu-" + re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return Result(kind, machine, versions)


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instruction_set() -> str:
    """The one that the kernels use here."""
    cap = os.environ.get(cpu.ISA_VARIABLE, "auto")
    return cap if cap != "auto" else (cpu.instruction_sets() or ["none"])[-1]


def _gpu(device: Device) -> Gpu:
    found = torch.cuda.get_device_properties(device.torch_device)
    clock = _nvidia_smi("clocks.max.sm")
    return Gpu(
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        cache_bytes=int(getattr(found, "L2_cache_size", 0)),
        cuda=str(torch.version.cuda or torch.version.hip),
        driver=_nvidia_smi("driver_version"),
        clock_mhz=int(clock) if clock.isdigit() else None,
    )


def _nvidia_smi(name: str) -> str:
    """A property of the first GPU; "unknown" without the program, which only reads here."""
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
