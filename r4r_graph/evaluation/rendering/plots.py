"""Figures of a report, as SVG.

Drawn without a display and without pyplot; one report always gives the same text. The background
is transparent and all lettering of one mid-tone, `INK`, which light and dark pages bear alike; the
colours are after the palette of Okabe and Ito (2008), and shapes tell apart what colours do.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from xml.dom import minidom

from r4r_graph.errors import MissingExtraError
from r4r_graph.evaluation.metrics import Estimate
from r4r_graph.evaluation.rendering.cells import condition_words, floor_words, shown
from r4r_graph.evaluation.rendering.document import NOTHING, readout_scores, smallest_step
from r4r_graph.evaluation.report import EvaluationReport, Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    New = Callable[[float], Figure]

INK = "#787878"
"""Colour of lettering and axes; a page may put its own in its place."""

COLOURS = ("#1f7fc0", "#d55e00", "#009e73", "#cc79a7", "#c08a00")
_SHAPES = "os^Dv"
_WIDTH = 6.2  # inches
_LONGEST = 28  # characters of a label

_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: selectable, and in the page's own size
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def figures(report: EvaluationReport) -> dict[str, str]:
    """Name to SVG text, safe to put into a page: no scripts, no references, no prolog.

    `errors`; `ratings` where there are slices by true rating; `reliability-1`, ... for each set of
    predictions with probabilities; `probes` where there are some.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing plots in the report", "evaluation") from None

    def new(height: float) -> Figure:
        return Figure(figsize=(_WIDTH, height), layout="constrained")

    drawn: dict[str, str] = {}
    # Whatever the user has set up for plots of their own stays as it was, and out of ours.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name; the page has fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        for name, figure in (
            ("errors", _errors(report, new)),
            ("ratings", _ratings(report, new)),
            *(
                (f"reliability-{at}", _reliability(predictor.reliability, new))
                for at, predictor in enumerate(report.predictors, start=1)
            ),
            ("probes", _probes(report, new)),
        ):
            if figure is not None:
                drawn[name] = _svg(figure, name)
    return drawn


# One figure each ---------------------------------------------------------------------------------


def _errors(report: EvaluationReport, new: New) -> Figure:
    experts = [
        (f"{_label(predictor.name)}, {readout}", scores)
        for predictor in report.predictors
        for readout, scores in readout_scores(predictor).items()
    ]
    floors = [(_label(floor_words(name)), scores) for name, scores in report.floors.items()]
    lines = [*experts, *floors]
    figure = new(1.3 + 0.26 * len(lines))
    series = {
        "MAE": [scores.mae for _, scores in lines],
        "RMSE": [scores.rmse for _, scores in lines],
    }
    axes = _dots(figure, [name for name, _ in lines], series, hollow_from=len(experts))
    axes.set_xlabel("error, rating units")
    return figure


def _ratings(report: EvaluationReport, new: New) -> Figure | None:
    found = {
        predictor.name: {p.label: p.mae for p in predictor.slices if p.by == "true rating"}
        for predictor in report.predictors
    }
    return _by_part(found, "MAE of the median, by true rating", new)


def _probes(report: EvaluationReport, new: New) -> Figure | None:
    found = {
        predictor.name: {condition_words(p.condition): p.moved for p in predictor.probes}
        for predictor in report.predictors
    }
    figure = _by_part(found, "mean read-out moves by, rating units", new)
    if figure is not None:
        [axes] = figure.axes
        axes.axvline(NOTHING * smallest_step(report.scale), color=INK, linestyle=":")
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    return figure


def _by_part(found: dict[str, dict[str, Estimate]], what: str, new: New) -> Figure | None:
    """Parts or conditions from top to bottom, the sets of predictions beside each other."""
    found = {name: parts for name, parts in found.items() if parts}
    labels = list(dict.fromkeys(label for parts in found.values() for label in parts))
    if not labels:
        return None
    nothing = Estimate(math.nan, math.nan, math.nan)
    series = {name: [parts.get(x, nothing) for x in labels] for name, parts in found.items()}
    figure = new(1.0 + 0.25 * len(series) + (0.16 + 0.18 * len(series)) * len(labels))
    axes = _dots(figure, [_label(label) for label in labels], series, apart=0.7)
    axes.set_xlabel(what)
    return figure


def _reliability(found: Reliability | None, new: New) -> Figure | None:
    if found is None:
        return None
    figure = new(5.6)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    upper.plot((0, 1), (0, 1), color=INK, linestyle="--", linewidth=1)
    full = [b for b in found.bins if b.count]
    most = max((b.count for b in full), default=1)
    upper.plot([b.predicted for b in full], [b.observed for b in full], color=COLOURS[0])
    upper.scatter(
        [b.predicted for b in full],
        [b.observed for b in full],
        s=[30 + 130 * b.count / most for b in full],
        color=COLOURS[0],
        zorder=3,
    )
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that came true")
    bars = lower.bar(
        [b.low for b in found.bins],
        [b.count for b in found.bins],
        [b.high - b.low for b in found.bins],
        align="edge",
        color=COLOURS[0],
        alpha=0.6,
    )
    lower.bar_label(bars, [f"{b.count:,}" for b in found.bins], fontsize=8, padding=1)
    lower.set(xlabel="predicted probability", ylabel="count", ylim=(0, 1.35 * most), yticks=())
    return figure


# Parts of figures --------------------------------------------------------------------------------


def _dots(
    figure: Figure,
    labels: Sequence[str],
    series: dict[str, list[Estimate]],
    *,
    apart: float = 0.0,
    hollow_from: int | None = None,
) -> Axes:
    """Figures with their intervals, one line a label; `apart` is the height that a line's dots
    are spread over."""
    axes = figure.add_subplot()
    for at, (name, estimates) in enumerate(series.items()):
        colour, shape = COLOURS[at % len(COLOURS)], _SHAPES[at % len(_SHAPES)]
        shift = apart * ((at + 0.5) / len(series) - 0.5)
        lines = [line + shift for line in range(len(labels))]
        axes.hlines(lines, [e.low for e in estimates], [e.high for e in estimates], color=colour)
        end = len(labels) if hollow_from is None else hollow_from
        for part, face in ((slice(0, end), colour), (slice(end, None), "none")):
            axes.plot(
                [e.value for e in estimates[part]],
                lines[part],
                shape,
                color=colour,
                markerfacecolor=face,
                # A leading underscore would keep a name out of the legend.
                label=f" {_label(name)}" if face != "none" else "",
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=2)
    return axes


def _label(name: str) -> str:
    return shown(name, _LONGEST)


def _svg(figure: Figure, name: str) -> str:
    """The drawing alone: no prolog, metadata or style sheet, and of the ids those referred to, so
    that it can stand in a page beside others."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = f"r4r-{name}"  # no id is that of another figure
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=nothing)
    root = minidom.parseString(file.getvalue()).documentElement
    assert root is not None
    root.setAttribute("style", "stroke-linejoin: round; font-family: system-ui, sans-serif")
    for sheet in root.getElementsByTagName("style"):
        assert sheet.parentNode is not None
        sheet.parentNode.removeChild(sheet)
    for element in root.getElementsByTagName("*"):
        if element.tagName == "g" and element.hasAttribute("id"):
            element.removeAttribute("id")
        if element.tagName == "text":
            kept = (
                part for part in element.getAttribute("style").split("; ") if "family" not in part
            )
            element.setAttribute("style", "; ".join(kept))
    return root.toxml()
