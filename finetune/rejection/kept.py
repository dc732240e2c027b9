"""What is left of the candidate rationales: counted in a report, kept in a file.

Of sampling there is a job folder of all draws; of both ways, `kept.parquet` has the rationales to
learn from, and `report.json` says how many candidates survived each step.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.rejection.judging import Candidate
from finetune.settings import Recipe
from r4r_graph.caches import write_atomically
from r4r_graph.errors import DataError, NotReadyError
from r4r_graph.evidence import Evidence
from r4r_graph.jobs import Columns, write_table

_log = logging.getLogger(__name__)

KEPT_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("evidence", pa.string()),
        ("rationale", pa.string()),
        ("hinted", pa.bool_()),
        ("error", pa.float64()),
        ("baseline_error", pa.float64()),
        ("rank", pa.int64()),
    ]
)
"""Columns of `kept.parquet`, a row for each rationale to learn from: `evidence` is
`Evidence.to_dict()` as JSON, `rank` counts a target's rationales, the best first. Of ready-made
ones neither target nor baseline are known (null)."""


SAMPLES_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("as_of", pa.float64()),
        ("evidence", pa.string()),
        ("baseline_error", pa.float64()),
        ("texts", pa.list_(pa.string())),
        ("hinted", pa.list_(pa.bool_())),
        ("outcomes", pa.list_(pa.string())),
        ("reasons", pa.list_(pa.list_(pa.string()))),
        ("errors", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)
"""Columns of the samples: a row for each target, its draws as lists. A row that failed has its
reason in `error`, beside the draws it had made before."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """How many candidates there were, where they ended, and how many were left."""

    drawn: int = 0
    leaked: int = 0
    """Gave a rating away."""
    malformed: int = 0
    """Gave none away, but were no whole paragraph."""
    repeated: int = 0
    """Were word for word a candidate of the same row."""
    judged: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True)
class RejectionReport:
    """What is left of the candidates, over all rows, of this run and earlier ones."""

    path: Path
    """The rationales that were kept."""
    ready_made: bool
    rows: int
    failed: int
    """Rows that ended in an error of the teacher or of the judge; what they kept before, counts."""
    without: int
    """Other rows of which nothing was kept."""
    kept: int
    """Rationales kept, composed ones among them."""
    plain: Survivors
    """Of the candidates that were drawn without a hint; of all, where they are ready-made."""
    hinted: Survivors
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why candidates were screened out, the most frequent first; one may have several reasons."""
    baseline_error: float | None = None
    """Mean error without a rationale, over the rows in which a candidate was judged. Of ready-made
    ones: mean over the rows of the median error of the sound candidates."""
    kept_error: float | None = None
    """Mean error with a kept rationale."""
    median_change: float | None = None
    """Median over the judged candidates of the error with one minus the error without: a `tau` of
    this value keeps half of them. None for ready-made ones."""
    composed: int = 0
    """Rationales put together by rule (`finetune.rejection.composing`)."""
    seconds: float = 0.0
    tokens: int = 0
    """Tokens that the teacher took in this run."""


def survivors(candidates: Iterable[Candidate]) -> Survivors:
    """The candidates, counted."""
    ends = Counter[str]()
    judged = 0
    for candidate in candidates:
        ends[candidate.outcome] += 1
        judged += candidate.outcome in ("rejected", "kept")
    screens = {name: ends[name] for name in ("leaked", "malformed", "repeated", "kept")}
    return Survivors(drawn=ends.total(), judged=judged, **screens)


def count_reasons(candidates: Iterable[Candidate]) -> dict[str, int]:
    """How often candidates were screened out for what, the most frequent first."""
    found = Counter(
        f"{candidate.outcome}: {reason.split(':')[0]}"
        for candidate in candidates
        for reason in {reason.split(":")[0] for reason in candidate.reasons}
    )
    return dict(found.most_common())


def drawn_in(row: Columns) -> list[Candidate]:
    """The candidates in a row of samples."""
    columns = (row[name] for name in ("texts", "outcomes", "hinted", "reasons", "errors"))
    return [
        Candidate(text, outcome, hinted, tuple(reasons), error)
        for text, outcome, hinted, reasons, error in zip(*columns, strict=True)
    ]


