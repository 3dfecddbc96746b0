"""The tables and pictures on the pages are what the committed result files say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_results import quartiles, synthetic, synthetic_gpu
from native import ROOT

from benchmarks import pictures, record

drawing = pytest.importorskip("benchmarks.drawing", reason="needs matplotlib")
import figures  # noqa: E402 - it draws

README = ROOT / "README.md"
RENEW = "run: make figures"


def _results() -> list[record.Result]:
    return [record.load(ROOT / path) for path in figures.recorded(ROOT)]


def test_pages_agree_with_their_result_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert figures.with_headlines(text, ROOT)[1] == text, RENEW
    page = (ROOT / figures.PAGE).read_text(encoding="utf-8")
    assert figures.page(_results()) == page, RENEW


def test_pictures_agree_with_their_result_files_and_are_shown() -> None:
    drawn = figures.wanted_pictures(_results())
    wanted = {path: pictures.digest(data) for path, (_, data) in drawn.items()}
    found = {}
    for path in (ROOT / pictures.IMAGES).glob("bench_*"):
        hashes = re.findall(r">data ([0-9a-f]{64})<", path.read_text(encoding="utf-8"))
        found[path.relative_to(ROOT)] = hashes[0] if hashes else "no hash"
    assert found == wanted, RENEW
    page = (ROOT / figures.PAGE).read_text(encoding="utf-8")
    assert all(f"](images/{path.name})" in page for path in wanted)


def test_the_readme_has_five_figures_with_the_misses() -> None:
    lines = figures.with_headlines(README.read_text(encoding="utf-8"), ROOT)[1].splitlines()
    start = next(j for j, line in enumerate(lines) if line.startswith("| figure | target |"))
    rows = lines[start + 2 : start + 8]
    assert [row.startswith("| ") for row in rows] == [True] * 5 + [False]
    assert "**1.64 MISSED**" in rows[1]


LINES = "<!-- benchmark table: {} -->\n<!-- end of benchmark table -->\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what draws, with a README and two result files, the second with another figure."""
    for folder in ("benchmarks", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "docs").mkdir()
    results = tmp_path / "benchmarks" / "results"
    shutil.rmtree(results)
    first = replace(synthetic(), kind="cpu-a")
    row = first.forward[0]
    ratios = {"ours/direct": quartiles(1.2 * row.ratios["ours/direct"].median)}
    second = replace(first, kind="cpu-b", forward=[replace(row, ratios=ratios), *first.forward[1:]])
    record.save(first, results / "cpu-a.json")
    record.save(second, results / "cpu-b.json")
    return tmp_path


def _renew(checkout: Path, status: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.figures"], cwd=checkout, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_figures_are_renewed_in_a_checkout(checkout: Path) -> None:
    readme = checkout / "README.md"
    one, two = (f"benchmarks/results/cpu-{name}.json" for name in "ab")
    readme.write_text(f"before\n\n{LINES.format(one)}\nafter\n")
    assert f"not in the README's table: {two}" in _renew(checkout, 0)
    first = readme.read_text()
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    readme.write_text(first.replace(one, two))
    assert f"not in the README's table: {one}" in _renew(checkout, 0)
    assert readme.read_text() != first.replace(one, two)  # another figure, another table
    readme.write_text(LINES.format(f"{one} {two}"))
    assert "not in the README's table" not in _renew(checkout, 0)
    both = re.findall(r"^\| figure \| target \|.*$", readme.read_text(), re.MULTILINE)
    assert [line.count("float32") for line in both] == [2]
    page = (checkout / figures.PAGE).read_text()
    assert re.findall("^## .*$", page, re.MULTILINE) == ["## cpu-a", "## cpu-b"]
    assert len(list((checkout / pictures.IMAGES).glob("*.svg"))) == 3


def test_pages_stay_as_they_are_where_they_cannot_be_renewed(checkout: Path) -> None:
    readme = checkout / "README.md"
    missing = LINES.format("benchmarks/results/cpu-other.json")
    for text, message in (("no table here", "no lines mark"), (missing, "there is no such file")):
        readme.write_text(text)
        assert message in _renew(checkout, 1)
        assert readme.read_text() == text
    assert list((checkout / "docs").iterdir()) == []


def test_every_picture_is_drawn_as_text_in_both_themes(tmp_path: Path) -> None:
    result = synthetic()
    found = pictures.present(result)
    assert found.keys() == pictures.PICTURES.keys()
    for name, data in found.items():
        path = tmp_path / f"{name}.svg"
        drawing.draw(name, data, path)
        text = path.read_text(encoding="utf-8")
        assert f">data {pictures.digest(data)}<" in text
        tree = ElementTree.fromstring(text)
        words = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert any("cpu-synthetic" in str(word) for word in words)
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})[;\"]", text))
        light, dark = (set(found) for found in zip(*drawing._DARK.items(), strict=True))
        assert colours <= light  # each has a rule for dark themes
        assert "prefers-color-scheme: dark" in text
        assert all(colour in text for colour in dark)
        drawing.draw(name, data, path)
        assert path.read_text(encoding="utf-8") == text  # the same data, the same bytes
    assert len(list(tmp_path.iterdir())) == 3


def test_pictures_of_a_gpu_have_names_of_their_own(tmp_path: Path) -> None:
    for path, (name, data) in figures.wanted_pictures([synthetic(), synthetic_gpu()]).items():
        drawing.draw(name, data, tmp_path / path.name)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"bench_cpu_{name}.svg" for name in pictures.PICTURES} | {
        "bench_gpu_ratio.svg"
    }


def test_a_plot_of_one_disturbed_row(tmp_path: Path) -> None:
    """Its upper quartile is ten times its median."""
    result = replace(synthetic(), forward=synthetic().forward[:1], backward=[])
    q = record.Quartiles(1.0, 0.9, 10.0, 3)
    result.forward[0] = replace(result.forward[0], ratios={"ours/direct": q})
    drawing.plot(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        drawing.plot(replace(result, forward=[]), tmp_path / "y.png")
