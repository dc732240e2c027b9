"""What lies beside a finished adapter: `r4r.json` for the loader, `README.md` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r4r_graph.engine.weights import BaseModel
from r4r_graph.prompts import prompt_info

_USES = {
    "summarizer": "turns one review into an aspect summary: what its writer praised, disliked and "
    "looks for",
    "reasoner": "writes one paragraph on why a user will or won't like an item, from the aspect "
    "summaries of both sides' earlier reviews; it never sees a rating",
    "predictor": "rates a pair from both sides' summaries, ratings, averages and a rationale, as a "
    "distribution over the scale's tokens at one position",
    "reward": "judges rationales in training: it has the predictor's format and was trained with "
    "the target's true review in the rationale's place, so it is no use for predicting",
}
_LIMITS = (
    "Trained on reviews of few domains, in English; elsewhere expect less.",
    "It learned from what people wrote, with their errors and prejudices, and repeats them.",
    "A rationale is the reason that the rating is computed with, not a verified fact about anyone.",
)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything a card says."""

    expert: str
    """The loader's name of the expert; a reward model loads as a predictor."""
    role: str
    """What it is: one of the three experts, or `reward`."""
    base: BaseModel
    settings: Mapping[str, Any]
    trained_with: Mapping[str, Any]
    """`history` and `budgets`, by which it is asked at inference."""
    data: Mapping[str, Any]
    """Counts and fingerprints."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = ()
    """Title and rows of each table of results."""
    data_terms: str = "not stated"
    teacher_terms: str = "not stated"


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write `r4r.json`, `metrics.json` and `README.md` into an adapter's folder."""
    info = prompt_info(facts.expert)
    note = {
        "expert": facts.expert,
        "role": facts.role,
        "base_model": facts.base.name,
        "base_digest": facts.base.digest,
        "prompt": {"name": info.name, "version": info.version, "digest": info.digest},
        "trained_with": dict(facts.trained_with),
    }
    _write_json(folder / "r4r.json", note)
    tables = {title: list(rows) for title, rows in facts.tables}
    _write_json(folder / "metrics.json", {**facts.metrics, **tables})
    (folder / "README.md").write_text(_card(facts, info.digest, info.version), encoding="utf-8")


def _card(facts: CardFacts, digest: str, version: int) -> str:
    lines = [
        "---",
        f"base_model: {facts.base.name}",
        "library_name: peft",
        "tags: [r4r-graph, lora, recommendation]",
        "---",
        "",
        f"# {facts.role.capitalize()} for {facts.base.name}",
        "",
        f"A LoRA adapter of r4r-graph that {_USES[facts.role]}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {facts.base.name}, digest `{facts.base.digest}` |",
        f"| prompt | `{facts.expert}` version {version}, digest `{digest}` |",
        f"| reads | the latest {facts.trained_with['history']} reviews of either side |",
        *(f"| {name} | {_shown(value)} |" for name, value in facts.data.items()),
        "",
        "## Results",
        "",
    ]
    if facts.metrics:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in facts.metrics.items()]
        lines.append("")
    for title, rows in facts.tables:
        lines += [f"{title}:", "", *_table(rows), ""]
    lines += [
        "## Intended use and limits",
        "",
        "For research, within r4r-graph, on the base model named above and no other.",
        "",
        *(f"- {limit}" for limit in _LIMITS),
        "",
        "## Terms",
        "",
        f"- Reviews: {facts.data_terms}",
        f"- Labels: {facts.teacher_terms}",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(facts.settings, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0]) if rows else []
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return [*head, *(f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in rows)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
