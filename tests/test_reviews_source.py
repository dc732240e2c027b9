"""The promises of `ReviewSource`, kept by every source, against a slow and obvious reference."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from r4r_graph.errors import DataError, SettingError
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews import ReviewSource, TableReviewSource
from r4r_graph.schema import Item, Review

Factory = Callable[[Sequence[Review], Sequence[Item]], ReviewSource]

FACTORIES: dict[str, Factory] = {"table": TableReviewSource.from_reviews}
"""Every source that ships: add a line for a new one."""


@pytest.fixture(params=list(FACTORIES.values()), ids=list(FACTORIES))
def make(request: pytest.FixtureRequest) -> Factory:
    factory: Factory = request.param
    return factory


def random_reviews(seed: int, count: int = 400) -> list[Review]:
    """Few users, items and moments, so that ties and repeated pairs abound."""
    draw = random.Random(seed)
    return [
        Review(
            user_id=f"u{draw.randrange(7)}",
            item_id=f"i{draw.randrange(9)}",
            rating=draw.choice([1.0, 2.0, 2.7, 3.0, 4.1, 5.0]),
            timestamp=float(draw.randrange(-40, 60)),
            title=draw.choice(["", "", f"title {n}"]),
            text=draw.choice(["", f"text {n}"]),
        )
        for n in range(count)
    ]


ITEMS = [Item("i0", "Zero", "film", "a film"), Item("i1", "", "film"), Item("unreviewed", "New")]
MOMENTS = [-math.inf, -40.0, -39.5, 0.0, 17.0, 17.5, 42.0, 59.0, 60.0, math.inf]
USERS = [f"u{n}" for n in range(7)] + ["nobody"]
ITEM_IDS = [f"i{n}" for n in range(9)] + ["nothing"]


class Reference:
    """Looks at every review for every question."""

    def __init__(self, reviews: Sequence[Review]) -> None:
        self.reviews = sorted(reviews, key=lambda r: r.timestamp)  # stable: ties keep their order

    def earlier(
        self,
        before: float,
        *,
        user: str | None = None,
        item: str | None = None,
        without_user: str | None = None,
        without_item: str | None = None,
    ) -> list[Review]:
        return [
            r
            for r in self.reviews
            if r.timestamp < before
            and (user is None or r.user_id == user)
            and (item is None or r.item_id == item)
            and r.user_id != without_user
            and r.item_id != without_item
        ]


def same_stats(found: RatingStats, reviews: Sequence[Review]) -> bool:
    expected = RatingStats.of([r.rating for r in reviews])
    if expected.count == 0:
        return found == RatingStats()
    close = found.mean == pytest.approx(expected.mean, abs=1e-9)
    # the square root turns a rounding error of 1e-14 into 1e-7
    return found.count == expected.count and close and abs_close(found.spread, expected.spread)


def abs_close(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) < 1e-6


def test_is_a_review_source(make: Factory) -> None:
    assert isinstance(make([], []), ReviewSource)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("limit", [0, 1, 5, 10_000])
def test_histories_hold_the_latest_of_what_is_strictly_earlier(
    make: Factory, seed: int, limit: int
) -> None:
    reviews = random_reviews(seed)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for before in MOMENTS:
        for user in USERS:
            found = source.user_history(user, before, limit)
            assert all(r.timestamp < before for r in found)
            expected = reference.earlier(before, user=user)
            assert found == expected[max(0, len(expected) - limit) :]
        for item in ITEM_IDS:
            found = source.item_history(item, before, limit)
            assert all(r.timestamp < before for r in found)
            expected = reference.earlier(before, item=item)
            assert found == expected[max(0, len(expected) - limit) :]


@pytest.mark.parametrize("limit", [0, 1, 4, 10_000])
def test_the_pairs_own_reviews_are_left_out_and_do_not_count(make: Factory, limit: int) -> None:
    reviews = random_reviews(3)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for before in MOMENTS:
        for user in USERS:
            for item in ITEM_IDS:
                found = source.user_history(user, before, limit, without_item=item)
                expected = reference.earlier(before, user=user, without_item=item)
                assert found == expected[max(0, len(expected) - limit) :]
                found = source.item_history(item, before, limit, without_user=user)
                expected = reference.earlier(before, item=item, without_user=user)
                assert found == expected[max(0, len(expected) - limit) :]


def test_statistics_are_over_all_that_is_strictly_earlier(make: Factory) -> None:
    reviews = random_reviews(4)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for before in MOMENTS:
        for user in USERS:
            earlier = reference.earlier(before, user=user)
            assert same_stats(source.user_stats(user, before), earlier)
        for item in ITEM_IDS:
            earlier = reference.earlier(before, item=item)
            assert same_stats(source.item_stats(item, before), earlier)


def test_statistics_leave_out_the_pairs_own_ratings(make: Factory) -> None:
    reviews = random_reviews(5)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for before in MOMENTS:
        for user in USERS:
            for item in ITEM_IDS:
                earlier = reference.earlier(before, user=user, without_item=item)
                assert same_stats(source.user_stats(user, before, without_item=item), earlier)
                earlier = reference.earlier(before, item=item, without_user=user)
                assert same_stats(source.item_stats(item, before, without_user=user), earlier)


def test_overall_statistics_are_over_everyone_and_everything(make: Factory) -> None:
    reviews = random_reviews(7)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for before in MOMENTS:
        assert same_stats(source.overall_stats(before), reference.earlier(before))
        for user, item in zip(USERS, ITEM_IDS, strict=False):
            found = source.overall_stats(before, without_pair=(user, item))
            earlier = [
                r for r in reference.earlier(before) if (r.user_id, r.item_id) != (user, item)
            ]
            assert same_stats(found, earlier)
    assert make([], []).overall_stats(math.inf) == RatingStats()


def test_statistics_are_none_when_only_the_own_rating_is_there(make: Factory) -> None:
    source = make([Review("u", "i", 4.1, 10.0)], [])
    assert source.user_stats("u", 11.0, without_item="i") == RatingStats()
    assert source.item_stats("i", 11.0, without_user="u") == RatingStats()
    assert source.user_stats("u", 11.0) == RatingStats(1, 4.1, 0.0)
    assert source.user_stats("u", 10.0) == RatingStats()


def test_reviews_at_the_same_time_keep_their_order(make: Factory) -> None:
    reviews = [Review("u", f"i{n}", 3.0, 5.0, text=str(n)) for n in (3, 1, 2, 0)]
    source = make(reviews, [])
    assert [r.text for r in source.user_history("u", 6.0, 3)] == ["1", "2", "0"]
    assert source.user_history("u", 5.0, 3) == []


def test_a_pair_with_several_reviews_is_left_out_whole(make: Factory) -> None:
    reviews = [Review("u", "own", 1.0, float(t)) for t in range(5)]
    reviews += [Review("u", "other", 5.0, 1.5), Review("v", "own", 2.0, 2.5)]
    source = make(reviews, [])
    assert source.user_history("u", 9.0, 2, without_item="own") == [reviews[5]]
    assert source.item_history("own", 9.0, 2, without_user="u") == [reviews[6]]
    # what comes at or after `before` is not taken off the statistics either
    assert source.user_stats("u", 2.0, without_item="own") == RatingStats(1, 5.0, 0.0)


def test_knows_ids_at_any_time_and_items_of_the_catalogue(make: Factory) -> None:
    source = make([Review("u", "i", 3.0, 1e9)], [Item("shelf")])
    assert source.knows_user("u")
    assert not source.knows_user("i")
    assert source.knows_item("i")
    assert source.knows_item("shelf")
    assert not source.knows_item("u")


def test_an_item_takes_its_title_from_the_catalogue_then_from_reviews(make: Factory) -> None:
    reviews = [
        Review("a", "i", 3.0, 10.0, title="first"),
        Review("b", "i", 3.0, 30.0, title="third"),
        Review("c", "i", 3.0, 20.0, title="second"),
        Review("d", "i", 3.0, 40.0, title=""),
        Review("a", "h", 3.0, 1.0, title="h"),
        Review("a", "j", 3.0, 1.0, title=""),
    ]
    plain = make(reviews, [])
    assert plain.item("i", None) == Item("i", "third")
    assert plain.item("i", math.inf) == Item("i", "third")
    assert plain.item("i", 30.0) == Item("i", "second")
    assert plain.item("i", 20.0) == Item("i", "first")
    assert plain.item("i", 10.0).title in {"first", "second", "third"}
    assert plain.item("j", None) == Item("j")
    assert plain.item("unknown", 5.0) == Item("unknown")
    entry = Item("i", "", "film", "about a film")
    assert make(reviews, [entry]).item("i", 30.0) == dataclasses.replace(entry, title="second")
    named = Item("i", "The Film", "film")
    assert make(reviews, [named]).item("i", 30.0) == named


def test_an_empty_source_answers_everything(make: Factory) -> None:
    source = make([], [])
    assert source.user_history("u", math.inf, 5, without_item="i") == []
    assert source.item_history("i", math.inf, 5, without_user="u") == []
    assert source.user_stats("u", math.inf) == source.item_stats("i", 0.0) == RatingStats()
    assert not source.knows_user("u")
    assert not source.knows_item("i")
    assert source.item("i", None) == Item("i")


def test_senseless_questions_are_refused(make: Factory) -> None:
    source = make(random_reviews(6), ITEMS)
    asks: list[Callable[[], object]] = [
        lambda: source.user_history("u1", 1.0, -1),
        lambda: source.item_history("i1", 1.0, -1),
        lambda: source.user_history("u1", math.nan, 1),
        lambda: source.item_history("i1", math.nan, 1),
        lambda: source.user_stats("u1", math.nan),
        lambda: source.item_stats("i1", math.nan),
        lambda: source.overall_stats(math.nan),
        lambda: source.item("i1", math.nan),
    ]
    for ask in asks:
        with pytest.raises(SettingError):
            ask()


# --- the table's own ---------------------------------------------------------------------------


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
    exported = ["ReviewSource", "TableReviewSource", "load_items", "load_pairs", "load_reviews"]
    assert names[:5] == exported
    assert not {"torch", "transformers", "pandas", "datasets", "langgraph"} & set(names)
