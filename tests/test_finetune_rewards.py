"""The reward of a rationale: what earns what, and that nothing broken is ever worth having."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune.grpo.rewards import (
    HEAVIEST,
    RationaleReward,
    completion_text,
    component_means,
    nearest_value,
    rating_weights,
)
from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import SettingError, TrainingError
from r4r_graph.evidence import Evidence, TokenBudgets
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.schema import AspectSummary, Item, ReviewAspects

Make = Callable[..., BatchingEngine]

SCALE = RatingScale()
GOOD = "This person likes short warm songs, and this album has many of them, so it will suit."
BETTER = "This person likes long cold noise, and this album has none of it, so it will not suit."
LEAKING = "This person likes short warm songs and will surely give the album five stars in the end."
FAULTY = "This person likes short warm songs, and this album has many of them, so it"  # unfinished


def evidence(title: str = "Songs") -> str:
    earlier = ReviewAspects("u", "j", "Other", 1.0, 4.0, AspectSummary(positive=("warm songs",)))
    stats = RatingStats.of([4.0])
    whole = Evidence(Item("i", title, "album"), (earlier,), (), stats, RatingStats())
    return json.dumps(whole.to_dict())


def judgement(request: RateRequest) -> str:
    """The rationale in a judge's prompt."""
    return request.messages[-1].content.partition("<judgement>")[2].partition("</judgement>")[0]


def by_words(request: RateRequest) -> list[float]:
    """Five for songs, one for noise."""
    said = judgement(request)
    if "broken" in said:
        raise RuntimeError("no judgement today")
    return [1, 0, 0, 0, 0] if "noise" in said else [0, 0, 0, 0, 1]


def reward(make: Make, rate: Any = by_words, **settings: Any) -> RationaleReward:
    engine = make(adapters=["predictor"], rate=rate)
    return RationaleReward(engine, SCALE, TokenBudgets(), **settings)


def earned(
    judge: RationaleReward, texts: list[Any], rating: float = 4.0, **more: Any
) -> list[float]:
    n = len(texts)
    return judge(completions=texts, evidence=[evidence()] * n, rating=[rating] * n, **more)


def test_the_reward_is_minus_the_error_of_the_mean(fake: Make) -> None:
    assert earned(reward(fake), [GOOD, BETTER]) == [-1.0, -3.0]
    assert earned(reward(fake), [GOOD], rating=4.75) == [-0.25]
    half = reward(fake, rate=lambda _: [0, 0, 0, 0.5, 0.5])
    assert earned(half, [GOOD], rating=4.5) == [0.0]


def test_the_judge_reads_the_predictors_prompt_with_the_rationale(fake: Make) -> None:
    asked: list[RateRequest] = []

    def rate(request: RateRequest) -> list[float]:
        asked.append(request)
        return [1, 1, 1, 1, 1]

    judge = reward(fake, rate=rate)
    earned(judge, [GOOD])
    assert asked[0].adapter == "predictor"
    whole = "\n".join(message.content for message in asked[0].messages)
    assert GOOD in whole
    assert "1: 4" in whole  # the history's, as at inference
    bare = RationaleReward(fake(rate=rate), SCALE, TokenBudgets())
    earned(bare, [GOOD])
    assert asked[1].adapter is None  # no adapter there: the base model judges


def test_one_batch_goes_to_the_judge_at_once(fake: Make) -> None:
    sizes: list[int] = []
    judge = reward(fake)
    inner = judge._engine.rate
    judge._engine.rate = lambda rows, **how: (sizes.append(len(rows)), inner(rows, **how))[1]  # type: ignore[method-assign]
    earned(judge, [GOOD, "", BETTER, LEAKING, GOOD])
    assert sizes == [3]  # what needs no judge is not shown to it


@pytest.mark.parametrize("text", ["", "   \n", LEAKING, "broken " + GOOD])
def test_empty_leaking_and_failed_rationales_earn_the_worst(fake: Make, text: str) -> None:
    judge = reward(fake)
    assert earned(judge, [GOOD, text, BETTER]) == [-1.0, judge.worst, -3.0]
    assert judge.worst <= -(SCALE.high - SCALE.low + 1.0 + 0.5)


def test_nothing_that_was_judged_is_below_the_worst(fake: Make) -> None:
    weights = {1.0: 7.5, 5.0: 0.5}
    for settings in ({}, {"weights": weights}, {"leak_penalty": 0.0, "form_penalty": 0.0}):
        judge = reward(fake, **settings)
        assert all(
            judge.worst <= one
            for rating in (1.0, 3.0, 5.0)
            for one in earned(judge, [GOOD, BETTER, FAULTY, LEAKING, ""], rating=rating)
        )
    light = reward(fake, weights=dict.fromkeys(SCALE.values, 0.1))
    assert light.worst <= -(4 + 1.0 + 0.5)  # a small weight does not lift the floor


def test_an_engine_that_raises_gives_the_worst(fake: Make) -> None:
    judge = reward(fake)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("gone")

    judge._engine.rate = fail  # type: ignore[method-assign]
    assert earned(judge, [GOOD, BETTER]) == [judge.worst] * 2
    judge._engine.rate = lambda *_, **__: []  # type: ignore[method-assign]
    assert earned(judge, [GOOD, BETTER]) == [judge.worst] * 2


