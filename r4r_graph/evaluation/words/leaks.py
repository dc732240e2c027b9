"""Screens of a rationale: does it give a rating away, and is it one whole, plain paragraph?

A rationale is written before there is a rating, by an expert that has seen none. A text that speaks
of one knows the answer, made it up, or ran on past its end, and an expert that learns from it
learns to write ratings down. The screens are patterns over English words. In doubt they refuse:
another draw costs little, a leak is learned. Numbers that are no ratings pass: years, titles,
discs, bands.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from r4r_graph import prompts
from r4r_graph.ratings import RatingScale

FEWEST_WORDS = 8
MOST_WORDS = 180
RUN_WORDS, RUN_TIMES = 6, 3
"""A run of so many words may not stand in a text so many times."""
LONG_RUN_WORDS = 12
"""A run of so many words may not even stand there twice."""
SENTENCE_WORDS = 5
"""Shorter sentences may be repeated; they may be pieces of a title."""
LETTERS = 0.9
"""Share of a text's characters that are letters, spaces and plain punctuation, at least."""

FIVE_STARS = RatingScale()

# --- numbers ---------------------------------------------------------------------------------

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORD = rf"(?:{'|'.join(_WORDS)}|hundred)"
_DIGITS = r"(?<![\w.,/$£€#-])\d+(?:[.,]\d+)?"
_NUMBER = rf"(?P<n>(?:{_DIGITS}|\b{_WORD})(?:[- ]and[- ]a[- ]half)?)"

# A number that stands for itself: it counts nothing ("four songs"), and says no place ("track 4").
_PLACES = "act chapter disc episode number part phase season side the top track version vol. volume"
_UNPLACED = "".join(rf"(?<!\b{re.escape(place)} )" for place in _PLACES.split())
_AFTER = (
    "about|and|as|at|because|but|by|due|for|from|given|if|in|is|meaning|on|or|out|overall|owing"
    "|rather|reflecting|seems|since|so|stars?|that|thanks|though|to|which|while|with|would|yet"
)
_END_OR = rf"(?!\w)(?=\s*(?:$|[.,;:!?)\]\"”’'*|]|[–—]|-\s)|\s+(?:{_AFTER})\b)(?![.,]\d)"
_LONE = rf"{_UNPLACED}(?!one\b(?!\s*[.!?])){_NUMBER}{_END_OR}"
_NEAR = r"[^.!?\n]"

Valid = Callable[[float | None, RatingScale], bool]
"""Whether a number that was found can be a rating; None where the finding has no number."""


def _any(_: float | None, __: RatingScale) -> bool:
    return True


def _usual(value: float | None, scale: RatingScale) -> bool:
    """On this scale, or on one up to ten."""
    return value is not None and value <= max(10.0, scale.high)


def _mark(value: float | None, scale: RatingScale) -> bool:
    """On a scale up to a hundred."""
    return value is not None and value <= max(100.0, scale.high)


def _end(value: float | None, scale: RatingScale) -> bool:
    """Where scales end."""
    return value in (5.0, 10.0, 100.0, scale.high)


def _fraction(value: float | None, scale: RatingScale) -> bool:
    """Between two values of this scale."""
    return value is not None and scale.low < value < scale.high and not value.is_integer()


# --- what gives a rating away ----------------------------------------------------------------

_RATE = r"\b(?:rat(?:e|es|ed|ing)|scor(?:es|ed|ing)|grad(?:e|es|ed|ing))\b"
_GIVE = (
    r"\b(?:giv(?:e|es|en|ing)|gave|award(?:s|ed|ing)?|assign(?:s|ed|ing)?|earn(?:s|ed|ing)?"
    r"|deserv(?:e|es|ed|ing)|gets?|got|receiv(?:e|es|ed|ing))\b"
)
_SCORE = r"(?:score|grade|mark)"
_SCORES = "score grade mark"
_BEST = r"(?:very |extremely )?(?:high|low|top|perfect|full|maximum|minimum|middling|near-perfect)"
_BEST += r"(?:er|est)?"
_THE_TWO = "".join(
    rf"(?<!\b{word} )"
    for word in ("the", "its", "his", "her", "their", "our", "these", "those", "whose", "both")
)
_WHO = r"(?:user|person|listener|viewer|reader|customer|reviewer|individual|they|he|she)"
_OWNER = rf"(?:{_WHO}(?:['’]s)?|their|his|her)"
_IT = (
    r"(?:it|(?:the|this|that|said)\s+(?:\w+\s+){0,2}?(?:item|album|candidate|film|movie|book"
    r"|product|music|record|place|business|compilation|collection|recommendation))\b"
)
_OF = r"(?:of|for|on|about|towards?|regarding|given to)"
_TONE = r"(?:positive|negative|mixed|favou?rable|glowing|lukewarm|critical|harsh|high|low|poor)"

