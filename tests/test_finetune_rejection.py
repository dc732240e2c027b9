"""Rejection sampling: what is asked, screened, judged and kept, and that no row is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.domains import review_source
from finetune.rejection.kept import KEPT_SCHEMA, RejectionReport, Survivors, read_kept
from finetune.rejection.sampling import SAMPLES_SCHEMA, hinted_prompt, reject, sample_rationales
from finetune.rows import target_evidence
from finetune.settings import Recipe
from finetune.splits import read_targets
from finetune.summaries import make_summaries, read_summaries
from finetune.teacher import open_teacher
from r4r_graph.engine.base import GenerateRequest, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeMeter
from r4r_graph.errors import EngineFailure, InputError, NotReadyError, SettingError, TeacherError
from r4r_graph.evidence import Evidence
from r4r_graph.experts import predictor_prompt, reasoner_prompt
from r4r_graph.jobs import JobProgress, read_job
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.schema import AspectSummary, Item, ReviewAspects
from tests.canaries import HELPFUL, HINT, USELESS, Desk, allowed, canaries, make_desk, ratings
from tests.scripted import prompt

Fake = Callable[..., BatchingEngine]


def is_hinted(request: GenerateRequest) -> bool:
    return HINT in prompt(request)


def run(desk: Desk, **settings: Any) -> RejectionReport:
    """Sample with the desk's engine as teacher and judge."""
    return sample_rationales(with_settings(desk.recipe, **settings), None, desk.engine)


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, rejection=replace(recipe.rejection, **settings))


def samples(recipe: Recipe) -> list[dict[str, Any]]:
    return read_job(recipe.folder("rejection") / "samples")


def by_draws(*texts: str) -> Callable[[GenerateRequest], str]:
    """The same answers for each target, draw after draw."""
    counts: dict[str, int] = {}

    def write(request: GenerateRequest) -> str:
        context = request.messages[1].content
        counts[context] = counts.get(context, -1) + 1
        return texts[min(counts[context], len(texts) - 1)]

    return write


# What is drawn, and when it ends --------------------------------------------------------------


def test_a_good_first_draw_needs_no_hint(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=lambda _: HELPFUL)
    report = run(desk)
    rows = len(read_targets(desk.recipe, "train", "instruction"))
    assert len(desk.written) == rows
    assert not any(map(is_hinted, desk.written))
    assert len(desk.rated) == 2 * rows  # with it, and without any
    assert report.plain == Survivors(drawn=rows, judged=rows, kept=rows)
    assert report.hinted == Survivors()
    assert (report.kept, report.without, report.failed) == (rows, 0, 0)
    for row in read_kept(desk.recipe):
        assert (row["rationale"], row["hinted"], row["rank"]) == (HELPFUL, False, 0)
        assert row["error"] < row["baseline_error"]


def test_hinted_draws_end_with_the_first_that_is_kept(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, USELESS + " So?", HELPFUL, "never"))
    report = run(desk)
    rows = len(read_targets(desk.recipe, "train", "instruction"))
    assert [is_hinted(request) for request in desk.written[:3]] == [False, True, True]
    assert len(desk.written) == 3 * rows
    assert report.plain == Survivors(drawn=rows, judged=rows)
    assert report.hinted == Survivors(drawn=2 * rows, judged=2 * rows, kept=rows)
    assert all(row["hinted"] for row in read_kept(desk.recipe))
    # one baseline a row, however many are judged
    assert sum("<judgement>" not in prompt(request) for request in desk.rated) == rows


def test_the_number_of_hinted_draws_is_bounded(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=lambda r: f"{USELESS} The {r.seed}th of its kind.")
    report = run(desk, rows=3)
    assert len(desk.written) == 3 * (1 + 4)
    assert (report.rows, report.without, report.kept) == (3, 3, 0)
    assert read_kept(desk.recipe) == []


