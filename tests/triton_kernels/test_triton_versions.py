"""The Triton kernels under the oldest version that pyproject.toml allows.

That version is installed by pip into a folder of its own, before this environment's on the path of
a subprocess; where no index is reached, the tests say so and are skipped.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import facts
import native
import other_triton
import pytest
from servers import interpreted

pytestmark = interpreted()

# What Triton 3.6 was made for: its interpreter makes an int of an array, which numpy 2.4 refuses.
NUMPY = "numpy<2.4"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which a process imports the oldest Triton."""
    bounds = re.findall(r'"triton>=([\d.]+)', (native.ROOT / "pyproject.toml").read_text())
    assert len(set(bounds)) == 1
    cache = tmp_path_factory.mktemp("triton")
    own = other_triton.variables(bounds[0], NUMPY)
    return {**own, "TRITON_CACHE_DIR": str(cache), "EXPECTED": bounds[0]}


def test_the_oldest_version_interprets(oldest: dict[str, str]) -> None:
    """Draws, the smallest cases of the table and all dtypes and methods of one case."""
    chosen = (
        "golden_blocks or test_case_table and (1x64x128 or 5x33x8 or 12x16x140-7 or misaligned)"
        " or every_dtype_and_method and case0 or prepared"
    )
    command: list[str | Path] = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen,
        *(Path(__file__).with_name(f"test_triton_{name}.py") for name in ("values", "mask_stream")),
    ]  # fmt: skip
    printed = native.run(command, variables={**oldest, "TRITON_INTERPRET": "1"})
    passed = re.search(r"(\d+) passed", printed)
    assert passed, printed
    assert int(passed[1]) >= 15, printed
    assert "skipped" not in printed


def test_the_oldest_version_compiles(oldest: dict[str, str]) -> None:
    """Every 13th of the kernels that ship, all kinds and architectures among them."""
    command = [sys.executable, "tools/triton_facts.py", "--print", "--every", "13"]
    printed = native.run(command, variables={**oldest, "TRITON_INTERPRET": "0"})
    found = facts.parse(printed[printed.index("{") :])
    assert found.compiler.startswith(f"Triton {oldest['EXPECTED']}")
    assert {k["kernel"] for k in found.kernels} == {"expand", "grad_s", "grad_B"}
    assert {k["arch"] for k in found.kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    # its ptxas keeps two to four registers of 6 of all 288 kernels in local memory
    assert [k for k in found.kernels if k["local_bytes"] > 16] == []
    for kernel in found.chosen(kernel="expand"):
        assert all("128" in store or "x4" in store for store in kernel["stores"]), kernel
