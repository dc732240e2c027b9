"""A report in words and tables: what the terminal, the Markdown and the HTML show alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from r4r_graph.evaluation.metrics import Estimate, PointScores, Scores
from r4r_graph.evaluation.rendering.cells import (
    COMPARED,
    INTERVAL,
    NONE,
    SLICE_WORDS,
    Cell,
    Table,
    comparison,
    condition_words,
    filled,
    floor_words,
    gain_cell,
    interval,
    make_table,
    number,
    percent,
    shown,
)
from r4r_graph.evaluation.report import (
    Difference,
    EvaluationReport,
    PredictorReport,
    Probe,
    RankingScores,
    RationaleForm,
    Verdict,
    WordScore,
)
from r4r_graph.ratings import READOUTS, Readout

NOTHING = 0.02
"""A rating that moves less than this share of the scale's smallest step stands still."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A place for one of `plots.figures`."""

    name: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what there is to know, and the tables."""

    title: str
    text: str
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()


def document(report: EvaluationReport) -> tuple[Section, ...]:
    """The report's sections, in order. What was not measured has none; the first one names it."""
    asked = (
        _slices(report),
        _ranking(report),
        _calibration(report),
        _probes(report),
        _words(report),
    )
    absent = [section.title for section in asked if not section.tables]
    sections = (
        _scored(report, absent),
        _accuracy(report),
        _against_floors(report),
        _against_first(report),
        *asked,
        _without_prediction(report),
    )
    return tuple(section for section in sections if section.tables)


def smallest_step(scale: Sequence[float]) -> float:
    """Between two neighbours of a scale."""
    return min(b - a for a, b in itertools.pairwise(scale))


def readout_scores(predictor: PredictorReport) -> dict[str, PointScores]:
    """Read-out to its scores; a single `point` where all read-outs are one and the same."""
    known = [r for r in READOUTS if isinstance(predictor.scores, Scores) or r in predictor.scores]
    scores = [predictor.point_scores(readout) for readout in known]
    if not isinstance(predictor.scores, Scores) and all(s == scores[0] for s in scores):
        return {"point": scores[0]}
    return dict(zip(known, scores, strict=True))


# Sections ----------------------------------------------------------------------------------------


def _scored(report: EvaluationReport, absent: Sequence[str]) -> Section:
    facts = report.facts
    drawn = "all" if facts.seed is None else f"drawn with seed {facts.seed}"
    lines = [
        ("rows", f"{facts.rows:,} of {facts.targets:,} ({drawn})"),
        ("sample", facts.digest),
        ("written between", f"{_date(facts.first)} and {_date(facts.last)}"),
        ("users", f"{facts.users:,}"),
        ("items", f"{facts.items:,}"),
        ("rating scale", ", ".join(f"{value:g}" for value in report.scale)),
        ("floors fitted on", f"{facts.train_rows:,} rows"),
    ]
    if absent:
        lines.append(("not measured", "; ".join(absent)))
    sets = report.predictors
    changed = [p for p in sets if p.condition != "as_is"]
    models = [(p.name, "condition", condition_words(p.condition)) for p in changed]
    models += [(p.name, what, value) for p in sets for what, value in _flat(p.model)]
    return Section(
        "What was scored",
        "Intervals are 95 % bootstrap intervals over rows, and every comparison is paired: both "
        "sides on the same rows, resampled together. “Better” and “worse” stand only where zero "
        "is outside the interval. A row without a prediction counts as the largest error of the "
        "scale.",
        filled(
            make_table("", ("what", "value"), lines),
            make_table("Notes", ("note",), [(note,) for note in report.notes]),
            make_table("Models", ("predictions", "what", "value"), models, aside=True),
        ),
    )