def test_more_may_be_kept_the_best_first(tmp_path: Path, fake: Fake) -> None:
    def rate(request: RateRequest) -> Sequence[float]:
        text = prompt(request)
        if "keep praising" not in text:
            return (1, 0, 0, 0, 0)
        return (0, 0, 1, 0, 0) if "better" in text else (0, 0, 0, 1, 0)

    better = HELPFUL + " It may be better yet on a second day."
    desk = make_desk(tmp_path, fake, write=by_draws(HELPFUL, USELESS, better), rate=rate)
    report = run(desk, keep=2, rows=4)
    rows = pd.DataFrame(read_kept(desk.recipe))
    assert report.kept == 8
    assert rows["rank"].tolist() == [0, 1] * 4
    assert rows["hinted"].tolist() == [True, False] * 4
    assert rows["rationale"].tolist() == [better, HELPFUL] * 4
    best, second = rows["error"][::2], rows["error"][1::2]
    assert (best.to_numpy() < second.to_numpy()).all()


def test_greedy_draws_are_not_repeated(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=lambda _: USELESS)
    run(desk, temperature=0.0, rows=2)
    assert len(desk.written) == 2 * 2


# Gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0, 1])
def test_leaks_are_screened_in_every_draw(tmp_path: Path, fake: Fake, draw: int) -> None:
    leak = HELPFUL + " They would give it a 4."
    texts = [leak, HELPFUL] if draw == 0 else [USELESS, leak, HELPFUL]
    desk = make_desk(tmp_path, fake, write=by_draws(*texts))
    report = run(desk)
    assert not any("a 4" in prompt(request) for request in desk.rated)
    counts = report.hinted if draw else report.plain
    assert counts.leaked == report.rows
    assert report.reasons == {"leaked: mark": report.rows}
    assert {row["rationale"] for row in read_kept(desk.recipe)} == {HELPFUL}


@pytest.mark.parametrize("text", ["", "Fine.", HELPFUL[:-9], f"Rationale: {HELPFUL}"])
def test_malformed_draws_are_not_judged(tmp_path: Path, fake: Fake, text: str) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(text, HELPFUL))
    report = run(desk)
    assert report.plain == Survivors(drawn=report.rows, malformed=report.rows)
    assert report.hinted.kept == report.kept == report.rows
    assert all(HELPFUL in prompt(r) for r in desk.rated if "<judgement>" in prompt(r))


def test_a_draw_has_to_fit_the_budget_of_an_answer(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, budgets={"rationale": FakeMeter().count(HELPFUL)})
    report = run(desk)  # it would end just before its end token
    assert report.reasons["malformed: too long"] == report.plain.drawn + report.hinted.drawn
    assert all(request.max_tokens == FakeMeter().count(HELPFUL) for request in desk.written)


def test_a_repeat_is_not_judged_twice(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, f" {USELESS}\n", HELPFUL))
    report = run(desk)
    assert report.hinted == Survivors(
        drawn=2 * report.rows, repeated=report.rows, judged=report.rows, kept=report.rows
    )


@pytest.mark.parametrize(
    ("tau", "change", "kept"),
    [
        (0.1, 0.05, True),  # slightly worse: what a tau above 0 lets through
        (0.1, 0.15, False),
        (0.0, 0.05, False),
        (0.0, 0.0, False),
        (0.0, -0.05, True),
        (-0.1, -0.05, False),
        (-0.1, -0.15, True),
    ],
)
def test_tau_bounds_the_change_of_the_error(
    tmp_path: Path, fake: Fake, tau: float, change: float, kept: bool
) -> None:
    def rate(request: RateRequest) -> Sequence[float]:
        mean = 2.0 - (change if "<judgement>" in prompt(request) else 0)  # all truths are higher
        return (2 - mean, mean - 1, 0, 0, 0) if mean <= 2 else (0, 3 - mean, mean - 2, 0, 0)

    desk = make_desk(tmp_path, fake, rate=rate)
    report = run(desk, tau=tau, rows=2, hinted_draws=0)
    assert report.kept == (2 if kept else 0)
    assert report.median_change == pytest.approx(change)
    assert all(row["error"] - row["baseline_error"] < tau for row in read_kept(desk.recipe))


# What prompts hold ----------------------------------------------------------------------------


