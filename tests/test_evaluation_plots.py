"""Figures: what they show, and that they are safe to put into a page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.figure import Figure

from r4r_graph.errors import MissingExtraError
from r4r_graph.evaluation.metrics import Estimate
from r4r_graph.evaluation.rendering import plots
from r4r_graph.evaluation.rendering.cells import shown
from r4r_graph.evaluation.rendering.document import document
from r4r_graph.evaluation.report import EvaluationReport, Reliability, ReliabilityBin
from tests import evaluation_reports as made

NAN = float("nan")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def full() -> dict[str, str]:
    return plots.figures(made.full())


@pytest.fixture(scope="module")
def hostile() -> dict[str, str]:
    return plots.figures(made.hostile())


def new(height: float) -> Figure:
    return Figure(figsize=(6, height))


def letters(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def dots(figure: Figure | None, at: int = 0) -> tuple[list[str], list[float], list[Any]]:
    """Labels, values and intervals of one series."""
    assert figure is not None
    [axes] = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    lines = axes.get_lines()[2 * at : 2 * at + 2]
    values = [float(x) for line in lines for x in line.get_xdata()]  # type: ignore[union-attr]
    bars = axes.collections[at]
    intervals = [tuple(path.vertices[:, 0].tolist()) for path in bars.get_paths()]
    return labels, values, intervals


# What is shown -----------------------------------------------------------------------------------


def test_the_document_has_a_place_for_every_figure(full: dict[str, str]) -> None:
    for report, found in ((made.full(), full), (made.report(made.points_only()), None)):
        placed = [figure.name for part in document(report) for figure in part.figures]
        assert placed == list(found or plots.figures(report))
    assert list(full) == ["errors", "ratings", "reliability-1", "reliability-2", "probes"]
    assert list(plots.figures(made.report(made.points_only()))) == ["errors"]


def test_errors_of_every_read_out_and_floor() -> None:
    report = made.report()
    labels, mae, intervals = dots(plots._errors(report, new))
    assert labels[:4] == ["ours, mean", "ours, median", "ours, mode", "global mean"]
    assert len(labels) == 3 + len(made.FLOORS)
    scores: Any = report.predictors[0].scores
    expected = [
        *(scores.mae[readout] for readout in ("mean", "median", "mode")),
        *(floor.mae for floor in report.floors.values()),
    ]
    assert mae == [e.value for e in expected]
    assert intervals == [(e.low, e.high) for e in expected]
    _, rmse, _ = dots(plots._errors(report, new), 1)
    assert rmse[0] == scores.rmse["mean"].value


def test_names_that_are_cut_alike_do_not_hide_each_other() -> None:
    report = made.report(made.predictor("x" * 50 + "a"), made.predictor("x" * 50 + "b"))
    labels, mae, _ = dots(plots._errors(report, new))
    assert len(labels) == len(mae) == 6 + len(made.FLOORS)


def test_how_far_the_rating_moves() -> None:
    labels, moved, intervals = dots(plots._probes(made.report(), new))
    assert labels[0] == "without the rationale"
    assert moved == [0.004, 0.309, 0.518, 0.207]
    assert intervals[0] == (0.003, 0.005)


def test_errors_by_true_rating_alone() -> None:
    labels, values, _ = dots(plots._ratings(made.report(), new))
    assert labels == ["1", "2", "3", "4", "5"]
    slices = [part for part in made.slices() if part.by == "true rating"]
    assert values == [part.mae.value for part in slices]
    assert plots._ratings(made.report(made.predictor(slices=made.slices()[:5])), new) is None


def test_reliability_leaves_empty_bins_out_of_the_line_and_shows_their_count() -> None:
    figure = plots._reliability(made.reliability(), new)
    assert figure is not None
    upper, lower = figure.axes
    diagonal, line = upper.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]  # type: ignore[arg-type]
    full = [b for b in made.reliability().bins if b.count]
    assert list(line.get_xdata()) == [b.predicted for b in full]  # type: ignore[arg-type]
    assert list(line.get_ydata()) == [b.observed for b in full]  # type: ignore[arg-type]
    assert [text.get_text() for text in lower.texts][:2] == ["900", "200"]
    assert lower.texts[-1].get_text() == "0"


def test_figures_of_almost_nothing() -> None:
    nothing = Estimate(NAN, NAN, NAN)
    empty = Reliability((ReliabilityBin(0.0, 1.0, 0, NAN, NAN),), NAN, {})
    few = made.probes()[:1]
    predictor = made.predictor(reliability=empty, probes=few, slices=made.slices()[-1:])
    assert len(plots.figures(made.report(predictor))) == 4
    assert dots(plots._by_part({"a": {"x": nothing, "y": made.around(1)}}, "", new))[0] == [
        "x",
        "y",
    ]


def test_a_set_without_a_condition_leaves_its_place_empty() -> None:
    one, other = {"x": made.around(1), "y": made.around(2)}, {"y": made.around(3)}
    figure = plots._by_part({"a": one, "b": other}, "", new)
    labels, values, _ = dots(figure, 1)
    assert labels == ["x", "y"]
    assert values[0] != values[0]
    assert values[1] == 3


# The text ----------------------------------------------------------------------------------------


def test_one_report_gives_one_text(full: dict[str, str]) -> None:
    assert plots.figures(made.full()) == full


def test_a_users_own_settings_stay_and_stay_out(full: dict[str, str]) -> None:
    own = {"font.size": 31, "lines.linewidth": 9, "svg.fonttype": "path", "savefig.bbox": "tight"}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        assert plots.figures(made.full()) == full
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_needed() -> None:
    code = (
        "import sys; from r4r_graph.evaluation.rendering.plots import figures; "
        "from tests.evaluation_reports import report; figures(report()); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_it_is_svg_without_prolog_scripts_or_references(
    full: dict[str, str], hostile: dict[str, str]
) -> None:
    for svg in [*full.values(), *hostile.values()]:
        assert svg.startswith("<svg ")
        root = ElementTree.fromstring(svg)
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {"svg", "defs", "g", "path", "text", "use", "clipPath", "rect"}
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on")
                assert "http" not in value
                assert not name.endswith("href") or value.startswith("#")
        addresses = set(re.findall(r"https?://[^\"'\s]*", svg.replace("http://x.y", "")))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_in_a_page_and_are_there(full: dict[str, str]) -> None:
    seen: list[str] = []
    for svg in full.values():
        root = ElementTree.fromstring(svg)
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        seen += ids
        wanted = set(re.findall(r"#([pm][0-9a-f]{10})", svg))
        assert wanted == set(ids)
        assert wanted
    assert len(seen) == len(set(seen))


def test_names_stay_text(hostile: dict[str, str]) -> None:
    found = letters(hostile["errors"])
    assert f"{shown(made.HOSTILE, 28)}, median" in found
    assert any(text.startswith("_<script>") for text in found)
    assert "<script" not in "".join(hostile.values())
    # In the legend too, where a leading underscore would hide a name.
    assert any(text.strip().startswith("_<script>") for text in letters(hostile["probes"]))


def test_letters_that_the_font_does_not_have() -> None:
    """A guard: they would be warned of; the page has fonts of its own."""
    found = plots.figures(made.report(made.predictor("電影 $x^{2$ \U0001f3ac")))
    assert "電影 $x^{2$ \U0001f3ac, mean" in letters(found["errors"])


def test_lettering_is_of_one_colour(full: dict[str, str]) -> None:
    for svg in full.values():
        for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
            assert f"fill: {plots.INK}" in element.attrib["style"]
        assert not re.search(r"(fill|stroke): (#000000|#ffffff|black|white)", svg)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report: EvaluationReport = made.report()
    with pytest.raises(MissingExtraError, match=r"pip install 'r4r-graph\[evaluation\]'"):
        plots.figures(report)
