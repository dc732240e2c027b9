"""The summarizer's output format: three labelled lists of short phrases, as text and back.

    positive: warm voice; clever lyrics
    negative: none
    values: honest songwriting

One definition serves the grammar that enforces it, the parser that reads it, the closing that
keeps it whole when the token budget ends, and the training targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from r4r_graph.schema import AspectSummary

SECTIONS = ("positive", "negative", "values")
MAX_PHRASES = 5
"""Phrases in one list."""
EMPTY = "none"
"""Stands for an empty list."""
GRAMMAR_VERSION = 1

# A phrase is bounded in number here and in tokens while decoding: bounding its characters in the
# regular expression multiplies the automaton's states (26 s to compile instead of 1).
_PHRASE = r"[^\s;<>][^;<>\n\r]*"
_LIST = rf"({_PHRASE})(; {_PHRASE}){{0,{MAX_PHRASES - 1}}}"
PATTERN = r"\n".join(f"{name}: {_LIST}" for name in SECTIONS)
"""Regular expression of the whole answer. `none` is a phrase like any other to the automaton."""
GRAMMAR = PATTERN + r"\n"
"""What is compiled: a new line stands for the end token (see `decoding`)."""

# The parser is not as strict: single bytes that the automaton lets through may spell a white
# space together (U+00A0), and Python counts some control characters as white space.
_WRITTEN = re.compile(
    r"\n".join(rf"{name}: [^;<>\n]+(; [^;<>\n]+){{0,{MAX_PHRASES - 1}}}" for name in SECTIONS)
)

_EMPTY_WORDS = frozenset({EMPTY, "n/a", "not mentioned", "not applicable", "nothing"})


def format_aspects(summary: AspectSummary) -> str:
    """The text of a summary, as the summarizer is trained to write it."""
    lists = (summary.positive, summary.negative, summary.values)
    return "\n".join(
        f"{name}: {'; '.join(_phrases(phrases)) or EMPTY}"
        for name, phrases in zip(SECTIONS, lists, strict=True)
    )


def parse_aspects(text: str) -> AspectSummary:
    """The summary in a text of this format.

    Phrases are stripped; repeats within a list and words for an empty list are dropped.

    Raises:
        ValueError: the text is not of the format.
    """
    if not _WRITTEN.fullmatch(text):
        raise ValueError(f"not an aspect summary: {text[:200]!r}")
    bodies = [line.split(": ", 1)[1] for line in text.split("\n")]
    return AspectSummary(*(_phrases(body.split("; ")) for body in bodies))


def closing(partial: str) -> str:
    """The shortest text that makes `partial`, a beginning of the format, whole."""
    lines = partial.split("\n")
    header, line = f"{SECTIONS[len(lines) - 1]}: ", lines[-1]
    if len(line) < len(header):
        end = header[len(line) :] + EMPTY
    elif line.endswith(";"):
        end = f" {EMPTY}"
    elif line.endswith("; ") or line == header:
        end = EMPTY
    else:
        end = ""
    return end + "".join(f"\n{name}: {EMPTY}" for name in SECTIONS[len(lines) :])


def in_phrase(partial: str) -> bool:
    """Whether `partial` ends inside a phrase, where the phrase may be ended."""
    lines = partial.split("\n")
    line = lines[-1]
    return len(line) > len(f"{SECTIONS[len(lines) - 1]}: ") and not line.endswith((";", "; "))


def repeats(partial: str) -> bool:
    """Whether the phrase that `partial` ends in stands in its list already."""
    line = partial.rpartition("\n")[2]
    _, _, body = line.partition(": ")
    *earlier, last = (phrase.strip(" .,").lower() for phrase in body.split(";"))
    return bool(last) and last in earlier


def _phrases(raw: Iterable[str]) -> tuple[str, ...]:
    kept: dict[str, str] = {}
    for phrase in raw:
        text = " ".join(re.sub(r"[;<>]", " ", phrase).split()).strip(" .,")
        if text and text.lower() not in _EMPTY_WORDS:
            kept.setdefault(text.lower(), text)
    return tuple(list(kept.values())[:MAX_PHRASES])