def test_no_prompt_holds_the_target_or_anything_later(tmp_path: Path, fake: Fake) -> None:
    unique = iter(range(10_000))
    desk = make_desk(
        tmp_path,
        fake,
        write=lambda _: f"{USELESS} It is the draw {next(unique)}x of them all.",
        rejection={"hinted_draws": 2},
    )
    ends: list[int] = []
    sample_rationales(desk.recipe, None, desk.engine, lambda _: ends.append(len(desk.asked)))
    targets = read_targets(desk.recipe, "train", "instruction")
    rows = samples(desk.recipe)
    starts, with_history = [0, *ends], 0
    for target, row, start, end in zip(targets, rows, starts, ends, strict=False):
        asked = desk.asked[start:end]
        drawn = [request for request in asked if isinstance(request, GenerateRequest)]
        judged = [request for request in asked if isinstance(request, RateRequest)]
        past = allowed(target, desk.reviews)
        words = set().union(*(canaries(review.text) for review in past), set())
        assert len(drawn) == 3
        assert len(judged) == 4
        for request in asked:
            assert canaries(prompt(request)) <= words
        with_history += bool(canaries(prompt(asked[0])))

        truth = f"{target.rating:g}"
        assert [ratings(prompt(request)) for request in drawn] == [[], [truth], [truth]]
        for request in drawn[1:]:
            assert truth in request.messages[2].content
            assert request.messages[1] == drawn[0].messages[1]

        baseline, *others = judged
        assert "<judgement>" not in prompt(baseline)
        for request, text in zip(others, row["texts"], strict=True):
            assert re.findall(r"<judgement>\n(.*)\n</judgement>", prompt(request)) == [text]
            assert request.messages[1] == baseline.messages[1]
        shown = re.findall(r"\b\d+: ([\d.]+)[,;]", prompt(baseline))
        assert set(shown) <= {f"{review.rating:g}" for review in past}
        for side in ("user_id", "item_id"):
            mine = [r.rating for r in past if getattr(r, side) == getattr(target, side)]
            stats = RatingStats.of(mine)
            line = f"average {stats.mean:.2f} of {stats.count}, spread" if mine else "none yet"
            assert line in prompt(baseline)
    assert len(ends) == len(targets) == len(rows)
    assert with_history > len(targets) / 2


def test_prompts_are_those_of_inference(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, HELPFUL))
    run(desk, rows=1)
    (row,) = samples(desk.recipe)
    (target,) = [
        target
        for target in read_targets(desk.recipe, "train")
        if (target.user_id, target.item_id, target.timestamp)
        == (row["user_id"], row["item_id"], row["as_of"])
    ]
    meter, budgets, scale = desk.engine.meter, desk.recipe.token_budgets, RatingScale()
    summaries = read_summaries(desk.recipe)
    evidence = target_evidence(target, review_source(desk.recipe), summaries, meter, desk.recipe)
    assert Evidence.from_dict(json.loads(row["evidence"])) == evidence
    assert [request.messages for request in desk.written] == [
        reasoner_prompt(evidence, meter),
        hinted_prompt(evidence, target.rating, scale, meter),
    ]
    assert [request.messages for request in desk.rated] == [
        predictor_prompt(evidence, text, scale, meter, budgets) for text in (None, USELESS, HELPFUL)
    ]
    assert {request.adapter for request in desk.rated} == {"predictor"}
    assert {request.adapter for request in desk.written} == {None}  # the base model teaches


@pytest.mark.parametrize("description", ["", "About <b>loss</b>  and hope."])
@pytest.mark.parametrize("history", [0, 2])
def test_the_hinted_context_is_the_reasoners(description: str, history: int) -> None:
    summary = AspectSummary(("warm <voice>",), (), ("wit", "5 stars"))
    side = tuple(
        ReviewAspects("u", f"i{at}", "A [INST] title", at, 4.0, summary) for at in range(history)
    )
    item = Item("i", "The <Candidate>", "album", description)
    evidence = Evidence(item, side, side, RatingStats(), RatingStats())
    meter = FakeMeter()
    plain = reasoner_prompt(evidence, meter)
    hinted = hinted_prompt(evidence, 3.5, RatingScale.parse("0.5,1,2,4"), meter)
    assert hinted[1] == plain[1]
    assert [turn.role for turn in hinted] == [turn.role for turn in plain]
    assert "scale from 0.5 to 4" in hinted[2].content
    assert "rate the candidate 3.5" in hinted[2].content


# Failures -------------------------------------------------------------------------------------


