"""Tables of texts, and how figures are written in them.

Texts of others (names, reasons, findings) become one line without control characters here, cut
where they are long; markup is each rendering's own to escape. `better` and `worse` stand only
where zero is outside a paired difference's interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from r4r_graph.evaluation.metrics import Estimate
from r4r_graph.evaluation.report import Difference, Verdict

Tone = Literal["plain", "good", "bad", "best"]

LONGEST = 300
"""Characters of a text that are shown."""

NONE = "–"
"""Stands for a figure that does not exist."""

INTERVAL = "[95 %]"
COMPARED = (f"MAE, median {INTERVAL}", "verdict", f"RMSE, mean {INTERVAL}", "verdict")
"""Columns of `compared`."""

CONDITION_WORDS = {
    "as_is": "as it is",
    "without_rationale": "without the rationale",
    "swapped_rationale": "a swapped rationale",
    "true_review": "the true review",
    "without_texts": "without any text",
    "averages_only": "averages alone",
}
"""Names of probe conditions in words."""

SLICE_WORDS = {
    "reviews by the user": "user's reviews",
    "reviews of the item": "item's reviews",
}
"""Headings of slices in fewer words."""

FLOOR_WORDS = {
    "user_item_mean": "user and item mean",
    "boosting_squared": "boosting (squared)",
    "boosting_absolute": "boosting (absolute)",
}
"""Names of floors in words, where spaces for underscores do not do."""

_TONES: dict[str, Tone] = {"better": "good", "worse": "bad"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One text of a table."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Table:
    """A table; every row has one cell a column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    aside: bool = False
    """Whether it may be folded away."""


def shown(text: str, longest: int = LONGEST) -> str:
    """`text` as one line, its control characters and direction marks written out."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def floor_words(name: str) -> str:
    """A floor's name in words."""
    return FLOOR_WORDS.get(name, name.replace("_", " "))


def condition_words(name: str) -> str:
    """A probe condition in words; an unknown one as it is."""
    return CONDITION_WORDS.get(name, name)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    note: str = "",
    *,
    aside: bool = False,
) -> Table:
    """A table of anybody's texts."""
    cells = (
        tuple(cell if isinstance(cell, Cell) else Cell(shown(cell)) for cell in row) for row in rows
    )
    return Table(shown(title), tuple(columns), tuple(cells), note, aside)


def filled(*tables: Table) -> tuple[Table, ...]:
    """Those that have rows."""
    return tuple(table for table in tables if table.rows)


# Figures -----------------------------------------------------------------------------------------


def number(value: float, *, signed: bool = False) -> str:
    """Three decimals and a true minus. The sign stays where it rounds to zero: an interval that
    ends there may exclude zero."""
    text = f"{value + 0.0:{'+' if signed else ''}.3f}"
    return NONE if value != value else text.replace("-", "−")


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return NONE if value != value else f"{100 * value:.1f} %"


def interval(estimate: Estimate, *, signed: bool = False, as_share: bool = False) -> str:
    """A figure and its interval; `[–]` where there are too few rows for one."""

    def written(figure: float) -> str:
        return percent(figure) if as_share else number(figure, signed=signed)

    value = written(estimate.value)
    ends = [written(end).removesuffix(" %") for end in (estimate.low, estimate.high)]
    return NONE if value == NONE else f"{value} [{NONE if NONE in ends else ', '.join(ends)}]"


def comparison(by_mae: Difference | None, by_rmse: Difference | None) -> tuple[str | Cell, ...]:
    """Four cells: difference in MAE and its verdict, difference in RMSE and its verdict."""
    cells: list[str | Cell] = [NONE] * 4
    if by_mae is not None:
        cells[:2] = interval(by_mae.mae, signed=True), verdict_cell(by_mae.verdict("mae"))
    if by_rmse is not None:
        cells[2:] = interval(by_rmse.rmse, signed=True), verdict_cell(by_rmse.verdict("rmse"))
    return tuple(cells)


def verdict_cell(verdict: Verdict) -> Cell:
    """A verdict in its tone."""
    return Cell(verdict, _TONES.get(verdict, "plain"))


def gain_cell(difference: Estimate) -> Cell:
    """The verdict on a difference that is better above zero."""
    if not difference.excludes_zero:
        return verdict_cell("undecided")
    return verdict_cell("better" if difference.low > 0 else "worse")
