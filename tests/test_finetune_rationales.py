"""The reasoner's rationales: as at inference, for targets that it has not seen, for no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.domains import review_source
from finetune.rationales import SCHEMA, read_rationales, refuse_trained, write_rationales
from finetune.rows import target_evidence
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import DataError, EngineFailure, InputError, NotReadyError, TrainingError
from r4r_graph.experts import Experts
from r4r_graph.jobs import JobProgress
from r4r_graph.schema import Review
from tests.canaries import HELPFUL, Desk, allowed, canaries, make_desk, ratings
from tests.scripted import prompt

Fake = Callable[..., BatchingEngine]


def key(target: Review) -> tuple[str, str, float]:
    return target.user_id, target.item_id, float(target.timestamp)


def mark_trained(desk: Desk, targets: list[Review]) -> None:
    """As if the reasoner had been trained on them."""
    folder = desk.recipe.adapters / "reasoner"
    folder.mkdir(parents=True, exist_ok=True)
    users, items, times = zip(*map(key, targets), strict=True)
    table = pa.table({"user_id": users, "item_id": items, "as_of": times})
    pq.write_table(table, folder / "rows.parquet")


def test_every_unseen_target_gets_one(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=lambda r: f"Rationale {r.seed} {len(desk.written)}.")
    report = write_rationales(desk.recipe, desk.engine)
    train = read_targets(desk.recipe, "train")  # of both roles
    validation = read_targets(desk.recipe, "validation")
    assert set(read_rationales(desk.recipe, "train")) == set(map(key, train))
    assert set(read_rationales(desk.recipe, "validation")) == set(map(key, validation))
    assert (report.train, report.validation) == (len(train), len(validation))
    assert len(desk.written) == len(train) + len(validation)
    assert (report.failed, report.reused, report.seen) == (0, 0, 0)
    assert list(pd.read_parquet(report.path).columns) == SCHEMA.names


def test_none_is_written_for_a_target_it_was_trained_on(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    train = read_targets(desk.recipe, "train")
    known = train[::2]
    mark_trained(desk, known)
    report = write_rationales(desk.recipe, desk.engine)
    assert report.seen == len(known)
    assert set(read_rationales(desk.recipe, "train")) == set(map(key, train[1::2]))


def test_none_is_read_for_a_target_it_was_trained_on_since(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    write_rationales(desk.recipe, desk.engine)
    mark_trained(desk, read_targets(desk.recipe, "train")[:1])
    with pytest.raises(DataError, match="trained on 1 of these"):
        read_rationales(desk.recipe, "train")
    assert read_rationales(desk.recipe, "validation")
    with pytest.raises(DataError, match="trained on"):
        refuse_trained(map(key, read_targets(desk.recipe, "train")), desk.recipe)


def test_ready_made_rows_without_a_target_exclude_nothing(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    folder = desk.recipe.adapters / "reasoner"
    folder.mkdir(parents=True)
    schema = {"user_id": pa.string(), "item_id": pa.string(), "as_of": pa.float64()}
    nothing = pa.table({name: pa.nulls(2, kind) for name, kind in schema.items()})
    pq.write_table(nothing, folder / "rows.parquet")
    report = write_rationales(desk.recipe, desk.engine)
    assert report.seen == 0
    assert report.train == len(read_targets(desk.recipe, "train"))


def test_damaged_rows_are_an_error(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    folder = desk.recipe.adapters / "reasoner"
    folder.mkdir(parents=True)
    (folder / "rows.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="trained on"):
        write_rationales(desk.recipe, desk.engine)


def test_the_prompt_is_that_of_inference_and_of_the_past(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, rationales={"concurrency": 1})
    boundaries: list[int] = []
    write_rationales(desk.recipe, desk.engine, lambda _: boundaries.append(len(desk.asked)))
    targets = read_targets(desk.recipe, "train") + read_targets(desk.recipe, "validation")
    assert boundaries == list(range(1, len(targets) + 1))
    experts = Experts(desk.engine, budgets=desk.recipe.token_budgets)
    seen = 0
    for target, request in zip(targets, desk.written, strict=True):
        evidence = target_evidence(
            target,
            review_source(desk.recipe),
            read_summaries(desk.recipe),
            desk.engine.meter,
            desk.recipe,
        )
        assert request.adapter == "reasoner"
        assert request.temperature == 0
        assert request.max_tokens == desk.recipe.token_budgets.rationale
        wanted = [message.content for message in experts.reasoner.messages(evidence)]
        assert [message.content for message in request.messages] == wanted
        past = set().union(*(canaries(r.text) for r in allowed(target, desk.reviews)), set())
        assert canaries(prompt(request)) <= past
        assert not ratings(prompt(request))
        seen += bool(canaries(prompt(request)))
    assert seen > len(targets) / 2


def test_training_targets_are_capped_by_seed(tmp_path: Path, fake: Fake) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        desk = make_desk(folder, fake, rationales={"rows": 4}, seed=seed)
        mark_trained(desk, read_targets(desk.recipe, "train")[:3])
        write_rationales(desk.recipe, desk.engine)
        found.append(set(read_rationales(desk.recipe, "train")))
        assert len(read_rationales(desk.recipe, "validation")) == len(
            read_targets(desk.recipe, "validation")
        )
    assert len(found[0]) == 4
    assert found[0] == found[1] != found[2]


def test_a_failed_row_is_recorded_and_the_others_go_on(tmp_path: Path, fake: Fake) -> None:
    calls: list[GenerateRequest] = []

    def write(request: GenerateRequest) -> str:
        calls.append(request)
        if len(calls) == 2:
            raise EngineFailure("no")
        return HELPFUL

    desk = make_desk(tmp_path, fake, write=write, rationales={"concurrency": 1})
    report = write_rationales(desk.recipe, desk.engine)
    targets = read_targets(desk.recipe, "train")
    assert report.failed == 1
    assert set(read_rationales(desk.recipe, "train")) == set(map(key, targets)) - {key(targets[1])}
    assert pd.read_parquet(report.path)["error"].dropna().tolist() == ["EngineFailure: no"]


def test_when_all_fail_there_is_an_error(tmp_path: Path, fake: Fake) -> None:
    def write(_: GenerateRequest) -> str:
        raise EngineFailure("no")

    desk = make_desk(tmp_path, fake, write=write)
    with pytest.raises(TrainingError, match="every row"):
        write_rationales(desk.recipe, desk.engine)


def test_a_stopped_run_goes_on(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, rationales={"concurrency": 1})

    def stop(progress: JobProgress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rationales(desk.recipe, desk.engine, stop)
    with pytest.raises(NotReadyError, match="again to go on"):
        read_rationales(desk.recipe, "train")
    report = write_rationales(desk.recipe, desk.engine)
    assert report.reused == 4
    assert len(desk.written) == report.train + report.validation


def test_another_reasoner_is_another_job(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    write_rationales(desk.recipe, desk.engine)
    with pytest.raises(InputError, match="reasoner"):
        write_rationales(desk.recipe, fake())


def test_the_report_says_how_good_they_are(tmp_path: Path, fake: Fake) -> None:
    texts = iter(["They give it five stars, for it has all that they like.", "Likes it"])
    desk = make_desk(
        tmp_path, fake, write=lambda _: next(texts, HELPFUL), rationales={"concurrency": 1}
    )
    report = write_rationales(desk.recipe, desk.engine)
    assert (report.leaking, report.malformed) == (1, 1)


def test_nothing_is_read_before_it_is_there(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    with pytest.raises(NotReadyError, match="`rationales`"):
        read_rationales(desk.recipe, "train")
    with pytest.raises(NotReadyError, match="`summaries`"):
        write_rationales(desk.recipe, desk.engine)
