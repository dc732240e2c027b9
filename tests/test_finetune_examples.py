"""Training rows: the prompts of inference, the right labels, nothing of the future."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.domains import review_source
from finetune.rows import histories, target_evidence
from finetune.settings import RatingTrainingSettings, Recipe
from finetune.sft.examples import (
    Example,
    context_length,
    rating_examples,
    reasoner_examples,
    reward_examples,
    summarizer_examples,
    within_length,
)
from r4r_graph.engine import aspects
from r4r_graph.engine.base import Message
from r4r_graph.engine.tokens import HubTokenMeter
from r4r_graph.engine.weights import find_base, load_tokenizer
from r4r_graph.errors import DataError, ModelError
from r4r_graph.experts import Experts
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import AspectSummary, Review
from tests.tiny_reviews import tiny_recipe

SUMMARY = AspectSummary(("warm voice", "clever lyrics"), (), ("honest songs",))


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Recipe:
    found: Recipe = tiny_recipe(tmp_path / "data", tiny_base)
    return found


@pytest.fixture
def meter(tiny_base: Path) -> HubTokenMeter:
    return HubTokenMeter(load_tokenizer(find_base(tiny_base)))


def _targets(recipe: Recipe, count: int = 5) -> list[Review]:
    return sorted(review_source(recipe), key=lambda review: review.timestamp)[-count:]


def _summaries(recipe: Recipe) -> dict[str, AspectSummary]:
    return {review.key: SUMMARY for review in review_source(recipe)}


def _experts(recipe: Recipe, engine: Any) -> Experts:
    return Experts(engine, None, recipe.rating_scale, recipe.token_budgets)


def test_summarizer_prompts_are_those_of_inference_token_for_token(
    recipe: Recipe, meter: HubTokenMeter, tiny_engine: Any
) -> None:
    summarizer = _experts(recipe, tiny_engine).summarizer
    pairs = [(review, "album", SUMMARY) for review in _targets(recipe)]
    long = replace(pairs[0][0], text="word " * 500, title="a very long title " * 20)
    pairs.append((long, "album <|im_end|> <b>", SUMMARY))
    for (review, kind, _), example in zip(
        pairs, summarizer_examples(pairs, meter, recipe), strict=True
    ):
        request, _ = summarizer.request(review, kind)
        assert example.prompt == tiny_engine._backend.prepare(request).ids


def test_reasoner_and_predictor_prompts_are_those_of_the_graph_token_for_token(
    recipe: Recipe, meter: HubTokenMeter, tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole graph runs for the targets as of their own time, and what its engine is asked is
    compared with the training rows."""
    from langgraph.store.memory import InMemoryStore

    from r4r_graph.engine.base import GenerateRequest
    from r4r_graph.recommender import Recommender

    asked: list[Any] = []
    backend = tiny_engine._backend
    prepare = backend.prepare

    def watch(request: Any) -> Any:
        prepared = prepare(request)
        asked.append((request, prepared.ids))
        return prepared

    monkeypatch.setattr(backend, "prepare", watch)
    source = review_source(recipe)
    experts = Experts(tiny_engine, InMemoryStore(), recipe.rating_scale, recipe.token_budgets)
    recommender = Recommender(experts, source)
    for target in _targets(recipe, 3):
        asked.clear()
        result = recommender.rate(
            target.user_id, target.item_id, as_of=target.timestamp, history=recipe.history
        )
        made = {
            review.key: experts.summarizer.summarize(review, kind).summary
            for review, kind in histories(target, source, recipe)
        }
        evidence = target_evidence(target, source, made, meter, recipe)
        kept = [{"evidence": evidence, "rationale": result.rationale}]
        [reason] = reasoner_examples(kept, meter)
        texts = {(target.user_id, target.item_id, target.timestamp): result.rationale}
        settings = RatingTrainingSettings()
        [rate] = rating_examples([target], texts, source, made, meter, recipe, settings)
        free = [ids for r, ids in asked if isinstance(r, GenerateRequest) and r.format == "text"]
        assert free == [reason.prompt]
        assert [i for r, i in asked if not isinstance(r, GenerateRequest)] == [rate.prompt]


