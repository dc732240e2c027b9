"""What the pages on configuration and on coroutines say is true of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import caches
from r4r_graph.configuration import SETTINGS, parse_budgets, resolve, variable
from r4r_graph.engine import fake_engine
from r4r_graph.recommender import Recommender

DOCS = Path(__file__).parents[1] / "docs"
SAMPLE = Path(caches.__file__).with_name("_demo")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caches, "_told", None)


def test_the_file_on_the_page_is_one(tmp_path: Path) -> None:
    [text] = blocks("configuration.md", "toml")
    (tmp_path / "r4r.toml").write_text(text)
    found = resolve(environ={})
    assert found.reviews == str(tmp_path / "data" / "reviews.parquet")
    assert found.knobs() == {"rationales": 4}
    budgets = parse_budgets(found.budgets)
    assert budgets is not None
    assert (budgets.review, budgets.side) == (224, 256)


def test_the_page_lists_every_setting() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert listed == [(name, variable(name)) for name in SETTINGS]


def test_the_configuration_page_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("R4R_ENGINE", "fake")
    monkeypatch.setenv("R4R_REVIEWS", str(SAMPLE / "reviews.jsonl"))
    [code] = blocks("configuration.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert 1 <= names["result"].rating <= 5
    assert capsys.readouterr().out == "smollm2-135m default\n"


def test_the_page_on_coroutines_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Recommender.load

    def load_fake(reviews: str, items: str) -> Recommender:
        assert (reviews, items) == ("reviews.parquet", "items.parquet")
        return load(SAMPLE / "reviews.jsonl", SAMPLE / "items.jsonl", engine=fake_engine())

    monkeypatch.setattr(Recommender, "load", load_fake)
    names: dict[str, Any] = {}
    for code in blocks("async.md", "python"):
        exec(code, names)
    names["recommender"].close()
    first, second, word, late = capsys.readouterr().out.splitlines()
    assert first.startswith("Glass Harbour ")
    assert second.startswith("Tin Lantern Letters ")
    assert word
    assert "(timeout=0.001)" in late
