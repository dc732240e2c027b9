"""Rejection sampling with a hint (paper): rationales that help to predict, to learn from.

    report = reject(recipe)
    rows = read_kept(recipe)

For each instruction target the teacher writes one rationale, from the reasoner's own prompt. Where
that is not kept, it writes more from a prompt that also names the true rating and forbids to
reveal it, one after the other, at most `hinted_draws`, until enough are kept. Each text, hinted or
not, passes the same gates in this order: it gives no rating away, it is a whole paragraph, it is no
repeat, and the reward model rates better with it:

    kept  <=>  |mean with it - true rating| - |mean without any - true rating| < tau

With `tau` above 0, rationales are also kept that make the rating worse by less than `tau`; with 0
only those that make it better; below 0, better by more than that. The paper starts where about half
of the candidates survive: `RejectionReport.median_change` says where that is.

Candidates that someone else has drawn and judged are ranked instead; see `candidates`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from finetune.domains import review_source
from finetune.engines import ExpertEngine, finished_rows, refuse_all_failed
from finetune.rationales import digest_summaries
from finetune.rejection.candidates import rank_candidates
from finetune.rejection.composing import compose_rationales, composed_facts, composed_rows
from finetune.rejection.judging import Candidate, Judge, screened
from finetune.rejection.kept import (
    SAMPLES_SCHEMA,
    RejectionReport,
    kept_of,
    packed,
    read_kept,
    sampling_report,
    write_kept,
)
from finetune.rows import Summaries, row_key, target_evidence
from finetune.settings import Recipe, RejectionSettings
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from finetune.teacher import Teacher, open_teacher, teacher_identity
from r4r_graph import prompts
from r4r_graph.engine.base import Engine, Message, TokenMeter
from r4r_graph.errors import AnswerError, EngineError, NotReadyError, SettingError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.leaks import screens_digest
from r4r_graph.evidence import Evidence, evidence_inputs, without_ratings
from r4r_graph.experts import Messages, Predictor, reasoner_prompt
from r4r_graph.jobs import Columns, OnProgress, digest_rows, run_job
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import Review, plain_number

__all__ = [
    "SAMPLES_SCHEMA",
    "hinted_prompt",
    "rank_candidates",
    "read_kept",
    "reject",
    "sample_rationales",
]


def reject(
    recipe: Recipe,
    teacher: Teacher | None = None,
    reward_engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> RejectionReport:
    """Make `work/rejection/kept.parquet`: by ranking where the recipe names ready-made candidates
    (`teacher.rationales`), else by sampling; with `rejection.rows=0` neither, and all is composed.
    See `rank_candidates`, `sample_rationales` and `compose_rationales`."""
    meter = reward_engine.meter if reward_engine is not None else None
    if recipe.rejection.composed and recipe.rejection.rows == 0:
        return compose_rationales(recipe, meter)
    if recipe.teacher.rationales is not None:
        return rank_candidates(recipe, meter, on_progress)
    return sample_rationales(recipe, teacher, reward_engine, on_progress)


def sample_rationales(
    recipe: Recipe,
    teacher: Teacher | None = None,
    reward_engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> RejectionReport:
    """Draw, screen and judge rationales for the instruction targets, and keep the good ones.

    The draws are in the job folder `work/rejection/samples`, so a run that stops goes on; answers
    that were paid for are in `work/rejection/answers.sqlite`. A row that fails on its own is
    recorded with its reason and takes no other row with it.

    Args:
        recipe: see `RejectionSettings`; `rows` targets are drawn by seed.
        teacher: writes the rationales; None opens the recipe's. The caller's stays open.
        reward_engine: judges with its adapter `predictor`; None loads `work/reward`.
        on_progress: called after each row.

    Raises:
        NotReadyError: there are no splits, no summaries or no reward model yet.
        SettingError: a setting is out of range.
        TeacherError: the teacher cannot be used, or its token limit is reached; the same call
            continues.
        InputError: the folder holds samples of other targets or with other settings.
        TrainingError: every row failed.
    """
    settings = recipe.rejection
    _check(settings)
    folder = recipe.folder("rejection")
    reward = recipe.folder("reward")
    if reward_engine is None and not reward.is_dir():
        raise NotReadyError(f"there is no reward model in {reward}; run the step `reward` first")
    targets, summaries = _targets(recipe), read_summaries(recipe)
    tools: list[_Tools] = []
    tokens = 0

    with ExitStack() as stack:
        judge = stack.enter_context(ExpertEngine(recipe, "predictor", reward, reward_engine))

        def opened() -> _Tools:
            """Only when there is a row to do: a finished job needs neither key nor model."""
            if not tools:
                asked = teacher or stack.enter_context(
                    open_teacher(recipe, folder / "answers.sqlite", judge.engine)
                )
                tools.append(_Tools(recipe, asked, judge.engine, summaries))
            return tools[0]

        async def sample(target: Review) -> Columns:
            return await opened().sampled(target)

        identity = teacher.identity if teacher else teacher_identity(recipe, reward_engine)
        run = run_job(
            targets,
            sample,
            folder / "samples",
            schema=SAMPLES_SCHEMA,
            manifest=_manifest(recipe, targets, summaries, identity, judge.facts),
            concurrency=settings.concurrency,
            on_progress=on_progress,
        )
        if tools:
            spent = tools[0].teacher.spent
            tokens = spent.prompt + spent.completion
    rows = finished_rows(folder / "samples", "rejection")
    refuse_all_failed(rows, folder / "samples")
    kept = [columns for row in rows for columns in kept_of(row, settings.keep)]
    composed = composed_rows(recipe, judge.engine.meter) if settings.composed else []
    report = sampling_report(recipe, rows, kept, composed, run.seconds, tokens)
    digest = digest_rows([row[name] for name in SAMPLES_SCHEMA.names] for row in rows)
    write_kept(recipe, kept + composed, report, {"samples": digest} | composed_facts(recipe))
    return report


def hinted_prompt(
    evidence: Evidence, rating: float, scale: RatingScale, meter: TokenMeter
) -> Messages:
    """The teacher's turns that name the true rating. The context is the reasoner's, word for word;
    the rating stands in the task."""
    inputs = without_ratings(evidence_inputs(evidence)) | {
        "rating": plain_number(round(rating, 2)),
        "scale_low": plain_number(scale.low),
        "scale_high": plain_number(scale.high),
    }
    turns = prompts.render("teacher_rationale", inputs, meter.special_tokens)
    return (
        Message("system", turns.system),
        Message("user", turns.context),
        Message("user", turns.task),
    )


# One row --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tools:
    """What the rows of one run share."""

    recipe: Recipe
    teacher: Teacher
    engine: Engine
    summaries: Summaries

    async def sampled(self, target: Review) -> Columns:
        """A target's draws."""
        recipe, meter = self.recipe, self.engine.meter
        evidence = target_evidence(target, review_source(recipe), self.summaries, meter, recipe)
        judge = Judge(
            Predictor(self.engine, recipe.rating_scale, recipe.token_budgets),
            evidence,
            target.rating,
        )
        drawn: list[Candidate] = []
        failure = None
        try:
            async for candidate in self._candidates(evidence, target.rating, judge):
                drawn.append(candidate)
        except (AnswerError, EngineError) as error:
            failure = f"{type(error).__name__}: {error}"
        return row_key(target) | {
            "evidence": packed(evidence),
            "baseline_error": judge.baseline,
            "texts": [candidate.text for candidate in drawn],
            "hinted": [candidate.hinted for candidate in drawn],
            "outcomes": [candidate.outcome for candidate in drawn],
            "reasons": [list(candidate.reasons) for candidate in drawn],
            "errors": [candidate.error for candidate in drawn],
            "error": failure,
        }

    async def _candidates(
        self, evidence: Evidence, rating: float, judge: Judge
    ) -> AsyncIterator[Candidate]:
        """Drawn one after the other, so that none is paid for that is not needed. Many rows are in
        flight, which fills the batches."""
        recipe, settings, meter = self.recipe, self.recipe.rejection, self.engine.meter
        plain = reasoner_prompt(evidence, meter)
        hinted = hinted_prompt(evidence, rating, recipe.rating_scale, meter)
        call: dict[str, Any] = {
            "max_tokens": recipe.token_budgets.rationale,
            "temperature": settings.temperature,
        }
        if settings.top_p < 1:
            call["top_p"] = settings.top_p
        draws = settings.hinted_draws if settings.temperature else min(1, settings.hinted_draws)
        texts: list[str] = []
        kept = 0
        for draw in range(1 + draws):
            answer = await self.teacher.ask(hinted if draw else plain, draw=draw, **call)
            found = screened(answer.text, evidence, texts, recipe, meter, hinted=draw > 0)
            if found is None:
                text = answer.text.strip()
                found = await judge.judged(text, settings.tau, hinted=draw > 0)
                texts.append(text)
            yield found
            kept += found.outcome == "kept"
            if kept >= settings.keep:
                return