def test_a_completion_is_the_answer_and_the_end_of_the_turn(
    recipe: Recipe, meter: HubTokenMeter, tiny_base: Path
) -> None:
    tokenizer = load_tokenizer(find_base(tiny_base))
    [example] = summarizer_examples([(_targets(recipe)[0], "album", SUMMARY)], meter, recipe)
    assert tokenizer.decode(example.completion[:-1]) == aspects.format_aspects(SUMMARY)
    assert tokenizer.convert_ids_to_tokens(example.completion[-1]) == "<|im_end|>"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a b"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    ended = [*meter.prompt([Message("user", "x")]), *meter.answer("a b")]
    assert whole[: len(ended)] == ended


def test_the_end_of_a_turn_is_read_from_the_template(tmp_path: Path) -> None:
    """Another family's template: another end (a common mistake is to know only one)."""
    from tests.tiny import make_tiny_base

    base = make_tiny_base(tmp_path / "headers", style="headers")
    tokenizer = load_tokenizer(find_base(base))
    meter = HubTokenMeter(tokenizer)
    assert tokenizer.convert_ids_to_tokens(meter.turn_end) == "<|eot_id|>"
    assert tokenizer.decode(meter.task_opening) == ("<|start_header_id|>user<|end_header_id|>\n\n")
    # The template writes the one beginning of a sequence that there is.
    ids = meter.prompt([Message("system", "s"), Message("user", "u")])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_joins_turns_cannot_open_the_task(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(find_base(tiny_base))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0-1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(ModelError, match="turn of its own"):
        _ = HubTokenMeter(tokenizer).task_opening


def test_the_context_ends_where_the_task_opens(recipe: Recipe, meter: HubTokenMeter) -> None:
    source, settings = review_source(recipe), RatingTrainingSettings()
    targets = _targets(recipe, 2)
    texts = {(t.user_id, t.item_id, t.timestamp): "a reason" for t in targets}
    for given in (texts, {}):
        for example in rating_examples(targets, given, source, {}, meter, recipe, settings):
            cut = context_length(example.prompt, meter.task_opening)
            tail = meter._tokenizer.decode(example.prompt[cut:])
            assert tail.startswith("<|im_start|>user\n<judgement>" if given else "<|im_start|>user")
            assert "</candidate><|im_end|>" in meter._tokenizer.decode(example.prompt[:cut])
    with pytest.raises(DataError, match="open its task"):
        context_length([1, 2, 3], meter.task_opening)


def test_no_prompt_holds_the_targets_rating_its_words_or_anything_later(
    recipe: Recipe, meter: HubTokenMeter
) -> None:
    """Every review has a word of its own and a rating of its own; the same user reviews the item
    before, at the same time, and after."""
    reviews = []
    for at in range(40):
        user, item = f"u{at % 4}", f"i{at % 5}"
        reviews.append(
            Review(user, item, 1 + at / 10, 1000.0 * (at // 2), f"t{item}", f"canary{at}word")
        )
    source = TableReviewSource.from_reviews(reviews)
    summaries = {r.key: AspectSummary((r.text,), (), ()) for r in reviews}
    settings = RatingTrainingSettings()
    decode = meter._tokenizer.decode
    seen = 0
    for at in range(10, 40):
        target = reviews[at]
        later = [r for r in reviews if r.timestamp >= target.timestamp]
        own = [r for r in reviews if (r.user_id, r.item_id) == (target.user_id, target.item_id)]
        evidence = target_evidence(target, source, summaries, meter, recipe)
        [reason] = reasoner_examples([{"evidence": evidence, "rationale": "r"}], meter)
        [rate] = rating_examples([target], {}, source, summaries, meter, recipe, settings)
        [judge] = reward_examples([target], source, summaries, meter, recipe, settings)
        for example, may_hold in ((reason, set()), (rate, set()), (judge, {target.text})):
            text = decode(example.prompt)
            seen += "canary" in text
            for other in {r.key: r for r in (*later, *own)}.values():
                if other.text not in may_hold:
                    assert other.text not in text
                assert f"rated {other.rating:g};" not in text
        assert target.text in decode(judge.prompt)
        assert "rated" not in decode(reason.prompt)
        assert "average" not in decode(reason.prompt)
    assert seen > 50  # the canaries of earlier reviews do come through


def test_without_history_a_prompt_says_so(recipe: Recipe, meter: HubTokenMeter) -> None:
    """Users and items without history have no nan and no empty section."""
    source = TableReviewSource.from_reviews([Review("u", "i", 4.0, 100.0, "t", "words")])
    [row] = rating_examples(list(source), {}, source, {}, meter, recipe, RatingTrainingSettings())
    text = meter._tokenizer.decode(row.prompt)
    assert "nan" not in text
    assert text.count("none yet") == 4


def test_dropout_of_rationale_and_texts(recipe: Recipe, meter: HubTokenMeter) -> None:
    source, summaries = review_source(recipe), _summaries(recipe)
    targets = list(source)[-40:]
    texts = {(t.user_id, t.item_id, t.timestamp): "a reason" for t in targets}

    def shown(**dropout: float) -> list[str]:
        settings = RatingTrainingSettings(**dropout)
        rows = rating_examples(targets, texts, source, summaries, meter, recipe, settings)
        return [meter._tokenizer.decode(row.prompt) for row in rows]

    assert all("a reason" in text and "warm voice" in text for text in shown())
    assert not any("a reason" in text for text in shown(rationale_dropout=1.0))
    assert not any("warm voice" in text for text in shown(text_dropout=1.0))
    assert all("average" in text for text in shown(text_dropout=1.0))
    half = shown(rationale_dropout=0.5)
    assert 8 < sum("a reason" in text for text in half) < 32
    assert half == shown(rationale_dropout=0.5)


def test_rows_that_teach_nothing_are_passed_over_and_long_answers_lose_phrases(
    recipe: Recipe, meter: HubTokenMeter
) -> None:
    review = _targets(recipe)[0]
    wordy = AspectSummary(*[tuple(f"a {i} {j}" for j in range(5)) for i in range(3)])
    rows = [
        (review, "", AspectSummary()),
        (replace(review, text=" "), "", SUMMARY),
        (review, "", wordy),
    ]
    [example] = summarizer_examples(rows, meter, recipe)
    assert len(example.completion) <= recipe.token_budgets.summary
    text = meter._tokenizer.decode(example.completion[:-1])
    parsed = aspects.parse_aspects(text)
    kept = (*parsed.positive, *parsed.negative, *parsed.values)
    every = (*wordy.positive, *wordy.negative, *wordy.values)
    assert set(kept) < set(every)
    assert parsed.positive[0] == wordy.positive[0]


def test_long_rows_are_left_out_never_cut_and_too_many_are_refused() -> None:
    rows = [Example((1,) * n, (2, 3)) for n in (5, 50, 6)]
    kept, left_out = within_length(rows, 10, 0.5)
    assert [len(example) for example in kept] == [7, 8]
    assert left_out == 1
    with pytest.raises(DataError, match=r"1 of 3 rows are longer than max_length=10"):
        within_length(rows, 10, 0.3)


def test_a_rating_off_the_scale_is_named(recipe: Recipe, meter: HubTokenMeter) -> None:
    source = TableReviewSource.from_reviews([Review("u", "i", 7.0, 100.0, "t", "words")])
    with pytest.raises(DataError, match="rating 7"):
        list(rating_examples(list(source), {}, source, {}, meter, recipe, RatingTrainingSettings()))
