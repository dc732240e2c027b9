"""Rationales composed by rule, for targets that no teacher has written for (extractive targets).

    report = compose_rationales(recipe)     # or beside a teacher's, by the step `rejection`

A rationale says which tastes the candidate meets, which it offends, and what weighs more. The
tastes and what is said of the candidate stand in the aspect summaries; what weighed more is known
from the target's own rating. So a sound rationale can be put together without a language model: the
phrases of the two sides that share the most words, in sentences that lean where the rating went.

A reasoner that learns from these learns to quote what is there, to say no as often as people do,
and to lean where the words let it foresee that. It never sees a rating, and none stands in the
text.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.domains import review_source
from finetune.rationales import digest_summaries
from finetune.rejection.judging import screened
from finetune.rejection.kept import (
    KEPT_SCHEMA,
    RejectionReport,
    Survivors,
    earlier_report,
    kept_file,
    packed,
    write_kept,
)
from finetune.rows import row_key, target_evidence
from finetune.settings import Recipe
from finetune.splits import read_targets
from finetune.summaries import read_summaries
from r4r_graph.engine.base import TokenMeter
from r4r_graph.engine.weights import find_base
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.leaks import screens_digest
from r4r_graph.evaluation.words.overlap import content_words
from r4r_graph.evidence import Evidence
from r4r_graph.jobs import Columns, digest_rows
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import Review, ReviewAspects

_log = logging.getLogger(__name__)

VERSION = 1
"""Of the sentences and of what is put into them."""

Leaning = Literal["for", "against", "torn"]

_FOR, _AGAINST = 0.6, 0.4
"""From which place on the scale (0 to 1) a rating speaks for the candidate, and up to which
against."""

_LONGEST = 7
"""Words that a phrase may have to be quoted."""

_TASTES = (
    "What counts for this person is {tastes}.",
    "This person looks for {tastes}.",
    "Going by earlier notes, {tastes} matter most to this person.",
    "They are drawn to {tastes}.",
    "Their notes keep coming back to {tastes}.",
)
_NO_TASTES = (
    "Little is known of what this person looks for.",
    "This person has left few words to go by.",
)
_SORE_POINTS = (
    " Things like {sore} have put them off before.",
    " They have complained of {sore} elsewhere.",
)
_BODY: dict[Leaning, dict[tuple[bool, bool], tuple[str, ...]]] = {
    # (is there praise, is there blame)
    "for": {
        (True, False): (
            "Others praise the candidate for {praise}, which answers that.",
            "By what others say it offers {praise}, and that is close to their taste.",
            "It is liked for {praise}, much as they would wish.",
        ),
        (True, True): (
            "Others praise {praise}; some mind {blame}, but that should weigh less here.",
            "It is liked for {praise}, and {blame} will hardly spoil that for them.",
            "The complaints about {blame} are outweighed by {praise}.",
        ),
        (False, True): (
            "Others complain of {blame}, yet that is not what they usually mind.",
            "It is blamed for {blame}, which should trouble them less than most.",
        ),
        (False, False): (
            "Nobody has said much about the candidate yet, so their general goodwill decides.",
            "Others have left few words on it, and nothing in them speaks against it.",
        ),
    },
    "against": {
        (False, True): (
            "Others complain of {blame}, which is just what they would mind.",
            "It is blamed for {blame}, and that goes against their taste.",
            "By what others say it suffers from {blame}.",
        ),
        (True, True): (
            "Others praise {praise}, but {blame} will weigh more for them.",
            "Even with {praise}, it suffers from {blame}.",
            "It is blamed for {blame}, and praise for {praise} will hardly make up for that.",
        ),
        (True, False): (
            "Others praise {praise}, but that is not what they ask for.",
            "It is liked for {praise}, which will not be enough for them.",
        ),
        (False, False): (
            "Nobody has said much for the candidate, and they are not easily pleased.",
            "Others have left few words on it, and nothing in them answers that.",
        ),
    },
    "torn": {
        (True, True): (
            "Others praise {praise}, while {blame} speaks against it.",
            "It has {praise} on its side and {blame} against it.",
        ),
        (True, False): (
            "Others praise {praise}, which answers that only in part.",
            "It is liked for {praise}, though that is not all they ask for.",
        ),
        (False, True): (
            "Others complain of {blame}, though not in a way that must decide it.",
            "It is blamed for {blame}, which they may or may not overlook.",
        ),
        (False, False): (
            "Others have left few words on it, which leaves it open.",
            "Nobody has said much about the candidate either way.",
        ),
    },
}
_CLOSE: dict[Leaning, tuple[str, ...]] = {
    "for": (
        "On the whole they will probably like it.",
        "It should suit them well.",
        "There is good reason to expect that they enjoy it.",
        "What it meets weighs more than what it offends.",
    ),
    "against": (
        "On the whole it will probably disappoint them.",
        "They are more likely to be let down than pleased.",
        "It does not seem to be for them.",
        "What it offends weighs more than what it meets.",
    ),
    "torn": (
        "They will probably find it fair, with regrets.",
        "It should leave them with mixed feelings.",
        "Neither side clearly weighs more.",
    ),
}


def compose_rationales(recipe: Recipe, meter: TokenMeter | None = None) -> RejectionReport:
    """Make `work/rejection/kept.parquet` of composed rationales alone.

    Args:
        meter: of the base model's tokenizer; None loads that.
    """
    started = time.monotonic()
    made_of = composed_facts(recipe)
    if (earlier := earlier_report(recipe, made_of)) is not None:
        return earlier
    rows = composed_rows(recipe, meter or base_meter(recipe))
    report = RejectionReport(
        path=kept_file(recipe),
        ready_made=False,
        rows=0,
        failed=0,
        without=0,
        kept=len(rows),
        composed=len(rows),
        plain=Survivors(),
        hinted=Survivors(),
        seconds=time.monotonic() - started,
    )
    write_kept(recipe, rows, report, made_of)
    return report


def composed_rows(recipe: Recipe, meter: TokenMeter) -> list[Columns]:
    """Rows of `KEPT_SCHEMA`, of `rejection.composed` instruction targets drawn by seed.

    A rationale that does not pass the screens of the others is left out.

    Raises:
        NotReadyError: there are no splits or no summaries yet.
    """
    if not recipe.rejection.composed:
        return []
    source, summaries = review_source(recipe), read_summaries(recipe)
    rows: list[Columns] = []
    refused = Counter[str]()
    for target in _targets(recipe):
        evidence = target_evidence(target, source, summaries, meter, recipe)
        dice = random.Random(f"{recipe.seed} {target.key}")
        text = compose(evidence, leaning_of(target.rating, recipe.rating_scale), dice)
        if (candidate := screened(text, evidence, (), recipe, meter)) is not None:
            refused.update(reason.split(":")[0] for reason in candidate.reasons)
            continue
        rows.append(
            dict.fromkeys(KEPT_SCHEMA.names)
            | row_key(target)
            | {"evidence": packed(evidence), "rationale": text, "hinted": False, "rank": 0}
        )
    if refused:
        _log.warning("composed rationales that did not pass the screens: %s", dict(refused))
    return rows


def composed_facts(recipe: Recipe) -> dict[str, object]:
    """What the composed rationales depend on; empty where the recipe asks for none."""
    if not recipe.rejection.composed:
        return {}
    targets = [target.key for target in _targets(recipe)]
    facts = {"version": VERSION, "targets": digest_rows(targets), "screens": screens_digest()}
    return {"composed": facts | {"summaries": digest_summaries(read_summaries(recipe))}}


def base_meter(recipe: Recipe) -> TokenMeter:
    """The meter of the base model's tokenizer."""
    from transformers import AutoTokenizer

    from r4r_graph.engine.tokens import HubTokenMeter

    return HubTokenMeter(
        AutoTokenizer.from_pretrained(
            find_base(recipe.base).path, local_files_only=True, trust_remote_code=False
        )
    )


