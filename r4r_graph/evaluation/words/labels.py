"""Aspect summaries of some origin, such as a teacher's: read from Parquet and checked.

    labels = read_aspects("aspects.parquet", confident_only=True)
    labels[label_key(review)]

Every label is in the summarizer's own form (`r4r_graph.engine.aspects`): what its grammar cannot
write is mended or left out, so that `parse_aspects(format_aspects(label)) == label`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph.engine.aspects import SECTIONS, format_aspects, parse_aspects
from r4r_graph.errors import DataError
from r4r_graph.jobs import digest_rows
from r4r_graph.prompts import clean
from r4r_graph.reviews.files import BadRows, Layout, file_parts, read_parquet, unreadable
from r4r_graph.reviews.table import column_of_numbers, column_of_texts
from r4r_graph.schema import AspectSummary, Review, unix_seconds

LabelKey = tuple[str, str, float]
"""User, item and time (unix seconds) of the review that a label is of."""

Labels = dict[LabelKey, AspectSummary]

_OTHER_NAMES = {"preferences": "values"}
"""What ready-made files may call a column."""


def label_key(review: Review) -> LabelKey:
    """Under which the label of a review is found."""
    return review.user_id, review.item_id, float(review.timestamp)


def read_aspects(path: str | os.PathLike[str], *, confident_only: bool) -> Labels:
    """Labels from a Parquet file, or from a folder of Parquet parts such as the teacher's.

    Columns: user_id, item_id, timestamp (unix seconds), and the lists of texts positive, negative
    and values (or preferences). Rows with a reason in the column `error` are left out. A review
    may be labelled twice, but not differently.

    Args:
        path: the file or folder.
        confident_only: leave out rows whose column `confident`, where there is one, is not true.

    Raises:
        DataError: it cannot be read, a column is missing or of another type, a row is bad, or two
            rows label one review differently; it names file, row and column.
    """
    labels: Labels = {}
    places: dict[LabelKey, str] = {}
    bad = BadRows(path)
    for part in file_parts(path):
        for where, row in _rows(part):
            if row.get("error") is not None:
                continue
            try:
                key, label = _label(row)
                if confident_only and not row.get("confident", True):
                    continue
                if labels.setdefault(key, label) != label:
                    raise DataError(f"labels a review differently than {places[key]}")
                places.setdefault(key, where)
            except DataError as error:
                bad.add(where, error)
    bad.check()
    return labels


def label_digest(labels: Mapping[LabelKey, AspectSummary]) -> str:
    """32 hex digits over the labels, in whatever order they come."""
    return digest_rows([*key, labels[key].to_dict()] for key in sorted(labels))


def normalized(summary: AspectSummary) -> AspectSummary:
    """The summary as the summarizer could have written it: each phrase one line without control
    characters or marks of the format, no repeats within a list, five phrases a list at most.

    Idempotent; `parse_aspects(format_aspects(...))` gives it back.
    """
    lists = (summary.positive, summary.negative, summary.values)
    tidy = AspectSummary(*(tuple(map(clean, phrases)) for phrases in lists))
    return parse_aspects(format_aspects(tidy))


def _rows(part: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file as plain values, each with its place; columns by their standard names."""
    if part.suffix.lower() != ".parquet":
        raise DataError(f"{part}: labels are read from Parquet files")
    try:
        found = pq.read_schema(part).names
    except (pa.ArrowException, OSError) as error:
        raise unreadable(part, error) from None
    names = {name: name for name in SECTIONS}
    for other, name in _OTHER_NAMES.items():
        if name not in found and other in found:
            names[name] = other
    layout = Layout(("user_id", "item_id", "timestamp", *names.values()), ("confident", "error"))
    table = read_parquet(part, layout)
    columns: dict[str, list[Any]] = {
        "user_id": column_of_texts(table, "user_id", part).to_pylist(),
        "item_id": column_of_texts(table, "item_id", part).to_pylist(),
        "timestamp": column_of_numbers(table, "timestamp", part).tolist(),
        "error": column_of_texts(table, "error", part).to_pylist(),
    }
    for name, written in names.items():
        columns[name] = _lists(table, written, part)
    if "confident" in found:
        columns["confident"] = _flags(table, "confident", part)
    for at in range(len(table)):
        yield f"{part}: row {at + 1}", {name: column[at] for name, column in columns.items()}


def _lists(table: pa.Table, name: str, where: Path) -> list[Any]:
    column, types = table.column(name), pa.types
    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list and not types.is_null(kind):
        raise DataError(f"{where}: column {name} is of type {kind}; expected lists of texts")
    if is_list:
        inner = kind.value_type
        is_text = types.is_string(inner) or types.is_large_string(inner) or types.is_null(inner)
        if not is_text:
            raise DataError(f"{where}: column {name} holds lists of {inner}; expected texts")
    values: list[Any] = column.to_pylist()
    return values


def _flags(table: pa.Table, name: str, where: Path) -> list[Any]:
    column = table.column(name)
    if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise DataError(f"{where}: column {name} is of type {column.type}; expected true or false")
    values: list[Any] = column.to_pylist()
    return values


def _label(row: Mapping[str, Any]) -> tuple[LabelKey, AspectSummary]:
    """A row's label and the review it is of."""
    for name in ("user_id", "item_id"):
        if not (row[name] or "").strip():
            raise DataError(f"column {name} is empty")
    if row["timestamp"] != row["timestamp"]:
        raise DataError("column timestamp is empty")
    for name in SECTIONS:
        if row[name] is None or None in row[name]:
            raise DataError(f"column {name} has no list of texts, or an empty place in it")
    key = row["user_id"], row["item_id"], unix_seconds(row["timestamp"])
    return key, normalized(AspectSummary.from_dict({name: row[name] for name in SECTIONS}))
