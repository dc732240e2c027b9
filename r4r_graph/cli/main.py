"""The commands of `r4r`, and how an error ends one: a clear line, never a traceback."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from r4r_graph.cli.bulk import bulk, summarize
from r4r_graph.cli.configured import configure
from r4r_graph.cli.evaluate import evaluate
from r4r_graph.cli.fuse import fuse
from r4r_graph.cli.graph import graph
from r4r_graph.cli.import_reviews import import_reviews
from r4r_graph.cli.mcp import mcp
from r4r_graph.cli.options import (
    AdaptersOption,
    BaseOption,
    BudgetsOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HistoryOption,
    InfluenceOption,
    ItemsOption,
    JsonOption,
    MismatchOption,
    RationalesOption,
    ReadoutOption,
    ReportOption,
    ReviewsOption,
    ScaleOption,
    SeedOption,
    Sources,
    TimeoutOption,
    checked_knobs,
    err,
    load,
    moment,
    out,
)
from r4r_graph.cli.rank import rank
from r4r_graph.cli.report import diff
from r4r_graph.cli.report import report as report_command
from r4r_graph.cli.runs import fork, resume, runs_app, show
from r4r_graph.cli.serve_command import serve_command
from r4r_graph.cli.talk import forget_unread, new_thread, talk
from r4r_graph.errors import (
    EngineError,
    InputError,
    R4RError,
    RunTimeoutError,
    SettingError,
    StorageError,
)

app = typer.Typer(
    name="r4r",
    help="Reads earlier reviews, writes down why this user will or won't like this item, then "
    "predicts the rating as a distribution.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="What is kept on this machine.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(runs_app, name="runs")
for command in (show, resume, fork):
    app.command()(command)
app.command()(bulk)
app.command()(summarize)
app.command()(evaluate)
app.command()(fuse)
app.command()(graph)
app.command("import")(import_reviews)
app.command()(mcp)
app.command()(rank)
app.command("report")(report_command)
app.command()(serve_command)
app.command()(diff)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if show_version:
        typer.echo(version("r4r-graph"))
        raise typer.Exit
    configure(context)


@app.command()
def rate(
    reviews: ReviewsOption,
    user: Annotated[str, typer.Option(help="Whose rating.")],
    item: Annotated[str, typer.Option(help="Of which item.")],
    items: ItemsOption = None,
    as_of: Annotated[
        str | None,
        typer.Option(help="Read only reviews before this time: unix seconds or ISO 8601."),
    ] = None,
    history: HistoryOption = None,
    rationales: RationalesOption = 1,
    readout: ReadoutOption = "mean",
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    scale: ScaleOption = "1-5",
    seed: SeedOption = 0,
    timeout: TimeoutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = None,
    budgets: BudgetsOption = None,
    allow_prompt_mismatch: MismatchOption = False,
    influence: InfluenceOption = "none",
    ask: Annotated[
        bool, typer.Option("--ask", help="Show the rationale before rating: accept, edit, refuse.")
    ] = False,
    ask_below: Annotated[
        float, typer.Option(help="Show the rating where the mode's probability is below this.")
    ] = 0.0,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="Keep the run, review texts in it.")
    ] = True,
    thread: Annotated[str | None, typer.Option(help="Keep the run under this name.")] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rate one pair: stars, distribution, and why. A run that asks and finds nobody at the
    terminal waits, with exit code 3; `r4r resume` answers."""
    from r4r_graph.runs import open_runs
    from r4r_graph.runs import thread as named

    knobs = checked_knobs(
        history=history,
        rationales=rationales,
        readout=readout,
        seed=seed,
        timeout=timeout,
        ask=ask,
        ask_below=ask_below,
        influence=influence,
        record=keep,
    )
    if not keep and (ask or ask_below or thread is not None or report is not None):
        raise SettingError(
            "--ask, --ask-below, --thread and --report need the run kept: without --no-keep"
        )
    if as_of is not None:
        moment(as_of)
    sources = Sources(
        str(reviews),
        None if items is None else str(items),
        base,
        adapters,
        scale,
        device,
        budgets,
        allow_prompt_mismatch,
        dtype,
        engine,
    )
    with open_runs() if keep else nullcontext() as saver:
        name = None if saver is None else new_thread(saver, thread)
        config = None if name is None else named(name)
        if config is not None:
            config["metadata"] = sources.label()
        with sources.load(checkpointer=saver) as recommender:
            events = recommender.stream(user, item, as_of=as_of, config=config, **knobs)
            try:
                talk(recommender, events, as_json=as_json, thread_id=name, report=report)
            except InputError:
                forget_unread(recommender, name)
                raise


