"""The frozen types: read-outs worked out by hand, and round trips through JSON."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from r4r_graph.errors import DataError, R4RError, SettingError
from r4r_graph.ratings import READOUTS, RatingDistribution, RatingScale, RatingStats
from r4r_graph.schema import (
    AspectSummary,
    Influence,
    Item,
    NodeUsage,
    Recommendation,
    Review,
    ReviewAspects,
    Truncation,
    plain_number,
    unix_seconds,
)

STARS = RatingScale()
UNEVEN = RatingScale((1, 2, 4, 10))


def over(*p: float, scale: RatingScale = STARS) -> RatingDistribution:
    return RatingDistribution(scale, p)


# Scales ------------------------------------------------------------------------------------------


def test_scales_are_parsed() -> None:
    assert RatingScale.parse("1-5") == STARS
    assert RatingScale.parse(" 1 - 10 ").values == tuple(range(1, 11))
    assert RatingScale.parse("0-1").values == (0, 1)
    assert RatingScale.parse("0.5, 1,1.5").values == (0.5, 1, 1.5)
    assert RatingScale.parse("-1,0,1").values == (-1, 0, 1)
    assert RatingScale.parse([1, 2.5]).values == (1, 2.5)
    assert (STARS.low, STARS.high) == (1, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "5-1",
        "3-3",
        "a-b",
        "1-",
        "-5-5",
        "1.5-3",
        "1,1",
        "2,1",
        "1,,2",
        "1,nan",
        "1,inf",
        ",",
    ],
)
def test_what_is_no_scale(text: str) -> None:
    with pytest.raises(SettingError, match="bad rating scale") as caught:
        RatingScale.parse(text)
    assert isinstance(caught.value, R4RError)


@pytest.mark.parametrize("values", [(), (1,), (1, 1), (2, 1), (1, math.nan), (1, 1.00000001)])
def test_values_that_are_no_scale(values: tuple[float, ...]) -> None:
    """The last two are written alike."""
    with pytest.raises(SettingError, match="bad rating scale"):
        RatingScale(values)


def test_labels_are_as_short_as_can_be() -> None:
    assert STARS.labels == ("1", "2", "3", "4", "5")
    assert RatingScale((-0.5, 0, 2.25, 100)).labels == ("-0.5", "0", "2.25", "100")


def test_ratings_are_held_against_the_scale() -> None:
    for rating in (1, 1.01, 3.7, 5):
        assert STARS.check(rating) == rating
    for rating in (0.99, 5.01, -1, math.nan, math.inf):
        with pytest.raises(DataError, match="off the scale 1 to 5"):
            STARS.check(rating)


# Read-outs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "mean", "median", "mode"),
    [
        ((0.1, 0.2, 0.4, 0.2, 0.1), 3.0, 3.0, 3),
        ((0.2, 0.2, 0.2, 0.2, 0.2), 3.0, 3.0, 1),
        # half of the mass lies under 4 + 0.5 * (0.05 / 0.25)
        ((0, 0, 0.2, 0.5, 0.3), 4.1, 4.1, 4),
        # exactly half of it up to 4.5, where the cell of 4 ends, and half of it on 5
        ((0.05, 0.05, 0.1, 0.3, 0.5), 4.15, 4.75, 5),
        # in the lower half of a cell: 3.5 + 0.5 * (0.1 / 0.2)
        ((0, 0.2, 0.2, 0.4, 0.2), 3.6, 3.75, 4),
        # an end keeps its mass
        ((0.9, 0.05, 0, 0, 0.05), 1.25, 1.0, 1),
        ((0, 0, 0, 0.4, 0.6), 4.6, 5.0, 5),
        ((0.4, 0, 0, 0, 0.6), 3.4, 5.0, 5),
        # two equal heaps: the middle of the gap between them
        ((0.5, 0, 0, 0, 0.5), 3.0, 3.0, 1),
    ],
)
def test_readouts_by_hand(p: tuple[float, ...], mean: float, median: float, mode: float) -> None:
    found = over(*p)
    assert found.mean == pytest.approx(mean)
    assert found.median == pytest.approx(median)
    assert found.mode == mode
    assert [found.read(readout) for readout in READOUTS] == [found.mean, found.median, found.mode]


@pytest.mark.parametrize("scale", [STARS, UNEVEN, RatingScale((0, 1))])
def test_readouts_of_a_point_mass(scale: RatingScale) -> None:
    for i, value in enumerate(scale.values):
        found = over(*(float(j == i) for j in range(len(scale.values))), scale=scale)
        assert [found.read(readout) for readout in READOUTS] == [value] * 3
        assert found.entropy == 0
        assert not math.copysign(1, found.entropy) < 0, "not -0.0"
        assert found.confidence == 1


def test_readouts_on_an_uneven_scale() -> None:
    """The cell of 4 reaches from 3 to 7."""
    found = over(0.1, 0.2, 0.5, 0.2, scale=UNEVEN)
    assert found.mean == pytest.approx(0.1 + 0.4 + 2 + 2)
    assert found.median == pytest.approx(3 + 1 * (0.2 / 0.25))
    upper = over(0.1, 0.1, 0.5, 0.3, scale=UNEVEN)
    assert upper.median == pytest.approx(4 + 3 * (0.05 / 0.25))
    assert upper.mode == 4


def test_medians_follow_from_their_definition() -> None:
    """As much mass under it as over it, an inner value's spread evenly over its cell."""
    dice = random.Random(0)
    for _ in range(300):
        size = dice.randint(2, 12)
        steps = [dice.choice([0.5, 1, 2, 3]) for _ in range(size)]
        scale = RatingScale(tuple(float(sum(steps[: i + 1])) for i in range(size)))
        weights = [dice.random() ** 4 for _ in range(size)]
        found = over(*(w / sum(weights) for w in weights), scale=scale)
        if found.median in (scale.low, scale.high):
            assert max(found.probabilities[0], found.probabilities[-1]) > 0.5 - 1e-9
        else:
            assert mass_under(found, found.median) == pytest.approx(0.5)
        assert scale.low <= found.median <= scale.high
        mirrored = RatingScale(tuple(-v for v in reversed(scale.values)))
        mirror = over(*reversed(found.probabilities), scale=mirrored)
        assert mirror.median == pytest.approx(-found.median)
        assert mirror.mean == pytest.approx(-found.mean)


