"""How long so many reviews take, out of measured rates: the tables of `docs/scaling.md`.

    python benchmarks/bulk.py > bulk.json
    python benchmarks/scaling.py bulk.json [--reviews 1000000 100000000] [--hours 24]

Every review is summarized once and rated once. Rates are those of one worker; workers share nothing
but the reviews, so that so many of them take so many times less. A price is the reader's own:
multiply it by the worker hours.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def worker_hours(reviews: int, rates: Mapping[str, Any]) -> tuple[float, float]:
    """Hours of one worker for the summaries and for the ratings.

    Args:
        reviews: how many.
        rates: of `benchmarks/bulk.py`: `summaries_per_s`, `ratings_per_s` of `bulk`.
    """
    return (
        reviews / rates["summaries_per_s"] / 3600,
        reviews / rates["ratings_per_s"]["bulk"] / 3600,
    )


def table(figures: Mapping[str, Any], reviews: Sequence[int], hours: float) -> str:
    """A Markdown table: a line for each number of reviews and each model that was measured."""
    lines = [
        "| reviews | experts | device | summarizing, h | rating, h | plain loop, h | "
        f"workers for {hours:g} h |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in reviews:
        for name in ("base", "adapters"):
            if (rates := figures.get(name)) is None:
                continue
            summarizing, rating = worker_hours(count, rates)
            plain = count / rates["ratings_per_s"]["plain"] / 3600
            workers = math.ceil((summarizing + rating) / hours)
            cells = [f"{count:,}", name, rates["device"]]
            cells += [f"{each:,.1f}" for each in (summarizing, rating, plain)]
            lines.append("| " + " | ".join([*cells, f"{workers:,}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", type=Path, help="what benchmarks/bulk.py printed")
    parser.add_argument("--reviews", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--hours", type=float, default=24.0)
    options = parser.parse_args()
    print(table(json.loads(options.figures.read_text()), options.reviews, options.hours))


if __name__ == "__main__":
    main()
