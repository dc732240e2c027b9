"""The page about scaling runs, on the sample, with stand-ins for models and cluster."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from r4r_graph import Recommender
from r4r_graph.bulk import rate_pairs
from r4r_graph.cli import app
from r4r_graph.engine import fake_engine

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load, sample = Recommender.load, ROOT / "r4r_graph" / "_demo" / "reviews.jsonl"

    def load_sample(reviews: str, **settings: Any) -> Recommender:
        assert reviews == "reviews.parquet"
        assert settings.keys() <= {"engine"}
        return load(sample, engine=fake_engine())

    def on_ray(load: Any, pairs: str, out: str, *, address: str, workers: int) -> Any:
        with load() as made:
            return rate_pairs(made, Path(pairs), out)

    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()][-4:]
    pairs = [{name: row[name] for name in ("user_id", "item_id", "timestamp")} for row in rows]
    import pandas

    pandas.DataFrame(pairs).to_parquet("pairs.parquet")
    monkeypatch.setattr(Recommender, "load", load_sample)
    monkeypatch.setattr("r4r_graph.ray_bulk.rate_pairs_on_ray", on_ray)
    names: dict[str, Any] = {}
    blocks = _blocks("python")
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert (names["report"].rows, names["report"].reused) == (4, 4)  # one job, both ways
    assert 1 <= names["result"].rating <= 5
    assert not Path("failed.jsonl").exists()


def test_it_names_only_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        option
        for name in ("bulk", "summarize")
        for parameter in commands[name].params
        for option in parameter.opts
    }
    for name in ("bulk", "kills"):
        benchmark = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        options |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', benchmark))
    shown = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", PAGE, flags=re.DOTALL)))
    assert shown <= options


def test_its_tables_are_worked_out_of_rates() -> None:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    rates = {
        "device": "cpu",
        "summaries_per_s": 10.0,
        "ratings_per_s": {"bulk": 2.0, "plain": 1.0},
    }
    summarizing, rating = scaling.worker_hours(36_000, rates)
    assert (summarizing, rating) == (1.0, 5.0)
    *_, line = scaling.table({"base": rates}, [36_000], hours=4.0).splitlines()
    assert line == "| 36,000 | base | cpu | 1.0 | 5.0 | 10.0 | 2 |"
