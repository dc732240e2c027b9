"""Rates real pairs through the command line, twice, and checks every answer.

Takes the latest reviews of the table (seeded sample of the last tenth by time) as targets, rates
each pair as of its review's time with `r4r rate --json`, and again. Every output must be one valid
JSON object, and the second pass must make no summary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from r4r_graph import Review, load_reviews

KEYS = {
    "user_id", "item_id", "title", "rating", "readout", "mean", "median", "mode", "distribution",
    "rating_mass", "entropy", "rationale", "user_aspects", "item_aspects", "cold_start",
    "truncated", "model", "usage",
}  # fmt: skip


def targets(reviews: Path, count: int, seed: int) -> list[Review]:
    """A seeded sample of the last tenth by time, in file order."""
    rows = sorted(load_reviews(reviews), key=lambda review: review.timestamp)
    last = rows[len(rows) * 9 // 10 :]
    return random.Random(seed).sample(last, count)


def rate(reviews: Path, items: Path | None, target: Review, extra: list[str]) -> dict[str, Any]:
    """One call of the command line, checked."""
    command = [
        sys.executable, "-c", "from r4r_graph.cli import main; main()",
        "rate", "--reviews", str(reviews), "--user", target.user_id, "--item", target.item_id,
        "--as-of", str(target.timestamp), "--json", *extra,
    ]  # fmt: skip
    if items is not None:
        command += ["--items", str(items)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} for {target}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    if missing := KEYS - set(result):
        raise SystemExit(f"missing in the output: {sorted(missing)}")
    if not math.isclose(sum(result["distribution"].values()), 1, abs_tol=1e-6):
        raise SystemExit(f"no distribution: {result['distribution']}")
    return result


def main() -> None:
    """Rate all pairs twice and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, extra = parser.parse_known_args()
    chosen = targets(options.reviews, options.pairs, options.seed)
    passes: list[list[dict[str, Any]]] = []
    figures: dict[str, Any] = {"reviews": options.reviews.parent.name, "pairs": len(chosen)}
    for name in ("first", "second"):
        started = time.perf_counter()
        results = [rate(options.reviews, options.items, target, extra) for target in chosen]
        passes.append(results)
        figures[name] = {
            "seconds_a_call": round((time.perf_counter() - started) / len(chosen), 1),
            "summaries_made": sum(r["usage"]["summarizer"]["calls"] for r in results),
            "summaries_kept": sum(r["usage"]["summarizer"]["cache_hits"] for r in results),
        }
    figures["cold_starts"] = sum(result["cold_start"] is not None for result in passes[0])
    figures["same_mean_both_times"] = sum(
        a["mean"] == b["mean"] for a, b in zip(*passes, strict=True)
    )
    figures["mean_rating_mass"] = sum(r["rating_mass"] for r in passes[0]) / len(chosen)
    print(json.dumps(figures, indent=2))
    if figures["second"]["summaries_made"]:
        raise SystemExit("the second pass made summaries again")


if __name__ == "__main__":
    main()