@app.command()
def demo(
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    seed: SeedOption = 0,
) -> None:
    """Rate one pair of a small sample that comes with the package, and show the graph."""
    from r4r_graph.cli import display
    from r4r_graph.debug import draw
    from r4r_graph.errors import MissingExtraError

    sample = Path(__file__).parents[1] / "_demo"
    out.print("A sample of invented albums, reviewed by invented people.", style="dim")
    out.print("The pair: user mara, item glass-harbour; mara has not reviewed it yet.", style="dim")
    recommender = load(sample / "reviews.jsonl", sample / "items.jsonl", base, adapters)
    with recommender:
        display.show_run(recommender.stream("mara", "glass-harbour", seed=seed), out, err)
        out.print("\nThe graph that ran:\n", style="bold")
        try:
            picture = draw(recommender.graph, "ascii")
        except MissingExtraError:
            picture = draw(recommender.graph, "mermaid")
        out.print(picture, markup=False, soft_wrap=True)


@app.command()
def doctor(
    base: Annotated[str | None, typer.Option(help="As for `rate`.")] = None,
    adapters: Annotated[str | None, typer.Option(help="As for `rate`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, device, settings, models and caches: what works, how to mend the rest, and
    which settings come from where."""
    from r4r_graph.cli import display
    from r4r_graph.cli.doctor import examine, look_up, settings_rows, show_settings

    found, amiss = look_up(base=base, adapters=adapters)
    findings = [*amiss, *examine(found)]
    if as_json:
        rows = [asdict(finding) for finding in findings]
        file = None if found.file is None else str(found.file)
        told = {"findings": rows, "settings": settings_rows(found), "file": file}
        typer.echo(json.dumps(told, indent=2))
    else:
        display.show_findings(findings, out)
        show_settings(found, out)
    if not all(finding.works for finding in findings):
        raise typer.Exit(1)


@cache_app.command("info")
def cache_info(as_json: JsonOption = False) -> None:
    """Show what is kept, where, and which of it stems from people's reviews."""
    from r4r_graph import caches
    from r4r_graph.cli import display

    entries = caches.cache_info()
    if as_json:
        kept = [
            {
                "name": entry.name,
                "path": str(entry.path),
                "bytes": entry.bytes,
                "holds_reviews": entry.holds_reviews,
            }
            for entry in entries
        ]
        summaries = caches.count_summaries()
        folder = str(caches.cache_dir())
        typer.echo(json.dumps({"folder": folder, "summaries": summaries, "kept": kept}, indent=2))
    else:
        display.show_cache(caches.cache_dir(), entries, caches.count_summaries(), out)


@cache_app.command("clear")
def cache_clear(
    base_models: Annotated[
        bool, typer.Option("--base-models", help="Also the converted base models.")
    ] = False,
) -> None:
    """Delete what is kept of people's reviews: their summaries, and the runs that read them."""
    from r4r_graph import caches
    from r4r_graph.cli import display

    try:
        count: int | None = caches.count_summaries()
    except SettingError:  # damaged: deleting it is what mends it
        count = None
    deleted = caches.clear_cache(base_models=base_models)
    display.show_cleared(deleted, count, out)


def main() -> None:
    """Run `r4r`. Exit codes: 0 done, 1 the engine, the disk or a check failed or time was up, 2 bad
    input, 3 the run waits for a person, 130 stopped by Ctrl-C."""
    log = logging.getLogger("r4r_graph")
    log.addHandler(RichHandler(console=err, show_time=False, show_path=False, markup=False))
    log.propagate = False
    # When one of several summarizers fails, LangGraph may log a traceback for the others.
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
    # Threads of a busy machine that wait for each other by spinning cost many times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except R4RError as error:
        from r4r_graph.cli.display import printable

        message = f"r4r: error: {printable(str(error))}"
        err.print(message, style="red", markup=False, emoji=False, soft_wrap=True)
        sys.exit(1 if isinstance(error, EngineError | StorageError | RunTimeoutError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