# All rows -------------------------------------------------------------------------------------


def _check(settings: RejectionSettings) -> None:
    for name, least in (("hinted_draws", 0), ("composed", 0), ("keep", 1), ("concurrency", 1)):
        if (value := getattr(settings, name)) < least:
            raise SettingError(f"bad setting rejection.{name}={value}: must be {least} or more")
    if settings.temperature < 0 or not 0 < settings.top_p <= 1:
        raise SettingError(
            f"bad setting rejection: temperature={settings.temperature:g} must be 0 or more, "
            f"top_p={settings.top_p:g} above 0 and at most 1"
        )


def _targets(recipe: Recipe) -> list[Review]:
    targets = read_targets(recipe, "train", "instruction")
    if recipe.rejection.rows is None:
        return targets
    drawn = by_lot(targets, recipe.seed, "rejection")[: recipe.rejection.rows]
    chosen = {target.key for target in drawn}
    return [target for target in targets if target.key in chosen]


def _manifest(
    recipe: Recipe,
    targets: Sequence[Review],
    summaries: Summaries,
    teacher: dict[str, Any],
    reward: dict[str, Any],
) -> dict[str, Any]:
    """All that decides the draws and their outcomes."""
    settings = recipe.rejection
    names = ("hinted_draws", "temperature", "top_p", "tau", "keep")
    return {
        "rows": len(targets),
        "rows_digest": digest_rows(target.key for target in targets),
        "summaries": digest_summaries(summaries),
        "teacher": teacher,
        "reward": reward,
        "settings": {name: getattr(settings, name) for name in names},
        "history": recipe.history,
        "budgets": asdict(recipe.token_budgets),
        "scale": list(recipe.rating_scale.values),
        "prompts": {
            name: prompts.prompt_info(name).digest for name in ("reasoner", "teacher_rationale")
        },
        "screens": screens_digest(),
    }
