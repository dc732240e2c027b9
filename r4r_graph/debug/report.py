"""A run as one HTML file.

write_report(trace(graph, thread_id), "run.html")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from r4r_graph.debug import page
from r4r_graph.debug.charts import lay_out, time_line
from r4r_graph.debug.steps import Step
from r4r_graph.debug.trace import GraphNode, RunTrace
from r4r_graph.schema import Influence, ReviewAspects

CONTENTS = (
    ("why", "Why this rating"),
    ("influence", "What moved it"),
    ("read", "What was read"),
    ("graph", "The graph"),
    ("time", "Time line"),
    ("steps", "Steps and prompts"),
    ("cut", "Cut, and warnings"),
    ("versions", "Model and settings"),
    ("json", "JSON"),
)
"""Sections: what links to them, and their short names."""

Read = tuple[str, str, float]
"""What tells a review from others: its user, item and time."""

_MOST_RATIONALES = 4
"""So many are open to begin with."""


def to_html(run: RunTrace) -> str:
    """One page about a run, also about one that failed, waits or was killed. It needs nothing
    beside it, and no text in it is ever read as markup."""
    return page.render("report.html.jinja", contents=CONTENTS, run=run, **_shown(run))


def write_report(run: RunTrace, file: str | os.PathLike[str]) -> Path:
    """Write the page, atomically.

    Raises:
        SettingError: it cannot be written.
    """
    return page.write_page(to_html(run), file)


def _shown(run: RunTrace) -> dict[str, Any]:
    """What the template shows besides the run itself."""
    rated, mixed = run.recommendation, run.distribution
    influence = rated.influence if rated else ()
    apart = [drawn.distribution for drawn in run.rationales if drawn.distribution]
    places, changes = _places(run), {_key(one): one.change for one in influence}
    given = any("rating" in answer for answer in run.answers)
    return {
        "rating": rated.rating if rated else None,
        "by_person": given,
        "chips": _chips(run),
        "alerts": _alerts(run),
        "stood_at": list(
            dict.fromkeys(step.node for step in run.steps if step.standing in ("failed", "pending"))
        ),
        "rated_apart": apart if len(apart) > 1 else [],
        "readouts": ()
        if mixed is None
        else (
            ("mean", f"{mixed.mean:.2f}"),
            ("median", f"{mixed.median:.2f}"),
            ("mode", f"{mixed.mode:g}"),
            ("entropy", f"{mixed.entropy:.2f} nats"),
            ("mass on ratings", f"{mixed.mass:.3f}"),
        ),
        "most_rationales": _MOST_RATIONALES,
        "influence": [(one, *places.get(_key(one), ("", None))) for one in influence],
        "most_change": max((abs(one.change) for one in influence), default=0.0),
        "sides": [
            ("user", "The user’s reviews", run.user_reviews, run.user_stats),
            ("item", "Reviews of the item", run.item_reviews, run.item_stats),
        ],
        "change_of": lambda review: changes.get(_key(review)),
        "picture": lay_out(run.nodes, run.edges),
        "node_rows": [
            (
                node,
                sum(s.prompt_tokens for s in _ran(run, node)),
                sum(s.completion_tokens for s in _ran(run, node)),
            )
            for node in run.nodes
            if not node.name.startswith("__")
        ],
        "line": time_line(run.steps),
        "labels": mixed.scale.labels if mixed else (),
        "versions": list(page.flat_model(run.model).items()),
        "node_words": _node_words,
        "node_class": _node_class,
        "without_prompts": _without_prompts,
    }


def _chips(run: RunTrace) -> list[str]:
    found = []
    if run.distribution is not None:
        found.append(
            f"most likely {run.distribution.mode:g}, at {page.percent(run.distribution.confidence)}"
        )
    found.append(f"{len(run.user_reviews)} + {len(run.item_reviews)} reviews read")
    if run.ended is not None:
        found.append(f"took {page.duration(run.ended - run.started)}")
    tokens = sum(step.prompt_tokens + step.completion_tokens for step in run.steps)
    found.append(f"{tokens:,} tokens")
    found.append(page.moment(run.started))
    return found


def _alerts(run: RunTrace) -> list[str]:
    found = ["cold start"] if run.cold_start else []
    for what, count in (("warning", len(run.warnings)), ("cut", len(run.truncated))):
        if count:
            found.append(f"{count} {what}{'s' if count > 1 else ''}")
    if run.distribution is not None and run.distribution.mass < 0.5:
        found.append(f"only {page.percent(run.distribution.mass)} of the mass on ratings")
    return found


def _places(run: RunTrace) -> dict[Read, tuple[str, ReviewAspects]]:
    """Which review is where on the page."""
    sides = (("user", run.user_reviews), ("item", run.item_reviews))
    return {
        _key(review): (f"{side}-{number}", review)
        for side, reviews in sides
        for number, review in enumerate(reviews, start=1)
    }


def _key(one: ReviewAspects | Influence) -> Read:
    return one.user_id, one.item_id, one.timestamp


def _ran(run: RunTrace, node: GraphNode) -> list[Step]:
    return [step for step in run.steps if step.node == node.name and step.standing != "earlier"]


# Words of the templates --------------------------------------------------------------------------


def _node_words(node: GraphNode) -> str:
    """What a node did, in a line."""
    if node.standing == "failed":
        return "failed"
    if node.standing == "waiting":
        return "waits for a person"
    if node.standing == "pending" and not node.steps:
        return "did not come to run"
    if not node.steps:
        return "ran before the fork" if node.earlier else "not run"
    parts = [f"{node.steps} steps" if node.steps > 1 else "1 step"]
    if node.cache_hits:
        parts.append(f"{node.cache_hits} from cache")
    return " · ".join([*parts, page.duration(node.seconds)])


def _node_class(node: str) -> str:
    return "human" if node == "human" else "work"


def _without_prompts(step: Step) -> str:
    """Why a step has no prompt to show."""
    if step.node in ("recall", "human"):
        return "This step asks no model."
    if step.standing not in ("done", "earlier"):
        return "It has no output."
    if step.node == "influence":
        return (
            "It asks the predictor once for each thing that is left out, with the prompts above "
            "but for that; these are not kept."
        )
    return "Its prompt was not kept."
