"""The passes of an import over its files, and what stays in memory between them.

The numbers of ids and texts are Python's 64-bit hashes: of 100 million users, two share one with a
chance of 1 in 4,000, and would be counted as one by the k-core; nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r4r_graph.errors import DataError
from r4r_graph.importing.cleaning import (
    clean_line,
    clean_text,
    first_line,
    id_of,
    rating_of,
    seconds_of,
)
from r4r_graph.importing.filters import Flags, Floats, Ints, in_window, k_core, repeated
from r4r_graph.importing.formats import Format, RawReview
from r4r_graph.importing.report import ImportProgress, OnProgress, Stage
from r4r_graph.importing.spool import Rejects, TableWriter
from r4r_graph.importing.streaming import Fault, Row, RowFile, batches, open_rows
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Item

ITEM_SCHEMA = pa.schema(
    {name: pa.large_string() for name in ("item_id", "title", "category", "description")}
)
"""Columns of the catalogue; see `load_items`."""

_BATCH_ROWS = 2**14
_BATCH_CHARACTERS = 2**24
_EVERY = 2000  # rows between two looks at the progress


@dataclass(slots=True)
class Written:
    """What is counted while writing."""

    titled: int = 0
    ratings: float = 0.0
    """Their sum."""


@dataclass(slots=True)
class _Batch:
    """Cleaned reviews that are not spilled yet, and their numbers."""

    rows: list[tuple[str, str, str, float, float, str]] = field(default_factory=list)
    """In the order of `REVIEW_SCHEMA`."""
    characters: int = 0

    def full(self) -> bool:
        return len(self.rows) >= _BATCH_ROWS or self.characters >= _BATCH_CHARACTERS


class Passes:
    """The passes of one import, and what stays in memory between them."""

    def __init__(self, wanted: Format, scale: RatingScale, on_progress: OnProgress | None) -> None:
        self._format = wanted
        self._scale = scale
        self._on_progress = on_progress
        self.read = 0
        self.unrated = 0
        self._numbers: list[tuple[Ints, Ints, Floats, Ints, Flags]] = []

    def spill(self, files: Sequence[RowFile], path: Path, bad: Rejects) -> None:
        """Read, clean and count all reviews; those that are good go into a scratch file."""
        batch, writer = _Batch(), TableWriter(path, REVIEW_SCHEMA, "lz4")
        for file, line, row in self._rows(files, "reading", bad):
            self.read += 1
            if isinstance(row, Fault):
                bad.add(file, line, row)
                continue
            try:
                self._take(self._format.review(row), batch)
            except DataError as error:
                bad.add(file, line, Fault(str(error), _shown(row)))
            if batch.full():
                self._numbers.append(_spill(batch, writer))
                batch = _Batch()
        self._numbers.append(_spill(batch, writer))
        writer.close()
        # one column at a time, so that no more than one is there twice
        columns = [list(column) for column in zip(*self._numbers, strict=True)]
        self._numbers.clear()
        self.users, self.items, self.times, self.texts, self.empty = (
            np.concatenate(columns.pop(0)) for _ in range(5)
        )

    def _take(self, raw: RawReview, batch: _Batch) -> None:
        user, item = id_of(raw.user_id, "user_id"), id_of(raw.item_id, "item_id")
        if self._format.unrated is not None and _is(raw.rating, self._format.unrated):
            self.unrated += 1
            return
        rating, when = rating_of(raw.rating, self._scale), seconds_of(raw.timestamp)
        title = clean_line(raw.title) if raw.title is not None else ""
        text = clean_text(raw.text)
        batch.rows.append((user, item, title, rating, when, text))
        batch.characters += len(text)

    def choose(
        self, k: int, since: float | None, until: float | None, with_text: bool
    ) -> dict[str, int]:
        """Decide which of the spilled reviews are kept; how many fell by what."""
        self.kept = ~repeated(self.users, self.items, self.times, self.texts)
        self.texts = self.texts[:0]
        left = [len(self.kept), int(self.kept.sum())]
        if with_text:
            self.kept &= ~self.empty
        left.append(int(self.kept.sum()))
        self.kept &= in_window(self.times, since, until)
        left.append(int(self.kept.sum()))
        self.kept[self.kept] = k_core(self.users[self.kept], self.items[self.kept], k)
        left.append(int(self.kept.sum()))
        names = ("duplicates", "no_text", "outside_window", "outside_core")
        return {name: left[at] - left[at + 1] for at, name in enumerate(names)}

    def catalogue(
        self, files: Sequence[RowFile], path: Path, bad: Rejects
    ) -> pa.ChunkedArray | None:
        """Write the items of the kept reviews, each once, and return their titles; None where no
        file describes any."""
        self._known = np.unique(self.items[self.kept])
        self._place = np.full(len(self._known), -1, dtype=np.int64)
        if not files:
            return None
        writer, rows, count, characters = TableWriter(path, ITEM_SCHEMA), [], 0, 0
        for file, line, row in self._rows(files, "items", bad):
            try:
                if isinstance(row, Fault):
                    raise DataError(row.reason)
                raw = self._format.item(row)
                item_id = id_of(raw.item_id, "item_id")
            except DataError as error:
                shown = row.text if isinstance(row, Fault) else _shown(row)
                bad.add(file, line, Fault(str(error), shown))
                continue
            number = hash(item_id)
            at = int(np.searchsorted(self._known, number))
            if at == len(self._known) or self._known[at] != number or self._place[at] >= 0:
                continue  # not reviewed, or described before
            self._place[at], count = count, count + 1
            item = Item(
                item_id,
                clean_line(raw.title),
                first_line(raw.categories),
                clean_text(raw.description),
            )
            rows.append(item.to_dict())
            characters += len(item.description)
            if len(rows) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                writer.add(pa.Table.from_pylist(rows, ITEM_SCHEMA))
                rows, characters = [], 0
        writer.add(pa.Table.from_pylist(rows, ITEM_SCHEMA))
        writer.close()
        return pq.read_table(path, columns=["title"])["title"] if count else None

    def write(self, spilled: Path, path: Path, titles: pa.ChunkedArray | None) -> Written:
        """Write the kept reviews, with the catalogue's titles where they have none."""
        written, writer = Written(), TableWriter(path, REVIEW_SCHEMA)
        start, of = 0, len(self.kept)
        with pq.ParquetFile(spilled, pre_buffer=False) as file:
            for batch in batches(file, _BATCH_ROWS):
                rows = slice(start, start + len(batch))
                start += len(batch)
                table = pa.Table.from_batches([batch]).filter(pa.array(self.kept[rows]))
                if titles is not None:
                    numbers = self.items[rows][self.kept[rows]]
                    table = _with_titles(table, titles, self._places(numbers))
                written.titled += pc.sum(pc.not_equal(table["title"], "")).as_py() or 0
                written.ratings += pc.sum(table["rating"]).as_py() or 0.0
                writer.add(table)
                self._tell(ImportProgress("writing", start, of, start))
        writer.close()
        return written

    def _places(self, numbers: Ints) -> Ints:
        """Where the items are in the catalogue; -1 where they are not."""
        places: Ints = self._place[np.searchsorted(self._known, numbers)]
        return places

    def _rows(
        self, files: Sequence[RowFile], stage: Stage, bad: Rejects
    ) -> Iterator[tuple[Path, int, Row | Fault]]:
        """The rows of several files; tells how far it is."""
        of, before, count = sum(file.size for file in files), 0, 0
        for file in files:
            with open_rows(file, columns=self._format.columns) as (rows, position):
                for line, row in rows:
                    yield file.path, line, row
                    count += 1
                    if count % _EVERY == 0:
                        done = before + position()
                        self._tell(ImportProgress(stage, done, of, count, bad.count))
            before += file.size
        self._tell(ImportProgress(stage, of, of, count, bad.count))

    def _tell(self, progress: ImportProgress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)


def _spill(batch: _Batch, writer: TableWriter) -> tuple[Ints, Ints, Floats, Ints, Flags]:
    """Write the batch; its numbers."""
    columns = list(zip(*batch.rows, strict=True)) or [()] * len(REVIEW_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, REVIEW_SCHEMA, strict=True)]
    writer.add(pa.table(arrays, schema=REVIEW_SCHEMA))
    users, items, _, ratings, times, texts = columns
    return (
        np.fromiter(map(hash, users), np.int64, len(users)),
        np.fromiter(map(hash, items), np.int64, len(users)),
        np.array(times, dtype=np.float64),
        np.fromiter(map(hash, zip(ratings, texts, strict=True)), np.int64, len(users)),
        np.fromiter((not text for text in texts), np.bool_, len(users)),
    )


def _with_titles(table: pa.Table, titles: pa.ChunkedArray, places: Ints) -> pa.Table:
    found = titles.take(pa.array(np.maximum(places, 0), mask=places < 0))
    own = table["title"]
    joined = pc.if_else(pc.equal(own, ""), pc.fill_null(found, ""), own)
    return table.set_column(table.column_names.index("title"), "title", joined)


def _is(value: object, number: float) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == number  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(row: Row) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in row.items())