_TABLE: tuple[tuple[str, str, str, Valid], ...] = (
    # reason; words of which one has to be there (it saves time); pattern; which numbers count
    ("star signs", "", r"[★☆⭐✩✪✫✬✭✮✯✰🌟]|\b\d\*(?![\w*])", _any),
    # "The two stars" of a film are people; "five stars" are not.
    ("stars", "star", rf"{_THE_TWO}(?<!['’]s ){_NUMBER}[\s-]*stars?\b(?!\s+of\b)", _mark),
    ("stars", "star", rf"{_NUMBER}[\s-]+stars?[\s-]+(?:rat|review|scor|verdict|out\b)", _mark),
    ("points", "p", rf"(?P<n>{_DIGITS})[\s-]*(?:points?|pts)\b", _mark),
    ("out of", "/", r"(?<![\w./])\d+(?:[.,]\d+)?\s*/\s*(?P<n>\d+)(?![\w/]|[.,]\d)", _end),
    (
        "out of",  # "nine out of ten songs" counts songs
        "out of",
        rf"\bout\s+of\s+(?:a\s+)?(?:possible\s+|maximum\s+)?(?P<n>\d+|{_WORD})(?![\w.-]*\w)"
        r"(?!\s+(?!this\b|was\b|stars\b|points\b|across\b)\w+s\b)",
        _end,
    ),
    (
        "scale",
        "scale",
        rf"\bscale\s+(?:of|from)\s+(?:\d+|{_WORD})\s*(?:to|-|–|through)\s*(?:\d|{_WORD})",
        _any,
    ),
    ("percentage", "% cent", r"\d\s*%|\bper\s?cent\b", _any),
    ("mark", _SCORES, rf"\b{_SCORE}s?\s*(?:of|is|was|:|=|at)\s*{_LONE}", _mark),
    ("mark", _SCORES, rf"\b{_SCORE}s?\b{_NEAR}{{1,40}}?{_LONE}", _usual),
    ("mark", _SCORES, rf"{_NUMBER}[\s-]+{_SCORE}s?\b(?!\s+(?:by|from)\b)", _mark),
    ("mark", "rat scor grad", rf"{_RATE}{_NEAR}{{1,60}}?{_LONE}", _usual),
    ("mark", "", rf"{_GIVE}\s+(?:[\w\"“”'’]+\s+){{1,5}}?{_LONE}", _usual),
    ("mark", "", rf"{_GIVE}\s+{_LONE}", _usual),
    ("mark", "", rf"\ban?\s+(?:[a-z]+\s+)?{_LONE}", _usual),
    ("mark", "", rf"(?=\d){_LONE}", _fraction),
    ("mark", "half", _LONE, _fraction),
    ("mark", "+ -", r"\b(?:an?|solid|strong|firm|grade of) (?-i:[A-F])[+-](?!\w)", _any),
    ("mark", "mark five", rf"\b{_BEST}\s+(?:possible\s+)?marks\b|\bfull\s+five\b", _any),
    (
        "mark",
        "score",
        rf"(?:{_GIVE}|{_RATE}|\ban?)\s+(?:\w+\s+){{0,4}}?{_BEST}\s+score\b(?!\s+(?:by|from))",
        _any,
    ),
    (
        "speaks of a rating",
        "rating",
        r"(?<!\bage )(?<!content )(?-i:(?<!R ))(?<!PG )(?<!13 )\bratings?\b",
        _any,
    ),
    (
        "speaks of a rating",
        "rat",
        r"\brat(?:e|es|ed|ing)\s+(?:it|this|that|them|the|their)\b"
        r"(?!\s+(?:best|greatest|finest|worst|most)\b)",
        _any,
    ),
    ("speaks of a rating", "rated", rf"\b{_WHO}\s+(?:\w+\s+){{0,2}}?rated\b", _any),
    (
        "own verdict",
        "review feedback",
        rf"\b{_OWNER}\s+(?:\w+\s+)?{_TONE}\s+(?:reviews?|review\s+history|feedback)\s+{_OF}\s+{_IT}",
        _any,
    ),
    (
        "own verdict",
        "review",
        rf"\b(?:{_WHO}['’]s|their|his|her)\s+(?:own\s+)?review\s+{_OF}\s+{_IT}",
        _any,
    ),
    (
        "own verdict",
        "review",
        rf"\b{_OWNER}\s+(?:\w+\s+)?{_TONE}\s+review\b(?!\s+(?:histor|of\b))",
        _any,
    ),
    (
        "own verdict",
        "reviewed gave given",
        rf"\b{_OWNER}\s+(?:\w+\s+)?(?:reviewed|gave|given)\s+{_IT}",
        _any,
    ),
)
_LEAKS = tuple(
    (reason, tuple(words.split()), re.compile(pattern, re.IGNORECASE), valid)
    for reason, words, pattern, valid in _TABLE
)


