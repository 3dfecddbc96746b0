"""``pytest benchmarks/ [--quick]``: every row a test, and the table of targets at the end."""

from __future__ import annotations

import pytest

from lora_ortho import backends

from . import record, tasks
from .bench import Bench
from .table import targets

_RESULT = pytest.StashKey[record.Result]()
_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption(
        "--quick", action="store_true",
        help="short rounds; no torch.compile, no scaling, no language model",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """What all tests of a run share: whose kernels, and the result that they fill."""
    quick = bool(config.getoption("--quick", default=False))
    bench = Bench.of("cpu", compiled=not quick)
    config.stash[_BENCH], config.stash[_RESULT] = bench, record.empty(bench.device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every task of a run; those that pytest-benchmark times too in a test of their own."""
    if "task" not in metafunc.fixturenames:
        return
    timed = "benchmark" in metafunc.fixturenames
    quick = bool(metafunc.config.getoption("--quick"))
    chosen = [
        task
        for task in tasks.choose(metafunc.config.stash[_BENCH], quick)
        if (task.section in ("forward", "backward")) == timed
    ]
    metafunc.parametrize("task", chosen, ids=lambda task: str(task).replace(" ", "-"))


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    reason = backends.available()["cpu"]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """Whose kernels are measured."""
    return request.config.stash[_BENCH]


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether --quick was given."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def result(request: pytest.FixtureRequest) -> record.Result:
    """What was measured so far."""
    return request.config.stash[_RESULT]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the targets, met, missed or not measured."""
    found = config.stash.get(_RESULT, None)
    if found is not None and any(found[section] for section in record.SECTIONS):
        terminalreporter.section("targets")
        terminalreporter.write_line(targets(found))