def leaning_of(rating: float, scale: RatingScale) -> Leaning:
    """What a rating says of what weighed more."""
    place = (rating - scale.low) / (scale.high - scale.low)
    return "for" if place >= _FOR else "against" if place <= _AGAINST else "torn"


def compose(evidence: Evidence, leaning: Leaning, dice: random.Random) -> str:
    """One paragraph. The same evidence, leaning and dice give the same words."""
    sides = _quoted(evidence, leaning, dice)
    opening = dice.choice(_TASTES if sides.tastes else _NO_TASTES)
    if sides.sore and leaning != "for":
        opening += dice.choice(_SORE_POINTS)
    body = dice.choice(_BODY[leaning][bool(sides.praise), bool(sides.blame)])
    text = " ".join((opening, body, dice.choice(_CLOSE[leaning])))
    return text.format(
        tastes=_listed(sides.tastes),
        sore=_listed(sides.sore),
        praise=_listed(sides.praise),
        blame=_listed(sides.blame),
    )


@dataclass(frozen=True, slots=True)
class _Quoted:
    """The phrases that go into a rationale."""

    tastes: Sequence[str]
    sore: Sequence[str]
    """What the person complained of."""
    praise: Sequence[str]
    """Of the candidate, by others."""
    blame: Sequence[str]


