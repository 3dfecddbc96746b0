"""Programs built outside the tree from an install prefix; the wheel with and without compiler."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from installed import install, python
from native import ROOT, build, run

GOLDEN = ROOT / "tests" / "golden" / "mask_stream.kat"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cmake --install` of the release build, then moved: nothing may remember where it was."""
    folder = tmp_path_factory.mktemp("install")
    run(["cmake", "--install", build("release"), "--prefix", folder / "first"])
    return (folder / "first").rename(folder / "moved")


def libdir(prefix: Path) -> Path:
    """The folder of the installed libraries: lib, lib64 or a Debian triplet's."""
    (library,) = prefix.glob("lib*/**/liblora_ortho.a")
    return library.parent


def test_installed_files(prefix: Path) -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    libraries = libdir(prefix)
    major = version[1].split(".")[0]
    assert os.readlink(libraries / "liblora_ortho.so") == f"liblora_ortho.so.{major}"
    assert os.readlink(libraries / f"liblora_ortho.so.{major}") == f"liblora_ortho.so.{version[1]}"
    dynamic = run(["readelf", "-d", libraries / "liblora_ortho.so"])
    assert f"Library soname: [liblora_ortho.so.{major}]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    headers = {path.name for path in (prefix / "include" / "lora_ortho").iterdir()}
    assert headers == {"lora_ortho.h", "mask_stream.h", "cuda.h"}
    for text in [*prefix.rglob("*.cmake"), *prefix.rglob("*.pc")]:
        assert str(ROOT) not in text.read_text(encoding="utf-8")


