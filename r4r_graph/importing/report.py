"""What an import tells: how far it is, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["reading", "items", "writing"]


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is."""

    stage: Stage
    done: int
    """Of `of`: bytes of the files while reading, reviews while writing."""
    of: int
    rows: int
    """Rows read in this stage."""
    rejected: int = 0
    """Bad rows so far; not told while writing."""


OnProgress = Callable[[ImportProgress], None]


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did. `read` is the sum of `rejected`, `unrated`, `duplicates`, `no_text`,
    `outside_window`, `outside_core` and `reviews`."""

    format: str
    out: Path
    items_out: Path | None
    """None where no file describes any of the items."""
    rejects: Path | None
    """None where no row was bad."""
    read: int
    """Rows of the files of reviews."""
    reviews: int
    """Reviews written."""
    rejected: int
    """Bad rows of the files of reviews."""
    unrated: int
    """Reviews without a rating, where the format has a mark for it; not written."""
    duplicates: int
    """Repetitions of an earlier review in user, item, time, rating and text; not written."""
    no_text: int
    """Reviews without a text that were left out; 0 unless that was asked for."""
    outside_window: int
    outside_core: int
    """Reviews outside the window of time, and then outside the k-core."""
    empty_texts: int
    """Reviews without a text among those written."""
    further: int
    """Reviews written by a user of an item that they also reviewed at another time or in other
    words."""
    titled: int
    """Reviews written with the item's title."""
    users: int
    items: int
    """Users and items of the reviews written."""
    items_written: int
    """Items that the catalogue describes."""
    items_rejected: int
    """Bad rows of the files of items."""
    first: float
    last: float
    """Times of the first and the last review, in unix seconds."""
    mean_rating: float
    seconds: float
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Kind of fault to bad rows, the most frequent first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        paths = {name: getattr(self, name) for name in ("out", "items_out", "rejects")}
        return asdict(self) | {name: path and str(path) for name, path in paths.items()}
