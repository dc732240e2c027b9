"""What a step cost, and what it said and heard.

A span is kept of every step that asks the engine: `{"node", "started", "ended", "calls",
"cache_hits", "prompt_tokens", "completion_tokens"}`. A record is kept of every prompt where the
knob `record` asks for it: `{"node", "started", "ended", "prompt": [{"role", "content"}], "output",
"prompt_tokens", "completion_tokens"}`; a summarizer's has the review's `key` and whether the
summary was `cached`. The output is a text, or for the predictor `{"probabilities", "mass"}`. The
influence keeps none: its prompts are the predictor's without a line each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from r4r_graph.engine.base import Message
from r4r_graph.graph.state import Json


def span(node: str, started: float, **counts: int) -> Json:
    """What a step that ends now cost; counts that are not given are 0, times are unix seconds."""
    nothing = dict.fromkeys(("calls", "cache_hits", "prompt_tokens", "completion_tokens"), 0)
    return {"node": node, "started": started, "ended": time.time(), **nothing, **counts}


def record(
    node: str,
    started: float,
    prompt: Sequence[Message],
    output: Any,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    **more: Any,
) -> Json:
    """One record of a step that ends now; times are unix seconds."""
    return {
        "node": node,
        "started": started,
        "ended": time.time(),
        "prompt": [{"role": turn.role, "content": turn.content} for turn in prompt],
        "output": output,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        **more,
    }
