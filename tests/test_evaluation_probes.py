"""Probes: what the predictor is shown under each condition, and what it costs to go on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, Review, fake_engine
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.fake import Rate
from r4r_graph.errors import InputError, SettingError
from r4r_graph.evaluation.probes import (
    CONDITIONS,
    NOT_APPLICABLE,
    exchanged,
    rate_targets,
    written,
)
from r4r_graph.evaluation.targets import row_key
from r4r_graph.schema import AspectSummary

REVIEWS = [
    Review(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10.0 * u + i, f"Title {i}", f"Word{u}x{i} here.")
    for u in range(5)
    for i in range(5)
]
TARGETS = [
    Review(f"u{n}", f"i{(n + 1) % 5}", 4.0, 1000.0 + n, text=f"Later {n}.") for n in range(5)
]


def spoken(request: GenerateRequest) -> str:
    if request.format == "aspects":
        return format_aspects(AspectSummary(positive=("melody",)))
    return f"Rationale number {hash(request.messages[1].content) % 10_000}."


def seen(out: Path, condition: str, targets: list[Review] = TARGETS) -> list[str]:
    """The predictor's prompt for each target, in order."""
    prompts: dict[str, str] = {}

    def rate(request: RateRequest) -> list[float]:
        text = "\n".join(message.content for message in request.messages)
        prompts[text] = text
        return [1, 1, 1, 1, 1]

    with open_with(rate) as recommender:
        texts = None
        if condition == "swapped_rationale":
            texts = {row_key(t): [f"Written for {t.user_id}."] for t in targets}
        rate_targets(
            recommender, targets, out, name="x", condition=condition, own=texts, history=3,
            concurrency=1,
        )  # fmt: skip
    return list(prompts)


def open_with(rate: Rate | None = None) -> Recommender:
    engine = fake_engine(rate=rate, write=spoken)
    return Recommender.load(REVIEWS, engine=engine, store=InMemoryStore())


def test_each_condition_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    as_is = seen(tmp_path, "as_is")
    bare = seen(tmp_path, "without_rationale")
    for whole, less in zip(as_is, bare, strict=True):
        before, judgement = whole.split("<judgement>")
        _, after = judgement.split("</judgement>\n")
        assert less == before + after
    assert all("liked: melody" in prompt for prompt in bare)

    reviewed = seen(tmp_path, "true_review")
    for target, shown, less in zip(TARGETS, reviewed, bare, strict=True):
        assert shown.replace(f"<judgement>\n{target.text}\n</judgement>\n", "") == less

    wordless = seen(tmp_path, "without_texts")
    for shown in wordless:
        assert "melody" not in shown
        assert "judgement" not in shown
        assert shown.count("said nothing") == len(re.findall(r"\b\d: \d", shown)) == 6
        assert shown.count("average ") == 2

    for shown in seen(tmp_path, "averages_only"):
        assert shown.count("none yet") == 2
        assert shown.count("average ") == 2


def test_a_swapped_rationale_is_of_another_user_and_another_item(tmp_path: Path) -> None:
    for target, shown in zip(TARGETS, seen(tmp_path, "swapped_rationale"), strict=True):
        [written_for] = [t for t in TARGETS if f"Written for {t.user_id}." in shown]
        assert written_for.user_id != target.user_id
        assert written_for.item_id != target.item_id


def test_rationales_go_round_and_skip_their_own_user_and_item() -> None:
    texts = {row_key(t): [t.user_id] for t in TARGETS}
    found = exchanged(texts, TARGETS, seed=0)
    assert sorted(found[row_key(t)][0] for t in TARGETS) == [f"u{n}" for n in range(5)]
    assert found == exchanged(texts, TARGETS, seed=0)
    of_one = [Review("u", f"i{n}", 3.0, float(n)) for n in range(4)]
    alone = exchanged({row_key(t): ["x"] for t in of_one}, of_one, seed=0)
    assert set(map(tuple, alone.values())) == {()}


def test_what_the_probe_sees_is_what_the_graph_sees(tmp_path: Path) -> None:
    """With its own rationale in place, a probe's prompt is the graph's, token for token."""
    prompts: list[tuple[str, ...]] = []

    def rate(request: RateRequest) -> list[float]:
        prompts.append(tuple(message.content for message in request.messages))
        return [1, 1, 1, 1, 1]

    with open_with(rate) as recommender:
        own = rate_targets(recommender, TARGETS, tmp_path, name="x", history=2)
        from_graph = set(prompts)
        prompts.clear()
        texts = written(own, TARGETS)
        as_reviews = [
            Review(t.user_id, t.item_id, t.rating, t.timestamp, text=texts[row_key(t)][0])
            for t in TARGETS
        ]
        rate_targets(
            recommender, as_reviews, tmp_path, name="x", condition="true_review", history=2
        )
    assert set(prompts) == from_graph


def test_a_row_with_nothing_to_show_says_so(tmp_path: Path) -> None:
    silent = [Review("u0", "i9", 3.0, 2000.0), *TARGETS]
    with open_with() as recommender:
        found = rate_targets(recommender, silent, tmp_path, name="x", condition="true_review")
    assert found.reasons == (NOT_APPLICABLE, *[None] * 5)
    assert np.isnan(found.points["mean"][0])


def test_a_failure_is_the_rows_own(tmp_path: Path) -> None:
    def rate(request: RateRequest) -> list[float]:
        if "Later 2." in request.messages[2].content:
            raise ValueError("scripted")
        return [0, 0, 0, 0, 1]

    with open_with(rate) as recommender:
        found = rate_targets(recommender, TARGETS, tmp_path, name="x", condition="true_review")
    assert [reason is None for reason in found.reasons] == [True, True, False, True, True]
    assert "scripted" in str(found.reasons[2])
    np.testing.assert_array_equal(found.points["mean"], [5, 5, np.nan, 5, 5])


def counting(calls: list[int]) -> Rate:
    def rate(_: RateRequest) -> list[float]:
        calls.append(1)
        return [1, 2, 3, 4, 5]

    return rate


def test_what_was_rated_is_not_rated_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def run(recommender: Recommender, targets: list[Review]) -> None:
        rate_targets(recommender, targets, tmp_path, name="x", condition="without_texts")

    with open_with(counting(calls)) as recommender:
        run(recommender, TARGETS)
        run(recommender, TARGETS)
        assert len(calls) == len(TARGETS)
        with pytest.raises(InputError, match="holds another job"):
            run(recommender, TARGETS[1:])


def test_conditions_are_checked(tmp_path: Path) -> None:
    with open_with() as recommender:
        with pytest.raises(SettingError, match=f"there are: {', '.join(CONDITIONS)}"):
            rate_targets(recommender, TARGETS, tmp_path, name="x", condition="upside_down")
        with pytest.raises(SettingError, match="needs the rationales"):
            rate_targets(recommender, TARGETS, tmp_path, name="x", condition="swapped_rationale")
