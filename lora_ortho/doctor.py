"""Which backends work on this machine, why others do not, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_ortho import backends, fused_ortho_lora, mask_stream
from lora_ortho.backends import cpu
from lora_ortho.messages import one_line

# MASK_STREAM.md, "Known answers": draws of row 0, columns 0 to 9.
KNOWN_SEED = 0x0123456789ABCDEF
KNOWN_DRAWS = (6177, 62576, 32269, 38036, 39227, 2939, 49830, 720, 14368, 29961)
_HALVES = tuple(int(u >= 1 << 15) for u in KNOWN_DRAWS)  # owners for p = (1/2, 1/2)

# Distribution, module, and what it is good for here.
PACKAGES = (
    ("torch", "torch", "required"),
    ("safetensors", "safetensors", "required"),
    ("triton", "triton", "the triton backend"),
    ("peft", "peft", "attach to PEFT models"),
    ("transformers", "transformers", "lora-ortho merge on language models"),
    ("diffusers", "diffusers", "lora-ortho merge on image pipelines, FLUX and sgm key names"),
    ("accelerate", "accelerate", "loading large models"),
    ("matplotlib", "matplotlib", "pictures: lora-ortho inspect --plot, the demo"),
    ("tomli", "tomli", "lora-ortho merge on Python 3.10"),
    ("mergekit", "mergekit", "lora_ortho.plugins.mergekit"),
    ("fusion-bench", "fusion_bench", "lora_ortho.plugins.fusion_bench"),
)
# What to do about a backend that does not work, by the first pattern found in its reason; and what
# where torch is a build for CPUs, on which no package beside it helps.
_REINSTALL = "then pip install again"
_NVCC = f"install the CUDA toolkit (nvcc), {_REINSTALL}"
_OTHER_TORCH = (
    "a machine with a GPU, and a build of torch with CUDA or ROCm (this one has neither), which "
    "brings Triton"
)
_ADVICE: tuple[tuple[str, str, str | None], ...] = (
    ("broken installation", "uninstall lora_ortho and install it again", None),
    ("without its compiled", f"install a C++17 compiler and CMake, {_REINSTALL}", None),
    ("this version of lora_ortho has no", "install a newer lora_ortho", None),
    ("triton cannot be imported", "pip install triton", _OTHER_TORCH),
    (
        "triton .* is older than",
        "install a newer torch: its builds for GPUs bring their Triton",
        None,
    ),
    ("(?i)built without|without cuda|nvcc", _NVCC, f"{_OTHER_TORCH}; there, {_NVCC}"),
    (
        "(?i)driver",
        "install or update the NVIDIA driver; nvidia-smi must list a device",
        _OTHER_TORCH,
    ),
    (
        "(?i)gpu|cuda|device",
        "an NVIDIA GPU that torch sees (torch.cuda.is_available())",
        _OTHER_TORCH,
    ),
)


@dataclass(frozen=True)
class Package:
    """One distribution: its version here, or None, and what it is for."""

    name: str
    version: str | None
    purpose: str


@dataclass(frozen=True)
class Backend:
    """One backend.

    Attributes:
        name: as in `backend=`.
        reason: why it does not work here; None where it does.
        advice: what to do about that.
        check: what its self-check found: "ok", what went wrong, or None where it cannot run.
    """

    name: str
    reason: str | None
    advice: str | None
    check: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All that `diagnose` found.

    Attributes:
        system: facts by name, for display.
        packages, backends: in a fixed order.
        instruction_sets: of the CPU kernels, weakest first; the one in use is `instruction_set`.
        openmp: the OpenMP libraries loaded in this process.
        warnings: what works, but not as well as it could.
        healthy: every backend that works here passed its self-check.
    """

    system: dict[str, str]
    packages: tuple[Package, ...]
    backends: tuple[Backend, ...]
    instruction_sets: tuple[str, ...]
    instruction_set: str | None
    openmp: tuple[str, ...]
    warnings: tuple[str, ...]
    healthy: bool


def diagnose() -> Diagnosis:
    """Looks at this process and machine, and runs each backend that works on a tiny problem."""
    found = tuple(_backend(name) for name in backends.names())
    sets = cpu.instruction_sets()
    chosen = os.environ.get(cpu.ISA_VARIABLE, "auto")
    in_use = (sets[-1] if chosen == "auto" else chosen) if sets else None
    openmp = loaded_openmp()
    return Diagnosis(
        _system(),
        tuple(Package(name, _version(name, module), use) for name, module, use in PACKAGES),
        found,
        tuple(sets),
        in_use,
        openmp,
        tuple(_warnings(sets, chosen, openmp)),
        all(backend.check in ("ok", None) for backend in found),
    )