def _accuracy(report: EvaluationReport) -> Section:
    lines = [
        (predictor.name, readout, scores)
        for predictor in report.predictors
        for readout, scores in readout_scores(predictor).items()
    ]
    lines += [(floor_words(name), "floor", scores) for name, scores in report.floors.items()]
    best_mae = min((s.mae.value for _, _, s in lines if s.mae.value == s.mae.value), default=0.0)
    best_rmse = min((s.rmse.value for _, _, s in lines if s.rmse.value == s.rmse.value), default=0)
    rows = [
        (
            name,
            what,
            _marked(scores.mae, best_mae),
            _marked(scores.rmse, best_rmse),
            f"{scores.missing:,}",
        )
        for name, what, scores in lines
    ]
    columns = ("predictions", "read-out", f"MAE {INTERVAL}", f"RMSE {INTERVAL}", "missing")
    note = "* Lowest of its column; whether by more than chance, the next tables say."
    return Section(
        "Accuracy",
        "Errors in rating units, lower is better. Floors are arithmetic on the ratings of earlier "
        "reviews, for the same rows. The median read-out is made for MAE, the mean for RMSE.",
        filled(make_table("", columns, rows, note)),
        (Figure("errors", "MAE and RMSE with their 95 % intervals; floors are hollow."),),
    )


def _against_floors(report: EvaluationReport) -> Section:
    tables = []
    for predictor in report.predictors:
        pairs = [(name, *_best_suited(by)) for name, by in predictor.against.items()]
        rows = [(floor_words(name), *comparison(*pair)) for name, *pair in pairs]
        note = (
            f"MAE: {_tally(d.verdict('mae') for _, d, _ in pairs if d)} "
            f"RMSE: {_tally(d.verdict('rmse') for _, _, d in pairs if d)}"
        )
        tables.append(make_table(predictor.name, ("floor", *COMPARED), rows, note))
    return Section(
        "Against the floors",
        "The predictions' error less the floor's, on the same rows: below zero they are better. "
        "An expert that does not beat the floors has learned nothing that was worth a language "
        "model.",
        filled(*tables),
    )


def _against_first(report: EvaluationReport) -> Section:
    rows = [
        (predictor.name, *comparison(*_best_suited(predictor.against_first)))
        for predictor in report.predictors
        if predictor.against_first
    ]
    first = report.predictors[0].name if report.predictors else ""
    return Section(
        "Sets of predictions against each other",
        "Error less that of the first set, on the same rows: below zero is better.",
        filled(make_table(f"Against {first}", ("predictions", *COMPARED), rows)),
    )


def _slices(report: EvaluationReport) -> Section:
    tables = []
    for predictor in report.predictors:
        named = [
            (f"{SLICE_WORDS.get(part.by, part.by)}: {part.label}", part)
            for part in predictor.slices
        ]
        errors = [
            (name, f"{p.rows:,}", f"{p.missing:,}", interval(p.mae), interval(p.rmse))
            for name, p in named
        ]
        columns = ("rows with", "rows", "missing", *COMPARED[::2])
        tables.append(make_table(predictor.name, columns, errors))
        compared = [(name, *comparison(p.difference, p.difference)) for name, p in named]
        title = f"{predictor.name}, less the floor “shrunk bias”"
        tables.append(make_table(title, ("rows with", *COMPARED), compared, aside=True))
    by_rating = any(p.by == "true rating" for s in report.predictors for p in s.slices)
    caption = "MAE of the median read-out by true rating: where the errors lie."
    return Section(
        "Slices",
        "The same figures for parts of the rows; very small ones have no interval. Of many "
        "comparisons one in twenty is decided by chance. Slices by true rating select on the "
        "truth: whoever stays near the middle looks bad at the ends of the scale, and is right to "
        "where little is known. They show where the errors lie, not what would be better.",
        filled(*tables),
        (Figure("ratings", caption),) if by_rating else (),
    )


def _ranking(report: EvaluationReport) -> Section:
    def lines(name: str, scores: Iterable[RankingScores]) -> Iterator[tuple[str, ...]]:
        for s in scores:
            yield name, f"{s.k}", f"{s.users:,}", interval(s.ndcg), interval(s.hit_rate)

    named = [(predictor.name, predictor.ranking) for predictor in report.predictors]
    ranked = [line for name, scores in named for line in lines(name, scores)]
    floors = report.ranking_floors.items() if ranked else ()
    by_floor = [line for name, scores in floors for line in lines(floor_words(name), scores)]
    columns = ("predictions", "k", "users", f"NDCG@k {INTERVAL}", f"HR@k {INTERVAL}")
    tables = [
        make_table("", columns, ranked),
        make_table("Floors (a constant orders by chance)", columns, by_floor, aside=True),
    ]
    for predictor in report.predictors:
        rows = [
            (floor_words(name), f"{scores.k}", interval(gain, signed=True), gain_cell(gain))
            for name, gains in predictor.ranking_against.items()
            for scores, gain in zip(predictor.ranking, gains, strict=True)
        ]
        compared = ("floor", "k", f"NDCG@k {INTERVAL}", "verdict")
        tables.append(make_table(f"{predictor.name}, less the floor's", compared, rows, aside=True))
    return Section(
        "Ranking",
        "How the mean read-out orders each user's held-out items; higher is better, and so is a "
        "difference above zero. HR@k is the share of users with a liked item among their first k. "
        "It grows with k in any order: compare it with that of a constant floor. Intervals are "
        "over users.",
        filled(*tables),
    )


