"""What an import costs: rows a second and peak memory, against reading the file with pandas.

Invented reviews in the form of Amazon 2023, gzipped, with a catalogue. Each import runs in a
process of its own; two sizes tell what a row costs. Pandas reads the same file as a whole, keeps
the columns, drops repetitions and writes Parquet: no cleaning, no rejects, no titles, no k-core,
so the comparison favours it. CPU seconds are told, too, for machines that others use as well.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (  # noqa: SIM905
    "the sound is <b>warm</b> and honest, though &#34;side two&#34; drags on; drums &amp; voice "
    "are close to the ear<br />I play it often, less so in the car, where the bass is lost"
).split(" ")

OURS = """
import sys
from r4r_graph.importing import import_reviews
folder = sys.argv[1]
report = import_reviews(
    "amazon-2023",
    [folder + "/reviews.jsonl.gz", folder + "/meta.jsonl.gz"],
    folder + "/out.parquet",
    k=int(sys.argv[2]),
)
print(report.reviews)
"""

PANDAS = """
import sys
import pandas
folder = sys.argv[1]
frame = pandas.read_json(folder + "/reviews.jsonl.gz", lines=True)
frame = frame[["user_id", "parent_asin", "rating", "timestamp", "text"]].drop_duplicates()
frame.to_parquet(folder + "/pandas.parquet")
print(len(frame))
"""


def write_reviews(folder: Path, rows: int, users: int, items: int) -> int:
    """Invented files; bytes of the reviews before compression."""
    dice = random.Random(0)
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(10, 120))) for _ in range(5000)]
    size = 0
    with gzip.open(folder / "reviews.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(rows):
            row = {
                "rating": float(dice.randint(1, 5)),
                "title": "Good",
                "text": f"{number} {dice.choice(texts)}",
                "images": [],
                "asin": "B000000000",
                "parent_asin": f"B{int(dice.paretovariate(0.5)) % items:09d}",
                "user_id": f"A{dice.randrange(users):027d}",
                "timestamp": 1_500_000_000_000 + 1000 * number,
                "helpful_vote": 0,
                "verified_purchase": True,
            }
            size += file.write(json.dumps(row) + "\n")
    with gzip.open(folder / "meta.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(items):
            row = {
                "main_category": "Digital Music",
                "title": f"Album number {number}",
                "description": ["An album."],
                "parent_asin": f"B{number:09d}",
            }
            file.write(json.dumps(row) + "\n")
    return size


def measured(code: str, *arguments: object) -> dict[str, float]:
    """Seconds and peak memory of a process; the time of its imports is in it."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"a process ended with status {status}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def compare(rows: int, k: int, *, pandas: bool) -> dict[str, object]:
    """One size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_reviews(folder, rows, users=max(1, rows // 8), items=max(1, rows // 20))
        found: dict[str, object] = {"rows": rows, "mb": round(size / 1e6)}
        ours = measured(OURS, folder, k)
        found["import"] = ours | {"rows_a_second": round(rows / ours["seconds"])}
        if pandas:
            found["pandas"] = measured(PANDAS, folder)
    return found


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--k-core", type=int, default=5)
    options = parser.parse_args()
    small = compare(options.rows // 4, options.k_core, pandas=False)
    large = compare(options.rows, options.k_core, pandas=True)
    grown = large["import"]["peak_mb"] - small["import"]["peak_mb"]  # type: ignore[index]
    figures = {
        "small": small,
        "large": large,
        "bytes_a_row": round(grown * 2**20 / (options.rows - options.rows // 4)),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
