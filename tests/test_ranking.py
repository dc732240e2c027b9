"""Rankings: their order, their words, their JSON; candidates by popularity; the facade's calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import DataError, EngineError, InputError, RequestError, SettingError
from r4r_graph.ranking import (
    CandidateProgress,
    Failure,
    Ranking,
    first_sentence,
    popular_items,
    ranked,
)
from r4r_graph.ratings import RatingDistribution, RatingScale
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Item, Recommendation
from tests.scripted import Script, at, prompt, review

Fake = Callable[..., BatchingEngine]

TABLE = [
    review("ann", "folk", 1, 5),
    review("ann", "rock", 2, 1),
    *(review(user, "one", day) for day, user in enumerate(("ben", "cas", "dan"))),
    *(review(user, "two", day) for day, user in enumerate(("ben", "cas"))),
    review("ben", "late", 30),
    review("cas", "folk", 3),
    review("ann", "one", 50),
]
ITEMS = {"described": Item("described", "The Described", "album", "Ten songs.")}


def recommendation(
    item_id: str, p: Sequence[float], rationale: str = "It suits. Well.", title: str = ""
) -> Recommendation:
    return Recommendation(
        user_id="ann",
        item_id=item_id,
        title=title,
        as_of=at(9),
        readout="mean",
        distribution=RatingDistribution(RatingScale(), tuple(p)),
        rationales=(rationale,),
        user_aspects=(),
        item_aspects=(),
        cold_start=None,
        truncated=(),
        warnings=(),
        model={},
    )


def order(*outcomes: Recommendation | Failure, top_k: int | None = None) -> list[str]:
    return [each.item_id for each in ranked("ann", at(9), outcomes, top_k)]


# Order -----------------------------------------------------------------------------------------


def test_the_best_mean_comes_first() -> None:
    low = recommendation("low", [0, 1, 0, 0, 0])
    high = recommendation("high", [0, 0, 0, 0.9, 0.1])
    middle = recommendation("middle", [0, 0, 1, 0, 0])
    assert order(low, high, middle) == ["high", "middle", "low"]
    assert order(low, high, middle, top_k=2) == ["high", "middle"]
    assert order(low, high, middle, top_k=9) == ["high", "middle", "low"]


def test_a_tie_is_broken_by_the_top_ratings_then_by_the_order_given() -> None:
    certain = recommendation("certain", [0, 0, 1, 0, 0])
    daring = recommendation("daring", [0.2, 0, 0.6, 0, 0.2])
    fours = recommendation("fours", [0, 0.3, 0.4, 0.3, 0])
    more_fours = recommendation("more_fours", [0, 0.4, 0.2, 0.4, 0])
    assert order(certain, fours, more_fours, daring) == ["daring", "more_fours", "fours", "certain"]
    twins = [recommendation(name, [0, 0, 1, 0, 0]) for name in "bac"]
    assert order(*twins) == ["b", "a", "c"]
    # 0.1 + 0.2 is not 0.3: such a difference is none.
    rounded = recommendation("rounded", [0, 0, 1 - 1e-9, 1e-9, 0])
    assert order(certain, rounded) == ["certain", "rounded"]


# The type --------------------------------------------------------------------------------------


def test_it_is_a_sequence_and_travels_as_json() -> None:
    failure = Failure("gone", "InputError", "appears nowhere")
    outcomes: list[Recommendation | Failure] = []
    outcomes += [
        recommendation("a", [0, 0, 0, 0, 1]),
        failure,
        recommendation("b", [1, 0, 0, 0, 0]),
    ]
    found = ranked("ann", at(9), outcomes, top_k=1)
    assert isinstance(found, Sequence)
    assert [each.item_id for each in found] == ["a"]
    assert (len(found), found[0].item_id, found[-1].item_id, found.rated) == (1, "a", "a", 2)
    assert [each.item_id for each in found[:5]] == ["a"]
    assert found.failures == (failure,)
    again = Ranking.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.summary == found.to_dict()["summary"]


def test_the_summary_is_computed() -> None:
    best = recommendation("b", [0, 0, 0, 0.5, 0.5], "Short  songs\nsuit them. More.", "The Best")
    alone = ranked("ann", at(9), [best])
    assert alone.summary == (
        "Best of 1 rated for ann: The Best, mean 4.50 on the scale 1 to 5. Short songs suit them."
    )
    failed = Failure("gone", "InputError", "appears nowhere")
    worse = recommendation("w", [1, 0, 0, 0, 0])
    some = ranked("ann", at(9), [failed, worse, best, failed], top_k=1)
    assert some.summary.startswith("Best of 2 rated for ann: The Best, mean 4.50")
    assert some.summary.endswith("Short songs suit them. 2 could not be rated.")
    untitled = ranked("ann", at(9), [recommendation("bare", [0, 0, 1, 0, 0], rationale="")])
    assert untitled.summary == "Best of 1 rated for ann: bare, mean 3.00 on the scale 1 to 5."


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("Rates it 3.5 at most! Two.", "Rates it 3.5 at most!"),
        ("no end", "no end"),
        ("", ""),
        ("w" * 400, "w" * 299 + "…"),
    ],
)
def test_the_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_where_none_was_rated_the_error_says_why() -> None:
    known, engine = Failure("a", "UnknownPairError", "who?"), Failure("b", "RequestError", "long")
    with pytest.raises(InputError, match="none of the 2 candidates could be rated: a: who"):
        ranked("ann", at(9), [known, known])
    with pytest.raises(EngineError, match=r"a: who\?; b: long"):
        ranked("ann", at(9), [known, engine])
    with pytest.raises(InputError, match="and 2 more"):
        ranked("ann", at(9), [known] * 5)


# Popular items ---------------------------------------------------------------------------------


@pytest.fixture
def source() -> TableReviewSource:
    return TableReviewSource.from_reviews(TABLE, ITEMS.values())


def test_popular_items_are_counted_as_of_the_time(source: TableReviewSource) -> None:
    assert popular_items(source, "ann", 9, as_of=at(9)) == ["one", "two"]
    assert popular_items(source, "ann", 1, as_of=at(9)) == ["one"]
    assert popular_items(source, "ann", 9, as_of=at(40)) == ["one", "two", "late"]
    assert popular_items(source, "ann", 9) == ["two", "late"]  # she reviewed `one` in the end
    assert popular_items(source, "zoe", 9, as_of=at(9)) == ["one", "folk", "two", "rock"]
    assert popular_items(source, "zoe", 9, as_of=at(0.5)) == ["one", "two"]
    assert popular_items(source, "zoe", 9, as_of=at(-5)) == []


def test_popular_items_need_a_source_that_lists_them(source: TableReviewSource) -> None:
    class Silent:
        """Answers the protocol and no more."""

        def __getattr__(self, name: str) -> Any:
            if name == "item_ids":
                raise AttributeError(name)
            return getattr(source, name)

    with pytest.raises(InputError, match="Silent cannot list its items: give it a method item_ids"):
        popular_items(Silent(), "ann", 3)
    with pytest.raises(InputError, match="no reviews to choose candidates from"):
        popular_items(None, "ann", 3)
    with pytest.raises(SettingError, match="bad number of candidates 0"):
        popular_items(source, "ann", 0)
    with pytest.raises(DataError, match="as_of"):
        popular_items(source, "ann", 3, as_of="soon")


# The facade ------------------------------------------------------------------------------------


def five_for(*wanted: str) -> Callable[[RateRequest], list[float]]:
    """A 5 for items with one of these titles, else a 1."""
    return lambda request: (
        [0, 0, 0, 0, 1] if any(name in prompt(request) for name in wanted) else [1, 0, 0, 0, 0]
    )


@pytest.fixture
def rater(fake: Fake) -> Iterator[Recommender]:
    script = Script(weights=five_for("Two"))
    engine = fake(write=script.write, rate=script.rate)
    with Recommender.load(
        TABLE, ITEMS, engine=engine, store=InMemoryStore(), checkpointer=InMemorySaver()
    ) as made:
        yield made


def test_rank_and_arank_agree_with_rate(rater: Recommender) -> None:
    found = rater.rank("ann", ["one", "two", "one"], as_of=at(9))
    assert [each.item_id for each in found] == ["two", "one"]
    alone = [rater.rate("ann", name, as_of=at(9)) for name in ("two", "one")]
    assert [each.distribution for each in found] == [each.distribution for each in alone]
    assert [each.rationales for each in found] == [each.rationales for each in alone]
    assert [each.user_aspects for each in found] == [each.user_aspects for each in alone]
    later = asyncio.run(rater.arank("ann", ["one", "two", "one"], as_of=at(9)))
    assert [each.distribution for each in later] == [each.distribution for each in found]
    assert later.summary == found.summary


def test_items_are_ids_or_items(rater: Recommender) -> None:
    new = Item("new", "Two of a Kind", "album", "Songs.")
    items: list[str | Item] = ["one", new, "described"]
    found = rater.rank("ann", iter(items), as_of=at(9))
    assert [(each.item_id, each.title) for each in found] == [
        ("new", "Two of a Kind"),
        ("one", "One"),
        ("described", "The Described"),
    ]
    assert found[0].cold_start == "item"


def test_all_candidates_share_one_time(rater: Recommender) -> None:
    found = rater.rank("ann", ["one", "two", "late"])
    assert {each.as_of for each in found} == {found.as_of}
    # Her review of `one` is not read for it.
    [one] = [each for each in found if each.item_id == "one"]
    assert {r.item_id for r in one.user_aspects} == {"folk", "rock"}
    assert "ann" not in {r.user_id for r in one.item_aspects}
    [two] = [each for each in found if each.item_id == "two"]
    assert "one" in {r.item_id for r in two.user_aspects}


def test_a_stream_tells_of_each_candidate(rater: Recommender) -> None:
    def checked(events: Sequence[CandidateProgress | Ranking]) -> None:
        *told, last = events
        assert isinstance(last, Ranking)
        assert [(e.done, e.of) for e in told if isinstance(e, CandidateProgress)] == [
            (1, 3),
            (2, 3),
            (3, 3),
        ]
        outcomes = {e.item_id: e.outcome for e in told if isinstance(e, CandidateProgress)}
        assert outcomes["gone"] == last.failures[0]
        assert outcomes["two"] == last[0]

    arguments: Any = ("ann", ["one", "gone", "two"])

    async def listen() -> list[CandidateProgress | Ranking]:
        return [event async for event in rater.astream_rank(*arguments, as_of=at(9))]

    checked(list(rater.stream_rank(*arguments, as_of=at(9))))
    checked(asyncio.run(listen()))


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([], {}, InputError, "nothing to rank"),
        ("one", {}, InputError, "bad candidates 'one'"),
        (["one", 7], {}, InputError, "candidate 2 is 7"),
        (["one", ""], {}, InputError, "candidate 2 has an empty item_id"),
        (["one"], {"top_k": 0}, SettingError, "bad top_k 0"),
        (["one"], {"top_k": True}, SettingError, "bad top_k True"),
        (["one"], {"item": ITEMS["described"]}, SettingError, "item is of one item"),
        (["one"], {"ask": True}, SettingError, "can ask nobody"),
        (["one"], {"moon": 1}, SettingError, "unknown setting moon"),
        (["one"], {"as_of": "soon"}, DataError, "bad as_of 'soon'"),
        (["gone", "lost"], {}, InputError, "none of the 2 candidates"),
    ],
)
def test_bad_input_is_named(
    rater: Recommender, items: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rater.rank("ann", items, **options)
    with pytest.raises(error, match=message):
        asyncio.run(rater.arank("ann", items, **options))


def test_a_candidate_that_is_refused_leaves_the_others(fake: Fake) -> None:
    def refuse(request: Any) -> None:
        if "Two" in prompt(request) and not hasattr(request, "format"):
            raise RequestError("too long by far")

    script = Script(before=refuse)
    with Recommender.load(
        TABLE, engine=fake(write=script.write, rate=script.rate), store=InMemoryStore()
    ) as rater:
        found = rater.rank("ann", ["two", "one", "gone"], as_of=at(9))
        with pytest.raises(EngineError, match="two: too long by far"):
            rater.rank("ann", ["two"], as_of=at(9))
    assert [each.item_id for each in found] == ["one"]
    assert [(each.item_id, each.error) for each in found.failures] == [
        ("two", "RequestError"),
        ("gone", "InputError"),
    ]
    assert found.failures[0].reason == "too long by far"
    assert found.failures[1].reason.startswith("item 'gone' appears nowhere")


def test_a_ranking_leaves_no_run_behind(rater: Recommender) -> None:
    rater.rank("ann", ["one"], as_of=at(9), config={"configurable": {"thread_id": "t"}})
    saver: Any = rater.graph.checkpointer
    assert list(saver.list(None)) == []
