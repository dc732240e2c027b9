"""The reward of a rationale: how well the predictor rates once it has read it.

    reward = RationaleReward(engine, scale, budgets)
    trainer = GRPOTrainer(reward_funcs=reward, ...)

A rationale earns minus the error of the predictor's mean rating, |mean - true|, on the scale of the
ratings (0 is best). Form faults cost a penalty. What cannot or must not be judged, an empty answer,
one that names a rating, an error in the judge, earns `RationaleReward.worst`, which nothing that
was judged undercuts: a reward of 0 for an exception would be the best one there is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r4r_graph.engine.base import Engine, RateRequest, RateResult
from r4r_graph.errors import SettingError, TrainingError
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from r4r_graph.evidence import Evidence, TokenBudgets
from r4r_graph.experts import Predictor
from r4r_graph.ratings import RatingScale

Screen = Callable[[str, Evidence], Sequence[str]]
"""A rationale and what it was written from, to the reasons to refuse it; empty where there are
none. Titles of the evidence may stand in a rationale, whatever words they have."""

HEAVIEST = 10.0
"""The largest weight that `rating_weights` gives before they are scaled to a mean of 1."""

_BROKEN = 3  # calls in a row in which every judgement failed, before the run is stopped


@dataclass(frozen=True, slots=True)
class Judgement:
    """One rationale's reward and what it is made of."""

    reward: float
    error: float | None = None
    """|mean - true|, unweighted; None where nothing was judged."""
    leaks: tuple[str, ...] = ()
    """Why the text names a rating."""
    faults: tuple[str, ...] = ()
    """What is wrong with its form."""
    empty: bool = False
    failure: str = ""
    """The judge's error."""