def kept_of(row: Columns, most: int) -> list[Columns]:
    """The rationales to learn from in a row of samples, the lower error first, on a tie the earlier
    draw."""
    kept = [candidate for candidate in drawn_in(row) if candidate.outcome == "kept"]
    kept.sort(key=lambda candidate: candidate.error or 0.0)
    shared = {name: row[name] for name in KEPT_SCHEMA.names if name in row}
    return [
        shared
        | {
            "rationale": candidate.text,
            "hinted": candidate.hinted,
            "error": candidate.error,
            "rank": rank,
        }
        for rank, candidate in enumerate(kept[:most])
    ]


def sampling_report(
    recipe: Recipe,
    rows: Sequence[Columns],
    kept: Sequence[Columns],
    composed: Sequence[Columns],
    seconds: float,
    tokens: int,
) -> RejectionReport:
    """The samples, counted."""
    drawn = [(row, candidate) for row in rows for candidate in drawn_in(row)]
    changes = [c.error - row["baseline_error"] for row, c in drawn if c.error is not None]
    empty = [row for row in rows if "kept" not in row["outcomes"]]
    return RejectionReport(
        path=kept_file(recipe),
        ready_made=False,
        rows=len(rows),
        failed=sum(row["error"] is not None for row in rows),
        without=sum(row["error"] is None for row in empty),
        kept=len(kept) + len(composed),
        composed=len(composed),
        plain=survivors(candidate for _, candidate in drawn if not candidate.hinted),
        hinted=survivors(candidate for _, candidate in drawn if candidate.hinted),
        reasons=count_reasons(candidate for _, candidate in drawn),
        baseline_error=mean(r["baseline_error"] for r in rows if r["baseline_error"] is not None),
        kept_error=mean(row["error"] for row in kept),
        median_change=statistics.median(changes) if changes else None,
        seconds=seconds,
        tokens=tokens,
    )


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    listed = list(values)
    return statistics.fmean(listed) if listed else None


def write_kept(
    recipe: Recipe, rows: Sequence[Columns], report: RejectionReport, made_of: Mapping[str, Any]
) -> None:
    """Write `kept.parquet`, and `report.json` after it; each is there whole, or as it was."""
    if not rows:
        _log.warning("no rationale was kept: %s", report.reasons or "there were no candidates")
    report.path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(list(rows), KEPT_SCHEMA), report.path)
    facts = {**asdict(report), "path": report.path.name, "made_of": dict(made_of)}
    facts["settings"] = asdict(recipe.rejection)
    write_atomically(_report_file(recipe), json.dumps(facts, indent=2) + "\n")


def read_kept(recipe: Recipe) -> list[dict[str, Any]]:
    """The rationales to learn from: rows of `KEPT_SCHEMA` with `evidence` as an `Evidence`.

    Raises:
        NotReadyError: the step `rejection` has not ended yet.
        DataError: the file is damaged.
    """
    path = kept_file(recipe)
    if not path.is_file() or not _report_file(recipe).is_file():
        raise NotReadyError(f"{path} is not there; run the step `rejection` first")
    try:
        rows = pq.read_table(path, schema=KEPT_SCHEMA).to_pylist()
        return [
            {**row, "evidence": Evidence.from_dict(json.loads(row["evidence"]))} for row in rows
        ]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run the step `rejection` "
            "again"
        ) from None


def kept_file(recipe: Recipe) -> Path:
    """Where the kept rationales are."""
    return recipe.folder("rejection") / "kept.parquet"


def _report_file(recipe: Recipe) -> Path:
    return recipe.folder("rejection") / "report.json"


def packed(evidence: Evidence) -> str:
    """The evidence as it stands in a file."""
    return json.dumps(evidence.to_dict(), ensure_ascii=False)


def earlier_report(recipe: Recipe, made_of: Mapping[str, Any]) -> RejectionReport | None:
    """The report of a run over the same, if its rationales are there."""
    try:
        facts = json.loads(_report_file(recipe).read_text(encoding="utf-8"))
        if facts["made_of"] != made_of or not kept_file(recipe).is_file():
            return None
        known = {each.name: facts[each.name] for each in fields(RejectionReport)}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    counts = {name: Survivors(**known[name]) for name in ("plain", "hinted")}
    return RejectionReport(**{**known, **counts, "path": kept_file(recipe)})
