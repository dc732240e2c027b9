"""Form of rationales: leaks, repeats, faults, lengths; titles that may be named."""

from __future__ import annotations

import pytest

from r4r_graph.errors import DataError
from r4r_graph.evaluation.words.rationales import MOST_EXAMPLES, rationale_form
from r4r_graph.ratings import RatingScale

SCALE = RatingScale()
GOOD = (
    "They praise honest lyrics and slow tempos, and this record has both, though its long "
    "instrumentals may bore them."
)
OTHER = "Since they look for loud drums and short songs, they will tire of this quiet record soon."
LEAKING = "They praise honest lyrics and slow tempos, so they would call this one five stars."
REPEATING = f"{OTHER} {OTHER}"
SHORT = "They will like it."


def test_shares_are_of_the_rows_that_have_a_rationale() -> None:
    form = rationale_form([GOOD, None, LEAKING, REPEATING, " \n ", SHORT], scale=SCALE)
    assert form is not None
    assert (form.rows, form.empty) == (6, 2)
    assert form.leaks.value == pytest.approx(1 / 4)
    assert form.repeats.value == pytest.approx(1 / 4)
    assert form.malformed.value == pytest.approx(2 / 4)  # repeats, too short
    assert form.distinct == 1.0
    assert 0.0 <= form.leaks.low < form.leaks.value < form.leaks.high <= 1.0
    assert form.examples == (
        "row 3: stars: 'five stars'",
        "row 4: repeats a sentence",
        "row 6: too short",
    )


def test_lengths_and_distinct_texts_by_hand() -> None:
    """Lengths 1 to 21: the percentiles of even steps."""
    texts = [" ".join(["word"] * count) for count in range(1, 22)]
    form = rationale_form(texts, scale=SCALE)
    assert form is not None
    assert form.words == (2.0, 11.0, 20.0)
    form = rationale_form([GOOD, GOOD.upper(), f" {GOOD}\n", OTHER], scale=SCALE)
    assert form is not None
    assert form.distinct == 0.5


def test_what_writes_the_same_for_all_is_seen() -> None:
    form = rationale_form([GOOD] * 50, scale=SCALE)
    assert form is not None
    assert form.distinct == 1 / 50
    assert form.malformed.value == form.leaks.value == 0.0
    assert form.examples == ()


def test_several_rationales_joined_are_a_fault() -> None:
    form = rationale_form([f"{GOOD}\n\n{OTHER}"], scale=SCALE)
    assert form is not None
    assert form.malformed.value == 1.0
    assert form.examples == ("row 1: several paragraphs",)


def test_a_rows_own_titles_are_not_looked_at() -> None:
    text = 'They praise honest lyrics and slow tempos, and "Five Stars for Failure" has both.'
    titles = [["Five Stars for Failure", "Other"], ["Another"]]
    form = rationale_form([text, text], titles=titles, scale=SCALE)
    assert form is not None
    assert form.leaks.value == 0.5
    assert [example.split(":")[0] for example in form.examples] == ["row 2"]


def test_marks_count_on_the_scale_that_is_rated_on() -> None:
    text = "They praise honest lyrics and slow tempos, and so it deserves a 17."
    twenty = rationale_form([text], scale=RatingScale.parse("0-20"))
    five = rationale_form([text], scale=SCALE)
    assert twenty is not None
    assert five is not None
    assert (twenty.leaks.value, five.leaks.value) == (1.0, 0.0)


def test_examples_are_few_and_of_both_kinds() -> None:
    form = rationale_form([*[SHORT] * 30, *[LEAKING] * 30], scale=SCALE)
    assert form is not None
    assert len(form.examples) == MOST_EXAMPLES
    assert form.examples[0].startswith("row 31: stars")
    assert form.examples[-1] == "row 10: too short"


@pytest.mark.parametrize("texts", [[], [None, None], ["", " "]])
def test_no_rationale_at_all(texts: list[str | None]) -> None:
    assert rationale_form(texts, scale=SCALE) is None


def test_titles_that_do_not_match() -> None:
    with pytest.raises(DataError, match="2 rationales and 1 lists of titles"):
        rationale_form([GOOD, OTHER], titles=[["A"]], scale=SCALE)
    with pytest.raises(DataError, match="not one text"):
        rationale_form([GOOD], titles=["A"], scale=SCALE)
