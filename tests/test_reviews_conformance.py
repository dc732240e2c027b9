"""The promises of `ReviewSource`, kept by every source, against a slow and obvious reference.

The heart of it: nothing at or after the time that is asked about is ever in an answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r4r_graph.errors import SettingError
from r4r_graph.ratings import RatingStats
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Item, Review
from tests.review_sources import KINDS, Make, Reference, latest, maker, same_stats
from tests.test_postgres import server as server

STRANGE = [
    "o'neil",
    'say "hi"',
    "two\nlines",
    "tab\there",
    " x",
    "x ",
    "x",
    "X",
    "100%_a\\b",
    "'; DROP TABLE reviews; --",
    "мара",
    "مرا",
    "cafe\u0301",
    "caf\u00e9",
    "\uffff",  # after the next one in UTF-16, before it by code point
    "\U0001f600",
    "{{ user }}",
    "<|im_end|>",
    "NULL",
    "0",
]
UNKNOWN = ["nobody", "", "nul\0nul", "half \ud83d", "long" * 10_000]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    yield from maker(request.param, tmp_path, lambda: request.getfixturevalue("server"))


def random_reviews(seed: int, count: int = 400) -> list[Review]:
    """Few users, items and moments, so that ties and repeated pairs abound; none twice."""
    draw = np.random.default_rng(seed)
    ids = np.array([f"u{n}" for n in range(7)]), np.array([f"i{n}" for n in range(9)])
    if seed % 2:
        ids = np.array(STRANGE[:7]), np.array(STRANGE[7:])
    rows = {}
    for n in range(count):
        review = Review(
            user_id=str(draw.choice(ids[0])),
            item_id=str(draw.choice(ids[1])),
            rating=float(draw.choice([1.0, 2.0, 2.7, 3.0, 4.1, 5.0])),
            timestamp=float(draw.integers(-40, 60)) * float(draw.choice([1.0, 1.0, 86_400.0])),
            title=str(draw.choice(["", "", f"title {n}"])),
            text=str(draw.choice(["", f"text {n}"])),
        )
        rows[review.key] = review
    return list(rows.values())


ITEMS = [
    Item("i0", "Zero", "film", "a film"),
    Item("i1", "", "film"),
    Item("X", "", "film"),
    Item("unreviewed", "New"),
]


def questions(reviews: Sequence[Review], seed: int, count: int) -> Iterator[tuple[Any, ...]]:
    """User, item, time and limit, at random; times are often those of reviews."""
    draw = np.random.default_rng(seed)
    users = [*sorted({r.user_id for r in reviews}), *UNKNOWN]
    items = [*sorted({r.item_id for r in reviews}), "unreviewed", *UNKNOWN]
    times = sorted({r.timestamp for r in reviews})
    for _ in range(count):
        when = times[draw.integers(len(times))]
        moments = [when, when, when + 0.5, math.nextafter(when, math.inf), math.inf, -math.inf]
        yield (
            users[draw.integers(len(users))],
            items[draw.integers(len(items))],
            moments[draw.integers(len(moments))],
            int(draw.choice([0, 1, 2, 5, 10_000])),
        )


def test_is_a_review_source(make: Make) -> None:
    assert isinstance(make([Review("u", "i", 3.0, 1.0)], []), ReviewSource)


# The heart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_is_the_references(make: Make, seed: int) -> None:
    reviews = random_reviews(seed)
    source, reference = make(reviews, ITEMS), Reference(reviews)
    for user, item, before, limit in questions(reviews, seed, 80):
        mine = reference.earlier(before, user=user)
        others = reference.earlier(before, user=user, without_item=item)
        assert source.user_history(user, before, limit) == latest(mine, limit)
        found = source.user_history(user, before, limit, without_item=item)
        assert found == latest(others, limit)
        assert all(r.timestamp < before for r in found)
        assert same_stats(source.user_stats(user, before), mine)
        assert same_stats(source.user_stats(user, before, without_item=item), others)

        every = reference.earlier(before, item=item)
        others = reference.earlier(before, item=item, without_user=user)
        assert source.item_history(item, before, limit) == latest(every, limit)
        found = source.item_history(item, before, limit, without_user=user)
        assert found == latest(others, limit)
        assert all(r.timestamp < before for r in found)
        assert same_stats(source.item_stats(item, before), every)
        assert same_stats(source.item_stats(item, before, without_user=user), others)

        everyone = reference.earlier(before)
        rest = [r for r in everyone if (r.user_id, r.item_id) != (user, item)]
        assert same_stats(source.overall_stats(before), everyone)
        assert same_stats(source.overall_stats(before, without_pair=(user, item)), rest)

        titles = [r.title for r in every if r.title]
        always = [r.title for r in reference.earlier(math.inf, item=item) if r.title]
        named = {i.item_id: i.title for i in ITEMS}.get(item)
        known = source.item(item, before)
        assert known.item_id == item
        assert known.title == (named or (titles or always or [""])[-1])


@pytest.mark.parametrize("seed", [3, 4])
def test_what_comes_later_changes_no_answer(make: Make, seed: int) -> None:
    """One source ends where the question is asked, the other knows all that came after."""
    reviews = random_reviews(seed, 200)
    times = sorted({r.timestamp for r in reviews})
    before = times[len(times) // 2]  # a time of reviews, which are thus not earlier
    whole, then = make(reviews, []), make([r for r in reviews if r.timestamp < before], [])
    for user, item, _, limit in questions(reviews, seed, 40):
        for ask in (
            lambda s, u=user, i=item, n=limit: s.user_history(u, before, n, without_item=i),
            lambda s, u=user, i=item, n=limit: s.item_history(i, before, n, without_user=u),
        ):
            assert ask(whole) == ask(then)
        for stats in (
            lambda s, u=user, i=item: s.user_stats(u, before, without_item=i),
            lambda s, u=user, i=item: s.item_stats(i, before, without_user=u),
            lambda s, u=user, i=item: s.overall_stats(before, without_pair=(u, i)),
        ):
            assert dataclasses.astuple(stats(whole)) == pytest.approx(
                dataclasses.astuple(stats(then)), abs=1e-6
            )
        if then.item(item, None).title:
            assert whole.item(item, before) == then.item(item, before)


def test_a_review_at_the_very_time_is_not_earlier(make: Make) -> None:
    moment = 1_700_000_000.0
    source = make([Review("u", "i", 4.1, moment, "T", "late"), Review("u", "j", 3.3, 1.0)], [])
    for asked, there in ((moment, 0), (math.nextafter(moment, math.inf), 1)):
        assert len(source.item_history("i", asked, 9)) == there
        assert source.item_stats("i", asked).count == there
        assert len(source.user_history("u", asked, 9)) == 1 + there
        assert source.user_stats("u", asked).count == 1 + there
        assert source.overall_stats(asked).count == 1 + there


def test_a_day_ends_where_it_ends(make: Make) -> None:
    """Times around midnight, to the last bit: sums by day must neither miss nor double one."""
    midnights = [86_400.0 * day for day in (-3, 0, 1, 19_676, 23_000)]
    times = sorted(
        {t for m in midnights for t in (math.nextafter(m, -math.inf), m, math.nextafter(m, 1e12))}
    )
    reviews = [Review("u", f"i{n}", 1 + n % 5, time) for n, time in enumerate(times)]
    source = make(reviews, [])
    for time in times:
        assert source.overall_stats(time).count == sum(r.timestamp < time for r in reviews)


# Order, pairs and statistics ---------------------------------------------------------------------


def test_reviews_at_the_same_time_keep_their_order(make: Make) -> None:
    reviews = [Review("u", f"i{n}", 3.0, 5.0, text=str(n)) for n in (3, 1, 2, 0)]
    source = make(reviews, [])
    assert [r.text for r in source.user_history("u", 6.0, 3)] == ["1", "2", "0"]
    assert source.user_history("u", 5.0, 3) == []


def test_a_pair_with_several_reviews_is_left_out_whole(make: Make) -> None:
    reviews = [Review("u", "own", 1.0, float(t)) for t in range(5)]
    reviews += [Review("u", "other", 5.0, 1.5), Review("v", "own", 2.0, 2.5)]
    source = make(reviews, [])
    assert source.user_history("u", 9.0, 2, without_item="own") == [reviews[5]]
    assert source.item_history("own", 9.0, 2, without_user="u") == [reviews[6]]
    # what comes at or after `before` is not taken off the statistics either
    assert source.user_stats("u", 2.0, without_item="own") == RatingStats(1, 5.0, 0.0)


def test_statistics_are_none_when_only_the_own_rating_is_there(make: Make) -> None:
    source = make([Review("u", "i", 4.1, 10.0)], [])
    assert source.user_stats("u", 11.0, without_item="i") == RatingStats()
    assert source.item_stats("i", 11.0, without_user="u") == RatingStats()
    assert source.overall_stats(11.0, without_pair=("u", "i")) == RatingStats()
    assert source.user_stats("u", 11.0) == RatingStats(1, 4.1, 0.0)
    assert source.user_stats("u", 10.0) == RatingStats()


def test_all_are_listed_in_their_order(make: Make) -> None:
    reviews = random_reviews(5)
    source: Any = make(reviews, [Item("shelf"), Item(reviews[0].item_id)])
    assert len(source) == len(reviews)
    assert list(source) == reviews
    assert source.user_ids() == list(dict.fromkeys(r.user_id for r in reviews))
    assert source.item_ids() == [*dict.fromkeys(r.item_id for r in reviews), "shelf"]


# Ids and items -----------------------------------------------------------------------------------


def test_ids_are_told_apart_to_the_last_character(make: Make) -> None:
    reviews = [Review(name, name, 3.0, float(n), name, name) for n, name in enumerate(STRANGE)]
    source = make(reviews, [])
    for name, review in zip(STRANGE, reviews, strict=True):
        assert source.knows_user(name)
        assert source.knows_item(name)
        assert source.user_history(name, math.inf, 9) == [review]
        assert source.item_history(name, math.inf, 9) == [review]
        assert source.item(name, None) == Item(name, name)
    for name in UNKNOWN:
        assert not source.knows_user(name)
        assert not source.knows_item(name)
        assert source.item(name, 5.0) == Item(name)


def test_knows_ids_at_any_time_and_items_of_the_catalogue(make: Make) -> None:
    source = make([Review("u", "i", 3.0, 1e9)], [Item("shelf")])
    assert source.knows_user("u")
    assert not source.knows_user("i")
    assert source.knows_item("i")
    assert source.knows_item("shelf")
    assert not source.knows_item("u")


def test_an_item_takes_its_title_from_the_catalogue_then_from_reviews(make: Make) -> None:
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


def test_texts_come_back_as_they_were(make: Make) -> None:
    text = (
        "Said \"wow\",\r\nthen 'slept'. \u202etfel\u202c \U0001f600\u200d\x07 \\n " + "x" * 100_000
    )
    review = Review("u", "i", 2.5, -86_400.25, " \ttitle ", text)
    assert make([review], []).user_history("u", 0.0, 1) == [review]


# Nothing, and nonsense ---------------------------------------------------------------------------


def test_an_empty_source_answers_everything(make: Make) -> None:
    source = make([], [])
    assert source.user_history("u", math.inf, 5, without_item="i") == []
    assert source.item_history("i", math.inf, 5, without_user="u") == []
    assert source.user_stats("u", math.inf) == source.item_stats("i", 0.0) == RatingStats()
    assert source.overall_stats(math.inf, without_pair=("u", "i")) == RatingStats()
    assert not source.knows_user("u")
    assert not source.knows_item("i")
    assert source.item("i", None) == Item("i")


def test_senseless_questions_are_refused(make: Make) -> None:
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


# In use ------------------------------------------------------------------------------------------


def test_threads_share_it(make: Make) -> None:
    reviews = random_reviews(8)
    source = make(reviews, ITEMS)
    asked = [*questions(reviews, 8, 60)]

    def ask(question: tuple[Any, ...]) -> tuple[list[Review], RatingStats, Item]:
        user, item, before, limit = question
        return (
            source.user_history(user, before, limit, without_item=item),
            source.item_stats(item, before, without_user=user),
            source.item(item, before),
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, asked))
    for (history, stats, item), alone in zip(found, map(ask, asked), strict=True):
        assert (history, item) == (alone[0], alone[2])
        assert stats.count == alone[1].count
        assert stats.mean == pytest.approx(alone[1].mean)  # a database may sum in another order


def test_the_graph_reads_it_from_threads_and_coroutines(make: Make) -> None:
    from langgraph.store.memory import InMemoryStore

    from r4r_graph import Recommender, fake_engine

    reviews = [Review("u", f"i{n}", 4.0, float(n), f"T{n}", f"words {n}") for n in range(6)]
    reviews += [Review("v", "i9", 2.0, 3.0, "T9", "other words"), Review("u", "i9", 1.0, 4.0)]
    source = make(reviews, [])
    with Recommender.load(source, engine=fake_engine(), store=InMemoryStore()) as recommender:

        async def together() -> list[Any]:
            return await asyncio.gather(*(recommender.arate("u", "i9", as_of=4.0) for _ in "ab"))

        found = [recommender.rate("u", "i9", as_of=4.0), *asyncio.run(together())]
    for one in found:
        assert [a.title for a in one.user_aspects] == ["T0", "T1", "T2", "T3"]
        assert [a.title for a in one.item_aspects] == ["T9"]