class RationaleReward:
    """A reward function for TRL: one reward a completion.

    Args:
        engine: rates with its adapter `predictor`, or with the base model where it has none. A
            reward model that was trained in the predictor's format does as well.
        scale: of the ratings.
        budgets: of the prompts, as at inference.
        leak_penalty: how far a rationale that names a rating stays below any judged one.
        form_penalty: taken off once where the form has faults.
        weights: scale value to the weight of the error of rows rated so (see `rating_weights`);
            None weighs all alike. All draws of one prompt share their weight, so it is lost again
            where rewards are divided by their spread within the group.
        leak_screen, form_screen: None takes those of `r4r_graph.evaluation.words.leaks`; they pass
            over the titles in the evidence.

    Raises:
        SettingError: a penalty is negative.
    """

    __name__ = "rationale"  # TRL's name for the reward in its metrics

    def __init__(
        self,
        engine: Engine,
        scale: RatingScale,
        budgets: TokenBudgets,
        *,
        leak_penalty: float = 1.0,
        form_penalty: float = 0.5,
        weights: Mapping[float, float] | None = None,
        leak_screen: Screen | None = None,
        form_screen: Screen | None = None,
    ) -> None:
        for name, penalty in (("leak_penalty", leak_penalty), ("form_penalty", form_penalty)):
            if not (math.isfinite(penalty) and penalty >= 0):
                raise SettingError(f"bad setting grpo.{name}={penalty}: a penalty is 0 or more")
        self._engine = engine
        self._predictor = Predictor(engine, scale, budgets)
        self._scale = scale
        self._form_penalty = form_penalty
        self._weights = dict(weights or {})
        self._leaks = leak_screen or self._leaks_by_scale
        self._form_faults = form_screen or _faults
        self._failed_calls = 0
        heaviest = max(1.0, *self._weights.values()) if self._weights else 1.0
        width = scale.high - scale.low
        self.worst = -(heaviest * width + leak_penalty + form_penalty)
        """The floor: of an empty or a leaking rationale, and of an error in the judge."""

    def __call__(
        self,
        completions: Sequence[Any],
        evidence: Sequence[str],
        rating: Sequence[float],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """The rewards of a batch, in its order.

        Args:
            completions: texts, or conversations of `{"role", "content"}` turns.
            evidence: column: `Evidence.to_dict()` as JSON, one a completion.
            rating: column: the target's true rating.
            log_metric: TRL's; receives the batch's mean of each component.

        Raises:
            TrainingError: the judge failed on everything, several batches in a row.
        """
        texts = [completion_text(completion) for completion in completions]
        judged = self.judge(texts, evidence, rating)
        if log_metric is not None:
            for name, value in component_means(judged).items():
                log_metric(f"rationale/{name}", value)
        self._stop_if_broken(judged)
        return [one.reward for one in judged]

    def judge(
        self, texts: Sequence[str], evidence: Sequence[str], ratings: Sequence[float]
    ) -> list[Judgement]:
        """The rewards of rationales and what they are made of."""
        known: dict[str, Evidence | Exception] = {}  # the draws of one prompt share their evidence
        for packed in evidence:
            if packed not in known:
                known[packed] = _unpacked(packed)
        shown = [known[packed] for packed in evidence]
        found = [self._screened(text, one) for text, one in zip(texts, shown, strict=True)]
        places = [i for i, one in enumerate(found) if one.reward > self.worst]
        results = self._rated([(texts[i], shown[i]) for i in places])
        for i, result in zip(places, results, strict=True):
            if isinstance(result, RateResult):
                found[i] = self._judged(found[i], result, ratings[i])
            else:
                found[i] = self._failed(result)
        return found

    def _screened(self, text: str, evidence: Evidence | Exception) -> Judgement:
        """What can be said of a text without the judge."""
        if not text:
            return Judgement(self.worst, empty=True)
        if isinstance(evidence, Exception):
            return self._failed(evidence)
        try:
            found = tuple(self._leaks(text, evidence))
            faults = tuple(self._form_faults(text, evidence))
        except Exception as error:
            return self._failed(error)
        if found:
            return Judgement(self.worst, leaks=found, faults=faults)
        return Judgement(-self._form_penalty if faults else 0.0, faults=faults)

    def _leaks_by_scale(self, text: str, evidence: Evidence) -> Sequence[str]:
        return leaks(text, self._scale, titles=_titles(evidence))

    def _judged(self, screened: Judgement, result: RateResult, rating: float) -> Judgement:
        error = abs(result.distribution.mean - rating)
        if not math.isfinite(error):
            return self._failed(ValueError(f"no finite error: rating {rating}"))
        weight = self._weights.get(nearest_value(rating, self._scale), 1.0)
        return replace(screened, reward=screened.reward - weight * error, error=error)

    def _failed(self, error: Exception) -> Judgement:
        return Judgement(self.worst, failure=f"{type(error).__name__}: {error}")

    def _rated(
        self, asked: Sequence[tuple[str, Evidence | Exception]]
    ) -> list[RateResult | Exception]:
        """A rating distribution or an error for each rationale, judged in one batch."""
        requests: list[RateRequest | Exception] = []
        for text, evidence in asked:
            try:
                assert isinstance(evidence, Evidence)  # else it was refused before
                requests.append(self._predictor.request(evidence, text, len(asked)))
            except Exception as error:
                requests.append(error)
        sound = [request for request in requests if isinstance(request, RateRequest)]
        answers: list[Any]
        try:
            answers = list(self._engine.rate(sound, return_exceptions=True)) if sound else []
            if len(answers) != len(sound):
                raise RuntimeError(f"{len(answers)} answers to {len(sound)} requests")
        except Exception as error:
            answers = [error] * len(sound)
        left = iter(answers)
        return [next(left) if isinstance(one, RateRequest) else one for one in requests]

    def _stop_if_broken(self, judged: Sequence[Judgement]) -> None:
        """A judge that always fails would make every reward the same, and training idle."""
        asked = [one for one in judged if one.error is not None or one.failure]
        if not asked:
            return
        all_failed = all(one.failure for one in asked)
        self._failed_calls = self._failed_calls + 1 if all_failed else 0
        if self._failed_calls >= _BROKEN:
            raise TrainingError(
                f"the judge failed on every rationale of {_BROKEN} batches in a row; last error: "
                f"{asked[-1].failure}"
            )


def completion_text(completion: Any) -> str:
    """The text of a completion as TRL hands it over: plain, or the turns of a conversation."""
    if isinstance(completion, str):
        return completion.strip()
    contents = [turn.get("content") for turn in completion]
    return "".join(part for part in contents if isinstance(part, str)).strip()


def component_means(judged: Sequence[Judgement]) -> dict[str, float]:
    """What a batch's rewards are made of: mean error of the judged, and shares of the others."""
    shares = {
        "leaking": [bool(one.leaks) for one in judged],
        "faulty_form": [bool(one.faults) for one in judged],
        "empty": [one.empty for one in judged],
        "failed": [bool(one.failure) for one in judged],
    }
    means = {name: sum(marks) / len(marks) for name, marks in shares.items() if marks}
    errors = [one.error for one in judged if one.error is not None]
    return {"error": sum(errors) / len(errors), **means} if errors else means


def rating_weights(ratings: Iterable[float], scale: RatingScale) -> dict[float, float]:
    """Weights against the skew of ratings: value of the scale to weight.

    A row weighs the inverse of how often its rating, rounded to the nearest value, occurs, but at
    most `HEAVIEST` times as much as evenly spread ratings would; scaled so that the mean over the
    rows is 1. Values that do not occur have none.
    """
    counts = Counter(nearest_value(rating, scale) for rating in ratings)
    rows = sum(counts.values())
    raw = {value: min(rows / (len(counts) * n), HEAVIEST) for value, n in counts.items()}
    mean = sum(raw[value] * n for value, n in counts.items()) / rows if rows else 1.0
    return {value: raw[value] / mean for value in sorted(raw)}


def nearest_value(rating: float, scale: RatingScale) -> float:
    """The scale's value nearest to a rating; the higher one in the middle."""
    return min(scale.values, key=lambda value: (abs(value - rating), -value))


def _unpacked(evidence: str) -> Evidence | Exception:
    try:
        return Evidence.from_dict(json.loads(evidence))
    except Exception as error:
        return error


def _faults(text: str, evidence: Evidence) -> Sequence[str]:
    return form_faults(text, titles=_titles(evidence))


def _titles(evidence: Evidence) -> set[str]:
    return {evidence.item.title, *(review.title for review in evidence.user_reviews)}