def _targets(recipe: Recipe) -> list[Review]:
    drawn = by_lot(read_targets(recipe, "train", "instruction"), recipe.seed, "composed")
    return drawn[: recipe.rejection.composed]


def _quoted(evidence: Evidence, leaning: Leaning, dice: random.Random) -> _Quoted:
    wants = _phrases(evidence.user_reviews, "values", "positive")
    minds = _phrases(evidence.user_reviews, "negative")
    praise = _phrases(evidence.item_reviews, "positive")
    blame = _phrases(evidence.item_reviews, "negative")
    # What speaks for it meets a taste, what speaks against it a sore point or a taste missed.
    praise = _best(praise, wants, 1 if leaning == "against" else dice.choice((1, 2, 2)))
    blame = _best(blame, [*minds, *wants], 1 if leaning == "for" else dice.choice((1, 2, 2)))
    return _Quoted(
        tastes=_best(wants, [*praise, *blame], dice.choice((2, 2, 3))),
        sore=_best(minds, blame, 1),
        praise=praise,
        blame=blame,
    )


def _phrases(reviews: Sequence[ReviewAspects], *names: str) -> list[str]:
    """The phrases of these lists, of the latest review first, each once."""
    found: dict[str, str] = {}
    for name in names:
        for review in reversed(reviews):
            for phrase in getattr(review.summary, name):
                plain = phrase.strip(" .;")
                if 0 < len(plain.split()) <= _LONGEST and not set('{}"\n') & set(plain):
                    found.setdefault(plain.lower(), plain)
    return list(found.values())


def _best(phrases: Sequence[str], others: Sequence[str], most: int) -> list[str]:
    """The phrases that share the most words with any of the others, on a tie the first; none that
    says again what is chosen already."""
    words = {phrase: content_words(phrase) for phrase in phrases}
    wanted = [content_words(other) for other in others]

    def shared(phrase: str) -> int:
        return max((len(words[phrase] & other) for other in wanted), default=0)

    chosen: list[str] = []
    for phrase in sorted(phrases, key=shared, reverse=True):  # stable
        if len(chosen) < most and all(words[phrase].isdisjoint(words[c]) for c in chosen):
            chosen.append(phrase)
    return chosen


def _listed(phrases: Sequence[str]) -> str:
    """In quotation marks: a phrase may be a noun, an adjective or half a sentence."""
    *first, last = [f'"{_within_a_sentence(phrase)}"' for phrase in phrases] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _within_a_sentence(phrase: str) -> str:
    """With a small first letter, unless the word seems to be a name."""
    word = phrase.split()[0]
    name = word[1:] != word[1:].lower() or word.endswith(("'s", "’s")) or word == "I"
    return phrase if name else phrase[0].lower() + phrase[1:]
