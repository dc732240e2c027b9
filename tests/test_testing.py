"""What embedders' tests are given: nothing but memory, and always the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from r4r_graph import testing
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import AspectSummary
from tests.processes import python

pytest_plugins = ["r4r_graph.testing", "pytester"]

PAIR = (testing.SAMPLE_USER, testing.SAMPLE_ITEM)


def test_the_fixtures_fit_together(
    r4r_recommender: Recommender, r4r_engine: BatchingEngine, r4r_reviews: TableReviewSource
) -> None:
    assert r4r_recommender.experts.engine is r4r_engine
    assert r4r_recommender.reviews is r4r_reviews
    found = r4r_recommender.rate(*PAIR)
    assert found.cold_start is None
    assert found.title == "Glass Harbour"


def test_nothing_is_kept_on_disk(r4r_recommender: Recommender) -> None:
    r4r_recommender.rate(*PAIR)
    assert not Path(os.environ["R4R_CACHE_DIR"]).exists()


def test_every_process_answers_the_same(r4r_recommender: Recommender) -> None:
    code = """
        from r4r_graph.testing import SAMPLE_ITEM, SAMPLE_USER, fake_recommender
        with fake_recommender() as recommender:
            print(recommender.rate(SAMPLE_USER, SAMPLE_ITEM).rating)
    """
    done = python(code, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == r4r_recommender.rate(*PAIR).rating


def test_answers_can_be_scripted(r4r_make_recommender: testing.MakeRecommender) -> None:
    summary = AspectSummary(("warm voice",))
    told = r4r_make_recommender(rating=2, rationale="Too long.", summary=summary).rate(*PAIR)
    assert (told.rating, told.rationale) == (2, "Too long.")
    assert {aspects.summary for aspects in told.user_aspects} == {summary}
    weighed = r4r_make_recommender(rating=[0, 0, 0, 1, 1]).rate(*PAIR)
    assert weighed.rating == 4.5
    asked = r4r_make_recommender(
        rating=lambda request: [1.0, 0, 0, 0, 0],
        rationale=lambda request: f"Of {len(request.messages)} turns.",
        summary=lambda request: AspectSummary(negative=("long",)),
    ).rate(*PAIR)
    assert (asked.rating, asked.rationale) == (1, "Of 3 turns.")
    assert asked.user_aspects[0].summary.negative == ("long",)


def test_a_rating_off_the_scale_is_refused(
    r4r_make_recommender: testing.MakeRecommender,
) -> None:
    with pytest.raises(Exception, match=r"rating 4\.5 is none of 1, 2, 3, 4, 5"):
        r4r_make_recommender(rating=4.5).rate(*PAIR)


def test_a_conftest_may_bring_its_own_reviews(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import pytest
        from r4r_graph import Review, TableReviewSource

        pytest_plugins = ["r4r_graph.testing"]

        @pytest.fixture
        def r4r_reviews():
            return TableReviewSource.from_reviews([Review("ann", "rock", 5, 1.0, text="Loud!")])
    """)
    pytester.makepyfile("""
        def test_ours(r4r_recommender):
            assert len(r4r_recommender.rate("ann", "folk").user_aspects) == 1
    """)
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=1)