def mass_under(found: RatingDistribution, at: float) -> float:
    values = found.scale.values
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    total = found.probabilities[0] if at > values[0] else 0.0
    for i, (value, p) in enumerate(zip(values[1:-1], found.probabilities[1:-1], strict=True)):
        for low, high in ((middles[i], value), (value, middles[i + 1])):
            total += p / 2 * min(max((at - low) / (high - low), 0), 1)
    return total


def test_entropy_and_confidence() -> None:
    uniform = over(0.2, 0.2, 0.2, 0.2, 0.2)
    assert uniform.entropy == pytest.approx(math.log(5))
    assert uniform.confidence == 0.2
    assert over(0.5, 0.5, 0, 0, 0).entropy == pytest.approx(math.log(2))


def test_the_lower_value_wins_a_tie() -> None:
    assert over(0, 0.5, 0, 0.5, 0).mode == 2


@pytest.mark.parametrize(
    "p",
    [
        (),
        (0.5, 0.5),
        (0.2, 0.2, 0.2, 0.2, 0.1),
        (0.2, 0.2, 0.2, 0.2, 0.2, 0.0),
        (1.5, -0.5, 0, 0, 0),
        (math.nan, 0, 0, 0, 1),
        (math.inf, 0, 0, 0, 0),
    ],
)
def test_what_is_no_distribution(p: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not a distribution"):
        over(*p)


def test_a_mixture() -> None:
    parts = [
        RatingDistribution(STARS, (0, 0, 0, 0.4, 0.6), 0.8),
        RatingDistribution(STARS, (0.2, 0, 0, 0.8, 0), 0.4),
        RatingDistribution(STARS, (0.1, 0.3, 0.2, 0, 0.4), 0.6),
    ]
    mixed = RatingDistribution.mix(parts)
    assert mixed.probabilities == pytest.approx((0.1, 0.1, 0.2 / 3, 0.4, 1 / 3))
    assert mixed.mass == pytest.approx(0.6)
    assert mixed.mean == pytest.approx(sum(part.mean for part in parts) / 3)
    assert mixed.scale == STARS
    assert RatingDistribution.mix(parts[:1]) == parts[0]
    assert mixed.entropy > parts[0].entropy


# Times and numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (1_700_000_000, 1_700_000_000),
        (1.5, 1.5),
        (-86400, -86400),
        ("1700000000", 1_700_000_000),
        (" 12.25 ", 12.25),
        ("1970-01-02", 86400),
        ("2023-11-14", 1_699_920_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000),
        ("2023-11-14 22:13:20", 1_700_000_000),
        ("2023-11-15T00:13:20+02:00", 1_700_000_000),
        ("1960-01-01", -315_619_200),
        (datetime(2023, 11, 14, 22, 13, 20), 1_700_000_000),
        (datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC), 1_700_000_000),
        (datetime(2023, 11, 14, 19, 13, 20, tzinfo=timezone(-timedelta(hours=3))), 1_700_000_000),
    ],
)
def test_times(value: Any, seconds: float) -> None:
    assert unix_seconds(value) == seconds
    assert isinstance(unix_seconds(value), float)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1_700_000_000_000, "milliseconds"),
        ("1700000000000", "milliseconds"),
        (-1_700_000_000_000, "milliseconds"),
        (math.nan, "finite"),
        ("nan", "finite"),
        (math.inf, "finite"),
        (True, "unix seconds"),
        ("", "ISO 8601"),
        ("yesterday", "ISO 8601"),
        ("2023-13-40", "ISO 8601"),
        (None, "ISO 8601"),
        ([], "ISO 8601"),
        (date(2023, 11, 14), "ISO 8601"),
        pytest.param(10**400, "too large to be a time", id="huge"),
    ],
)
def test_what_is_no_time(value: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^bad as_of.*{reason}"):
        unix_seconds(value, what="as_of")


def test_plain_numbers() -> None:
    assert [repr(plain_number(v)) for v in (4.0, 4.5, 0, -2.0, 1e9)] == [
        "4",
        "4.5",
        "0",
        "-2",
        "1000000000",
    ]


def test_statistics() -> None:
    assert RatingStats.of([]) == RatingStats(0, None, None)
    assert RatingStats.of([4]) == RatingStats(1, 4, 0)
    found = RatingStats.of([2, 4, 4, 4, 5, 5, 7, 9])
    assert (found.count, found.mean, found.spread) == (8, 5, 2)
    assert RatingStats.of([0.1] * 3).spread == pytest.approx(0, abs=1e-7)
    assert json.loads(json.dumps(RatingStats().to_dict())) == RatingStats().to_dict()


# Rows --------------------------------------------------------------------------------------------

REVIEW = Review("u1", "i1", 4.5, 1_700_000_000, "A title", "Some\nwords ☺")


def through_json(value: Any, **settings: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False, **settings))