def _calibration(report: EvaluationReport) -> Section:
    scores, coverage, bins, figures = [], [], [], []
    for at, predictor in enumerate(report.predictors, start=1):
        name, reliability = predictor.name, predictor.reliability
        known = predictor.scores if isinstance(predictor.scores, Scores) else None
        if not known and not reliability and predictor.mass is None:
            continue
        scores.append(
            (
                name,
                interval(known.nll) if known else NONE,
                number(reliability.expected_error) if reliability else NONE,
                NONE if predictor.mass is None else percent(predictor.mass),
            )
        )
        levels = reliability.coverage if reliability else {"0.8": known.coverage} if known else {}
        coverage += [
            (name, f"{100 * float(level):g} %", interval(share, as_share=True), _sure(level, share))
            for level, share in levels.items()
        ]
        if reliability:
            rows = [
                (
                    f"{b.low:g} to {b.high:g}",
                    f"{b.count:,}",
                    percent(b.predicted),
                    percent(b.observed),
                )
                for b in reliability.bins
            ]
            columns = ("probability", "count", "predicted", "came true")
            bins.append(make_table(f"Reliability of {name}", columns, rows, aside=True))
            caption = f"{shown(name)}: predicted probabilities, and how often they came true."
            figures.append(Figure(f"reliability-{at}", caption))
    return Section(
        "Calibration",
        "Whether the probabilities can be taken at their word. The central 80 % interval should "
        "hold 80 % of the truths: with fewer the predictions are too sure, with more not sure "
        "enough. The expected error is the mean distance between predicted and observed.",
        filled(
            make_table(
                "",
                ("predictions", f"NLL, nats {INTERVAL}", "expected error", "mass on ratings"),
                scores,
                "Mass on ratings: the model's raw probability of all ratings together, before "
                "everything else is masked. Far below 100 % it would rather write something else.",
            ),
            make_table(
                "Coverage",
                ("predictions", "interval", f"truths inside {INTERVAL}", "verdict"),
                coverage,
            ),
            *bins,
        ),
        tuple(figures),
    )


def _probes(report: EvaluationReport) -> Section:
    step = smallest_step(report.scale)
    columns = ("condition", "rated", f"rating moves {INTERVAL}", *COMPARED[::2], "verdict")
    tables = []
    for predictor in report.predictors:
        rows = [
            (
                condition_words(p.condition),
                f"{p.rows - p.missing:,} of {p.rows:,}",
                interval(p.moved),
                interval(p.difference.mae, signed=True),
                interval(p.difference.rmse, signed=True),
                _use(p, step),
            )
            for p in predictor.probes
        ]
        tables.append(make_table(predictor.name, columns, rows))
    return Section(
        "Is the rationale used?",
        "The same rows rated once more with something taken away or exchanged: how far the mean "
        "read-out moves, and the error less that of the rows as they are; above zero the change "
        "hurts. A drop may come from the unfamiliar prompt alone, so the comparison that counts "
        "is with a predictor trained without the part, at equal budget: evaluate several adapter "
        "sets together. “Not used”: the rating stands still, and no error changes.",
        filled(*tables),
        (Figure("probes", "How far the mean read-out moves, with 95 % intervals."),),
    )


