"""The steps by name, and all of them in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.domains import has_labels
from finetune.settings import Recipe
from r4r_graph.errors import SettingError


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the pipeline."""

    name: str
    home: str
    """Module and function."""
    says: str
    trains: bool = False
    """Whether it takes `resume`: without it, it starts over."""

    @property
    def run(self) -> Callable[..., Any]:
        """The function: recipe in, report out."""
        module, function = self.home.split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(f"finetune.{module}"), function)
        return found


def _training(name: str, says: str) -> Step:
    return Step(name, f"sft.train:train_{name}", f"train: {says}", trains=True)


STEPS = (
    Step("splits", "splits:make_splits", "part the reviews by time; reward and instruction rows"),
    Step("teacher", "teacher:label_aspects", "have a teacher write aspect summaries"),
    _training("summarizer", "review -> aspect summary"),
    Step("check", "sft.check:check_summarizer", "hold our summarizer against its teacher"),
    Step("summaries", "summaries:make_summaries", "our summarizer reads every history"),
    Step("relabel", "relabel:relabel", "mend our summaries into labels for sets without a teacher"),
    _training("reward", "true review -> rating, the judge of rationales"),
    Step(
        "rejection",
        "rejection.sampling:reject",
        "sample rationales, keep those that help the judge",
    ),
    _training("reasoner", "histories -> rationale"),
    Step("rationales", "rationales:write_rationales", "our reasoner writes for rows new to it"),
    _training("predictor", "histories and rationale -> rating"),
    Step("calibrate", "calibrate:calibrate_predictor", "temperature and biases, validation rows"),
    Step("grpo", "grpo.train:train_grpo", "reinforce the reasoner by the predictor's error", True),
)
"""In the pipeline's order."""


def step_named(name: str) -> Step:
    """A step.

    Raises:
        SettingError: there is none of that name.
    """
    for step in STEPS:
        if step.name == name:
            return step
    raise SettingError(f"no step {name!r}; there are: {', '.join(s.name for s in STEPS)}")


def planned(recipe: Recipe) -> list[Step]:
    """What `all` runs: the recipe's `steps`, else everything but `check`, `relabel` and `grpo`; a
    teacher is not asked where ready-made labels are given.

    Raises:
        SettingError: an unknown step, or one that stands before what it needs.
    """
    if recipe.steps:
        chosen = [step_named(name) for name in recipe.steps]
        order = [STEPS.index(step) for step in chosen]
        if order != sorted(order):
            raise SettingError(f"steps out of order: {', '.join(recipe.steps)}")
        return chosen
    ready_made = has_labels(recipe)
    skipped = {"check", "relabel", "grpo", *(["teacher"] if ready_made else [])}
    return [step for step in STEPS if step.name not in skipped]


def run_all(
    recipe: Recipe, *, on_step: Callable[[Step, Any], None] | None = None
) -> dict[str, Any]:
    """Run the pipeline in order; a finished step is skipped by itself, a stopped one goes on.

    Returns each step's report by name. `on_step` is called after each.
    """
    reports: dict[str, Any] = {}
    for step in planned(recipe):
        reports[step.name] = step.run(recipe)
        if on_step is not None:
            on_step(step, reports[step.name])
    return reports
