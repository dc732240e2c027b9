"""What the page on review sources says is true of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import Recommender, load_items, load_reviews
from r4r_graph.engine import fake_engine
from r4r_graph.reviews.loading import KEPT_FROM
from tests.review_sources import write_reviews

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "r4r_graph" / "_demo"
PAGE = (ROOT / "docs" / "reviews.md").read_text(encoding="utf-8")


def test_the_page_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_reviews(tmp_path / "reviews.parquet", list(load_reviews(SAMPLE / "reviews.jsonl")))
    items = [item.to_dict() for item in load_items(SAMPLE / "items.jsonl").values()]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))
    load = Recommender.load
    monkeypatch.setattr(Recommender, "load", lambda reviews: load(reviews, engine=fake_engine()))
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        exec(code, names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{len(names['reviews'])} ")
    assert second == "1 0"
    assert "This prints `1 0`" in PAGE
    assert (tmp_path / "reviews.index" / "index.json").is_file()
    assert names["live"].knows_item("glass-harbour")
    names["live"].close()
    names["recommender"].close()


def test_the_page_names_the_size_from_which_an_index_is_kept() -> None:
    assert f"{KEPT_FROM >> 20} MiB" in PAGE