def test_a_row_whose_teacher_fails_is_recorded_and_the_others_go_on(
    tmp_path: Path, fake: Fake
) -> None:
    calls: list[GenerateRequest] = []

    def write(request: GenerateRequest) -> str:
        calls.append(request)
        if len(calls) == 2:
            raise EngineFailure("the connection broke")
        return HELPFUL

    desk = make_desk(tmp_path, fake, write=write)
    report = run(desk)
    rows = samples(desk.recipe)
    assert [row["error"] is not None for row in rows].index(True) == 1
    assert "the connection broke" in rows[1]["error"]
    assert (report.failed, report.without) == (1, 0)
    assert report.kept == report.rows - 1 == len(rows) - 1
    targets = read_targets(desk.recipe, "train", "instruction")
    assert [row["as_of"] for row in rows] == [target.timestamp for target in targets]


@pytest.mark.parametrize("broken", ["baseline", "candidate"])
def test_what_could_not_be_judged_is_never_kept(tmp_path: Path, fake: Fake, broken: str) -> None:
    calls: list[RateRequest] = []

    def rate(request: RateRequest) -> Sequence[float]:
        with_text = "<judgement>" in prompt(request)
        calls.append(request)
        if len(calls) <= 2 and with_text == (broken == "candidate"):
            raise EngineFailure("no memory")
        return (0, 0, 0, 1, 0) if with_text else (1, 0, 0, 0, 0)

    desk = make_desk(tmp_path, fake, rate=rate)
    report = run(desk, tau=100.0)
    rows = samples(desk.recipe)
    assert rows[0]["error"] == "EngineFailure: no memory"
    assert list(rows[0]["outcomes"]) == []
    assert report.failed == 1
    assert report.kept == report.rows - 1


def test_what_a_row_kept_before_it_failed_counts(tmp_path: Path, fake: Fake) -> None:
    def write(request: GenerateRequest) -> str:
        if is_hinted(request):
            raise EngineFailure("no")
        return HELPFUL

    desk = make_desk(tmp_path, fake, write=write)
    with pytest.raises(Exception, match="every row"):  # which is suspicious, and said
        run(desk, rows=2, keep=2)
    kept_rows = [row for row in samples(desk.recipe) if "kept" in row["outcomes"]]
    assert len(kept_rows) == 2


def test_a_stopped_run_goes_on_and_pays_for_nothing_twice(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, HELPFUL))

    def stop(progress: JobProgress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_rationales(desk.recipe, None, desk.engine, stop)
    with pytest.raises(NotReadyError, match="`rejection`"):
        read_kept(desk.recipe)
    report = run(desk)
    assert report.kept == report.rows
    assert len(desk.written) == 2 * report.rows
    assert len(samples(desk.recipe)) == report.rows


def test_answers_of_a_killed_run_are_used(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, HELPFUL))
    run(desk)
    first = len(desk.written)
    for part in (desk.recipe.folder("rejection") / "samples").glob("part-*.parquet"):
        part.unlink()  # as if it had been killed before they were written
    report = run(desk)
    assert len(desk.written) == first
    assert report.kept == report.rows
    assert report.tokens == 0


def test_the_token_limit_ends_the_run_and_can_be_raised(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, teacher={"token_limit": 1500})
    with pytest.raises(TeacherError, match="token limit"):
        run(desk)
    paid = len(desk.written)
    assert 0 < paid < len(read_targets(desk.recipe, "train", "instruction"))
    more = replace(desk.recipe, teacher=replace(desk.recipe.teacher, token_limit=None))
    report = sample_rationales(more, None, desk.engine)
    assert report.failed == 0
    assert len(desk.written) == report.rows


