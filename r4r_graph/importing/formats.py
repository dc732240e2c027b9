"""Public formats: which of their files hold reviews and which items, and what their fields mean.

| format | reviews | items |
|---|---|---|
| Amazon 2014, 2018 | `reviews_*`, `*_5.json` | `meta_*` |
| Amazon 2023 | `<category>.jsonl` | `meta_<category>.jsonl` |
| Yelp | `yelp_academic_dataset_review.json` | `yelp_academic_dataset_business.json` |
| Goodreads (UCSD) | `goodreads_reviews_*` | `goodreads_books_*` |

A file is told by its fields, never by its name. A review's headline (`summary`; in 2023 `title`)
is left out: "Five stars" would tell the reasoner the rating.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from r4r_graph.errors import DataError, SettingError
from r4r_graph.importing.streaming import Row
from r4r_graph.reviews.files import shorten

Holds = Literal["reviews", "items"]


@dataclass(frozen=True, slots=True)
class RawReview:
    """A review's fields as they are in the file."""

    user_id: object
    item_id: object
    rating: object
    timestamp: object
    text: object
    title: object = None
    """The item's, where the file has it."""


@dataclass(frozen=True, slots=True)
class RawItem:
    """An item's fields as they are in the file."""

    item_id: object
    title: object = None
    categories: Sequence[object] = ()
    """The first that is not empty counts."""
    description: object = None


@dataclass(frozen=True, slots=True)
class Fields:
    """By which fields a kind of file is known."""

    needed: frozenset[str]
    foreign: frozenset[str] = frozenset()
    """Fields of other kinds of file."""

    def fit(self, found: frozenset[str]) -> bool:
        """Whether a file with the fields found is one."""
        return self.needed <= found and not self.foreign & found


@dataclass(frozen=True, slots=True)
class Format:
    """A public format."""

    name: str
    reviews: Fields
    items: Fields
    review: Callable[[Row], RawReview]
    item: Callable[[Row], RawItem]
    takes: str
    """Which files it takes, in words."""
    unrated: float | None = None
    """The rating that stands for none."""
    columns: frozenset[str] | None = None
    """All fields that are read; None: whatever there is."""

    def holds(self, found: frozenset[str]) -> Holds | None:
        """What a file with these fields holds."""
        if self.reviews.fit(found):
            return "reviews"
        return "items" if self.items.fit(found) else None


def recognise(path: Path, rows: Sequence[Row], wanted: Format) -> Holds:
    """What a file holds, from its first rows.

    Raises:
        DataError: nothing of this format; it says what the content looks like.
    """
    found = frozenset(str(name) for row in rows for name in row)
    if holds := wanted.holds(found):
        return holds
    for other in FORMATS.values():
        if other.name != wanted.name and (holds := other.holds(found)):
            raise DataError(
                f"{path}: no file of {wanted.name}; its content looks like {holds} of "
                f"{other.name}. Import it with: r4r import {other.name}"
            )
    named = shorten(", ".join(map(repr, sorted(found))), 300)
    raise DataError(f"{path}: no file of {wanted.name}; its fields are {named}. {wanted.takes}")


# --- Amazon ------------------------------------------------------------------------------------

_IMAGE_TEXT = re.compile(r'<img[^<>]*\balt="([^"<>]*)"')
_AMAZON = frozenset({"reviewerID", "asin", "overall"})
_NO_AMAZON_ITEM = frozenset({"reviewerID", "parent_asin", "user_id"})


def _amazon_review(row: Row) -> RawReview:
    return RawReview(
        row.get("reviewerID"),
        row.get("asin"),
        row.get("overall"),
        row.get("unixReviewTime"),
        row.get("reviewText"),
    )


def _amazon_2014_item(row: Row) -> RawItem:
    # Paths from the broadest category to the narrowest; the broadest one names the kind of thing.
    paths = _listed(row.get("categories"))
    kinds = [kind for path in paths for kind in _listed(path)[:1]]
    return RawItem(row.get("asin"), row.get("title"), kinds, row.get("description"))


def _amazon_2018_item(row: Row) -> RawItem:
    title, main = row.get("title"), row.get("main_cat")
    if isinstance(title, str) and "getTime" in title:
        title = None  # a script that was taken for the title
    if isinstance(main, str) and (picture := _IMAGE_TEXT.search(main)):
        main = picture[1]
    kinds = [main, *_listed(row.get("category"))]
    return RawItem(row.get("asin"), title, kinds, row.get("description"))


def _amazon_2023_review(row: Row) -> RawReview:
    return RawReview(
        row.get("user_id"),
        row.get("parent_asin"),  # `asin` is the colour or size; items are described by the parent
        row.get("rating"),
        row.get("timestamp", row.get("sort_timestamp")),
        row.get("text"),
    )


def _amazon_2023_item(row: Row) -> RawItem:
    kinds = [row.get("main_category"), *_listed(row.get("categories"))]
    described = row.get("description") or row.get("features")
    return RawItem(row.get("parent_asin"), row.get("title"), kinds, described)


# --- Yelp, Goodreads ---------------------------------------------------------------------------


