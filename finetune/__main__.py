"""`python -m finetune STEP --config RECIPE.yaml [key=value ...]`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from finetune.pipeline import STEPS, Step, planned, run_all
from finetune.settings import load_recipe
from r4r_graph.errors import EngineError, R4RError

err = Console(stderr=True, highlight=False)

app = typer.Typer(
    name="finetune",
    help="Trains the experts of r4r-graph on your reviews, step by step or all at once. A finished "
    "step is skipped, a stopped one goes on; reports go to stdout as JSON.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[
    Path, typer.Option("--config", help="The recipe: a YAML file, or a shipped one's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. epochs=2 or predictor.lora.rank=8", metavar="KEY=VALUE"),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on where it stopped, or start over.")
]


def _add(step: Step) -> None:
    def plain(config: ConfigOption, overrides: Overrides = None) -> None:
        _report(step, _with_progress(step, load_recipe(config, overrides or (), step=step.name)))

    def training(
        config: ConfigOption, overrides: Overrides = None, resume: ResumeOption = True
    ) -> None:
        recipe = load_recipe(config, overrides or (), step=step.name)
        _report(step, step.run(recipe, resume=resume))

    app.command(step.name, help=f"{step.says[0].upper()}{step.says[1:]}.")(
        training if step.trains else plain
    )


for _step in STEPS:
    _add(_step)


@app.command("all")
def everything(config: ConfigOption, overrides: Overrides = None) -> None:
    """Run the whole pipeline in order."""
    recipe = load_recipe(config, overrides or ())
    err.print(f"steps: {', '.join(step.name for step in planned(recipe))}")
    run_all(recipe, on_step=_report)


@app.command("release")
def _release(
    out: Annotated[Path, typer.Argument(help="An empty or new folder.")],
    config: ConfigOption,
    overrides: Overrides = None,
) -> None:
    """Copy the finished experts, without what only training needs."""
    from finetune.release import release

    report = release(load_recipe(config, overrides or ()), out)
    typer.echo(json.dumps(asdict(report), default=str))


def _with_progress(step: Step, recipe: Any) -> Any:
    if step.name in ("splits", "relabel"):  # seconds
        return step.run(recipe)
    from r4r_graph.cli import display

    with display.progress(step.name, err) as tell:
        return step.run(recipe, on_progress=tell)


def _report(step: Step, report: Any) -> None:
    if os.environ.get("RANK", "0") != "0":  # one of several training processes
        return
    columns = asdict(report) if is_dataclass(report) and not isinstance(report, type) else report
    typer.echo(json.dumps({"step": step.name, **columns}, default=str))


def main() -> None:
    """Run a step. Exit codes: 0 done, 1 the run failed, 2 bad input."""
    # Threads of a busy machine that wait for each other by spinning cost many times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except R4RError as error:
        from r4r_graph.cli.display import printable

        message = f"finetune: error: {printable(str(error))}"
        err.print(message, style="red", markup=False, soft_wrap=True)
        sys.exit(1 if isinstance(error, EngineError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
