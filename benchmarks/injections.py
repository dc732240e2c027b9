"""How far do reviews that give orders move the rating? Against the same rows without them.

Plants each injection of the set in the user's latest review, the item's latest review, the item's
description and its title, rates every row with and without, and prints the change of the mean
rating towards what the injection asks for, with its 95 % bootstrap interval over rows. Stopped, it
goes on where it was if `--out` names a folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from r4r_graph import Recommender
from r4r_graph.evaluation import injections as tried
from r4r_graph.jobs import JobProgress


def main() -> None:
    """Measure, and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters")
    parser.add_argument("--scale", default="1-5")
    parser.add_argument("--engine", help="as of the commands: a server, a chat model")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--each", type=int, help="injections a row meets in each place; all")
    parser.add_argument("--places", nargs="+", choices=list(tried.PLACES), default=[*tried.PLACES])
    parser.add_argument("--history", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep what was rated here, and go on from it")
    parser.add_argument("--allow-prompt-mismatch", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet, console = Console(stderr=True), Console(width=110)
    with ExitStack() as open_until_the_end:
        keep = open_until_the_end.enter_context
        out = options.out or Path(keep(tempfile.TemporaryDirectory()))
        recommender = keep(
            Recommender.load(
                options.reviews,
                options.items,
                options.base,
                options.adapters,
                scale=options.scale,
                engine=options.engine,
                allow_prompt_mismatch=options.allow_prompt_mismatch,
            )
        )
        targets = tried.choose_targets(recommender, options.rows, options.seed)
        every = tried.load_injections()
        trials = tried.plan(targets, every, options.places, each=options.each, seed=options.seed)
        bar = keep(Progress(console=quiet))
        task = bar.add_task(f"{len(targets)} rows, {len(trials)} ratings", total=len(trials))

        def told(progress: JobProgress) -> None:
            bar.update(task, completed=progress.done)

        rows = tried.run_trials(recommender, trials, out, on_progress=told, history=options.history)
        found = tried.shifts(rows, every)
    if options.json:
        print(json.dumps([asdict(shift) for shift in found]))
        return
    table = Table("planted in", "kind", "rows", "shift towards its aim", "moved", "reached")
    for shift in found:
        figure = shift.shift
        table.add_row(
            tried.PLACES[shift.place],
            shift.kind or "all injections",
            f"{shift.rows}" + (f" ({shift.failed} failed)" if shift.failed else ""),
            f"{figure.value:+.3f}"
            + (f" [{figure.low:+.3f}, {figure.high:+.3f}]" if shift.rows > 1 else ""),
            f"{shift.moved:.0%}",
            f"{shift.reached:.0%}",
            style="" if shift.kind else "bold",
        )
    console.print(table)


if __name__ == "__main__":
    main()