def test_evidence_or_a_rating_that_cannot_be_used_gives_the_worst(fake: Make) -> None:
    judge = reward(fake)
    rewards = judge(
        completions=[GOOD, GOOD, GOOD],
        evidence=["{}", evidence(), evidence()],
        rating=[4.0, float("nan"), 4.0],
    )
    assert rewards == [judge.worst, judge.worst, -1.0]


def test_a_screen_that_raises_gives_the_worst(fake: Make) -> None:
    def screen(text: str, _: Evidence) -> list[str]:
        raise ValueError(text)

    for name in ("leak_screen", "form_screen"):
        judge = reward(fake, **{name: screen})
        assert earned(judge, [GOOD]) == [judge.worst]


def test_faults_of_form_cost_the_penalty_once(fake: Make) -> None:
    assert earned(reward(fake, form_penalty=0.25), [GOOD, FAULTY]) == [-1.0, -1.25]
    two = reward(fake, form_penalty=0.25, form_screen=lambda *_: ["a", "b"])
    assert earned(two, [GOOD]) == [-1.25]


def test_titles_may_say_what_they_say(fake: Make) -> None:
    said = "This person likes warm songs, and Five Stars is an album of warm songs throughout."
    judge = reward(fake)
    given = {"completions": [said], "rating": [4.0]}
    assert judge(evidence=[evidence("Five Stars")], **given) == [-1.0]
    assert judge(evidence=[evidence("Songs")], **given) == [judge.worst]


def test_a_rating_on_another_scale_leaks_too(fake: Make) -> None:
    said = "This person likes warm songs, and would surely give this album of songs a 17 out of 20."
    engine = fake(rate=lambda request: [1.0] * len(request.scale.values))
    wide = RationaleReward(engine, RatingScale.parse("1-20"), TokenBudgets())
    assert earned(wide, [said]) == [wide.worst]


def test_a_judge_that_always_fails_ends_the_run(fake: Make) -> None:
    judge = reward(fake)
    for _ in range(2):
        earned(judge, ["broken " + GOOD])
    earned(judge, [GOOD, "broken " + GOOD])  # one success: not broken
    earned(judge, [""])  # nothing was asked
    for _ in range(2):
        earned(judge, ["broken " + GOOD])
    with pytest.raises(TrainingError, match="no judgement today"):
        earned(judge, ["broken " + GOOD])


def test_completions_come_plain_or_as_conversations(fake: Make) -> None:
    turns = [{"role": "assistant", "content": f" {BETTER}\n"}]
    assert earned(reward(fake), [GOOD, turns]) == [-1.0, -3.0]
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([{"role": "assistant", "thinking": "x"}]) == ""
    assert completion_text([]) == ""


def test_metrics_say_what_the_rewards_are_made_of(fake: Make) -> None:
    said: dict[str, float] = {}
    texts = [GOOD, BETTER, LEAKING, "", FAULTY, "broken " + GOOD, GOOD, GOOD]
    earned(reward(fake), texts, log_metric=said.__setitem__, trainer_state=None, prompts=None)
    assert said == {
        "rationale/error": pytest.approx((1 + 3 + 1 + 1 + 1) / 5),
        "rationale/leaking": 1 / 8,
        "rationale/faulty_form": 1 / 8,
        "rationale/empty": 1 / 8,
        "rationale/failed": 1 / 8,
    }
    assert "error" not in component_means(reward(fake).judge([""], [evidence()], [4.0]))


def test_weights_scale_the_error_and_not_the_penalty(fake: Make) -> None:
    weights = {4.0: 2.0, 1.0: 0.5}
    judge = reward(fake, weights=weights)
    assert earned(judge, [GOOD, FAULTY], rating=4.0) == [-2.0, -2.5]
    assert earned(judge, [GOOD], rating=3.6) == [pytest.approx(-2.8)]  # rounds to 4
    assert earned(judge, [GOOD], rating=1.0) == [-2.0]
    assert earned(judge, [GOOD], rating=2.0) == [-3.0]  # a value that has no weight


def test_weights_are_inverse_frequencies_with_mean_one() -> None:
    ratings = [5.0] * 6 + [4.6] * 2 + [1.0] * 2
    weights = rating_weights(ratings, SCALE)
    assert weights == {1.0: pytest.approx(2.5), 5.0: pytest.approx(0.625)}
    of_rows = [weights[nearest_value(rating, SCALE)] for rating in ratings]
    assert sum(of_rows) / len(of_rows) == pytest.approx(1.0)
    assert rating_weights([3.0, 4.0], SCALE) == {3.0: 1.0, 4.0: 1.0}


def test_a_rating_that_is_seen_once_does_not_outweigh_all() -> None:
    weights = rating_weights([5.0] * 10_000 + [1.0], SCALE)
    assert weights[1.0] / weights[5.0] == pytest.approx(HEAVIEST / (10_001 / 20_000))
    assert weights[5.0] * 10_000 + weights[1.0] == pytest.approx(10_001)


def test_ratings_round_to_the_nearest_value_and_up_from_the_middle() -> None:
    halves = RatingScale.parse("0.5,1,1.5,2")
    assert [nearest_value(r, SCALE) for r in (1.4, 1.5, 4.9, 2.5)] == [1, 2, 5, 3]
    assert nearest_value(1.2, halves) == 1.0


@pytest.mark.parametrize("name", ["leak_penalty", "form_penalty"])
@pytest.mark.parametrize("penalty", [-0.1, float("nan")])
def test_penalties_are_not_negative(fake: Make, name: str, penalty: float) -> None:
    with pytest.raises(SettingError, match=name):
        reward(fake, **{name: penalty})
