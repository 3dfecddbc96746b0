"""The benchmark harness: contenders are checked before they are timed, result files kept whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    checks,
    compare,
    floors,
    gpu,
    instructions,
    peers,
    record,
    rule,
    run,
    scaling,
    sections,
    tasks,
)
from benchmarks.bench import Bench
from benchmarks.cases import DTYPES, TINY_CASES, Case, Inputs, make
from benchmarks.device import Host, Rehearsal, Stopwatch
from benchmarks.harness import Effort, measure
from benchmarks.run import main
from benchmarks.table import update

ROOT = Path(__file__).resolve().parents[2]
SMALL = Case(24, 64, 160, 3, 4)
BRIEF = Effort(0.0, round_seconds=1e-6, least=1, tries=1)
BENCH = Bench("cpu", Host(), compiled=False)


def test_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no table here")
    with pytest.raises(record.ResultError, match="mark"):
        update(page)
    assert page.read_text() == "no table here"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contender_computes_what_it_should(dtype: str) -> None:
    rows = [
        sections.forward(BENCH, SMALL, dtype, BRIEF),
        sections.backward(BENCH, SMALL, dtype, BRIEF),
        sections.slow_peers(BENCH, SMALL, dtype, BRIEF),
        sections.expand(BENCH, SMALL, dtype, BRIEF),
        sections.samples(BENCH, SMALL, dtype, BRIEF),
        sections.scaling(BENCH, SMALL, dtype, BRIEF, "K"),
    ]
    if peers.missing("peft") is None:
        rows.append(sections.layer(BENCH, SMALL, dtype, BRIEF))
    for row in rows:
        assert row["refused"] == {}
        assert row["ratios"]


def test_torchs_own_gradients_are_right_where_sums_are_long() -> None:
    """Of 4096 terms a sum: how far off it is differs between processors, ours and torch's."""
    row = sections.backward(BENCH, Case(4096, 640, 640, 2, 32), "float32", BRIEF)
    assert row["refused"] == {}
    assert set(row["seconds"]) == {"ours", "direct"}


