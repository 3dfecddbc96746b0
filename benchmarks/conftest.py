"""``--quick`` for ``pytest benchmarks/``."""

from __future__ import annotations

import pytest

from benchmarks.cases import CPU_CASES, DTYPES, MANY_ADAPTERS, ONE_TOKEN
from lora_ortho import backends

_QUICK = (ONE_TOKEN, CPU_CASES[2], MANY_ADAPTERS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--quick", action="store_true", help="three cases instead of all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with every dtype, one after the other."""
    if "case" in metafunc.fixturenames:
        cases = _QUICK if metafunc.config.getoption("--quick") else CPU_CASES
        pairs = [(case, dtype) for case in cases for dtype in DTYPES]
        names = [f"{case}-{dtype}" for case, dtype in pairs]
        metafunc.parametrize(("case", "dtype"), pairs, ids=names, scope="module")


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    reason = backends.available()["cpu"]
    if reason is not None:
        pytest.skip(reason)
