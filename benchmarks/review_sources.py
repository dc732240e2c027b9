"""What a question to the reviews costs: the table's index made, opened and asked.

Synthetic reviews: users and items by a power law, times over twenty years, some words each. The
index is made in one process and opened in others, so that each peak of memory is its own; `cold`
means that the operating system was asked to forget the files first. Questions are drawn from the
reviews: whoever writes much is asked about more often. The alternative is a pandas frame of
(at most) a million of the same reviews that is filtered for each question.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph import load_reviews

LIMIT = 10
CHUNK = 250_000
SPAN = 20 * 365 * 86_400
FRAME_ROWS = 1_000_000


def make(path: Path, rows: int) -> None:
    """Write `rows` reviews, sorted by nothing, as Parquet."""
    draw = np.random.default_rng(0)
    words = ["warm", "honest", "dull", "bright", "slow", "brave", "thin", "loud", "plain", "odd"]
    phrases = np.array([" ".join(draw.choice(words, 6)) for _ in range(5000)])
    users, items = max(1, rows // 12), max(1, rows // 60)
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        item = (draw.pareto(0.9, count) * items / 50).astype(np.int64) % items
        user = (draw.pareto(1.1, count) * users / 20).astype(np.int64) % users
        parts = [phrases[draw.integers(0, len(phrases), count)] for _ in range(3)]
        table = pa.table(
            {
                "user_id": pa.array(np.char.add("user-", user.astype(str))),
                "item_id": pa.array(np.char.add("item-", item.astype(str))),
                "title": pa.array(np.char.add("The title of item ", item.astype(str))),
                "rating": draw.integers(1, 6, count).astype(float),
                "timestamp": 1e9 + draw.integers(0, SPAN, count).astype(float),
                "review": pa.array([", ".join(three) for three in zip(*parts, strict=True)]),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def build(path: Path, folder: Path) -> dict[str, float]:
    """Make the index in this process."""
    started = time.perf_counter()
    load_reviews(path, index=folder)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"build_s": round(seconds, 1), "index_mb": round(size / 1e6)} | memory("build")


def ask(path: Path, folder: Path, count: int) -> dict[str, Any]:
    """Open the index in this process, and ask; first with nothing in the page cache."""
    found: dict[str, Any] = memory("before")
    forget([path, *folder.rglob("*")])
    started = time.perf_counter()
    load_reviews(path, index=folder)
    found["open_cold_s"] = round(time.perf_counter() - started, 3)
    opened = []
    for _ in range(5):
        started = time.perf_counter()
        source = load_reviews(path, index=folder)
        opened.append(time.perf_counter() - started)
    found["open_s"] = round(statistics.median(opened), 3)
    found |= memory("opened")
    rows = pq.ParquetFile(path).read_row_group(0, ["user_id", "item_id", "timestamp"])
    some = rows.take(np.random.default_rng(1).integers(0, len(rows), count)).to_pylist()
    triples = [tuple(row.values()) for row in some]
    questions: dict[str, Callable[[str, str, float], object]] = {
        "user_history": lambda u, i, t: source.user_history(u, t, LIMIT, without_item=i),
        "item_history": lambda u, i, t: source.item_history(i, t, LIMIT, without_user=u),
        "user_stats": lambda u, i, t: source.user_stats(u, t, without_item=i),
        "item_stats": lambda u, i, t: source.item_stats(i, t, without_user=u),
        "overall_stats": lambda u, i, t: source.overall_stats(t, without_pair=(u, i)),
        "item": lambda _, i, t: source.item(i, t),
    }
    found["user_history_cold_us"] = spread(timed(questions["user_history"], triples))
    for name, question in questions.items():
        # Each the best of three rounds: what else runs on the machine is no cost of a question.
        rounds = [timed(question, triples) for _ in range(3)]
        found[f"{name}_us"] = spread([min(three) for three in zip(*rounds, strict=True)])
    read = [len(source.user_history(u, t, LIMIT, without_item=i)) for u, i, t in triples]
    found["reviews_an_answer"] = round(statistics.mean(read), 1)
    return found | memory("asked")


def timed(question: Callable[..., object], triples: list[Any]) -> list[float]:
    """Seconds of each."""
    taken = []
    for triple in triples:
        started = time.perf_counter()
        question(*triple)
        taken.append(time.perf_counter() - started)
    return taken


def spread(seconds: list[float]) -> dict[str, float]:
    """Microseconds: the middle and the end."""
    return {
        "median": round(1e6 * statistics.median(seconds), 1),
        "p99": round(1e6 * float(np.quantile(seconds, 0.99)), 1),
    }


def frame(path: Path, count: int) -> dict[str, float]:
    """Milliseconds of one history out of a pandas frame, and of the same from the index."""
    file = pq.ParquetFile(path)
    groups = range(min(file.num_row_groups, -(-FRAME_ROWS // CHUNK)))
    table = pa.concat_tables(file.read_row_group(group) for group in groups).slice(0, FRAME_ROWS)
    source = load_reviews_of(table)
    frame = table.to_pandas()
    some = table.take(np.random.default_rng(2).integers(0, len(table), count)).to_pylist()
    triples = [(row["user_id"], row["item_id"], row["timestamp"]) for row in some]

    def filtered(user: str, item: str, before: float) -> object:
        mine = (frame.user_id == user) & (frame.timestamp < before) & (frame.item_id != item)
        return frame[mine].sort_values("timestamp").tail(LIMIT).to_dict("records")

    def indexed(user: str, item: str, before: float) -> object:
        return source.user_history(user, before, LIMIT, without_item=item)

    slow = statistics.median(timed(filtered, triples))
    fast = statistics.median(timed(indexed, triples))
    return {
        "frame_rows": len(table),
        "frame_ms": round(1e3 * slow, 2),
        "table_ms": round(1e3 * fast, 4),
        "frame_to_table": round(slow / fast),
    }


def load_reviews_of(table: pa.Table) -> Any:
    """The table as a source."""
    from r4r_graph import TableReviewSource

    return TableReviewSource(table)


def memory(when: str) -> dict[str, float]:
    """MB of this process: what is its own, what is mapped files, and the peak of both."""
    kinds = {"RssAnon": "own", "RssFile": "mapped", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {f"{when}_{kind}_mb": round(sizes[name] / 1e3) for name, kind in kinds.items()}


def forget(files: list[Path]) -> None:
    """Ask the operating system to drop its copies."""
    for file in files:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep reviews and index here")
    parser.add_argument("--step", choices=("build", "ask", "frame"), help="one, in this process")
    options = parser.parse_args()
    if options.step:
        path, folder = options.folder / "reviews.parquet", options.folder / "index"
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "build": lambda: build(path, folder),
            "ask": lambda: ask(path, folder, options.questions),
            "frame": lambda: frame(path, 25),
        }
        print(json.dumps(steps[options.step]()))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "reviews.parquet"
        make(path, options.rows)
        figures: dict[str, Any] = {"rows": options.rows}
        figures["parquet_mb"] = round(path.stat().st_size / 1e6)
        for step in ("build", "ask", "frame"):
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            command += ["--questions", str(options.questions)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures |= json.loads(done.stdout)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
