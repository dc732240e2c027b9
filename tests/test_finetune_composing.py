"""Rationales by rule: they quote what is there, lean where the rating went, and name none."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.domains import review_source
from finetune.rejection.composing import compose, compose_rationales, leaning_of
from finetune.rejection.kept import read_kept
from finetune.rejection.sampling import reject
from finetune.rows import target_evidence
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import FakeMeter
from r4r_graph.errors import NotReadyError, SettingError
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from r4r_graph.evidence import Evidence
from r4r_graph.experts import reasoner_prompt
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.schema import AspectSummary, Item, ReviewAspects
from tests.canaries import canaries, make_desk

Fake = Callable[..., BatchingEngine]
LEANINGS = ("for", "against", "torn")
NOTHING = AspectSummary()


def evidence(user: AspectSummary = NOTHING, others: AspectSummary = NOTHING) -> Evidence:
    def side(summary: AspectSummary) -> tuple[ReviewAspects, ...]:
        return (ReviewAspects("u", "i", "Album", 0.0, 3.0, summary),)

    stats = RatingStats()
    return Evidence(Item("i", title="Album"), side(user), side(others), stats, stats)


FULL = evidence(
    AspectSummary(("Warm strings",), ("Thin voices",), ("Long codas", "Quiet endings")),
    AspectSummary(("Quiet drums", "Loud brass"), ("Voices without body", "Dull cover"), ()),
)


def written(about: Evidence, leaning: str, draws: int = 60) -> set[str]:
    return {compose(about, leaning, random.Random(n)) for n in range(draws)}  # type: ignore[arg-type]


@pytest.mark.parametrize("leaning", LEANINGS)
def test_it_is_a_sound_rationale_with_whatever_is_known(leaning: str) -> None:
    one = AspectSummary(("Warm strings",), ("Thin voices",), ("Quiet endings",))
    for user in (NOTHING, one):
        for others in (
            NOTHING,
            AspectSummary(("Quiet drums",)),
            AspectSummary((), ("Dull cover",)),
            one,
        ):
            for text in written(evidence(user, others), leaning):
                assert not leaks(text), text
                assert not form_faults(text), text
                assert "{" not in text
                assert '""' not in text


@pytest.mark.parametrize("leaning", LEANINGS)
def test_it_quotes_nothing_but_the_lists(leaning: str) -> None:
    lists = (review.summary for review in (*FULL.user_reviews, *FULL.item_reviews))
    there = {phrase.lower() for s in lists for part in s.to_dict().values() for phrase in part}
    for text in written(FULL, leaning):
        quoted = re.findall(r'"([^"]*)"', text)
        assert quoted
        assert set(map(str.lower, quoted)) <= there


def test_it_leans_where_the_rating_went_and_the_same_dice_say_the_same() -> None:
    said = {leaning: written(FULL, leaning, 200) for leaning in LEANINGS}
    ends = {leaning: {t.rsplit(". ", 1)[-1] for t in texts} for leaning, texts in said.items()}
    assert not ends["for"] & ends["against"]
    assert not ends["torn"] & (ends["for"] | ends["against"])
    assert len(said["for"]) > 20  # no one sentence
    assert written(FULL, "for") == written(FULL, "for")


def test_phrases_that_share_words_come_together() -> None:
    for text in written(FULL, "for"):
        assert "quiet drums" in text  # answers "quiet endings", as loud brass does not
        assert "quiet endings" in text
    for text in written(FULL, "against"):
        assert "voices without body" in text
        assert "dull cover" not in text or text.index("voices") < text.index("dull cover")


def test_nothing_is_said_twice_and_names_keep_their_letters() -> None:
    about = evidence(
        AspectSummary(("Depth of feeling", "Feeling"), (), ("Prince's guitar", "AC/DC")),
        AspectSummary(("Deep feeling", "Feeling and depth", "I could dance")),
    )
    for text in written(about, "for"):
        assert text.lower().count("feeling") <= 2  # once for each side
    everything = " ".join(written(about, "for"))
    assert "Prince's guitar" in everything
    assert "AC/DC" in everything


@pytest.mark.parametrize(
    ("rating", "leaning"),
    [(1, "against"), (2.5, "against"), (3, "torn"), (3.25, "torn"), (3.5, "for"), (5, "for")],
)
def test_what_a_rating_leans_to(rating: float, leaning: str) -> None:
    assert leaning_of(rating, RatingScale()) == leaning
    ten = RatingScale.parse("1-10")
    assert leaning_of(1 + (rating - 1) * 9 / 4, ten) == leaning


def test_the_step_composes_for_targets_that_the_predictor_then_leaves_alone(
    tmp_path: Path, fake: Fake
) -> None:
    desk = make_desk(tmp_path, fake, rejection={"rows": 0, "composed": 5})
    report = reject(desk.recipe, reward_engine=desk.engine)
    assert (report.kept, report.composed, report.rows) == (5, 5, 0)
    assert not desk.asked  # no model has a part in it
    kept = read_kept(desk.recipe)
    targets = {t.key: t for t in read_targets(desk.recipe, "train", "instruction")}
    source, summaries = review_source(desk.recipe), read_summaries(desk.recipe)
    by_pair = {(t.user_id, t.item_id, float(t.timestamp)): t for t in targets.values()}
    for row in kept:
        target = by_pair[row["user_id"], row["item_id"], row["as_of"]]
        known = target_evidence(target, source, summaries, FakeMeter(), desk.recipe)
        own = canaries(target.text)
        assert own
        assert not own & canaries(row["rationale"])  # never of the review to be foreseen
        shown = " ".join(turn.content for turn in reasoner_prompt(known, FakeMeter()))
        assert canaries(row["rationale"]) <= canaries(shown)
    again = compose_rationales(desk.recipe, FakeMeter())
    assert (again.kept, again.seconds) == (report.kept, report.seconds)  # it was there already


def test_composed_ones_come_beside_those_of_a_teacher(tmp_path: Path, fake: Fake) -> None:
    alone = make_desk(tmp_path / "alone", fake)
    both = make_desk(tmp_path / "both", fake, rejection={"composed": 4})
    reports = [reject(desk.recipe, reward_engine=desk.engine) for desk in (alone, both)]
    assert reports[0].composed == 0
    assert reports[1].composed == 4
    assert reports[1].kept == reports[0].kept + 4
    assert len(read_kept(both.recipe)) == reports[1].kept


def test_what_it_needs_first(tmp_path: Path, fake: Fake) -> None:
    desk = make_desk(tmp_path, fake, summarized=False, rejection={"rows": 0, "composed": 5})
    with pytest.raises(NotReadyError, match="summaries"):
        reject(desk.recipe, reward_engine=desk.engine)
    bad = make_desk(tmp_path / "bad", fake, rejection={"composed": -1})
    with pytest.raises(SettingError, match=r"rejection\.composed=-1"):
        reject(bad.recipe, reward_engine=bad.engine)
