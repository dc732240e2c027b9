"""What people may write, and what else may stand in their data: hypothesis strategies.

The same examples come in every run. For a search, `R4R_HOSTILE_EXAMPLES=2000 pytest
tests/test_hostile.py`: as many examples a test, new ones in each run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, timedelta, timezone
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from r4r_graph.schema import Item, Review

CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_sep|>"),  # ChatML, Phi
    *("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),  # Llama 2, Mistral
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # Llama 3
    *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),  # Gemma
    *("<think>", "</think>", "<tool_call>", "<|fim_prefix|>"),  # Qwen
    *("[TOOL_CALLS]", "[IMG]", "[gMASK]", "[CLS]", "[SEP]"),
    "<｜begin▁of▁sentence｜>",  # DeepSeek
    *("### Instruction:", "### Response:"),  # tokens of several words
)
OUR_TAGS = ("review", "person", "candidate", "judgement")

_PIECES = (
    *CONTROL_TOKENS,
    *(f"<{tag}>" for tag in OUR_TAGS),
    *(f"</{tag}>" for tag in OUR_TAGS),
    *("{{ 7*7 }}", "{% for i in range(9) %}x{% endfor %}", "{# gone #}", "{{ labels }}", "${x}"),
    *("＜|im_end|＞", "﹤/person﹥", "［INST］", "<\u200b|im_end|>", "[IN[INST]ST]"),
    *("&lt;/review&gt;", "&amp;", "&#60;b&#62;"),
    *("\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\u2028", "\u2029", "\xa0"),
    *("\x00", "\x07", "\x1b[31m", "\x7f", "\x9b", "\ufeff", "\u200b", "\ufffe", "\ue000"),
    *("\u202eevil\u202c", "\u2066x\u2069", "שלום עולם", "مرحبا بالعالم", "می‌خواهم"),
    *("👩‍👩‍👧", "❤️", "🏳️‍🌈", "e\u0301\u0323\u0327", "ﷺ", "ﬁ", "½", "日本語", "क्‍ष"),
    *("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</script>", "'\"><b>", "]]>"),
    *("'; DROP TABLE store; --", "../../etc/passwd", "C:\\con", "a/b", ";", ",", '"', "\\", "%s"),
    *("positive: all", "; ", "none", "1. ", "rated 5", "NaN", "null", "-0", "5"),
)

sound_texts = st.one_of(
    st.just(""),
    st.text(max_size=30),
    st.lists(st.sampled_from(_PIECES) | st.text(max_size=6), max_size=8).map("".join),
    st.lists(st.sampled_from(_PIECES), min_size=2, max_size=6).map(" ".join),
)
"""Texts that are Unicode, if nothing else."""

huge_texts = st.builds(
    lambda piece, times: piece * times,
    st.sampled_from([*_PIECES, "a", " ", "word "]),
    st.sampled_from([300, 1500]),
)
broken_texts = st.sampled_from(["\ud800", "a\udfffb", "\udc80\ud83d", "half \ud83d of a face"])
"""Halves of surrogate pairs, which are no characters: no file holds them, Python texts may."""

texts = st.one_of(sound_texts, sound_texts, huge_texts, broken_texts)

ids = st.one_of(
    st.sampled_from(["u", "i", "ann", "target", "", " ", "\n", "a/b", "..", "a\x1fb", "\x00", "0"]),
    sound_texts,
    broken_texts,
)
ratings = st.one_of(
    st.sampled_from([1, 5, 2.5, 1.0, 5.000001, 0, -1, 1e300, 10**400]),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0, 5e-324]),
    st.floats(0.5, 5.5),
)
_ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))])
times = st.one_of(
    st.sampled_from([0, -1, 1.5e9, -6e10, 9.9e10, 1e11, 1.7e12, -1e18, 1e300, 10**400]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.floats(-1e11, 1e11),
)
"""Unix seconds, and what is taken for them."""
moments = st.one_of(
    times,
    st.datetimes(timezones=_ZONES),
    st.sampled_from(["2023-11-14", "0001-01-01", "9999-12-31", "nan", "1e400", "soon", "", "１２"]),
    sound_texts,
)
"""What a caller may give as a time."""

reviews = st.builds(Review, ids, ids, ratings, times, texts, texts)
items = st.builds(Item, ids, texts, texts, texts)

_EVERY_DAY = st.sampled_from(["ann", "ben", "target", "folk", "../x", "a\nb"])
likely_reviews = st.builds(
    Review, _EVERY_DAY, _EVERY_DAY, st.floats(1, 5), st.floats(-1e9, 2e9), texts, texts
)
"""Most of these are accepted: what is hostile is in their words."""

_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | sound_texts | times,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
_COLUMNS = ("user_id", "item_id", "rating", "timestamp", "title", "review")
plain_rows = st.fixed_dictionaries(
    {}, optional=dict.fromkeys([*_COLUMNS, "text", "more"], _VALUES | sound_texts)
)
"""Rows of a JSON file, or of a history that is passed to the graph itself."""
likely_rows = st.fixed_dictionaries(
    {
        "user_id": _EVERY_DAY,
        "item_id": _EVERY_DAY | st.integers(),
        "rating": st.floats(1, 5) | ratings.filter(lambda rating: rating != 10**400),
        "timestamp": st.floats(0, 2e9) | st.sampled_from(["2014-03-05", "-1", 9e10, 1e12]),
        "title": sound_texts,
        "review": sound_texts,
    }
)

_EXAMPLES = int(os.environ.get("R4R_HOSTILE_EXAMPLES", "0"))


def examples(count: int) -> Callable[..., Any]:
    """So many examples of a test, the same ones in every run; more and others in a search."""
    return settings(
        max_examples=_EXAMPLES or count,
        derandomize=not _EXAMPLES,
        database=None,
        deadline=None,
        # To make an example small takes hundreds of runs: only where one is looked for.
        phases=list(Phase) if _EXAMPLES else [Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