def leaks(text: str, scale: RatingScale = FIVE_STARS, *, titles: Iterable[str] = ()) -> list[str]:
    """Where `text` gives a rating away; empty where it does not.

    Each finding is a reason and the words, as `stars: 'five stars'`. Marks count on this scale and
    on the usual ones (up to 5, 10 and 100). Words for liking and disliking are what a rationale is
    made of, and pass; a rating named in words ("would rate it highly"), or a review of the
    candidate that the person is said to have written, do not. Words of `titles`, as they are
    written there, are not looked at.
    """
    plain = _without_titles(_normal(text), titles)
    low = plain.lower()
    found: dict[str, None] = {}
    for reason, words, pattern, valid in _LEAKS:
        if words and not any(word in low for word in words):
            continue
        for match in pattern.finditer(plain):
            if valid(_value(match.groupdict().get("n")), scale):
                found[f"{reason}: {' '.join(match[0].split())!r}"] = None
                break
    return list(found)


def _normal(text: str) -> str:
    """Full-width digits and their like as plain ones; 3½ as 3.5."""
    halves = re.sub(r"(?<!\d)½", "0.5", text).replace("½", ".5")
    return unicodedata.normalize("NFKC", halves).strip()


def _without_titles(text: str, titles: Iterable[str]) -> str:
    """The text with a word in each title's place: `100% Ginuwine` is no percentage. A title of one
    word is taken for one only in quotation marks."""
    for title in sorted({_normal(title) for title in titles}, key=len, reverse=True):
        if not title or title not in text:
            continue
        if " " in title:
            text = re.sub(rf"(?<!\w){re.escape(title)}(?!\w)", "title", text)
        else:
            text = re.sub(rf"[\"“]{re.escape(title)}([.,]?[\"”])", r'"title\1', text)
    return text


def _value(written: str | None) -> float | None:
    """A number as it was written: 4, 4.5, 4,5, four, four-and-a-half."""
    if written is None:
        return None
    head, *half = re.split(r"[- ]and", written.lower())
    more = 0.5 if half else 0.0
    if head == "hundred":
        return 100.0
    return (_WORDS.index(head) if head in _WORDS else float(head.replace(",", "."))) + more


# --- form ------------------------------------------------------------------------------------