def _one_element_off(inputs: Inputs, backend: str, samples: int = 1) -> peers.Forward:
    """Ours, but for one element, which another adapter owns."""
    call, masks = _RIGHT(inputs, backend, samples), checks.orthogonal(inputs.case)
    rolled = masks.masks[1:] + masks.masks[:1]
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, masks.gains, rolled, inputs.base)
    other = rule.formula(*tensors)

    def wrong() -> Tensor:
        y = call()
        at = divmod(int((y - other).abs().flatten().argsort()[y.numel() // 2]), y.shape[1])
        y[at] = other[at]  # half of all elements would change by less
        return y

    return wrong


_RIGHT = peers.ours


def test_a_wrong_result_is_refused_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "ours", _one_element_off)
    row = sections.forward(BENCH, SMALL, "float32", BRIEF)
    assert "wrong result" in row["refused"]["ours"]
    assert "ours" not in row["seconds"]
    assert row["ratios"] == {}
    words = ["--backend", "cpu", "--quick", "--case", str(SMALL), "--dtype", "float32"]
    assert main([*words, "--only", "forward"]) == 1
    assert "wrong result" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(1, 6))
def test_a_wrong_gradient_is_refused(dtype: str, which: int) -> None:
    """One element of dx, dbase, dA and dB taken with the other sign; as they are, they pass."""
    inputs, masks = make(SMALL, DTYPES[dtype]), checks.orthogonal(SMALL)
    found = [tensor.detach().clone() for tensor in peers.ours_training(inputs, "cpu")()]
    checks.check_training(found, inputs, masks, joined=False)
    flat = found[which].flatten()
    at = int(flat.abs().argsort()[flat.numel() // 2])
    flat[at] *= -1
    found[which] = flat.view_as(found[which])
    with pytest.raises(checks.WrongResult):
        checks.check_training(found, inputs, masks, joined=False)


def test_a_row_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr(sections, "forward", broken)
    todo = tasks.choose(BENCH, True, ["forward", "backward"], [SMALL], ["float32"])
    result = run.run(list(todo), BENCH, quick=True, quiet=True)
    assert result["forward"][0]["refused"] == {"row": "failed: RuntimeError: out of order"}
    assert result["backward"][0]["ratios"]
    assert len(run.failures(result)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_another_seed_are_noticed(dtype: str) -> None:
    inputs, masks = make(SMALL, DTYPES[dtype]), checks.orthogonal(SMALL)
    inputs = inputs.__class__(**{**vars(inputs), "seed": 1})
    with torch.no_grad(), pytest.raises(checks.WrongResult):
        checks.check_forward(peers.ours(inputs, "cpu")(), inputs, masks)


def test_unequal_shares_are_noticed() -> None:
    inputs = make(SMALL, torch.float32)
    x, A, B = inputs.x, inputs.lora_A, inputs.lora_B
    with pytest.raises(checks.WrongResult, match="shares"):
        checks.check_random(inputs.base + 3 * (x @ A[0].T @ B[0].T), inputs)


def test_result_files_join_only_when_of_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    row = {"case": str(SMALL), "dtype": "float32", "backend": "cpu", "ratios": {}}
    old = record.empty()
    old["forward"] = [row, {**row, "dtype": "bfloat16"}]
    record.save(old, path)
    new = record.empty()
    new["forward"] = [{**row, "others": 0.5}]
    joined = record.join(record.load(path), new)
    assert joined["forward"] == [new["forward"][0], old["forward"][1]]
    new["versions"] = {**new["versions"], "torch": "0"}
    with pytest.raises(record.ResultError, match="versions"):
        record.join(record.load(path), new)
    path.write_text('{"schema": 0}')
    with pytest.raises(record.ResultError, match="schema"):
        record.load(path)


def test_files_of_schema_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    old = {"schema": 1, "kind": "cpu-x", "machine": {}, "versions": {}}
    sections_of_1 = ("forward", "backward", "peers", "layer", "memory", "threads", "overhead")
    row = {"case": str(SMALL), "dtype": "float32"}
    path.write_text(json.dumps(old | {name: [row] for name in sections_of_1}))
    found = record.load(path)
    assert found["forward"] == [{"backend": "cpu", **row}]
    assert found["scaling"] == []
    path.write_text(json.dumps(old))
    with pytest.raises(record.ResultError, match="lacks forward"):
        record.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "1x2"],
        ["--append"],
        ["--only", "nothing"],
        ["--save", "--json", "x.json"],
        ["--budget", "0"],
        ["--plot", "x.txt"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_figures_of_a_new_kind_of_machine(tmp_path: Path) -> None:
    """Run, save, compare and draw where no result of this machine lies yet, as processes."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.rmtree(tmp_path / "benchmarks" / "results")

    def python(status: int, module: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *words], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    short = ["--quick", "--case", str(SMALL), "--dtype", "float32", "--only", "forward"]
    kind = record.empty()["kind"]
    hint = f"no figures of this kind of machine are recorded yet ({kind}): "
    shown = python(0, "benchmarks", *short)
    assert f"{hint}run `lora-ortho bench --json {kind}.json` and add the file" in shown
    assert "--save is for a source checkout" in python(2, "benchmarks", *short, "--save")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir()
    assert f"{hint}`python -m benchmarks --save` writes" in python(0, "benchmarks", *short)
    assert hint not in python(0, "benchmarks", *short, "--save")
    saved = results / f"{kind}.json"
    assert record.load(saved)["kind"] == kind
    missing = "benchmarks/results/cpu-other.json"
    shown = python(2, "benchmarks.compare", missing, str(saved))
    assert f"{missing}: there is no such file; on a machine of that kind, `python -m" in shown
    page = tmp_path / "page.md"
    lines = "<!-- benchmark table: {} -->\n<!-- end of benchmark table -->\n"
    page.write_text(lines.format(missing))
    assert "there is no such file" in python(1, "benchmarks.figures", str(page))
    assert page.read_text() == lines.format(missing)
    page.write_text(lines.format(f"benchmarks/results/{kind}.json"))
    assert "not on that page" not in python(0, "benchmarks.figures", str(page))
    assert "| forward ÷ direct, geometric mean |" in page.read_text()
    shutil.copy(saved, tmp_path / missing)
    assert "not on that page: cpu-other.json" in python(0, "benchmarks.figures", str(page))


def test_existing_file_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.svg"
    path.write_text("mine")
    assert main(["--json", str(path)]) == 1
    assert main(["--plot", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" exists; ")[2] for line in lines] == [
        "--append adds to it, --force replaces it", "--force replaces it",
    ]  # fmt: skip
    assert path.read_text() == "mine"


def test_outputs_are_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the targets' cases would take minutes; a status of 1 comes at once."""
    other = tmp_path / "other.json"
    record.save({**record.empty(), "kind": "cpu-other"}, other)
    start = time.monotonic()
    assert main(["--json", str(other), "--append"]) == 1
    assert main(["--only", "memory", "--plot", str(tmp_path / "x.svg")]) == 1
    assert time.monotonic() - start < 10
    first, second = capsys.readouterr().err.splitlines()
    assert "the results differ in kind: cpu-other" in first
    assert "neither is measured" in second
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_plot_of_one_disturbed_row(tmp_path: Path) -> None:
    """Its upper quartile is ten times its median."""
    figures = pytest.importorskip("benchmarks.figures", reason="needs matplotlib")
    q = {"median": 1.0, "q1": 0.9, "q3": 10.0, "count": 3}
    row = {"case": str(SMALL), "dtype": "float32", "backend": "cpu", "ratios": {"ours/direct": q}}
    result = record.empty()
    result["kind"], result["forward"] = "cpu-here", [row]
    figures.plot(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_backend_that_does_not_work_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["--backend", "cuda"]) == 1
    assert "backend cuda does not work here" in capsys.readouterr().err


def test_json_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--quiet", "--case", str(SMALL), "--dtype", "float32"]
    assert main([*words, "--only", "forward", "--only", "ceilings", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["forward"][0]["seconds"]["ours"]["median"] > 0
    assert result["ceilings"][0]["copy_bytes_per_second"] > 1e6


class Scripted(Stopwatch):
    """A clock that says what it is told."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__([lambda: None])
        self._left = iter(seconds)

    def __call__(self, rotations: int) -> float:
        return next(self._left)


def test_ratios_are_taken_round_by_round() -> None:
    watches = {
        "a": Scripted([1.0, 2.0, 4.0, 9.0]),
        "b": Scripted([1.0, 1.0, 4.0, 3.0]),
    }
    times = measure(watches, Effort(0.0, round_seconds=1e-9, least=3, tries=1))
    assert times.ratio("a", "b").median == 2.0  # of 2, 1, 3; that of the medians would be 4/3
    assert times.of("a").median == 4.0


def test_work_is_counted() -> None:
    case = Case(2, 3, 5, 2, 1)
    #      x  A and B   base, y      products of s, then one of the owner's per element
    assert floors.forward(case, "float32") == (4 * (6 + 16 + 20), 2 * (2 * 3 * 2 + 2 * 5))
    assert floors.expand(case, "bfloat16") == (2 * (4 + 10 + 20), 2 * 10)
    backward = floors.backward(case, "float32")
    assert backward.bytes == 4 * (6 + 16 + 20) + 4 * (2 * 6 + 2 * 16 + 10)
    slow = {"copy_bytes_per_second": 84.0, "matmul_operations_per_second": 1e9}
    assert floors.forward(case, "float32").seconds(slow) == 2.0


def test_exponents_and_late_surprises() -> None:
    straight = scaling.fit({n: 3e-6 * n for n in (64, 256, 1024)})
    assert math.isclose(straight.exponent, 1.0, abs_tol=1e-6)
    assert not straight.above(1.2)
    assert scaling.fit({n: 1e-9 * n * n for n in (2, 4, 8)}).above(1.2)
    late = scaling.fit({1: 1.0, 10: 10.0, 100: 100.0, 200: 400.0})
    assert late.exponent < 1.2 < late.last
    assert late.above(1.2)
    with pytest.raises(ValueError, match="two sizes"):
        scaling.fit({4: 1.0})


def test_instructions_are_read_from_the_tables(tmp_path: Path) -> None:
    (tmp_path / "triton_kernels.md").write_text(
        "| kernel | dtype | method | K × r | sm_80 | sm_90 |\n"
        "| --- | --- | --- | --- | ---: | ---: |\n"
        "| grad_s | bfloat16 | orthogonal | 3 × 16 | 90, 40.0 | 90, 41.0 |\n"
        "| forward | bfloat16 | orthogonal | 3 × 16 | 80, 22.5 | 96, 23.5 |\n"
    )
    (tmp_path / "cuda_kernels.md").write_text(
        "| expand | 1 | less |\n|---|---|---|\n| bfloat16, sm_90a | 13.8 | 15.8 |\n"
    )
    assert instructions.per_element("triton", "9.0", "bfloat16", tmp_path) == 23.5
    assert instructions.per_element("cuda", "9.0", "bfloat16", tmp_path) == 13.8
    assert instructions.per_element("cuda", "7.0", "bfloat16", tmp_path) is None
    assert instructions.per_element("triton", "9.0", "float32", tmp_path) is None
    assert instructions.per_element("reference", "9.0", "bfloat16", tmp_path) is None
    card = {"clock_mhz": 1000, "multiprocessors": 100}
    assert instructions.bound(card, 12.8) == 1e12
    assert instructions.bound({**card, "clock_mhz": "unknown"}, 12.8) is None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_tables_of_this_project_are_read(backend: str) -> None:
    found = instructions.per_element(backend, "9.0", "bfloat16")
    assert found is not None
    assert 5 < found < 60


def _measured(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.json"
    words = ["--quick", "--quiet", "--case", "256x512x512-3x16", "--dtype", "float32"]
    assert main([*words, "--backend", "cpu", "--only", "forward", "--json", str(path)]) == 0
    return path


def test_a_slower_kernel_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that does its work four times; and files that differ by just 20 %."""
    old = _measured(tmp_path, "old")
    assert compare.main([str(old), str(old)]) == 0

    def four_times(inputs: Inputs, backend: str, samples: int = 1) -> peers.Forward:
        call = _RIGHT(inputs, backend, samples)
        return lambda: [call() for _ in range(4)][-1]

    monkeypatch.setattr(peers, "ours", four_times)
    new = _measured(tmp_path, "new")
    capsys.readouterr()
    assert compare.main([str(old), str(new), "--beyond", "1.3"]) == 1
    assert "WORSE" in capsys.readouterr().out
    result = record.load(old)
    result["forward"][0]["ratios"]["ours/direct"]["median"] *= 1.2
    record.save(result, new)
    assert compare.main([str(old), str(new), "--beyond", "1.1"]) == 1
    assert compare.main([str(old), str(new), "--beyond", "1.3"]) == 0
    assert compare.main([str(new), str(old), "--beyond", "1.1"]) == 0  # better
    assert "better" in capsys.readouterr().out


def test_rows_that_are_gone_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    q = {"median": 1.0, "q1": 0.9, "q3": 1.1, "count": 9}
    row = {"case": str(SMALL), "dtype": "float32", "backend": "cpu", "ratios": {"paper/ours": q}}
    full = record.empty()
    full["peers"] = [row]
    record.save(full, old)
    record.save({**full, "peers": []}, new)
    assert compare.main([str(old), str(new)]) == 1
    assert "no such row" in capsys.readouterr().out
    wrong = {**row, "ratios": {}, "refused": {"ours": "wrong result"}}
    record.save({**full, "peers": [wrong]}, new)
    assert compare.main([str(old), str(new)]) == 1
    record.save({**full, "kind": "cpu-other"}, new)
    assert compare.main([str(old), str(new)]) == 2
    with pytest.raises(SystemExit):
        compare.main([str(old), str(new), "--beyond", "0.9"])


def test_gpu_run_goes_through_rotating_buffers() -> None:
    bench = Bench("reference", Rehearsal(), compiled=False)
    row = sections.forward(bench, TINY_CASES[1], "bfloat16", BRIEF)
    assert row["refused"] == {}
    assert row["sets"] == 2
    assert set(row["launch"]) == {"ours", "direct"}


def test_rehearsal_of_the_gpu_run(tmp_path: Path) -> None:
    """The benchmark part, with every stage's outcome in a file that no one takes for a GPU's."""
    environment = {**os.environ, "LORA_ORTHO_GPU_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    path = tmp_path / "result.json"
    words = ["--quick", "--case", str(TINY_CASES[1]), "--backend", "reference", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words], cwd=ROOT, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "REHEARSAL" in done.stdout
    assert " met" not in done.stdout
    assert "missed" not in done.stdout
    result = record.load(path)
    assert result["kind"].startswith("rehearsal-")
    found = result["peers"][0]
    assert {"paper/ours", "stored mask/ours"} <= found["ratios"].keys()
    assert found["refused"].keys() <= {"vllm"}


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.stored_mask import _drop_and_shrink as kernel
types = dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), "*bf16") | {"mask_ptr": "*i8", "keep": "fp32"}
types |= dict.fromkeys(("seed", "tokens", "d_in", "rank", "rank_sum"), "i32")
constants = {"TOKENS": 32, "FEATURES": 64, "RANK": 16, "WIDE": False}
types |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=kernel, signature=types, constexprs=constants)
for arch in (80, 90):
    print(len(triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]))
"""


def test_stored_mask_compiles_for_gpus() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], cwd=ROOT, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


def test_a_stage_that_fails_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    stages = gpu.Run(rehearsal=False, total=60.0)
    python = sys.executable
    assert stages.stage("one", [python, "-c", "print('here')"], 30) == "here\n"
    assert stages.stage("two", [python, "-c", "raise SystemExit(3)"], 30) is None
    # a stage that does not end, with a process of its own that does not either
    held = "import subprocess; subprocess.run(['sleep', '60'])"
    assert stages.stage("three", [python, "-c", held], 1.0) is None
    stages.absent("four", "not here")
    assert stages.stage("five", [python, "-c", "print(5)"], 30) == "5\n"
    found = {outcome.name: outcome.status for outcome in stages.outcomes}
    assert found == {
        "one": "ok", "two": "failed", "three": "out of time", "four": "absent", "five": "ok",
    }  # fmt: skip
    assert [outcome.name for outcome in stages.outcomes if outcome.bad] == ["two", "three"]
    assert stages.outcomes[2].seconds < 10
    over = gpu.Run(rehearsal=False, total=-1.0)
    assert over.stage("late", [python, "-c", "print(1)"], 30) is None
    assert over.outcomes[0].status == "out of time"
    assert "three: out of time" in capsys.readouterr().err


def test_a_gpu_run_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.delenv(gpu.REHEARSAL, raising=False)
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    assert gpu.main(["--no-build", "--no-tests"]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_run_builds_for_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [gpu.architecture(text) for text in ("8.0", "9.0\n", "12.0", "[N/A]", "")]
    assert found == ["80-real", "90a-real", "120-real", None, None]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu.build_variables(False)["LORA_ORTHO_CUDA_ARCHITECTURES"] == "90a-real"
    assert gpu.build_variables(True)["LORA_ORTHO_CUDA"] == "0"


def test_environment_of_a_gpu_run_sees_this_one(tmp_path: Path) -> None:
    python = gpu.environment(tmp_path / "venv")
    code = "import sys, torch; print(sys.prefix); print(torch.__version__)"
    done = subprocess.run([python, "-c", code], text=True, capture_output=True, check=False)
    assert done.stdout.split() == [str(tmp_path / "venv"), torch.__version__], done.stderr
