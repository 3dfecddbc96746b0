"""The README's tables and pictures are what the committed result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import floors, pictures, record
from benchmarks.cases import CPU_CASES, DTYPES, GPU_CASES, TINY_CASES
from benchmarks.table import blocks, report, update
from benchmarks.targets import View, targets_of, views

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RENEW = "run: make figures"


def _results() -> list[tuple[Path, record.Result]]:
    paths, _ = blocks(README.read_text(encoding="utf-8"))
    return [(path, record.load(ROOT / path)) for path in paths]


def test_readme_tables_agree_with_their_result_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert blocks(text)[1] == text, RENEW


def test_pictures_agree_with_their_result_files() -> None:
    wanted = {
        pictures.path_of(result, name, theme): pictures.digest(data)
        for _, result in _results()
        for name, data in pictures.present(result).items()
        for theme in pictures.THEMES
    }
    found = {}
    for path in (ROOT / pictures.IMAGES).glob("bench_*"):
        hashes = re.findall(r">data ([0-9a-f]{64})<", path.read_text(encoding="utf-8"))
        found[path.relative_to(ROOT)] = hashes[0] if hashes else "no hash"
    assert found == wanted, RENEW


def test_committed_result_is_whole() -> None:
    for path, result in _results():
        assert path.stem == result["kind"]
        if not result["kind"].startswith("cpu"):
            continue
        for dtype in DTYPES:
            view = View(result, dtype, "cpu")
            for section in ("forward", "backward"):
                for case in CPU_CASES:
                    assert view.ratio(section, case, "ours/direct") > 0
            for target in targets_of(result):
                if dtype in target.dtypes:
                    assert target.value(view) >= 0


def test_another_figure_changes_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = README.read_text(encoding="utf-8")
    path, result = _results()[0]
    before = pictures.present(result)["ratio"]
    changed = json.loads(json.dumps(result))
    changed["forward"][0]["ratios"]["ours/direct"]["median"] *= 1.2
    assert pictures.digest(pictures.present(changed)["ratio"]) != pictures.digest(before)
    copy = tmp_path / path
    record.save(changed, copy)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    page = tmp_path / "README.md"
    block = text[text.index("<!-- benchmark table") : text.index("<!-- end of benchmark table")]
    page.write_text(f"before\n\n{block}<!-- end of benchmark table -->\n\nafter\n")
    _, wanted = blocks(page.read_text(encoding="utf-8"))
    assert wanted != page.read_text(encoding="utf-8")
    update(page)
    assert page.read_text(encoding="utf-8") == wanted
    assert wanted.startswith("before\n")
    assert wanted.endswith("\nafter\n")


def _point(case: str, seconds: float, **more: object) -> record.Row:
    times = {"median": seconds, "q1": seconds, "q3": seconds, "count": 9}
    row = {"case": case, "dtype": "float32", "backend": "cpu", "others": 0.0}
    ratio = {**times, "median": seconds / 2}
    found = {"seconds": {"ours": times, "direct": {**times, "median": 2.0}, "paper": times}}
    return {**row, **found, "ratios": {"ours/direct": ratio}, **more}


def synthetic() -> record.Result:
    """A result with something of everything, and a quadratic surprise in K."""
    result = record.empty()
    result["kind"] = "cpu-synthetic"
    work = {"bytes": 1000, "operations": 4000}
    result["forward"] = [_point(str(case), 1.0 + j, **work) for j, case in enumerate(CPU_CASES)]
    head = {"case": "1x1x1-1x1", "dtype": "float32", "backend": "cpu"}
    rates = {"copy_bytes_per_second": 1e3, "matmul_operations_per_second": 2e3}
    result["ceilings"] = [{**head, **rates}]
    for count in (2, 4, 8):
        case = f"256x1024x1024-{count}x16"
        result["scaling"].append(_point(case, count**2 / 100, axis="K", at=count))
    for tokens in (256, 1024):
        row = {**head, "case": f"{tokens}x1024x1024-3x16", "forward": 1 << 20}
        result["memory"] += [{**row, "contender": name} for name in ("ours", "direct", "paper")]
    return result


def synthetic_gpu() -> record.Result:
    """What a GPU run of two backends gives, in small."""
    result = record.empty()
    words = {"gpu": "NVIDIA Test", "cuda": "13.0", "driver": "1", "capability": "9.0"}
    card = {**words, "multiprocessors": 132, "clock_mhz": 1980}
    result["kind"], result["machine"] = "gpu-nvidia-test", {**result["machine"], **card}
    graph = {"launch": {"ours": "graph", "direct": "graph"}, "sets": 2}
    rates = {"copy_bytes_per_second": 4e12, "matmul_operations_per_second": 8e14}
    for backend, speed in (("triton", 1e-4), ("cuda", 8e-5)):
        own = {"dtype": "bfloat16", "backend": backend}
        result["ceilings"].append({"case": "1x1x1-1x1", **own, **rates})
        for case in GPU_CASES:
            for section in ("forward", "backward", "expand"):
                work = getattr(floors, section)(case, "bfloat16")._asdict()
                result[section].append(_point(str(case), speed, **own, **work, **graph))
    return result


def test_a_gpu_has_its_own_targets_and_a_column_for_each_backend(tmp_path: Path) -> None:
    result = synthetic_gpu()
    text = report(result)
    assert "NVIDIA Test, CUDA 13.0" in text
    head = "| figure | target | triton, bfloat16 | cuda, bfloat16 |"
    assert head in text
    assert "| forward ÷ direct, geometric mean | ≤ 0.80 | 0.00 met | 0.00 met |" in text
    # 8192 x 4096 elements, read and written, and little else, in 100 us and 80 us at 4e12 bytes/s
    assert "share of copy bandwidth | ≥ 0.90 | **0.34 missed** | **0.42 missed** |" in text
    assert "instructions an element" in text
    result["forward"][0]["launch"]["ours"] = "no graph: why"
    assert "not replayed from a graph" in report(result)
    figures = pytest.importorskip("benchmarks.figures", reason="needs matplotlib")
    for name, data in pictures.present(result).items():
        path = tmp_path / pictures.path_of(result, name, "dark").name
        assert path.name.startswith("bench_gpu_")
        figures.draw(name, data, "dark", path)
        assert path.stat().st_size > 1000


def test_a_rehearsal_meets_and_misses_nothing() -> None:
    result = record.empty()
    result["kind"] = "rehearsal-here"
    own = {"dtype": "bfloat16", "backend": "triton"}
    result["forward"] = [_point(str(case), 1.0, **own) for case in TINY_CASES]
    text = report(result)
    assert text.startswith("REHEARSAL")
    assert "| forward ÷ direct, geometric mean | ≤ 0.80 | 0.50 rehearsed |" in text
    assert " met" not in text
    assert "missed" not in text


def test_every_picture_is_drawn_and_carries_its_hash(tmp_path: Path) -> None:
    figures = pytest.importorskip("benchmarks.figures", reason="needs matplotlib")
    result = synthetic()
    found = pictures.present(result)
    assert found.keys() == pictures.PICTURES.keys()
    for name, data in found.items():
        for theme in pictures.THEMES:
            path = tmp_path / f"{name}_{theme}.svg"
            figures.draw(name, data, theme, path)
            text = path.read_text(encoding="utf-8")
            assert f">data {pictures.digest(data)}<" in text
            figures.draw(name, data, theme, path)
            assert path.read_text(encoding="utf-8") == text  # the same data, the same bytes
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".svg"] * 8
    assert pictures.markup(result).count("prefers-color-scheme: dark") == 4


def test_report_warns_of_growth_and_shows_floors() -> None:
    result = synthetic()
    text = report(result)
    assert "K 2 … 8: ours 2.00 (**WARNING: above 1.1**" in text
    view = views(result)[0]
    assert view.share("forward", CPU_CASES[0]) == 2.0  # the operations' two seconds by one
    assert "200 %" in text
    assert "matrix product" in text