_END = re.compile(r"[.!?…][\"'”’»)\]]*$")
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+")
_LABELS = (
    "rationale|answer|recommendation|rating|score|note|disclaimer|explanation|conclusion|output"
    "|input|question|analysis|review|summary|reason|reasoning|judge?ment|user|assistant|system"
    "|human|task|response|paragraph|positive|negative|values|preferences|liked|disliked|wants"
)
_DEBRIS = tuple(
    (fault, re.compile(pattern, re.IGNORECASE | re.MULTILINE))
    for fault, pattern in (
        ("several paragraphs", r"\n"),
        ("markup", r"[<>{}|`\\•■]|\*\*|__|#\w*\s*#|##|\[/?INST|https?:|www\.|([^\w\s])\1{4,}"),
        ("list", r"^\s*(?:[-*•#]|\d+[.)])\s|[-*#]\s.{1,80}\s[-*#]\s.{1,80}\s[-*#]\s"),
        ("row of numbers", r"\d+(?:\s*[,;:./()-]+\s*\d+|\s+\d+){3,}"),
        ("words of a prompt", rf"(?:^|[.!?\"”)*]\s*)(?:\w+\s+)?(?:{_LABELS})\s?:"),
        ("words of a prompt", r"\b(?:positive|negative|values|liked|disliked|wants):\s"),
        (
            "words of a prompt",
            r"\bin one (?:short )?paragraph\b|^(?:sure|certainly)[,!]|^here(?:'s| is)\b",
        ),
        (
            "words of a prompt",
            r"\bas an ai\b|\bi (?:cannot|can't|hope|apologi[sz]e)\b|\blet me know\b",
        ),
        ("words of a prompt", r"\bfurther (?:questions|requests|assistance)\b|\bfinal answer\b"),
    )
)


def form_faults(
    text: str, *, titles: Iterable[str] = (), most_words: int = MOST_WORDS
) -> list[str]:
    """What keeps `text` from being one whole paragraph of prose; empty where nothing does.

    Faults: empty, too short (under 8 words), too long, unfinished, a sentence or a run of words
    that is repeated, several paragraphs, lists, markup, rows of numbers, the words of a prompt.
    Words of `titles`, as they are written there, are not looked at.
    """
    plain = _without_titles(_normal(text), titles)
    words = _words(plain)
    if not words:
        return ["empty"]
    faults: dict[str, None] = {}
    if len(words) < FEWEST_WORDS:
        faults["too short"] = None
    if len(words) > most_words:
        faults["too long"] = None
    if not _END.search(plain):
        faults["unfinished"] = None
    sentences = [tuple(_words(sentence)) for sentence in _SENTENCE.split(plain)]
    whole = [sentence for sentence in sentences if len(sentence) >= SENTENCE_WORDS]
    if len(set(whole)) < len(whole):
        faults["repeats a sentence"] = None
    if _repeats(words, RUN_WORDS) >= RUN_TIMES or _repeats(words, LONG_RUN_WORDS) >= 2:
        faults["repeats a run of words"] = None
    faults |= {fault: None for fault, pattern in _DEBRIS if pattern.search(plain)}
    if not _prompt_runs().isdisjoint(_runs(words, RUN_WORDS)):
        faults["words of a prompt"] = None
    prose = sum(char.isalpha() or char.isspace() or char in "'’-,.;\"“”" for char in plain)
    if prose < LETTERS * len(plain):
        faults["no prose"] = None
    return list(faults)


def screens_digest() -> str:
    """12 hex digits over all that decides the two screens."""
    limits = (FEWEST_WORDS, MOST_WORDS, RUN_WORDS, RUN_TIMES, LONG_RUN_WORDS, SENTENCE_WORDS)
    facts: list[object] = [
        *limits,
        LETTERS,
        *((reason, pattern.pattern) for reason, _, pattern, _ in _LEAKS),
    ]
    facts += sorted(_prompt_runs())
    facts += [_END.pattern, _SENTENCE.pattern, *((f, pattern.pattern) for f, pattern in _DEBRIS)]
    return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()


def is_well_formed(text: str) -> bool:
    """Whether `form_faults` finds nothing."""
    return not form_faults(text)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


def _repeats(words: Sequence[str], size: int) -> int:
    """How often the commonest run of `size` words stands there."""
    return max(Counter(_runs(words, size)).values(), default=0)


@functools.cache
def _prompt_runs() -> frozenset[tuple[str, ...]]:
    """Runs of words in what the reasoner and the teacher are told to do; weak models repeat it."""
    empty = {"title": "", "description": ""}
    inputs: dict[str, object] = {"kind": "", "item": empty, "user_reviews": [], "item_reviews": []}
    inputs |= dict.fromkeys(("rating", "scale_low", "scale_high"), 0)
    tasks = [prompts.render(name, inputs).task for name in ("reasoner", "teacher_rationale")]
    return frozenset(run for task in tasks for run in _runs(_words(task), RUN_WORDS))