def test_reviews_through_json() -> None:
    assert Review.from_dict(through_json(REVIEW.to_dict())) == REVIEW
    assert list(REVIEW.to_dict()) == [
        "user_id",
        "item_id",
        "title",
        "rating",
        "timestamp",
        "review",
    ]
    bare = Review("u", "i", 3, 0)
    assert Review.from_dict(through_json(bare.to_dict())) == bare


def test_reviews_of_loose_rows() -> None:
    row = {"user_id": 0, "item_id": 7, "rating": "4", "timestamp": "2023-11-14", "text": "Good"}
    assert Review.from_dict(row) == Review("0", "7", 4, 1_699_920_000, "", "Good")
    empty = {"rating": 3, "timestamp": 5, "user_id": None, "review": None, "title": None}
    assert Review.from_dict(empty) == Review("", "", 3, 5)
    assert Review.from_dict(empty | {"review": "", "text": "not this"}).text == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rating": None}, "no 'rating'"),
        ({"timestamp": None}, "no 'timestamp'"),
        ({"rating": "good"}, "not a number"),
        ({"rating": [4]}, "not a number"),
        ({"rating": math.nan}, "not a finite number"),
        ({"timestamp": "late"}, "bad timestamp"),
    ],
)
def test_reviews_that_are_none(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Review.from_dict(REVIEW.to_dict() | changes)
    missing = {k: v for k, v in REVIEW.to_dict().items() if k not in changes}
    with pytest.raises(DataError, match=f"no '{next(iter(changes))}'"):
        Review.from_dict(missing)


def test_a_reviews_key_covers_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"user_id": "u2"},
        {"item_id": "i2"},
        {"rating": 4.0},
        {"timestamp": 1},
        {"title": "B"},
        {"text": "Other"},
        {"user_id": "u1i1", "item_id": ""},
    ]
    keys = {REVIEW.key, *(replace(REVIEW, **change).key for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert replace(REVIEW).key == REVIEW.key
    assert len(REVIEW.key) == 16
    whole = replace(REVIEW, rating=4)  # type: ignore[arg-type]
    assert whole.key == replace(REVIEW, rating=4.0).key, "equal reviews, equal keys"
    assert Review.from_dict(through_json(REVIEW.to_dict())).key == REVIEW.key


def test_items_through_json() -> None:
    item = Item("i1", "A title", "album", "Words")
    assert Item.from_dict(through_json(item.to_dict())) == item
    assert Item.from_dict({"item_id": 0, "title": None}) == Item("0")
    assert Item.from_dict({}) == Item("")


def recommendation(scale: RatingScale = STARS, **changes: Any) -> Recommendation:
    weights = [float(i + 1) for i in range(len(scale.values))]
    p = tuple(w / sum(weights) for w in weights)
    aspects = ReviewAspects(
        "u1", "i2", "Other", 1_600_000_000.5, 3.5, AspectSummary(("warm",), (), ("honesty", "ü"))
    )
    plain = Recommendation(
        user_id="u1",
        item_id="i1",
        title="A title",
        as_of=1_700_000_000,
        readout="median",
        distribution=RatingDistribution(scale, p, 0.97),
        rationales=("It fits.", "It does not."),
        user_aspects=(aspects, replace(aspects, item_id="i3")),
        item_aspects=(replace(aspects, user_id="u2", summary=AspectSummary()),),
        cold_start=None,
        truncated=(Truncation("review", "cut from 400 to 320 tokens"),),
        warnings=("a warning",),
        model={"base": "smollm2-135m", "adapters": {"reasoner": None}},
        usage={"summarizer": NodeUsage(3, 1, 200, 40, 0.25), "reasoner": NodeUsage()},
        influence=(
            Influence("user_review", 3.0, 0.5, "u1", "i2", "Other", 1_600_000_000.5),
            Influence("rationale", 3.75, -0.25),
        ),
        answers=({"about": "rationale", "action": "accept"},),
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    "given",
    [
        recommendation(),
        recommendation(RatingScale.parse("1-10")),
        recommendation(RatingScale.parse("-1,0,0.5,1,10")),
        recommendation(cold_start="both", user_aspects=(), item_aspects=(), truncated=()),
        recommendation(rationales=("Only one.",), warnings=(), usage={}),
    ],
    ids=["stars", "1-10", "odd scale", "cold", "one rationale"],
)
def test_recommendations_through_json(given: Recommendation) -> None:
    row = through_json(given.to_dict())
    assert Recommendation.from_dict(row) == given
    assert Recommendation.from_dict(row).to_dict() == given.to_dict()
    # PostgreSQL's jsonb, among others, gives members back in an order of its own.
    assert Recommendation.from_dict(through_json(given.to_dict(), sort_keys=True)) == given


def test_what_a_recommendation_says() -> None:
    given = recommendation()
    row = given.to_dict()
    assert given.rating == row["rating"] == row["median"] == given.distribution.median
    assert row["mean"] == pytest.approx(55 / 15)
    assert row["mode"] == 5
    assert row["distribution"] == {str(i): pytest.approx(i / 15) for i in range(1, 6)}
    assert row["rating_mass"] == 0.97
    assert row["rationale"] == given.rationale == "It fits."
    assert row["rationales"] == ["It fits.", "It does not."]
    assert row["usage"]["summarizer"]["cache_hits"] == 1
    assert row["user_aspects"][0]["values"] == ["honesty", "ü"]
    assert "rationales" not in recommendation(rationales=("One.",)).to_dict()
    assert replace(given, readout="mode").rating == 5
    assert row["influence"][1] == {
        **{"what": "rationale", "without": 3.75, "change": -0.25},
        **{"user_id": "", "item_id": "", "title": "", "timestamp": 0.0},
    }


def test_a_persons_last_rating_is_the_rating() -> None:
    first, last = ({"about": "rating", "action": "rate", "rating": n} for n in (2, 1))
    accepted = {"about": "rating", "action": "accept"}
    assert recommendation(answers=(first, last, accepted)).rating == 1.0
    assert recommendation(answers=(accepted,)).rating == recommendation().distribution.median


def test_what_came_later_may_be_absent() -> None:
    row = recommendation().to_dict()
    del row["influence"], row["answers"]
    found = Recommendation.from_dict(row)
    assert (found.influence, found.answers) == ((), ())
