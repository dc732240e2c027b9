"""One value at a time: texts freed of markup, ids, ratings, times.

What cannot be used raises `DataError`. Its message begins with the kind of fault, then a colon and
the details, so that faults can be counted by kind.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal

from r4r_graph.errors import DataError
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews.files import shorten
from r4r_graph.schema import unix_seconds

THUMBS = "thumbs"
"""Names the scale of two values, 0 (down) and 1 (up)."""

_EXACT = 2**53  # whole numbers below it survive as floats

# --- texts -------------------------------------------------------------------------------------

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Only the names of HTML: "<grin>" and "a < b" are what somebody wrote.
_BREAK = re.compile(
    r"</?(?:address|article|aside|blockquote|br|center|dd|div|dl|dt|figure|footer|h[1-6]|header|hr"
    r"|li|main|nav|ol|p|pre|section|table|tbody|td|tfoot|th|thead|tr|ul)(?=[\s/>])[^<>]*>",
    re.IGNORECASE,
)
_INLINE = re.compile(
    r"</?(?:a|abbr|acronym|b|big|cite|code|del|em|embed|font|form|i|iframe|img|input|ins|kbd|label"
    r"|link|mark|meta|object|param|q|s|samp|script|small|span|strike|strong|style|sub|sup|tt|u|var"
    r"|video|wbr)(?=[\s/>])[^<>]*>",
    re.IGNORECASE,
)
_HIDDEN = (
    (re.compile("<!--"), re.compile("-->")),
    (
        re.compile(r"<(?:script|style)(?=[\s>])", re.IGNORECASE),
        re.compile(r"</(?:script|style)\s*>", re.IGNORECASE),
    ),
)
# Amazon's own markup: a link to a product with its name, and a video.
_AMAZON_LINK = re.compile(r"\[\[ASIN:\w+\s+([^\[\]]*)\]\]")
_AMAZON_EMBED = re.compile(r"\[\[(?:ASIN|VIDEOID):?\w*\]\]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff\ufff9-\ufffb]")
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"[^\S\n]+")
_ODD_SPACE = re.compile(r"[^\S\n ]")
_AROUND_LINE_END = re.compile(" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(value: object) -> str:
    """A text without entities, markup and control characters, with single spaces and at most one
    blank line in a row. A list is joined line by line; what is no text is empty.

    Entities are undone twice, for in public files `&amp;#34;` is common.
    """
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, map(clean_text, value)))
    if not isinstance(value, str):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if whole else ""
    text = value
    if "&" in text:
        text = _ENTITY.sub(_character, _ENTITY.sub(_character, text))
    if "<" in text:
        text = _BREAK.sub("\n", _without_hidden(text))
        text = _INLINE.sub("", text)
    if "[[" in text:
        text = _AMAZON_EMBED.sub("", _AMAZON_LINK.sub(r"\1", text))
    if not text.isascii():
        text = _HALF_PAIR.sub("\ufffd", text)
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    # Most texts have nothing of what follows, and looking for it is what would take the time.
    if "  " in text or _ODD_SPACE.search(text):
        text = _SPACES.sub(" ", text)
    if "\n" in text:
        text = _BLANK_LINES.sub("\n\n", _AROUND_LINE_END.sub("\n", text))
    return text.strip()


def clean_line(value: object) -> str:
    """As `clean_text`, on one line; for titles and categories."""
    return " ".join(clean_text(value).split())


def first_line(values: Iterable[object]) -> str:
    """The first of the values that has a text, on one line."""
    return next(filter(None, map(clean_line, values)), "")


def _character(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])


def _without_hidden(text: str) -> str:
    """Without comments, scripts and style sheets. Each is looked for once, from left to right:
    an expression for whole blocks would take quadratic time where none is closed."""
    for opening, closing in _HIDDEN:
        parts, at = [], 0
        while (start := opening.search(text, at)) and (end := closing.search(text, start.end())):
            parts.append(text[at : start.start()])
            at = end.end()
        text = "".join([*parts, text[at:]])
    return text


# --- ids, ratings, times -----------------------------------------------------------------------


def id_of(value: object, name: str) -> str:
    """An id as text, without spaces around it.

    Raises:
        DataError: there is none, or it is neither text nor a whole number.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        value = int(value)  # a whole number from a column that also had nulls
    if value is None or value != value:
        raise DataError(f"no {name}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"bad {name}: {shorten(repr(value), 60)} is not text")
    text = str(value).strip()
    if not text:
        raise DataError(f"no {name}")
    if not text.isascii() and _HALF_PAIR.search(text):
        raise DataError(f"bad {name}: half a surrogate pair, which is no character")
    return text


def parse_scale(text: str) -> RatingScale:
    """A scale as `RatingScale.parse` takes it, or `thumbs`.

    Raises:
        SettingError: not a scale.
    """
    return RatingScale((0.0, 1.0)) if text.strip().lower() == THUMBS else RatingScale.parse(text)


_UP = frozenset({"up", "thumbs up", "true", "yes", "y", "t", "like", "liked", "positive"})
_DOWN = frozenset({"down", "thumbs down", "false", "no", "n", "f", "dislike", "disliked"}) | {
    "negative"
}


def rating_of(value: object, scale: RatingScale) -> float:
    """A rating on the scale. Where the scale has two values, words and truth values are the
    higher one (up, true, yes, like) or the lower one (down, false, no, dislike).

    Raises:
        DataError: there is none, it is no number, or it lies outside the scale.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise DataError("no rating")
    if len(scale.values) == 2:
        word = str(value).strip().lower().replace("_", " ").replace("-", " ")
        if word in _UP or word in _DOWN:
            return scale.high if word in _UP else scale.low
    if isinstance(value, bool) or not isinstance(value, float | int | str | Decimal):
        raise DataError(f"bad rating: {shorten(repr(value), 60)} is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"bad rating: {shorten(repr(value), 60)} is no number") from None
    if not math.isfinite(number):
        raise DataError(f"bad rating: {number} is no finite number")
    if not scale.low <= number <= scale.high:
        raise DataError(f"off the scale: rating {number:g} is not in {scale.low:g}-{scale.high:g}")
    return number


_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))
"""Below which number it counts seconds, milli-, micro- or nanoseconds. The first of these limits is
the year 5138 in seconds and March 1973 in milliseconds."""
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# "Sun Jul 30 07:44:10 -0700 2017": strptime would read it in the language of the machine.
_LONG_TIME = re.compile(
    r"[A-Za-z]{3} ([A-Za-z]{3}) +(\d{1,2}) (\d\d:\d\d:\d\d) ([+-]\d\d):?(\d\d) (\d{4})"
)
_WHOLE = re.compile(r"\d+")


def seconds_of(value: object) -> float:
    """A time as unix seconds: a count of seconds, milli-, micro- or nanoseconds (by its size), an
    ISO 8601 text, `Sun Jul 30 07:44:10 -0700 2017`, or a date; UTC where no zone is named.

    Raises:
        DataError: there is none, or it is no time.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise DataError("no timestamp")
    if isinstance(value, datetime):
        return _seconds_of_text(value.isoformat())
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    if isinstance(value, bool) or not isinstance(value, float | int | str | Decimal):
        raise DataError(f"bad timestamp: {shorten(repr(value), 60)} is no time")
    if _may_be_a_date(str(value).strip()):
        raise DataError(f"bad timestamp: {value} may be a date or seconds; write 2014-01-01")
    try:
        number = float(value)
    except OverflowError:
        raise DataError("bad timestamp: a number too large to be a time") from None
    except ValueError:
        assert isinstance(value, str)
        return _seconds_of_text(value.strip())
    for limit, unit in _UNITS:
        if abs(number) < limit:
            return number / unit
    raise DataError(f"bad timestamp: {number} is no time")


def _may_be_a_date(text: str) -> bool:
    """Whether digits alone may be a year, or a year, month and day."""
    if len(text) not in (4, 8) or not _WHOLE.fullmatch(text):
        return False
    if len(text) == 4:
        return 1900 <= int(text) <= 2100
    return 1900 <= int(text[:4]) <= 2100 and 1 <= int(text[4:6]) <= 12 and 1 <= int(text[6:]) <= 31


def _seconds_of_text(text: str) -> float:
    if match := _LONG_TIME.fullmatch(text):
        month, day, clock, hours, minutes, year = match.groups()
        if month.lower() in _MONTHS:
            number = _MONTHS.index(month.lower()) + 1
            text = f"{year}-{number:02}-{int(day):02}T{clock}{hours}:{minutes}"
    try:
        return unix_seconds(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise DataError(
            f"bad timestamp: {shorten(repr(text), 60)} is neither a number nor ISO 8601, or "
            "later than the year 5138"
        ) from None