def test_a_finished_run_asks_nobody(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    first = run(desk)
    before = desk.recipe.folder("rejection").joinpath("kept.parquet").read_bytes()
    desk.asked.clear()
    again = run(desk)
    assert desk.asked == []
    assert replace(again, seconds=0, tokens=0) == replace(first, seconds=0, tokens=0)
    assert desk.recipe.folder("rejection").joinpath("kept.parquet").read_bytes() == before


def test_a_teacher_of_ones_own_stays_open(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    judge = fake(rate=lambda r: (0, 0, 0, 1, 0) if "<judgement>" in prompt(r) else (1, 0, 0, 0, 0))
    with open_teacher(desk.recipe, tmp_path / "answers.sqlite", desk.engine) as teacher:
        report = sample_rationales(desk.recipe, teacher, judge)
        assert report.kept == report.rows == teacher.spent.calls
        assert report.tokens == teacher.spent.total
    assert not desk.rated


# Files and settings ---------------------------------------------------------------------------


def test_the_files(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, write=by_draws(USELESS, HELPFUL))
    report = run(desk)
    folder = desk.recipe.folder("rejection")
    table = pd.read_parquet(folder / "kept.parquet")
    assert list(table.columns) == KEPT_SCHEMA.names
    assert list(pd.read_parquet(folder / "samples").columns) == SAMPLES_SCHEMA.names
    facts = json.loads((folder / "report.json").read_text())
    assert facts["hinted"]["kept"] == report.rows
    assert facts["settings"]["tau"] == 0.0
    assert report.path == folder / "kept.parquet"
    assert report.baseline_error == pytest.approx(table["baseline_error"].mean())
    assert report.kept_error == pytest.approx(table["error"].mean())
    # the reasoner's prompt can be rendered from it
    for row in read_kept(desk.recipe):
        turns = reasoner_prompt(row["evidence"], desk.engine.meter)
        assert turns in [request.messages for request in desk.written]


def test_rows_are_drawn_by_seed_among_the_instruction_rows(tmp_path: Path, fake: Fake) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        desk = make_desk(folder, fake, seed=seed)
        run(desk, rows=5)
        instruction = read_targets(desk.recipe, "train", "instruction")
        keys = [(row["user_id"], row["item_id"], row["as_of"]) for row in samples(desk.recipe)]
        assert set(keys) <= {(t.user_id, t.item_id, t.timestamp) for t in instruction}
        found.append(keys)
    assert len(found[0]) == 5
    assert found[0] == found[1] != found[2]


def test_other_settings_are_another_job(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake)
    run(desk)
    with pytest.raises(InputError, match="settings"):
        run(desk, tau=0.2)
    with pytest.raises(InputError, match="reward"):
        sample_rationales(desk.recipe, None, fake(adapters=()))


@pytest.mark.parametrize(
    "bad",
    [{"hinted_draws": -1}, {"keep": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"concurrency": 0}],
)
def test_bad_settings_are_refused(tmp_path: Path, fake: Fake, bad: dict[str, Any]) -> None:
    desk = make_desk(tmp_path, fake)
    with pytest.raises(SettingError, match=next(iter(bad))):
        run(desk, **bad)


def test_what_comes_first_is_named(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False)
    with pytest.raises(NotReadyError, match="`reward`"):
        reject(desk.recipe)
    with pytest.raises(NotReadyError, match="`summaries`"):
        reject(desk.recipe, None, desk.engine)
    with pytest.raises(NotReadyError, match="`rejection`"):
        read_kept(desk.recipe)


def test_a_tiny_model_goes_through_it(
    tmp_path: Path, fake: Fake, tiny_engine: BatchingEngine
) -> None:
    desk = make_desk(
        tmp_path,
        fake,
        summarized=False,
        history=2,
        budgets={"review": 16, "side": 64, "summary": 40, "rationale": 16},
        rejection={"rows": 3, "hinted_draws": 1, "concurrency": 3},
    )
    make_summaries(desk.recipe, tiny_engine)
    report = sample_rationales(desk.recipe, None, tiny_engine)
    assert (report.rows, report.failed) == (3, 0)
    assert report.plain.drawn == 3
    assert report.tokens > 0


def test_the_reward_model_in_the_work_folder_judges(
    tmp_path: Path, fake: Fake, tiny_base: Path
) -> None:
    from r4r_graph.engine.adapters import find_adapters
    from tests.tiny import make_adapter

    desk = make_desk(
        tmp_path,
        fake,
        base=str(tiny_base),
        device="cpu",
        budgets={"rationale": 16},
        rejection={"rows": 2, "hinted_draws": 0},
    )
    make_adapter(tiny_base, desk.recipe.folder("reward"), expert="predictor", seed=1)
    report = reject(desk.recipe)
    job = json.loads((desk.recipe.folder("rejection") / "samples" / "_job.json").read_text())
    found = find_adapters({"predictor": desk.recipe.folder("reward")})
    assert job["reward"]["adapter"] == found["predictor"].digest
    assert report.rows == 2