def _yelp_review(row: Row) -> RawReview:
    return RawReview(
        row.get("user_id"),
        row.get("business_id"),
        row.get("stars"),
        row.get("date"),
        row.get("text"),
    )


def _yelp_item(row: Row) -> RawItem:
    place = ", ".join(str(row[name]) for name in ("city", "state") if row.get(name))
    return RawItem(row.get("business_id"), row.get("name"), [row.get("categories")], place)


def _goodreads_review(row: Row) -> RawReview:
    text = row.get("review_text")
    if text is None:  # the files about spoilers: pairs of a flag and a sentence
        parts = [_listed(part)[1:2] for part in _listed(row.get("review_sentences"))]
        text = " ".join(str(sentence) for part in parts for sentence in part)
    when = row.get("date_added") or row.get("timestamp")
    return RawReview(row.get("user_id"), row.get("book_id"), row.get("rating"), when, text)


def _goodreads_item(row: Row) -> RawItem:
    return RawItem(row.get("book_id"), row.get("title"), ["book"], row.get("description"))


def _listed(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


_FORMATS = (
    Format(
        "amazon-2014",
        Fields(_AMAZON, frozenset({"verified"})),
        Fields(frozenset({"asin"}), _NO_AMAZON_ITEM | {"category", "main_cat"}),
        _amazon_review,
        _amazon_2014_item,
        "Give the review files, and the files with metadata for the titles",
    ),
    Format(
        "amazon-2018",
        Fields(_AMAZON, frozenset({"helpful"})),
        Fields(frozenset({"asin"}), _NO_AMAZON_ITEM | {"categories"}),
        _amazon_review,
        _amazon_2018_item,
        "Give the review files, and the files with metadata for the titles",
    ),
    Format(
        "amazon-2023",
        Fields(frozenset({"user_id", "parent_asin", "rating"})),
        Fields(frozenset({"parent_asin", "title"}), frozenset({"user_id"})),
        _amazon_2023_review,
        _amazon_2023_item,
        "Give the review files, and the files with metadata for the titles",
    ),
    Format(
        "yelp",
        Fields(frozenset({"user_id", "business_id", "stars"})),
        Fields(frozenset({"business_id", "name"}), frozenset({"user_id"})),
        _yelp_review,
        _yelp_item,
        "Give the files of reviews and of businesses; users, tips and check-ins are not read",
    ),
    Format(
        "goodreads",
        Fields(frozenset({"user_id", "book_id", "rating"}), frozenset({"is_read"})),
        Fields(frozenset({"book_id", "title"}), frozenset({"user_id"})),
        _goodreads_review,
        _goodreads_item,
        "Give the files of reviews and of books; shelves, works and authors are not read",
        unrated=0.0,
    ),
)
FORMATS: Mapping[str, Format] = {format.name: format for format in _FORMATS}
"""The public formats by name."""


# --- any table ---------------------------------------------------------------------------------

TABLE = "table"
_REVIEW_COLUMNS = ("user_id", "item_id", "rating", "timestamp", "title", "review")
_ITEM_COLUMNS = ("item_id", "title", "category", "description")


def parse_columns(text: str, option: str) -> dict[str, str]:
    """Our columns to the file's, from `user_id=reviewer,rating=stars`.

    Raises:
        SettingError: no such list, or a column that is none of ours.
    """
    known = _ITEM_COLUMNS if option == "--item-columns" else _REVIEW_COLUMNS
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if name not in known or not equals or not column or name in columns:
            raise SettingError(
                f"bad {option} {part.strip()!r}: write OURS=THEIRS, each once, with "
                f"{', '.join(known)} on the left"
            )
        columns[name] = column
    return columns


def table_format(columns: Mapping[str, str], item_columns: Mapping[str, str]) -> Format:
    """A table whose columns are named as ours, but for those in the mappings.

    A file of items has the item's id, and neither users nor ratings.

    Args:
        columns: our columns to those of the files of reviews.
        item_columns: the same for the files of items.
    """
    ours = {name: columns.get(name, name) for name in _REVIEW_COLUMNS}
    items = {name: item_columns.get(name, name) for name in _ITEM_COLUMNS}

    def review(row: Row) -> RawReview:
        user, item, rating, when, title, text = (row.get(ours[name]) for name in _REVIEW_COLUMNS)
        return RawReview(user, item, rating, when, text, title)

    def item(row: Row) -> RawItem:
        found = {name: row.get(column) for name, column in items.items()}
        described = found["description"]
        return RawItem(found["item_id"], found["title"], [found["category"]], described)

    asked = [*_REVIEW_COLUMNS[:4], *(name for name in columns if name not in _REVIEW_COLUMNS[:4])]
    told = ", ".join(f"{name}={ours[name]}" for name in asked)
    return Format(
        TABLE,
        Fields(frozenset(ours[name] for name in asked)),
        Fields(
            frozenset({items["item_id"], *(items[name] for name in item_columns)}),
            frozenset({ours["user_id"], ours["rating"]}),
        ),
        review,
        item,
        f"Name the columns with --columns; reviews were looked for by {told}, "
        f"items by item_id={items['item_id']}",
        columns=frozenset({*ours.values(), *items.values()}),
    )