@pytest.mark.parametrize("linkage", ["shared", "static"])
def test_c_consumer_with_cmake(linkage: str, prefix: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "examples" / "c_consumer", source)
    if linkage == "static":
        lists = source / "CMakeLists.txt"
        text = lists.read_text(encoding="utf-8")
        text = text.replace("lora_ortho::lora_ortho", "lora_ortho::static")
        lists.write_text(text.replace("LANGUAGES C)", "LANGUAGES C CXX)"), encoding="utf-8")
    folder = tmp_path / "build"
    run(["cmake", "-G", "Ninja", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}"])
    run(["cmake", "--build", folder])
    said = run([folder / "c_consumer", GOLDEN])
    assert re.search(r"^[1-9]\d+ known draws, 0 differ$", said, re.MULTILINE)
    assert "largest difference from the formula and stored values" in said
    linked = "liblora_ortho" in run(["readelf", "-d", folder / "c_consumer"])
    assert linked == (linkage == "shared")


def test_cmake_refuses_another_version(prefix: Path, tmp_path: Path) -> None:
    lists = (ROOT / "examples" / "c_consumer" / "CMakeLists.txt").read_text(encoding="utf-8")
    (tmp_path / "main.c").write_text("int main(void) { return 0; }\n", encoding="utf-8")
    text = lists.replace("find_package(lora_ortho 0.1", "find_package(lora_ortho 99.0")
    assert text != lists
    (tmp_path / "CMakeLists.txt").write_text(text, encoding="utf-8")
    where = ["-S", str(tmp_path), "-B", str(tmp_path / "b"), f"-DCMAKE_PREFIX_PATH={prefix}"]
    with pytest.raises(AssertionError, match=r"compatible with requested\s+version"):
        run(["cmake", *where])


def test_cpp_consumer_with_pkg_config(prefix: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("C++ consumer: pkg-config is not installed")
    libraries = libdir(prefix)
    where = {"PKG_CONFIG_PATH": str(libraries / "pkgconfig")}
    flags = run(["pkg-config", "--cflags", "--libs", "lora_ortho"], variables=where).split()
    assert f"-I{prefix}/" in " ".join(flags)
    program, source = tmp_path / "cpp_consumer", ROOT / "examples" / "cpp_consumer" / "main.cpp"
    run(["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", source, *flags, "-o", program])
    said = run([program, GOLDEN], variables={"LD_LIBRARY_PATH": str(libraries)})
    assert re.search(r"^[1-9]\d* known blocks of draws, 0 differ$", said, re.MULTILINE)
    assert "gradient of the gains and stored values" in said


def test_python_consumer_with_ctypes(prefix: Path) -> None:
    program = ROOT / "examples" / "python_consumer" / "merge.py"
    assert "import torch" not in program.read_text(encoding="utf-8")
    said = run([sys.executable, program, libdir(prefix) / "liblora_ortho.so", GOLDEN])
    assert re.search(r"^[1-9]\d+ known draws agree$", said, re.MULTILINE)
    assert "from NumPy" in said


def test_static_consumer_of_a_library_with_cuda(tmp_path: Path) -> None:
    """find_package brings the static CUDA runtime; without a GPU the CPU half works on."""
    if shutil.which("nvcc") is None:
        pytest.skip("a library with CUDA kernels: nvcc is not installed")
    run(["cmake", "--install", build("cuda"), "--prefix", tmp_path / "prefix"])
    source = tmp_path / "source"
    shutil.copytree(ROOT / "examples" / "c_consumer", source)
    lists = source / "CMakeLists.txt"
    text = lists.read_text(encoding="utf-8").replace("LANGUAGES C)", "LANGUAGES C CXX)")
    lists.write_text(text.replace("lora_ortho::lora_ortho", "lora_ortho::static"), encoding="utf-8")
    where = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    run(["cmake", "-G", "Ninja", "-S", source, "-B", tmp_path / "build", where])
    run(["cmake", "--build", tmp_path / "build"])
    said = run([tmp_path / "build" / "c_consumer", GOLDEN])
    assert "largest difference from the formula and stored values" in said


# ---- the Python package


MERGE = """
import torch
A, B, x = [torch.randn(2, 6)] * 2, [torch.randn(5, 2)] * 2, torch.randn(3, 6)
y = lora_ortho.fused_ortho_lora(x, A, B, seed=1)
print("reference differs by", float((y - lora_ortho.fused_ortho_lora(
    x, A, B, seed=1, backend="reference")).abs().max()) > 1e-5)
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    variables = {"CC": "/bin/false", "CXX": "/bin/false", "LORA_ORTHO_REQUIRE_NATIVE": "0"}
    variables["LORA_ORTHO_CUDA"] = "0"
    target = install(tmp_path, variables)
    output = (tmp_path / "output").read_text(encoding="utf-8")
    assert "WARNING: lora_ortho is installed WITHOUT its compiled CPU kernels" in output
    assert re.search(r"Reason: cmake ended with status 1: .*(?i:error)", output)
    said = python(target, "print(lora_ortho.backends.available()['cpu'])" + MERGE)
    # The warning on import, then the reason.
    assert re.search(r"(?s)RuntimeWarning: .*reference backend stands in.*\n", said)
    assert len(re.findall(r"not built: cmake ended with status 1", said)) == 2
    assert "reference differs by False" in said


def test_without_a_compiler_where_it_is_required(tmp_path: Path) -> None:
    variables = {"CC": "/bin/false", "CXX": "/bin/false", "LORA_ORTHO_REQUIRE_NATIVE": "1"}
    variables["LORA_ORTHO_CUDA"] = "0"
    with pytest.raises(AssertionError, match="NativeBuildError: cmake ended with status 1"):
        install(tmp_path, variables)


def test_a_broken_nvcc_does_not_stop_the_build(tmp_path: Path) -> None:
    """The build goes on without CUDA; here it then ends for want of a C++ compiler."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "nvcc").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    broken = {"CC": "/bin/false", "CXX": "/bin/false", "CUDACXX": "", "PATH": path}
    install(tmp_path, {**broken, "LORA_ORTHO_CUDA": "", "LORA_ORTHO_REQUIRE_NATIVE": "0"})
    output = (tmp_path / "output").read_text(encoding="utf-8")
    assert "WARNING: building without CUDA kernels, since cmake ended with status 1" in output
    assert "WARNING: lora_ortho is installed WITHOUT its compiled CPU kernels" in output


def test_wheel(tmp_path: Path) -> None:
    """With CUDA kernels for one architecture where nvcc is; they need neither GPU nor libcudart."""
    cuda = shutil.which("nvcc") is not None
    print("CUDA kernels in the wheel:", "compiled" if cuda else "left out, nvcc is not installed")
    chosen = {"LORA_ORTHO_CUDA": "1" if cuda else "0", "LORA_ORTHO_CUDA_ARCHITECTURES": "90-real"}
    target = install(tmp_path, {"LORA_ORTHO_REQUIRE_NATIVE": "1", **chosen})
    assert (target / "lora_ortho" / "py.typed").exists()
    assert not (target / "lora_ortho" / "_C.py").exists()
    (extension,) = (target / "lora_ortho").glob("_C.*.so")
    dynamic = run(["readelf", "-d", extension])
    assert "PATH" not in dynamic
    assert "liblora_ortho" not in dynamic
    assert "libcuda" not in dynamic
    code = """
import lora_ortho.benchmarks
import lora_ortho.triton_kernels
from lora_ortho import _C
for module in (lora_ortho.benchmarks, lora_ortho.triton_kernels, _C):
    assert module.__file__.startswith(sys.path[0]), module.__file__
assert lora_ortho.backends.available()["cpu"] is None
words = ["--quick", "--case", "16x64x96-2x4", "--dtype", "float32", "--only", "forward"]
assert lora_ortho.benchmarks.main(words + ["--only", "memory"]) == 0
assert lora_ortho.__version__ == _C.version() == VERSION, (lora_ortho.__version__, _C.version())
maps = open("/proc/self/maps").read().split()
print("cuda:", lora_ortho.backends.available()["cuda"])
print("libgomp:", len({word for word in maps if "libgomp" in word}))
"""
    (metadata,) = target.glob("lora_ortho-*.dist-info")
    version = metadata.name.removeprefix("lora_ortho-").removesuffix(".dist-info")
    said = python(target, code.replace("VERSION", repr(version)) + MERGE)
    assert "libgomp: 1\n" in said
    reasons = (
        ["None", "no NVIDIA GPU, or no driver for one"] if cuda else ["built without its CUDA"]
    )
    assert any(reason in said for reason in reasons)
    assert "reference differs by False" in said
