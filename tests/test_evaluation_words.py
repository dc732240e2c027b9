"""Phrase overlap, against values worked out by hand."""

from __future__ import annotations

import pytest

from r4r_graph.evaluation.words.overlap import list_overlap, phrase_overlap
from r4r_graph.schema import AspectSummary


@pytest.mark.parametrize(
    ("phrases", "others", "wanted"),
    [
        (["warm voice"], ["warm voice"], 1.0),
        (["The warm voice!"], ["warm voices"], 1.0),
        (["warm voice"], ["cold sound"], 0.0),
        (["warm voice"], ["warm sound"], 0.5),
        ([], [], 1.0),
        (["warm voice"], [], 0.0),
        ([], ["warm voice"], 0.0),
        # precision 1, recall (1 + 0) / 2
        (["warm voice"], ["warm voice", "drums"], 2 * 0.5 / 1.5),
        (["it"], ["it"], 1.0),
    ],
)
def test_lists_by_hand(phrases: list[str], others: list[str], wanted: float) -> None:
    assert list_overlap(phrases, others) == pytest.approx(wanted)
    assert list_overlap(others, phrases) == pytest.approx(wanted)


def test_a_summary_is_the_mean_of_its_lists_each_by_itself() -> None:
    one = AspectSummary(("warm voice",), ("too long",), ())
    assert phrase_overlap(one, one) == 1.0
    swapped = AspectSummary(("too long",), ("warm voice",), ())
    assert phrase_overlap(one, swapped) == pytest.approx(1 / 3)
    half = AspectSummary(("warm voice",), (), ("craft",))
    assert phrase_overlap(one, half) == pytest.approx(1 / 3)
