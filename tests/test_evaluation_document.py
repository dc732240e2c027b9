"""What a report says in words: every figure, and no verdict that the interval does not give."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from r4r_graph.evaluation.metrics import Estimate
from r4r_graph.evaluation.rendering.cells import Cell, Table, interval, number, shown
from r4r_graph.evaluation.rendering.document import Section, document, readout_scores
from r4r_graph.evaluation.report import EvaluationReport, PredictorReport, Probe, Reliability
from tests import evaluation_reports as made

NAN = float("nan")


def texts(report: EvaluationReport) -> list[str]:
    return [cell.text for table in tables(report) for row in table.rows for cell in row]


def tables(report: EvaluationReport) -> Iterator[Table]:
    for section in document(report):
        yield from section.tables


def section(report: EvaluationReport, title: str) -> Section:
    [found] = [section for section in document(report) if section.title == title]
    return found


def rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


# Every figure ------------------------------------------------------------------------------------


def numbered(value: Any, counter: Iterator[int]) -> Any:
    """The same report in which every figure is another."""
    if isinstance(value, Estimate):
        return Estimate(*(next(counter) / 1000 for _ in range(3)))
    if isinstance(value, Mapping):
        return {key: numbered(entry, counter) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(numbered(entry, counter) for entry in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**{name: numbered(entry, counter) for name, entry in fields.items()})
    return value


def promised(report: EvaluationReport) -> list[Estimate]:
    """What a person is shown; the rest is in the JSON."""
    shown = [*made.estimates(report.floors), *made.estimates(report.ranking_floors)]
    for predictor in report.predictors:
        scores: Any = predictor.scores
        shown += [*made.estimates([scores.mae, scores.rmse, scores.nll])]
        for differences in (*predictor.against.values(), predictor.against_first):
            if differences:
                shown += [differences["median"].mae, differences["mean"].rmse]
        assert predictor.reliability is not None
        shown += made.estimates(
            [
                predictor.slices,
                predictor.ranking,
                predictor.ranking_against,
                predictor.reliability.coverage,
                [(probe.moved, probe.difference) for probe in predictor.probes],
                predictor.words,
            ]
        )
    return shown


def test_every_figure_is_shown_with_its_interval() -> None:
    report: EvaluationReport = numbered(made.full(), itertools.count(1))
    found = texts(report)
    expected = promised(report)
    assert len(expected) > 150
    for estimate in expected:
        plain = "{:.3f} [{:.3f}, {:.3f}]".format(*dataclasses.astuple(estimate))
        signed = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*dataclasses.astuple(estimate))
        share = "{:.1f} % [{:.1f}, {:.1f}]".format(
            *(100 * end for end in dataclasses.astuple(estimate))
        )
        ways = {plain, f"{plain} *", signed, share}
        assert sum(text in ways for text in found) == 1, plain


def test_every_other_number_is_shown() -> None:
    report = made.full()
    [facts] = section(report, "What was scored").tables[:1]
    assert rows(facts) == [
        ["rows", "300 of 4,321 (drawn with seed 7)"],
        ["sample", "c0ffee12"],
        ["written between", "2011-03-13 and 2014-05-13"],
        ["users", "210"],
        ["items", "187"],
        ["rating scale", "1, 2, 3, 4, 5"],
        ["floors fitted on", "21,987 rows"],
    ]
    calibration, _, bins, _ = section(report, "Calibration").tables
    assert rows(calibration)[0] == ["ours", "1.234 [1.194, 1.274]", "0.043", "98.7 %"]
    assert rows(bins)[0] == ["0 to 0.1", "900", "4.7 %", "3.3 %"]
    assert rows(bins)[-1] == ["0.9 to 1", "0", "–", "–"]
    form, findings, _, summaries = section(report, "Words").tables
    assert [value for _, value in rows(form)] == [
        "296",
        "4",
        "2.1 % [1.1, 3.1]",
        "5.2 % [3.2, 7.2]",
        "6.3 % [3.3, 9.3]",
        "91.7 %",
        "21, 34.5, 58",
    ]
    assert rows(findings)[0] == ["row 3: stars: 'five stars'"]
    assert rows(summaries)[0][:2] == ["phrase overlap", "199 (1 failed)"]
    ranking = section(report, "Ranking").tables[0]
    assert rows(ranking)[0][:3] == ["ours", "1", "45"]
    slices = section(report, "Slices").tables[0]
    assert rows(slices)[1][:3] == ["cold start: user", "61", "1"]
    assert rows(slices)[4][0] == "user's reviews: 0"


def test_without_predictions_counts_and_reasons() -> None:
    counts, reasons, _ = section(made.full(), "Rows without a prediction").tables
    assert rows(counts)[0] == ["ours", "300", "2", "0.7 %"]
    assert rows(reasons) == [["u7 / i9: out of memory"], ["u8 / i2: the row was stopped"]]


def test_numbers_are_written_out() -> None:
    assert number(1.23456) == "1.235"
    assert number(-0.5, signed=True) == "−0.500"
    assert number(0.5, signed=True) == "+0.500"
    assert number(-0.0, signed=True) == "+0.000"
    assert number(NAN) == "–"
    assert interval(Estimate(-0.001, -0.002, -0.0001), signed=True) == "−0.001 [−0.002, −0.000]"
    assert interval(Estimate(0.5, NAN, NAN)) == "0.500 [–]"
    assert interval(Estimate(NAN, NAN, NAN)) == "–"
    assert interval(Estimate(0.8, 0.75, 0.85), as_share=True) == "80.0 % [75.0, 85.0]"


def test_all_rows_and_times_that_no_calendar_knows() -> None:
    facts = dataclasses.replace(made.report().facts, seed=None, targets=300, first=NAN, last=1e99)
    [table] = section(made.report(facts=facts), "What was scored").tables[:1]
    assert rows(table)[0] == ["rows", "300 of 300 (all)"]
    assert rows(table)[2] == ["written between", "nan and 1e+99"]


def test_models_and_conditions_are_named() -> None:
    models = section(made.full(), "What was scored").tables[2]
    assert rows(models) == [
        ["without rationale", "condition", "without the rationale"],
        ["ours", "base", "smollm2-135m"],
        ["ours", "adapters predictor", "3f2a9c"],
        ["ours", "adapters reasoner", "b17e"],
        ["without rationale", "base", "smollm2-135m"],
        ["without rationale", "adapters predictor", "3f2a9c"],
        ["without rationale", "adapters reasoner", "b17e"],
    ]


# Verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says", "tone"),
    [
        (made.BETTER, "better", "good"),
        (made.WORSE, "worse", "bad"),
        (made.UNDECIDED, "undecided", "plain"),
        (made.difference(Estimate(-0.1, -0.2, 0.0)), "undecided", "plain"),
        (made.difference(Estimate(-0.1, -0.2, -1e-9)), "better", "good"),
        (made.difference(Estimate(-0.1, NAN, NAN)), "undecided", "plain"),
    ],
)
def test_a_verdict_only_where_zero_is_outside(change: Any, says: str, tone: str) -> None:
    report = made.report(made.predictor(against=made.against(change)))
    [table] = section(report, "Against the floors").tables
    for row in table.rows:
        assert [row[2], row[4]] == [Cell(says, tone)] * 2  # type: ignore[arg-type]


def test_verdict_words_stand_in_verdict_columns_alone() -> None:
    decided = {"better", "worse"}
    for table in tables(made.full()):
        for row in table.rows:
            found = {c for c, cell in zip(table.columns, row, strict=True) if cell.text in decided}
            assert found <= {"verdict"}
        assert not any(cell.tone != "plain" for row in table.rows for cell in row[:1])


def test_mae_and_rmse_have_verdicts_of_their_own() -> None:
    mixed = made.difference(made.BETTER.mae, made.WORSE.rmse)
    report = made.report(made.predictor(against=made.against(mixed)))
    [table] = section(report, "Against the floors").tables
    assert rows(table)[0][2::2] == ["better", "worse"]
    assert table.note == (
        "MAE: better 8, worse 0, undecided 0. RMSE: better 0, worse 8, undecided 0."
    )


def test_the_median_answers_for_mae_and_the_mean_for_rmse() -> None:
    each = {
        "mean": made.difference(made.around(0.301), made.around(0.302)),
        "median": made.difference(made.around(0.303), made.around(0.304)),
        "mode": made.difference(made.around(0.305), made.around(0.306)),
    }
    report = made.report(made.predictor(against={"user_mean": each}))
    [table] = section(report, "Against the floors").tables
    assert [cell[:6] for cell in rows(table)[0][1::2]] == ["+0.303", "+0.302"]


def test_more_is_better_in_a_ranking_and_of_words() -> None:
    _, _, table = section(made.report(), "Ranking").tables
    assert [row[-1] for row in rows(table)] == ["better", "better", "undecided", "worse"]
    *_, rationales, _ = section(made.report(), "Words").tables
    assert [row[-1] for row in rows(rationales)] == ["better", "undecided"]


def test_the_best_of_each_column_is_marked_and_ties_are_shared() -> None:
    table = section(made.full(), "Accuracy").tables[0]
    marked = [
        (row[0].text, row[1].text, at)
        for row in table.rows
        for at in (2, 3)
        if row[at].tone == "best"
    ]
    assert marked == [("ours", "mean", 3), ("ours", "median", 2)]
    assert all(
        row[at].text.endswith(" *") == (row[at].tone == "best")
        for row in table.rows
        for at in (2, 3)
    )
    alike = section(made.report(made.predictor("a"), made.predictor("b")), "Accuracy").tables[0]
    assert sum(row[2].tone == "best" for row in alike.rows) == 2


def test_coverage_is_held_against_its_level() -> None:
    coverage = section(made.report(), "Calibration").tables[1]
    assert [row[1:] for row in rows(coverage)] == [
        ["50 %", "55.1 % [52.0, 58.2]", "not sure enough"],
        ["80 %", "70.0 % [65.9, 74.1]", "too sure"],
        ["90 %", "95.7 % [93.5, 97.9]", "not sure enough"],
    ]
    near = Reliability((), 0.0, {"0.8": made.around(0.82, 0.05)})
    coverage = section(made.report(made.predictor(reliability=near)), "Calibration").tables[1]
    assert rows(coverage)[0][-1] == "undecided"


def test_sets_are_held_against_the_first() -> None:
    [table] = section(made.full(), "Sets of predictions against each other").tables
    assert table.title == "Against ours"
    assert [row[0] for row in rows(table)] == ["without rationale"]
    assert not any(s.title.startswith("Sets of") for s in document(made.report()))


# Probes ------------------------------------------------------------------------------------------


def probe(moved: Estimate, change: Any, condition: str = "without_rationale") -> Probe:
    return Probe(condition, 300, 0, moved, made.scores(0.7, 1.0), change)


def used(*probes: Probe, scale: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)) -> list[str]:
    report = made.report(made.predictor(probes=probes), scale=scale)
    [table] = section(report, "Is the rationale used?").tables
    return [row[-1] for row in rows(table)]


def test_a_rating_that_stands_still_does_not_use_what_was_taken_away() -> None:
    nothing = made.difference(Estimate(0.0, 0.0, 0.0))
    assert used(probe(Estimate(0.0, 0.0, 0.0), nothing)) == ["not used"]
    assert used(probe(Estimate(0.019, 0.018, 0.0199), nothing)) == ["not used"]
    assert used(probe(Estimate(0.019, 0.018, 0.021), nothing)) == ["undecided"]
    assert used(probe(Estimate(0.019, NAN, NAN), nothing)) == ["undecided"]
    assert used(probe(Estimate(0.001, 0.0, 0.002), made.WORSE)) == ["hurts"]


def test_standing_still_is_measured_in_steps_of_the_scale() -> None:
    moved = probe(Estimate(0.015, 0.014, 0.016), made.UNDECIDED)
    assert used(moved) == ["not used"]
    assert used(moved, scale=(0.5, 1.0, 2.0)) == ["undecided"]


def test_what_a_change_does() -> None:
    far = made.around(0.3)
    both = made.difference(made.WORSE.mae, made.BETTER.rmse)
    half = made.difference(made.UNDECIDED.mae, made.BETTER.rmse)
    changes = (made.WORSE, made.BETTER, made.UNDECIDED, both, half)
    assert used(*(probe(far, change) for change in changes)) == [
        "hurts",
        "helps",
        "undecided",
        "hurts and helps",
        "helps",
    ]


def test_conditions_have_names_in_words_and_unknown_ones_their_own() -> None:
    conditions = ("as_is", "swapped_rationale", "without_texts", "averages_only", "new_thing")
    probes = tuple(probe(made.around(0.3), made.WORSE, each) for each in conditions)
    found = section(made.report(made.predictor(probes=probes)), "Is the rationale used?")
    assert [row[0] for row in rows(found.tables[0])] == [
        "as it is",
        "a swapped rationale",
        "without any text",
        "averages alone",
        "new_thing",
    ]
    assert "unfamiliar prompt" in found.text
    assert "equal budget" in found.text


def test_every_probe_has_a_name_in_words() -> None:
    from r4r_graph.evaluation.probes import AS_IS, CONDITIONS
    from r4r_graph.evaluation.rendering.cells import CONDITION_WORDS

    assert set(CONDITION_WORDS) == {AS_IS, *CONDITIONS}


# What there is not -------------------------------------------------------------------------------


def test_point_predictions_alone() -> None:
    report = made.report(made.points_only())
    titles = [s.title for s in document(report)]
    assert titles == [
        "What was scored",
        "Accuracy",
        "Against the floors",
        "Rows without a prediction",
    ]
    facts = section(report, "What was scored").tables[0]
    assert rows(facts)[-1] == [
        "not measured",
        "Slices; Ranking; Calibration; Is the rationale used?; Words",
    ]
    accuracy = section(report, "Accuracy").tables[0]
    assert [row[1] for row in rows(accuracy)][:4] == ["mean", "median", "mode", "floor"]


def test_one_point_a_row_is_one_line() -> None:
    predictor = made.points_only(alike=True)
    assert list(readout_scores(predictor)) == ["point"]
    accuracy = section(made.report(predictor), "Accuracy").tables[0]
    assert [row[1] for row in rows(accuracy)][:2] == ["point", "floor"]


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"ranking": (), "ranking_against": {}}, "Ranking"),
        ({"probes": ()}, "Is the rationale used?"),
        ({"words": None}, "Words"),
        ({"slices": ()}, "Slices"),
    ],
)
def test_what_was_not_measured_is_left_out_and_named(change: Any, title: str) -> None:
    report = made.report(made.predictor(**change))
    assert title not in [s.title for s in document(report)]
    assert ["not measured", title] in rows(section(report, "What was scored").tables[0])


def test_distributions_without_a_reliability_table() -> None:
    predictor = made.predictor(reliability=None, mass=None)
    found = section(made.report(predictor), "Calibration")
    scores, coverage = found.tables
    assert rows(scores) == [["ours", "1.234 [1.194, 1.274]", "–", "–"]]
    assert rows(coverage) == [["ours", "80 %", "81.3 % [79.2, 83.4]", "undecided"]]
    assert found.figures == ()


def test_figures_that_are_nan() -> None:
    nothing = Estimate(NAN, NAN, NAN)
    [first, *_] = made.ranking(0.7)
    ranked = (dataclasses.replace(first, hit_rate=nothing),)
    report = made.report(made.predictor(ranking=ranked, ranking_against={}, mass=NAN))
    assert rows(section(report, "Ranking").tables[0])[0][-1] == "–"
    assert rows(section(report, "Calibration").tables[0])[0][-1] == "–"


# The form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [made.full, made.hostile, made.report])
def test_every_row_has_one_cell_a_column(report: Callable[[], EvaluationReport]) -> None:
    found = list(tables(report()))
    assert found
    for table in found:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_no_text_holds_what_a_terminal_would_obey() -> None:
    for part in document(made.hostile()):
        captions = [figure.caption for figure in part.figures]
        everything = [part.title, part.text, *captions]
        for table in part.tables:
            everything += [table.title, table.note, *table.columns]
            everything += [cell.text for row in table.rows for cell in row]
        assert all(text.isprintable() for text in everything)
    assert any("\\x1b[31m" in text and "\\u202e" in text for text in texts(made.hostile()))


def test_texts_are_one_line_and_end_somewhere() -> None:
    assert shown(" a\n\tb\u2028c\x85 ") == "a b c"
    assert shown("a\x7f\ud800\u200fb") == "a\\x7f\\ud800\\u200fb"
    assert shown("x" * 300) == "x" * 300
    assert shown("x" * 301) == "x" * 299 + "…"
    assert shown("ж 好 é") == "ж 好 é"


def test_the_document_needs_nothing_that_is_not_there() -> None:
    """Neither the command line nor the plotting library."""
    code = (
        "import sys; import r4r_graph.evaluation.rendering as r; "
        "bad = [m for m in sys.modules if m.startswith(('r4r_graph.cli', 'matplotlib'))]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_predictor_without_some_read_outs() -> None:
    known: PredictorReport = made.points_only()
    assert isinstance(known.scores, Mapping)
    only: Any = {"mean": known.scores["mean"]}
    some = {"user_mean": {"mean": made.BETTER}}
    report = made.report(dataclasses.replace(known, scores=only, against=some))
    assert rows(section(report, "Accuracy").tables[0])[0][:2] == ["from a file", "point"]
    [table] = section(report, "Against the floors").tables
    assert rows(table)[0][1:] == ["–", "–", "−0.112 [−0.172, −0.052]", "better"]
