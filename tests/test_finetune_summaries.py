"""Our summarizer over all histories: each review once, resumable, failures recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from finetune.domains import review_source
from finetune.engines import ExpertEngine
from finetune.rows import histories
from finetune.splits import read_targets
from finetune.summaries import SCHEMA, SPLITS, make_summaries, read_summaries
from r4r_graph.caches import open_summary_store
from r4r_graph.engine.base import GenerateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import EngineFailure, InputError, NotReadyError, TrainingError
from r4r_graph.experts import Experts
from r4r_graph.jobs import JobProgress
from tests.canaries import canaries, make_desk
from tests.tiny import make_adapter

Fake = Callable[..., BatchingEngine]


def in_histories(desk: object, splits: tuple[str, ...] = SPLITS) -> dict[str, str]:
    """Key and text of every review in a target's history."""
    recipe = desk.recipe  # type: ignore[attr-defined]
    source = review_source(recipe)
    found = {}
    for split in splits:
        for target in read_targets(recipe, split):  # type: ignore[arg-type]
            for review, _ in histories(target, source, recipe):
                found[review.key] = review.text
    return found


def test_every_review_of_a_history_is_summarized_once(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    report = make_summaries(desk.recipe, desk.engine)
    wanted = in_histories(desk)
    summaries = read_summaries(desk.recipe)
    assert {key: set(s.positive) for key, s in summaries.items()} == {
        key: canaries(text) for key, text in wanted.items()
    }
    assert len(desk.asked) == report.rows == len(wanted)
    assert (report.failed, report.reused, report.empty) == (0, 0, 0)
    table = pd.read_parquet(report.path)
    assert list(table.columns) == SCHEMA.names
    assert table["key"].is_unique


def test_what_is_there_is_not_made_again(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    report = make_summaries(desk.recipe, desk.engine)
    assert desk.asked == []
    assert report.reused == report.rows > 0


def test_a_stopped_run_goes_on(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False, summaries={"concurrency": 1})

    def stop(progress: JobProgress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_summaries(desk.recipe, desk.engine, on_progress=stop)
    with pytest.raises(NotReadyError, match="again to go on"):
        read_summaries(desk.recipe)
    report = make_summaries(desk.recipe, desk.engine)
    assert 0 < report.reused < report.rows
    assert len(desk.asked) == report.rows  # the cache had what was not yet written


def test_the_cache_is_the_recommenders(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    store = open_summary_store()
    try:
        experts = Experts(desk.engine, store, desk.recipe.rating_scale, desk.recipe.token_budgets)
        target = read_targets(desk.recipe, "validation")[0]
        review, kind = histories(target, review_source(desk.recipe), desk.recipe)[0]
        assert experts.summarizer.summarize(review, kind).cached
    finally:
        store.conn.close()


def test_a_failed_review_is_recorded_and_left_out(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    engine = desk.engine

    def write(request: GenerateRequest) -> str:
        if "canary3words" in request.messages[1].content:
            raise EngineFailure("no")
        return "positive: warm voice\nnegative: none\nvalues: none"

    engine = fake(write=write)
    report = make_summaries(desk.recipe, engine)
    wanted = in_histories(desk)
    failed = {key for key, text in wanted.items() if "canary3words" in text}
    assert report.failed == len(failed) == 1
    assert set(read_summaries(desk.recipe)) == set(wanted) - failed
    table = pd.read_parquet(report.path)
    assert table["error"].dropna().tolist() == ["EngineFailure: no"]


def test_when_all_fail_there_is_an_error(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)

    def write(_: GenerateRequest) -> str:
        raise EngineFailure("out of memory")

    with pytest.raises(TrainingError, match=r"every row .* out of memory"):
        make_summaries(desk.recipe, fake(write=write))


def test_another_summarizer_is_another_job(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    with pytest.raises(InputError, match="summarizer"):
        make_summaries(desk.recipe, fake())  # without an adapter


def test_rows_are_capped_by_seed(tmp_path: Path, fake: Fake) -> None:
    folders = [tmp_path / name for name in "abc"]
    found = []
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        desk = make_desk(folder, fake, summaries={"rows": 5}, seed=seed)
        found.append(set(read_summaries(desk.recipe)))
    assert len(found[0]) == 5
    assert found[0] == found[1] != found[2]


def test_splits_can_be_chosen(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    make_summaries(desk.recipe, desk.engine, splits=("validation",))
    assert set(read_summaries(desk.recipe)) == set(in_histories(desk, ("validation",)))


def test_nothing_is_read_before_it_is_there(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    with pytest.raises(NotReadyError, match="`summaries`"):
        read_summaries(desk.recipe)


def test_the_engine_is_loaded_with_the_adapter(
    tmp_path: Path, fake: Fake, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = make_desk(tmp_path, fake, base=str(tiny_base), device="cpu")
    folder = desk.recipe.adapters / "summarizer"
    with (
        caplog.at_level(logging.WARNING),
        ExpertEngine(desk.recipe, "summarizer", folder, None) as bare,
    ):
        assert bare.facts["adapter"] is None
        assert bare.engine.info.adapters == {}
    assert "no adapter for the summarizer" in caplog.text
    make_adapter(tiny_base, folder, expert="summarizer", seed=1)
    caplog.clear()
    with ExpertEngine(desk.recipe, "summarizer", folder, None) as own:
        facts = own.facts
        assert own.engine.info.adapters == {"summarizer": facts["adapter"]}
        assert own.engine.info.digest == facts["base"]
    assert "no adapter" not in caplog.text
    given = ExpertEngine(desk.recipe, "summarizer", folder, own.engine)
    assert given.facts == facts
