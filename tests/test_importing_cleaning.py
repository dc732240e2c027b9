"""One value at a time."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from r4r_graph.errors import DataError, SettingError
from r4r_graph.importing.cleaning import (
    clean_line,
    clean_text,
    first_line,
    id_of,
    parse_scale,
    rating_of,
    seconds_of,
)
from r4r_graph.ratings import RatingScale

STARS = RatingScale()


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("It&#34;s &amp; it&#39;s", "It\"s & it's"),
        ("R&amp;amp;B, &amp;#34;live&amp;#34;", 'R&B, "live"'),
        ("AT&T &copy &unknown; &#xD800;", "AT&T &copy &unknown; \ufffd"),
        ("one<br /><BR>two</p><p class='x'>three", "one\n\ntwo\n\nthree"),
        ("a <b>bold</b> <a href=\"x\">link</a>", "a bold link"),
        ("I <3 it, a < b > c, <grin>, <abc>", "I <3 it, a < b > c, <grin>, <abc>"),
        ("&lt;i&gt;so&lt;/i&gt;", "so"),
        ("x<script>var a = '<b>';</script>y<!-- z -->w<style>p{}</style>", "xyw"),
        ("<script>never closed", "<script>never closed"[8:]),
        ("like [[ASIN:B000X Nevermind (LP)]] or [[ASIN:B1]] [[VIDEOID:abc]]!",
         "like Nevermind (LP) or !"),
        ("a\r\nb\rc\u2028d \t e\xa0f\x00\x1b[2J", "a\nb\nc\nd e f[2J"),
        ("a\n \n \n\nb", "a\n\nb"),
        ("  \ufeffx\u200b ", "x"),
        ("👩\u200d💻 שלום", "👩\u200d💻 שלום"),
        ("half \ud83d pair", "half \ufffd pair"),
        (["one", "", "<i>two</i>"], "one\ntwo"),
        (None, ""),
        (float("nan"), ""),
        (True, ""),
        (300, "300"),
        ({}, ""),
    ],
)  # fmt: skip
def test_texts(given: object, cleaned: str) -> None:
    assert clean_text(given) == cleaned


def test_hostile_markup_takes_no_longer_than_its_length() -> None:
    started = time.process_time()
    for part in ("<script>", "<!--", "<a ", "&", "[[ASIN:", "\n ", '<a "', "</script><script>"):
        clean_text(part * (400_000 // len(part)))
    assert time.process_time() - started < 10


def test_lines() -> None:
    assert clean_line("a<br>b\n c") == "a b c"
    assert first_line([None, " ", "<img src='x'>", "Rock &amp; Pop", "other"]) == "Rock & Pop"
    assert first_line([]) == ""


@pytest.mark.parametrize(("given", "id_"), [(" a ", "a"), (7, "7"), (7.0, "7"), ("a\nb", "a\nb")])
def test_ids(given: object, id_: str) -> None:
    assert id_of(given, "user_id") == id_


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "^no user_id$"),
        (float("nan"), "^no user_id$"),
        (" ", "^no user_id$"),
        (True, "^bad user_id: True is not text"),
        (1.5, "^bad user_id: 1.5"),
        (2.0**60, "^bad user_id"),
        (["a"], "^bad user_id"),
        ("x\udfff", "^bad user_id: half a surrogate pair"),
    ],
)
def test_bad_ids(given: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        id_of(given, "user_id")


def test_ratings() -> None:
    assert [rating_of(v, STARS) for v in (1, "4.5", " 5 ", Decimal("2.5"))] == [1, 4.5, 5, 2.5]
    assert rating_of(8, parse_scale("1-10")) == 8
    assert rating_of(0.5, parse_scale("0.5,1,1.5,2")) == 0.5
    up, down = (True, "UP", "thumbs_up", "1", 1.0, "Like"), (False, "down", 0, "no", "Thumbs-Down")
    for scale in (parse_scale("Thumbs"), parse_scale("0-1")):
        assert [rating_of(v, scale) for v in up] == [1] * len(up)
        assert [rating_of(v, scale) for v in down] == [0] * len(down)
    assert [rating_of(v, parse_scale("-1,1")) for v in ("yes", "no", -1)] == [1, -1, -1]
    with pytest.raises(SettingError, match="bad rating scale"):
        parse_scale("stars")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, "no rating"),
        ("", "no rating"),
        (float("nan"), "no rating"),
        ("good", "bad rating"),
        ("up", "bad rating"),
        (True, "bad rating"),
        ("inf", "bad rating"),
        ("nan", "bad rating"),
        ([5], "bad rating"),
        (10**400, "bad rating"),
        (5.1, "off the scale"),
        (0, "off the scale"),
    ],
)
def test_bad_ratings(given: object, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        rating_of(given, STARS)
    assert str(caught.value).partition(":")[0] == kind


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (1_588_687_728, 1_588_687_728),
        (1_588_687_728_923, 1_588_687_728.923),
        ("1588687728923000", 1_588_687_728.923),
        (1_588_687_728_923_000_000, 1_588_687_728.923),
        (Decimal("1588687728.5"), 1_588_687_728.5),
        (-86400, -86400),
        ("2018-07-07 22:09:11", 1_531_001_351),
        ("2018-07-07T22:09:11+02:00", 1_530_994_151),
        ("2018-07-07T22:09:11Z", 1_531_001_351),
        ("Sun Jul 30 07:44:10 -0700 2017", 1_501_425_850),
        ("Thu Mar  2 00:00:00 +0530 2017", 1_488_393_000),
        (datetime(2018, 7, 7, 22, 9, 11), 1_531_001_351),
        (datetime(2018, 7, 7, 22, 9, 11, tzinfo=UTC), 1_531_001_351),
        (date(2018, 7, 7), 1_530_921_600),
        ("17280000", 17_280_000),
        (1000, 1000),
    ],
)
def test_times(given: object, seconds: float) -> None:
    assert seconds_of(given) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "^no timestamp$"),
        (" ", "^no timestamp$"),
        (float("nan"), "^no timestamp$"),
        ("nan", "^bad timestamp: nan is no time"),
        (float("inf"), "^bad timestamp"),
        (10**400, "^bad timestamp"),
        (1e21, "^bad timestamp"),
        (True, "^bad timestamp"),
        ([1], "^bad timestamp"),
        ("yesterday", "neither a number nor ISO 8601"),
        ("07/04/2013", "neither a number nor ISO 8601"),
        ("Sun Foo 30 07:44:10 -0700 2017", "neither a number nor ISO 8601"),
        ("Sun Feb 30 07:44:10 -0700 2017", "neither a number nor ISO 8601"),
        (datetime(6000, 1, 1), "^bad timestamp: '6000-01-01T00:00:00' is"),
        ("6000-01-01", "^bad timestamp: '6000-01-01' is"),
        ("2014", "may be a date or seconds"),
        (20140101, "may be a date or seconds"),
    ],
)
def test_bad_times(given: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        seconds_of(given)
