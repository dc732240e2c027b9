"""The table of reviews: what it reads, and what it refuses. What every source promises is in
`test_reviews_conformance.py`."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence

import pyarrow as pa
import pytest

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Item, Review
from tests.review_sources import Reference
from tests.test_reviews_conformance import random_reviews


def columns(reviews: Sequence[Review]) -> dict[str, list[object]]:
    rows = [r.to_dict() for r in reviews]
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_kind_of_string_column_and_many_chunks(kind: pa.DataType) -> None:
    reviews = random_reviews(7, 90)
    texts = {"user_id", "item_id", "title", "review"}
    data = columns(reviews)
    parts = []
    for start, stop in itertools.pairwise((0, 0, 30, 31, 90, 90)):  # empty chunks too
        arrays = {n: pa.array(v[start:stop], kind if n in texts else None) for n, v in data.items()}
        arrays["rating"] = arrays["rating"].cast(pa.float32())
        arrays["timestamp"] = arrays["timestamp"].cast(pa.int64())
        parts.append(pa.table(arrays))
    source = TableReviewSource(pa.concat_tables(parts))
    assert [(r.user_id, r.item_id, r.title, r.text, r.timestamp) for r in source] == [
        (r.user_id, r.item_id, r.title, r.text, r.timestamp) for r in reviews
    ]
    reference = Reference(reviews).earlier(17.0, user="u1")
    assert [r.text for r in source.user_history("u1", 17.0, 99)] == [r.text for r in reference]


def test_integer_ids_become_texts_and_null_texts_empty() -> None:
    table = pa.table(
        {
            "user_id": [7, 8],
            "item_id": pa.array([70.0, 80.0]),
            "title": pa.nulls(2),
            "rating": [4, 5],
            "timestamp": [1, 2],
            "review": pa.array([None, "fine"]),
            "helpful": [1, 2],
        }
    )
    found = list(TableReviewSource(table))
    assert found == [Review("7", "70", 4.0, 1.0), Review("8", "80", 5.0, 2.0, text="fine")]


def test_a_null_title_is_no_title() -> None:
    data = columns([Review("a", "i", 3.0, t) for t in (1.0, 2.0, 3.0)])
    source = TableReviewSource(pa.table({**data, "title": pa.array(["Old", None, None])}))
    assert source.item("i", None) == Item("i", "Old")


def test_len_and_ids() -> None:
    source = TableReviewSource.from_reviews(
        [Review("b", "y", 1.0, 5.0), Review("a", "x", 1.0, 4.0), Review("b", "x", 1.0, 3.0)],
        [Item("z"), Item("x")],
    )
    assert len(source) == 3
    assert source.user_ids() == ["b", "a"]
    assert source.item_ids() == ["y", "x", "z"]


def test_a_sliced_table_is_read_from_its_own_start() -> None:
    reviews = random_reviews(8, 50)
    table = pa.table(columns(reviews)).slice(20, 15)
    assert list(TableReviewSource(table)) == reviews[20:35]


def test_running_sums_stay_exact_behind_many_other_ratings() -> None:
    heavy = [Review(f"u{n % 3}", f"i{n}", 4.1, float(n)) for n in range(30_000)]
    source = TableReviewSource.from_reviews([*heavy, Review("zed", "i", 3.3, 1.0)])
    assert source.user_stats("zed", 2.0) == RatingStats(1, 3.3, 0.0)
    assert source.item_stats("i29999", math.inf) == RatingStats(1, 4.1, 0.0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"user_id": pa.array(["a", None])}, "row 2 .* no user_id"),
        ({"item_id": pa.array(["", "b"])}, "row 1 .* no item_id"),
        ({"item_id": pa.array([True, False])}, "item_id is of type bool"),
        ({"item_id": pa.array([["a"], ["b"]])}, "item_id is of type list"),
        ({"user_id": pa.array([1.5, 2.0])}, "user_id is of type double"),
        ({"user_id": pa.array([2.0**60, 2.0])}, "too large to be exact"),
        ({"rating": pa.array([1.0, None])}, "row 2 .* no finite rating"),
        ({"rating": pa.array([math.inf, 1.0])}, "row 1 .* no finite rating"),
        ({"rating": pa.array(["4", "5"])}, "rating is of type string"),
        ({"timestamp": pa.array([math.nan, 1.0])}, "row 1 .* no finite timestamp"),
        ({"timestamp": pa.array([1, 1_700_000_000_000])}, "milliseconds"),
        ({"timestamp": pa.array([-1_700_000_000_000, 1])}, "milliseconds"),
    ],
)
def test_a_table_that_cannot_be_indexed_is_refused(
    change: dict[str, pa.Array], complaint: str
) -> None:
    data = columns([Review("a", "x", 4.0, 1.0), Review("b", "y", 5.0, 2.0)])
    with pytest.raises(DataError, match=complaint):
        TableReviewSource(pa.table({**data, **change}))


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    table = pa.table({"user_id": ["a"], "asin": ["b"]})
    with pytest.raises(DataError, match=r"no column item_id, .*it has user_id, asin"):
        TableReviewSource(table)


def test_importing_reviews_is_light() -> None:
    code = "import sys, r4r_graph.reviews as r; print(*r.__all__, *sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    sources = ["ListedReviews", "ReviewSource", "TableReviewSource"]
    assert names[:7] == [*sources, "load_items", "load_pairs", "load_reviews", "open_reviews"]
    assert not {"torch", "transformers", "pandas", "datasets", "langgraph"} & set(names)
