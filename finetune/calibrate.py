"""Calibrates the predictor: one temperature and one bias a rating value, on validation rows.

The predictor's adapter rates the validation rows as it will at inference, but without any
calibration that it already has; `r4r_graph.calibration` fits on what it says. How much that helps
is measured by cross-fitting: each half of the rows is calibrated by a fit on the other half. Where
it does not, the identity is stored.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.domains import floors, review_source
from finetune.engines import ExpertEngine
from finetune.rationales import read_rationales
from finetune.rows import row_key, target_evidence
from finetune.settings import Recipe
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.caches import write_atomically
from r4r_graph.calibration import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationFacts,
    calibrated,
    fit_calibration,
)
from r4r_graph.engine.adapters import Adapter, find_adapters
from r4r_graph.engine.base import Engine
from r4r_graph.engine.model_files import file_digest
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import DataError, NotReadyError, RequestError, SettingError
from r4r_graph.evaluation.metrics import (
    Estimate,
    PointScores,
    Scores,
    likelihood_losses,
    missing,
    paired_difference,
    score,
    score_points,
    soft_targets,
)
from r4r_graph.experts import Predictor
from r4r_graph.jobs import Columns, OnProgress, digest_rows, read_job, run_job
from r4r_graph.prompts import prompt_digests
from r4r_graph.schema import AspectSummary, Review

Floats = npt.NDArray[np.float64]
Key = tuple[str, str, float]

_CONCURRENCY = 64

_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("rating", pa.float64()),
        ("distribution", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What the calibration did, on validation rows that its predictor was not trained on."""

    path: Path
    """The file, beside the adapter."""
    helped: bool
    """Whether the cross-fitted likelihood was better. If not, the file holds the identity."""
    calibration: Calibration
    """What the file holds."""
    rows: int
    """Rows that were rated; those that failed are `before.missing`."""
    without_rationale: int
    """Validation rows left out because no rationale was written for them."""
    before: Scores
    """The predictor alone."""
    after: Scores
    """Cross-fitted: each half of the rows by a fit on the other half."""
    gain: Estimate
    """Negative log-likelihood after less before, paired; below zero it helped."""
    floors: Mapping[str, PointScores]
    """Of the same rows."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "helped": self.helped,
            "calibration": self.calibration.to_dict(),
            "rows": self.rows,
            "without_rationale": self.without_rationale,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "gain": asdict(self.gain),
            "floors": {name: scores.to_dict() for name, scores in self.floors.items()},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Rows:
    """What is rated."""

    targets: Sequence[Review]
    rationales: Mapping[Key, str]
    summaries: Mapping[str, AspectSummary]
    without_rationale: int

    @property
    def digest(self) -> str:
        """Of the targets alone."""
        return digest_rows([*row_key(t).values(), t.rating] for t in self.targets)


def calibrate_predictor(
    recipe: Recipe,
    *,
    engine: Engine | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
) -> CalibrationReport:
    """Fit the predictor's calibration, and store it beside the adapter (paper: no such step).

    Distributions that an earlier run computed of the same rows, adapter and prompts are reused.
    An existing calibration is ignored while fitting, and replaced at the very end.

    Args:
        recipe: its section `calibrate`, and all that decides what the predictor reads.
        engine: one with an adapter `predictor` and no calibration; None loads it.
        resume: reuse distributions of an earlier run.
        on_progress: called after each row that is rated.

    Raises:
        NotReadyError: there is no predictor, or something before it is missing.
        DataError: there are too few rows; the message counts them.
        SettingError: the engine has no adapter `predictor`, or applies a calibration already.
        ModelError: the adapter or its base model cannot be loaded.
    """
    started = time.monotonic()
    folder = recipe.adapters / "predictor"
    if not folder.is_dir():
        raise NotReadyError(f"no predictor in {folder}; run the step predictor first")
    rows = _rows(recipe)
    _require(recipe, len(rows.targets), len(rows.targets), rows.without_rationale)
    probabilities, failure = _distributions(recipe, rows, folder, engine, resume, on_progress)
    truths = np.array([target.rating for target in rows.targets])
    known = ~missing(probabilities)
    _require(recipe, int(known.sum()), len(known), rows.without_rationale, failure)

    scale, l2 = recipe.rating_scale, recipe.calibrate.l2
    targets = soft_targets(truths, scale)
    crossed = _cross_fitted(probabilities, targets, known, recipe)
    losses = [likelihood_losses(truths, p, scale) for p in (probabilities, crossed)]
    nll_before, nll_after = (float(loss[known].mean()) for loss in losses)
    helped = nll_after < nll_before
    calibration = Calibration(scale.values)
    if helped:
        calibration = fit_calibration(probabilities[known], targets[known], scale, l2=l2)
    weights = folder / "adapter_model.safetensors"
    facts = CalibrationFacts(
        rows=int(known.sum()),
        nll_before=nll_before,
        nll_after=nll_after,
        split_digest=rows.digest,
        weights_digest=file_digest(weights) if weights.is_file() else "",
    )
    by_floor = floors(recipe, rows.targets, read_targets(recipe, "train"))
    report = CalibrationReport(
        path=folder / CALIBRATION_FILE,
        helped=helped,
        calibration=replace(calibration, facts=facts),
        rows=len(rows.targets),
        without_rationale=rows.without_rationale,
        before=score(truths, probabilities, scale, seed=recipe.seed),
        after=score(truths, crossed, scale, seed=recipe.seed),
        gain=paired_difference(losses[1], losses[0], seed=recipe.seed),
        floors={
            name: score_points(truths, points, scale, seed=recipe.seed)
            for name, points in by_floor.items()
        },
        seconds=time.monotonic() - started,
    )
    report.calibration.save(report.path)
    write_atomically(_home(recipe) / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _cross_fitted(
    probabilities: Floats, targets: Floats, known: npt.NDArray[np.bool_], recipe: Recipe
) -> Floats:
    """Each half of the rows calibrated by a fit on the other half; missing rows stay missing."""
    scale = recipe.rating_scale
    places = np.random.default_rng(recipe.seed).permutation(np.flatnonzero(known))
    halves = places[::2], places[1::2]
    crossed = np.full_like(probabilities, np.nan)
    for fitted_on, applied_to in (halves, halves[::-1]):
        calibration = fit_calibration(
            probabilities[fitted_on], targets[fitted_on], scale, l2=recipe.calibrate.l2
        )
        crossed[applied_to] = calibrated(probabilities[applied_to], calibration)
    return crossed


# Rows and their distributions --------------------------------------------------------------------


def _home(recipe: Recipe) -> Path:
    return recipe.folder("runs") / "calibrate"


def _rows(recipe: Recipe) -> _Rows:
    settings = recipe.calibrate
    targets = read_targets(recipe, "validation")
    found, rationales = len(targets), {}
    if settings.with_rationale:
        rationales = read_rationales(recipe, "validation")
        targets = [target for target in targets if _key(target) in rationales]
    without = found - len(targets)
    if settings.rows is not None and settings.rows < len(targets):
        dice = np.random.default_rng(recipe.seed)
        places = sorted(dice.choice(len(targets), settings.rows, replace=False).tolist())
        targets = [targets[at] for at in places]
    return _Rows(targets, rationales, read_summaries(recipe), without)


def _require(
    recipe: Recipe, usable: int, chosen: int, without_rationale: int, failure: str = ""
) -> None:
    least = max(recipe.calibrate.min_rows, 2)
    if usable >= least:
        return
    why = [f"{without_rationale} validation rows have no rationale"] if without_rationale else []
    if failed := chosen - usable:
        why.append(f"{failed} could not be rated ({failure})")
    raise DataError(
        f"calibration needs {least} validation rows and there are {usable}"
        + (f"; {', '.join(why)}" if why else "")
        + "; make more of them, or lower calibrate.min_rows"
    )


def _distributions(
    recipe: Recipe,
    rows: _Rows,
    folder: Path,
    engine: Engine | None,
    resume: bool,
    on_progress: OnProgress | None,
) -> tuple[Floats, str]:
    """Uncalibrated probabilities (n, values), nan where a row failed, and the first failure."""
    manifest = _manifest(recipe, rows, *_weights(recipe, folder, engine))
    name = digest_rows([manifest])[:16]
    out = _home(recipe) / f"distributions-{name}"
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    found = _read(out) if out.is_dir() else []
    if len(found) < len(rows.targets):
        with ExpertEngine(recipe, "predictor", folder, engine) as expert:
            _rate(recipe, rows, expert.engine, out, manifest, on_progress)
        found = _read(out)
    probabilities = np.full((len(found), len(recipe.rating_scale.values)), np.nan)
    for at, row in enumerate(found):
        if row["error"] is None:
            probabilities[at] = row["distribution"]
    failures = [row["error"] for row in found if row["error"] is not None]
    return probabilities, failures[0] if failures else ""


def _read(out: Path) -> list[Columns]:
    try:
        return read_job(out)
    except DataError:  # nothing finished yet
        return []


def _rate(
    recipe: Recipe,
    rows: _Rows,
    engine: Engine,
    out: Path,
    manifest: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> None:
    source = review_source(recipe)
    predictor = Predictor(engine, recipe.rating_scale, recipe.token_budgets)

    async def rate(target: Review) -> Columns:
        row: Columns = {**row_key(target), "rating": target.rating}
        rationale = rows.rationales.get(_key(target))
        evidence = target_evidence(target, source, rows.summaries, engine.meter, recipe)
        try:
            [result] = await predictor.arate(evidence, [rationale])
        except RequestError as error:  # the row's own fault; anything else ends the run
            return row | {"distribution": None, "error": f"{type(error).__name__}: {error}"}
        return row | {"distribution": list(result.distribution.probabilities), "error": None}

    run_job(
        rows.targets,
        rate,
        out,
        schema=_SCHEMA,
        manifest=manifest,
        concurrency=_CONCURRENCY,
        on_progress=on_progress,
    )


def _weights(recipe: Recipe, folder: Path, engine: Engine | None) -> tuple[str, str, str]:
    """Digests of base and adapter, and the dtype, without loading them.

    Raises:
        SettingError: the engine cannot be used.
    """
    if engine is None:
        return find_base(recipe.base).digest, _found(folder, False).digest, str(recipe.dtype)
    digest = engine.info.adapters.get("predictor")
    if digest is None:
        raise SettingError("the engine has no adapter 'predictor' to calibrate")
    if (folder / CALIBRATION_FILE).is_file() and digest == _found(folder, True).digest:
        raise SettingError(
            "the engine applies the predictor's calibration already; load it with "
            "load_local_engine(..., calibrated=False)"
        )
    return engine.info.digest, digest, engine.info.dtype


def _found(folder: Path, with_calibration: bool) -> Adapter:
    return find_adapters({"predictor": folder}, calibrated=with_calibration)["predictor"]


def _manifest(recipe: Recipe, rows: _Rows, base: str, adapter: str, dtype: str) -> dict[str, Any]:
    """All that decides the distributions."""
    splits = recipe.folder("splits") / "manifest.json"
    return {
        "targets": rows.digest,
        "rationales": digest_rows([*key, text] for key, text in sorted(rows.rationales.items())),
        "summaries": digest_rows(
            [key, summary.to_dict()] for key, summary in sorted(rows.summaries.items())
        ),
        "splits": file_digest(splits) if splits.is_file() else "",
        "base": base,
        "adapter": adapter,
        "dtype": dtype,
        "quantize_4bit": recipe.quantize_4bit,
        "prompts": prompt_digests(),
        "scale": list(recipe.rating_scale.values),
        "history": recipe.history,
        "budgets": asdict(recipe.token_budgets),
    }


def _key(target: Review) -> Key:
    return target.user_id, target.item_id, float(target.timestamp)