def self_check(name: str) -> str:
    """Runs a backend on ten elements whose owners MASK_STREAM.md gives; "ok" or what was wrong.

    With x = 1, A_j = 1, B_j = j + 1 and p = (1/2, 1/2), an element is twice the number of its
    owner. The output and the gradient of each B are compared.
    """
    on_gpu = "cuda" in (backends.get(name).devices or ()) and torch.cuda.is_available()
    one = torch.ones(1, 1, device="cuda" if on_gpu else "cpu")
    lora_B = [one.new_full((len(_HALVES), 1), j + 1.0).requires_grad_() for j in range(2)]
    try:
        y = fused_ortho_lora(one, [one, one], lora_B, seed=KNOWN_SEED, backend=name)
        grads = torch.autograd.grad(y.sum(), lora_B)
    except Exception as error:  # whatever it is, it is what this check is for
        return f"{type(error).__name__}: {one_line(error)}"
    wanted = [2.0 * (owner + 1) for owner in _HALVES]
    if y.flatten().tolist() != wanted:
        return f"wrong output: {y.flatten().tolist()}, expected {wanted}"
    for j, grad in enumerate(grads):
        if grad.flatten().tolist() != [2.0 * (owner == j) for owner in _HALVES]:
            return f"wrong gradient of lora_B[{j}]: {grad.flatten().tolist()}"
    return "ok"


def check_draws() -> str:
    """The mask stream in Python against the published numbers; "ok" or what was wrong."""
    drawn = mask_stream.draws(KNOWN_SEED, range(1), range(len(KNOWN_DRAWS)))[0].tolist()
    return "ok" if drawn == list(KNOWN_DRAWS) else f"drew {drawn}, expected {list(KNOWN_DRAWS)}"


def advice(reason: str, torch_for_gpus: bool) -> str:
    """What to do about a backend that does not work for this reason.

    Args:
        torch_for_gpus: torch is a build with CUDA or ROCm, whether or not there is a device.
    """
    for pattern, text, on_cpu_build in _ADVICE:
        if re.search(pattern, reason):
            return text if torch_for_gpus or on_cpu_build is None else on_cpu_build
    return "see README.md"


def loaded_openmp(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """Paths of the OpenMP runtimes loaded in this process; none where the system does not say."""
    try:
        text = maps.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(sorted(set(re.findall(r"(/\S*lib(?:gomp|omp|iomp5)[-.\w]*\.so\S*)", text))))


def _backend(name: str) -> Backend:
    try:
        reason: str | None = backends.get(name).unavailable()
    except Exception as error:  # parts of different versions
        reason = f"broken installation: {type(error).__name__}: {error}"
    if reason is not None:
        for_gpus = bool(torch.version.cuda or torch.version.hip)
        return Backend(name, reason, advice(reason, for_gpus), None)
    check = self_check(name)
    if name == "reference" and check == "ok":
        check = check_draws()
    return Backend(name, None, None, check)


def _version(distribution: str, module: str) -> str | None:
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return None
    try:
        # What torch itself says names the build: "2.13.0+cu130" where the package is "2.13.0".
        return torch.__version__ if module == "torch" else importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _system() -> dict[str, str]:
    facts = {
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    else:
        built = torch.version.cuda or torch.version.hip
        kind = f"torch is built for {built}, and finds no device" if built else "torch has no CUDA"
        facts["gpu"] = f"none ({kind})"
    return facts


def _warnings(sets: list[str], chosen: str, openmp: tuple[str, ...]) -> list[str]:
    warnings = []
    if sets and chosen not in ("auto", *sets):
        warnings.append(f"{cpu.ISA_VARIABLE}={chosen} is not one of auto, {', '.join(sets)}")
    elif sets and chosen not in ("auto", sets[-1]):
        warnings.append(f"{cpu.ISA_VARIABLE}={chosen} holds the CPU kernels below {sets[-1]}")
    if len(openmp) > 1:
        warnings.append(
            f"{len(openmp)} OpenMP runtimes are loaded and will compete for the cores: "
            f"{', '.join(openmp)}; import torch before other libraries that bring one"
        )
    if sys.version_info < (3, 11) and importlib.util.find_spec("tomli") is None:
        warnings.append("lora-ortho merge needs tomli on Python 3.10 (pip install tomli)")
    return warnings
