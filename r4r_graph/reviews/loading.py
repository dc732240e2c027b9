"""Files of reviews, of items and of pairs, read strictly: one bad row and nothing is loaded.

All bad rows are counted and the first few are named by line, so that a file can be mended in one
go. `files` knows the formats, `rows` what a good row is, `stored` how an index is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from r4r_graph.caches import review_indexes_dir
from r4r_graph.errors import DataError, SettingError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews.addresses import is_address, without_password
from r4r_graph.reviews.files import (
    AT_ONCE,
    BadRows,
    Layout,
    Row,
    file_parts,
    parquet_batches,
    read_rows,
)
from r4r_graph.reviews.index import ReviewIndex
from r4r_graph.reviews.rows import (
    REVIEWS,
    checked_review,
    checked_seconds,
    checked_text,
    parquet_reviews,
    parquet_rows,
)
from r4r_graph.reviews.source import ReviewSource
from r4r_graph.reviews.stored import stored_reviews
from r4r_graph.reviews.table import REVIEW_SCHEMA, TableReviewSource
from r4r_graph.schema import Item, Pair

_log = logging.getLogger(__name__)

FIVE_STARS = RatingScale()
KEPT_FROM = 64 << 20
"""Bytes of a file from which on its index is kept on disk."""


def load_reviews(
    path: str | os.PathLike[str],
    *,
    scale: RatingScale = FIVE_STARS,
    items: Mapping[str, Item] | None = None,
    index: str | os.PathLike[str] | bool | None = None,
) -> TableReviewSource:
    """Reviews from a file, or from a folder of Parquet parts, indexed.

    Large files are read once: their index is kept, and later loads map it in well under a second
    (see `stored`). A changed file is read anew.

    Columns: user_id, item_id, rating and timestamp, filled in every row; title and review, which
    may be empty or absent. Others are ignored. Ids are texts or whole numbers. Timestamps are
    unix seconds, ISO 8601 texts (UTC where they name no zone) or Arrow times.

    Args:
        path: The file or folder.
        scale: Every rating must lie within it; fractions are fine.
        items: The item catalogue, by item id; see `load_items`.
        index: Where the index is kept: a folder, made on demand; True: in the cache folder;
            False: in memory alone. None keeps that of files from 64 MiB on in the cache folder,
            and reads them into memory where that cannot be written.

    Raises:
        DataError: the path cannot be read as reviews, or any of its rows is bad.
        SettingError: the index cannot be kept where it was asked for.
    """
    parts = file_parts(path)

    def read(use: Callable[[pa.Table], None]) -> None:
        _read_reviews(path, parts, scale, use)

    try:
        folder = _index_folder(path, parts, index)
        if folder is not None:
            table, found = stored_reviews(folder, parts, scale, read)
            return TableReviewSource(table, items, index=found)
    except DataError:
        raise
    except (OSError, SettingError) as error:
        if index is not None:
            raise SettingError(f"cannot keep the index of {path}: {error}") from None
        _log.warning("the index of %s cannot be kept (%s): it is made in memory", path, error)
    tables: list[pa.Table] = []
    read(tables.append)
    table = pa.concat_tables(tables)
    return TableReviewSource(table, items, index=ReviewIndex.of(table))


def open_reviews(
    where: str | os.PathLike[str],
    *,
    scale: RatingScale = FIVE_STARS,
    items: Mapping[str, Item] | None = None,
) -> ReviewSource:
    """Reviews from a file or a folder (see `load_reviews`), or the address of a database, such as
    `sqlite:///reviews.db` or `postgresql+psycopg://HOST/NAME` (see `SqlReviewSource`).

    Raises:
        DataError: see `load_reviews`.
        SettingError: a bad address, a database without reviews, or items beside one, which holds
            its own.
        SourceError: the database cannot be reached.
        MissingExtraError: SQLAlchemy or the database's driver is not installed.
    """
    if not is_address(where):
        return load_reviews(where, scale=scale, items=items)
    from r4r_graph.reviews.sql import SqlReviewSource

    if items:
        raise SettingError(
            f"{without_password(str(where))} holds its own items: add them to it, once, with "
            "SqlReviewSource.add_items"
        )
    return SqlReviewSource(str(where), scale=scale, create=False)


def _index_folder(
    path: str | os.PathLike[str],
    parts: Sequence[Path],
    index: str | os.PathLike[str] | bool | None,
) -> Path | None:
    """Where the index of these files is kept; None: nowhere."""
    if index is None:
        index = sum(part.stat().st_size for part in parts) >= KEPT_FROM
    if not isinstance(index, bool):
        return Path(index).expanduser().absolute()
    if not index:
        return None
    whole = Path(path).resolve()
    name = hashlib.blake2b(str(whole).encode("utf-8", "surrogateescape"), digest_size=8)
    return review_indexes_dir() / f"{whole.name[:40]}-{name.hexdigest()}"


def _read_reviews(
    path: str | os.PathLike[str],
    parts: Iterable[Path],
    scale: RatingScale,
    use: Callable[[pa.Table], None],
) -> None:
    """Feed the reviews of all files to `use`, in tables of `REVIEW_SCHEMA`. Rows are checked on
    the way; the error about bad ones comes at the end."""
    bad, count = BadRows(path), 0
    rows: list[tuple[object, ...]] = []

    def hand_on(table: pa.Table) -> None:
        nonlocal count
        count += len(table)
        if not bad.count:  # else all that is left to do is to count the others
            use(table)

    def flush() -> None:
        columns = zip(*rows, strict=True)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, REVIEW_SCHEMA, strict=True)]
        hand_on(pa.table(arrays, schema=REVIEW_SCHEMA))
        rows.clear()

    def keep(_: str, row: Row) -> None:
        rows.append(checked_review(row, scale))
        if len(rows) == AT_ONCE:
            flush()

    for part in parts:
        if part.suffix.lower() == ".parquet":
            for before, table in parquet_batches(part, REVIEWS):
                hand_on(parquet_reviews(part, table, before, scale, bad))
        else:
            read_rows(part, REVIEWS, bad, keep)
    if rows:
        flush()
    bad.check()
    if not count:
        raise DataError(f"{path}: holds no reviews; expected at least one row")


def load_items(path: str | os.PathLike[str]) -> dict[str, Item]:
    """An item catalogue from a file, or from a folder of Parquet parts, by item id.

    Columns: item_id, filled in every row; title, category and description, which may be empty or
    absent. Others are ignored. An item may be repeated, but not with other values.

    Raises:
        DataError: the path cannot be read as items, any of its rows is bad, or two rows differ
            on one item.
    """
    bad = BadRows(path)
    items: dict[str, Item] = {}
    places: dict[str, str] = {}

    def use(where: str, row: Row) -> None:
        texts = [checked_text(row, name) for name in ("title", "category", "description")]
        item = Item(checked_text(row, "item_id", required=True), *texts)
        if items.setdefault(item.item_id, item) != item:
            first = places[item.item_id]
            raise DataError(f"item_id {item.item_id!r} is described differently at {first}")
        places.setdefault(item.item_id, where)

    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            parquet_rows(part, _ITEMS, bad, use)
        else:
            read_rows(part, _ITEMS, bad, use)
    bad.check()
    if not items:
        raise DataError(f"{path}: holds no items; expected at least one row")
    return items


def load_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs to rate from a file, or from a folder of Parquet parts, in file order.

    Columns: user_id, item_id, and as_of or timestamp (the time before which reviews may be
    read), filled in every row. Others are ignored, so a file of reviews is one of pairs, too.

    Raises:
        DataError: the path cannot be read as pairs, or any of its rows is bad.
    """
    bad = BadRows(path)
    pairs: list[Pair] = []

    def use(_: str, row: Row) -> None:
        ids = (
            checked_text(row, "user_id", required=True),
            checked_text(row, "item_id", required=True),
        )
        when = row.get("as_of")
        if when is None or when == "":
            when = row.get("timestamp")
        pairs.append(Pair(*ids, checked_seconds(when)))

    for part in file_parts(path):
        if part.suffix.lower() == ".parquet":
            parquet_rows(part, _PAIRS, bad, use)
        else:
            read_rows(part, _PAIRS, bad, use)
    bad.check()
    if not pairs:
        raise DataError(f"{path}: holds no pairs; expected at least one row")
    return pairs


_ITEMS = Layout(("item_id",), ("title", "category", "description"))
_PAIRS = Layout(("user_id", "item_id"), ("as_of", "timestamp"))