def _words(report: EvaluationReport) -> Section:
    tables = []
    columns = (
        "measure",
        "scored",
        f"value {INTERVAL}",
        f"floor {INTERVAL}",
        f"difference {INTERVAL}",
        "verdict",
    )
    for predictor in report.predictors:
        words, name = predictor.words, predictor.name
        if words is None:
            continue
        if words.form:
            form = _form(words.form)
            tables.append(
                make_table(f"{name}: form of the rationales", ("rationales", "value"), form)
            )
            found = [(example,) for example in words.form.examples]
            tables.append(make_table(f"{name}: findings", ("finding",), found, aside=True))
        rationales = [_alike(score) for score in words.rationales]
        title = f"{name}: rationales against the review written later"
        tables.append(make_table(title, columns, rationales))
        summaries = [_alike(words.summaries)] if words.summaries else []
        tables.append(make_table(f"{name}: summaries against the teacher's", columns, summaries))
    return Section(
        "Words",
        "Higher is more alike. The floor holds each text against another row's: texts that are "
        "not above it know nothing of their own row.",
        filled(*tables),
    )


def _without_prediction(report: EvaluationReport) -> Section:
    counts, reasons = [], []
    for predictor in report.predictors:
        scores = list(readout_scores(predictor).values())
        rows, missing = scores[0].rows, max(s.missing for s in scores)
        share = percent(missing / rows) if rows else NONE
        counts.append((predictor.name, f"{rows:,}", f"{missing:,}", share))
        found = [(reason,) for reason in predictor.failures]
        title = f"{predictor.name}: reasons"
        reasons.append(make_table(title, ("user / item: reason",), found, aside=True))
    return Section(
        "Rows without a prediction",
        "They count as the largest error of the scale and are in every figure above.",
        filled(make_table("", ("predictions", "rows", "without", "share"), counts), *reasons),
    )


# Rows of tables ----------------------------------------------------------------------------------


def _marked(estimate: Estimate, best: float) -> Cell:
    text = interval(estimate)
    return Cell(f"{text} *", "best") if number(estimate.value) == number(best) else Cell(text)


def _best_suited(
    differences: Mapping[Readout, Difference],
) -> tuple[Difference | None, Difference | None]:
    """Of the median for MAE, of the mean for RMSE."""
    return differences.get("median"), differences.get("mean")


def _tally(verdicts: Iterable[Verdict]) -> str:
    found = list(verdicts)
    words: tuple[Verdict, ...] = ("better", "worse", "undecided")
    return ", ".join(f"{word} {found.count(word)}" for word in words) + "."


def _sure(level: str, covered: Estimate) -> Cell:
    if covered.high < float(level):
        return Cell("too sure", "bad")
    if covered.low > float(level):
        return Cell("not sure enough", "bad")
    return Cell("undecided")


def _use(probe: Probe, step: float) -> Cell:
    """What a change did, in words. The rating stands still only where all of the interval does."""
    decided = {probe.difference.verdict("mae"), probe.difference.verdict("rmse")} - {"undecided"}
    if not decided and probe.moved.high < NOTHING * step:
        return Cell("not used", "bad")
    if len(decided) == 1:
        return Cell("hurts" if "worse" in decided else "helps")
    return Cell("hurts and helps" if decided else "undecided")


def _form(form: RationaleForm) -> list[tuple[str, str]]:
    low, median, high = (f"{words:g}" for words in form.words)
    return [
        ("rows with one", f"{form.rows:,}"),
        ("rows without", f"{form.empty:,}"),
        (f"name a rating {INTERVAL}", interval(form.leaks, as_share=True)),
        (f"repeat themselves {INTERVAL}", interval(form.repeats, as_share=True)),
        (f"any fault of form {INTERVAL}", interval(form.malformed, as_share=True)),
        ("different texts", percent(form.distinct)),
        ("words (5th percentile, median, 95th)", f"{low}, {median}, {high}"),
    ]


def _alike(score: WordScore) -> tuple[str | Cell, ...]:
    rows = f"{score.rows:,}"
    return (
        score.name,
        f"{rows} ({score.failed:,} failed)" if score.failed else rows,
        interval(score.value),
        interval(score.floor),
        interval(score.difference, signed=True),
        gain_cell(score.difference),
    )


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of each entry of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key} ")
        else:
            yield f"{above}{key}", str(value)


def _date(seconds: float) -> str:
    """The day in UTC; what is no time that a calendar knows, as it is."""
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"
