"""The page on hostile input: its Python runs, and what it names is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.engine.fake import fake_engine
from r4r_graph.evaluation.injections import PLACES, load_injections
from r4r_graph.evidence import TokenBudgets

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hostile-input.md").read_text(encoding="utf-8")


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    with fake_engine() as engine:
        names: dict[str, Any] = {"engine": engine}
        exec(code, names)
        names["recommender"].close()
    rating, error = capsys.readouterr().out.splitlines()
    assert 1 <= float(rating) <= 5
    assert error in PAGE


def test_the_page_names_only_what_exists() -> None:
    budgets = TokenBudgets()
    assert f"within {budgets.title} and {budgets.description}" in PAGE
    assert len(load_injections()) == 14
    assert "fourteen" in PAGE
    words = " ".join(PAGE.split())
    assert {"user_review", "item_review", "description", "title"} == set(PLACES)
    assert "the user's latest review, the item's latest review, the item's description" in words
    script = ROOT / "benchmarks" / "injections.py"
    text = script.read_text(encoding="utf-8")
    assert set(re.findall(r"--[a-z]+", PAGE)) <= set(re.findall(r"--[a-z]+", text))
    assert callable(runpy.run_path(str(script))["main"])
