"""Sets of adapters: how they are named, what is rated with them, what is asked of their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from langgraph.store.memory import InMemoryStore

from r4r_graph import Recommender, Review, fake_engine
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.contenders import (
    AdapterSet,
    WordChecks,
    run_adapters,
    words_of,
)
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.evaluation.words.labels import label_key
from r4r_graph.jobs import JobProgress
from r4r_graph.ratings import READOUTS, RatingScale
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import AspectSummary

REVIEWS = [
    Review(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10.0 * u + i, f"Title {i}", f"Word{u}x{i} here.")
    for u in range(5)
    for i in range(5)
]
TARGETS = [Review(f"u{n}", f"i{(n + 2) % 5}", 4.0, 1e3 + n, text=f"Later {n}.") for n in range(5)]
EVERY = [*REVIEWS, *TARGETS]


class Opened:
    """Opens recommenders on the fake engine, and remembers for whom and what was asked."""

    def __init__(self) -> None:
        self.folders: list[str | None] = []
        self.rated: list[RateRequest] = []
        self.wrote: list[GenerateRequest] = []

    def __call__(self, folder: str | None) -> Recommender:
        self.folders.append(folder)

        def rate(request: RateRequest) -> Sequence[float]:
            self.rated.append(request)
            return [1, 1, 1, 1, 6] if "<judgement>" in request.messages[2].content else [1] * 5

        return Recommender.load(EVERY, engine=fake_engine(rate=rate), store=InMemoryStore())


class Lengths:
    """Scores a text by whether its reference is `Later 0.`."""

    name = "first"

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        return [float(reference == "Later 0.") for reference in references]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", AdapterSet("base", "none")),
        ("b=none", AdapterSet("b", "none")),
        ("work", AdapterSet("work", "work")),
        ("ours=work", AdapterSet("ours", "work")),
        ("ours=work@without_rationale", AdapterSet("ours", "work", "without_rationale")),
        ("work@true_review", AdapterSet("work", "work", "true_review")),
        ("ours=odd@name", AdapterSet("ours", "odd@name")),
        ("x=none@averages_only", AdapterSet("x", "none", "averages_only")),
    ],
)
def test_how_sets_are_written(
    text: str, expected: AdapterSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("work", "odd@name"):
        (tmp_path / name).mkdir()
    assert AdapterSet.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ours=nowhere", "'nowhere' is no folder"),
        ("ours=none@upside_down", "rates under one of as_is, without_rationale"),
        ("ours=none@swapped_rationale", "rates under one of"),
        ("../up=none", "'../up' is to name a folder"),
        ("_x=none", "is to name a folder"),
    ],
)
def test_bad_sets_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        AdapterSet.parse(text)


def test_a_set_is_rated_as_it_is_and_under_each_probe(tmp_path: Path) -> None:
    load, told = Opened(), list[tuple[str, int]]()

    def tell(what: str, now: JobProgress) -> None:
        told.append((what, now.done))

    probes = ["without_rationale", "swapped_rationale", "true_review", "without_texts"]
    found = run_adapters(
        AdapterSet("ours", "work"), TARGETS, load, tmp_path, probes=probes, tell=tell, history=2
    )
    assert load.folders == ["work"]
    assert [probe.condition for probe in found.probes] == probes
    assert found.predictions.points["mean"].tolist() == pytest.approx([4.0] * 5)
    assert [round(float(p.points["mean"][0]), 6) for p in found.probes] == [3.0, 4.0, 4.0, 3.0]
    assert [what for what, done in told if done == 5] == [
        f"ours {condition}" for condition in ("as_is", *probes)
    ]
    assert found.words is not None
    assert found.words.form is not None
    assert found.words.form.rows == 5
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"as_is", *probes}


def test_several_rationales_are_drawn_by_the_seed_and_exchanged_together(tmp_path: Path) -> None:
    load, knobs = Opened(), {"rationales": 2, "sure": 1.0}
    both = [
        run_adapters(
            AdapterSet(f"s{seed}", None),
            TARGETS,
            load,
            tmp_path,
            probes=["swapped_rationale"],
            seed=seed,
            **knobs,
        )
        for seed in (0, 1)
    ]
    for found in both:
        own, [swapped] = found.predictions, found.probes
        assert [len(texts) for texts in own.rationales] == [2] * 5
        assert sorted(own.rationales) == sorted(swapped.rationales)
        assert all(a != b for a, b in zip(own.rationales, swapped.rationales, strict=True))
    assert both[0].predictions.rationales != both[1].predictions.rationales


def test_an_evaluation_that_is_called_again_rates_nothing_twice(tmp_path: Path) -> None:
    first, second = Opened(), Opened()
    results = [
        run_adapters(AdapterSet("x", None), TARGETS, load, tmp_path, probes=["without_texts"])
        for load in (first, second)
    ]
    assert len(first.rated) == 10
    assert second.rated == []
    for one, other in zip(
        (results[0].predictions, *results[0].probes),
        (results[1].predictions, *results[1].probes),
        strict=True,
    ):
        assert one.points["mean"].tolist() == other.points["mean"].tolist()
        assert one.rationales == other.rationales


def test_a_set_without_rationales_writes_none_and_exchanges_none(tmp_path: Path) -> None:
    load = Opened()
    found = run_adapters(
        AdapterSet("plain", "work", "without_rationale"),
        TARGETS,
        load,
        tmp_path,
        probes=["without_rationale", "swapped_rationale", "averages_only"],
    )
    assert found.predictions.condition == "without_rationale"
    assert [probe.condition for probe in found.probes] == ["averages_only"]
    assert found.words is None
    assert all("<judgement>" not in request.messages[2].content for request in load.rated)


def test_rationales_are_held_against_the_review_written_later() -> None:
    with Opened()(None) as recommender:
        source = recommender.reviews
    predictions = run_predictions({0: ("Fond of it.", "And of that."), 1: ("Loves it.",)})
    words = words_of(predictions, TARGETS, source, RatingScale(), [Lengths()])
    assert words is not None
    assert words.form is not None
    assert (words.form.rows, words.form.empty) == (6, 3)
    [score] = words.rationales  # nobody else wrote of these items so late
    assert (score.name, score.rows) == ("first", 2)
    # Of two rows the one's own reference is `Later 0.`, and the other one's other.
    assert score.value.value == score.floor.value == 0.5


def test_the_hard_floor_is_another_users_review_of_the_same_item() -> None:
    target = TARGETS[0]
    others = [
        Review("someone", target.item_id, 2.0, target.timestamp - 1, text="Earlier."),
        Review("someone", target.item_id, 2.0, target.timestamp, text="Later 0."),
        Review("silent", target.item_id, 2.0, target.timestamp + 5, text=" "),
        *[Review("someone", t.item_id, 2.0, t.timestamp + 1, text="Else.") for t in TARGETS[1:]],
    ]
    source = TableReviewSource.from_reviews([*EVERY, *others])
    predictions = run_predictions(dict.fromkeys(range(5), ("Fond of it.",)))
    words = words_of(predictions, TARGETS, source, RatingScale(), [Lengths()])
    assert words is not None
    anyone, same_item = words.rationales
    assert (anyone.name, same_item.name) == ("first", "first, same item")
    # One row's own review is `Later 0.`, and so is what another user wrote of its item.
    assert same_item.value.value == same_item.floor.value == 0.2
    assert same_item.difference.value == 0


def run_predictions(texts: dict[int, tuple[str, ...]]) -> Predictions:
    return Predictions(
        "x",
        {readout: np.full(5, 3.0) for readout in READOUTS},
        reasons=(None,) * 5,
        rationales=tuple(texts.get(at, ()) for at in range(5)),
    )


def test_summaries_are_held_against_labels_of_the_targets_time(tmp_path: Path) -> None:
    label = AspectSummary(positive=("warm voice",))
    other = AspectSummary(negative=("cold sound",))
    labels = {label_key(r): (label, other)[n % 2] for n, r in enumerate(EVERY)}
    load = Opened()
    checks = WordChecks(labels=labels, summaries=4)
    found = run_adapters(AdapterSet("x", None), TARGETS, load, tmp_path, checks=checks)
    assert found.words is not None
    assert found.words.summaries is not None
    assert found.words.summaries.rows == 4
    # Labels of reviews that a training could have seen are not used, and nothing is rated first.
    load.rated.clear()
    early = {key: value for key, value in labels.items() if key[2] < TARGETS[0].timestamp}
    with pytest.raises(DataError, match="0 of the labelled reviews are from the time"):
        run_adapters(
            AdapterSet("y", None), TARGETS, load, tmp_path, checks=WordChecks(labels=early)
        )
    assert load.rated == []


def test_unknown_probes_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    load = Opened()
    with pytest.raises(SettingError, match="unknown probe 'nonsense'"):
        run_adapters(AdapterSet("x", None), TARGETS, load, tmp_path, probes=["nonsense"])
    assert load.folders == []
