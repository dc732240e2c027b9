"""What `r4r runs` and `r4r show` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from langgraph.types import Overwrite, StateSnapshot
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from r4r_graph import runs
from r4r_graph.cli.display import safe, show_question, show_waiting

_STYLES = {"finished": "green", "waiting": "yellow", "failed": "red", "stopped": "dim"}


def show_runs(found: Sequence[runs.RunInfo], out: Console) -> None:
    """A line each."""
    if not found:
        out.print("no runs are kept")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("run", "began", "user", "item", "status", "rating", "fork of"):
        table.add_column(title, justify="right" if title == "rating" else "left")
    for run in found:
        table.add_row(
            safe(run.thread_id),
            _moment(run.started),
            safe(run.user_id),
            safe(run.item_id),
            safe(run.status, _STYLES[run.status]),
            "" if run.rating is None else f"{run.rating:.2f}",
            safe(run.forked_from or ""),
        )
    out.print(table)


def run_steps(
    states: Sequence[StateSnapshot], now: StateSnapshot, thread_id: str
) -> dict[str, Any]:
    """A run as plain JSON values: what it is, its knobs, its steps, and how it stands.

    Args:
        states: `runs.history`.
        now: `runs.find`.
        thread_id: the run.

    Returns:
        `runs.RunInfo`'s fields, `knobs`, `question`, `recommendation` (or None), and `steps`:
        each with `number` and `node`, `ended` (unix seconds; None where it is not over), and
        `tasks` with `spans`, `records`, `update` (whatever else was found out) and `error`.
    """
    steps = []
    for before, after in zip(states, [*states[1:], None], strict=True):
        if not before.tasks or before.tasks[0].name == "__start__":
            continue
        steps.append(
            {
                "number": (before.metadata or {}).get("step", 0) + 1,
                "node": before.tasks[0].name,
                "began": runs.seconds(before),
                "ended": None if after is None else runs.seconds(after),
                "tasks": [_task(task) for task in before.tasks],
            }
        )
    return {
        **asdict(runs.info([*states[:-1], now], thread_id)),
        "knobs": asdict(runs.knobs_of_run(now)),
        "question": runs.question(now),
        "recommendation": now.values.get("recommendation") or None,
        "steps": steps,
    }


def _task(task: Any) -> dict[str, Any]:
    update = {
        name: value.value if isinstance(value, Overwrite) else value
        for name, value in (task.result or {}).items()
    }
    return {
        "spans": update.pop("spans", []),
        "records": update.pop("records", []),
        "update": update,
        "error": None if task.error is None else str(task.error),
        "done": task.result is not None,
    }


def show_steps(told: Mapping[str, Any], out: Console, *, prompts: bool) -> None:
    """A run, step by step.

    Args:
        told: see `run_steps`.
        out: where.
        prompts: also what each step was asked, where that is kept.
    """
    rating = (told["recommendation"] or {}).get("rating")
    about = f"{told['user_id']} on {told['item_id']}"
    out.print(safe(f"{told['thread_id']}  {about}  {_moment(told['started'])}"), style="bold")
    standing = told["status"] + ("" if rating is None else f", rated {rating:.2f}")
    out.print(safe(standing, _STYLES[told["status"]]))
    if told["forked_from"]:
        out.print(safe(f"a fork of {told['forked_from']}"), style="dim")
    recorded = False
    for step in told["steps"]:
        out.print()
        out.print(safe(f"{step['number']:3} {_headline(step)}"), style="bold")
        for task in step["tasks"]:
            for line in _said(step["node"], task):
                out.print(Padding(safe(line), (0, 0, 0, 4)))
            recorded = recorded or bool(task["records"])
            for record in task["records"] if prompts else ():
                for turn in record["prompt"]:
                    out.print(Padding(safe(f"[{turn['role']}]", "dim"), (0, 0, 0, 4)))
                    for line in turn["content"].splitlines():
                        out.print(Padding(safe(line, "dim"), (0, 0, 0, 6)))
    if told["question"] is not None:
        show_question(told["question"], out)
        show_waiting(told["thread_id"], told["question"], out)
    if recorded and not prompts:
        out.print("\n--prompts shows what each step was asked", style="dim")


def _headline(step: Mapping[str, Any]) -> str:
    """A step's name, how it went, its time and tokens."""
    spans = [span for task in step["tasks"] for span in task["spans"]]
    waits = not all(task["done"] for task in step["tasks"])
    parts = [step["node"] + (f" x{len(step['tasks'])}" if len(step["tasks"]) > 1 else "")]
    if any(task["error"] for task in step["tasks"]):
        parts.append("failed")
    elif waits:
        parts.append("waits" if step["node"] == "human" else "not over")
    if spans:
        seconds = max(s["ended"] for s in spans) - min(s["started"] for s in spans)
        total = {
            name: sum(span[name] for span in spans)
            for name in ("calls", "cache_hits", "prompt_tokens", "completion_tokens")
        }
        parts.append(f"{seconds:.1f} s")
        parts.append(f"{total['calls']} calls, {total['cache_hits']} kept")
        parts.append(f"{total['prompt_tokens']} + {total['completion_tokens']} tokens")
    elif step["ended"] is not None:
        parts.append(f"{step['ended'] - step['began']:.1f} s")
    return "  ".join(parts)


def _said(node: str, task: Mapping[str, Any]) -> list[str]:
    """What a step found out, in lines."""
    update = task["update"]
    if task["error"]:
        return [task["error"]]
    lines = []
    if node == "recall" and task["done"]:
        sides = len(update["user_reviews"]), len(update["item_reviews"])
        lines.append(f"{sides[0]} reviews by the user, {sides[1]} of the item")
    for summary in update.get("summaries", {}).values() if node == "summarizer" else ():
        signs = (("+", "positive"), ("-", "negative"), ("looks for", "values"))
        told = [f"{sign} {', '.join(summary[name])}" for sign, name in signs if summary[name]]
        lines.append("; ".join(told) or "nothing")
    for answer in update.get("answers", ()) if node == "human" else ():
        more = answer.get("rationales") or [str(answer.get("rating", ""))]
        lines.append(" ".join([f"about the {answer['about']}: {answer['action']}", *more]).strip())
    for drawn in update.get("rationales", ()) if node == "reasoner" else ():
        lines.append(drawn["text"])
    if node == "predictor" and task["done"]:
        rated = update["recommendation"]
        shown = ", ".join(f"{v}: {100 * p:.1f} %" for v, p in rated["distribution"].items())
        lines.append(f"mean {rated['mean']:.2f} ({shown})")
    for one in update.get("influence", ()) if node == "influence" else ():
        which = " ".join(filter(None, (one["user_id"], one["item_id"])))
        lines.append(f"{one['change']:+.2f} {one['what'].replace('_', ' ')} {which}".rstrip())
    return lines


def _moment(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
