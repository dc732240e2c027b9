"""A person in the loop: what they are asked, which answers there are, and what those change.

The question is the value of LangGraph's interrupt, and the answer the value that the run is resumed
with: `Command(resume={"action": "accept"})`, or `Recommender.resume(thread_id, "accept")`.

    about a rationale, before it is rated with     accept | edit (rationale or rationales) | refuse
    about the rating, where the model is unsure    accept | rate (rating)

A refused rationale is gone, and another one is drawn. A rating by a person stands beside the
distribution, which stays the model's. An answer that is none of these is asked for again, with the
fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from r4r_graph.graph.outcome import confidence
from r4r_graph.graph.state import Json, RatingState
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import plain_number

ACTIONS: Mapping[str, tuple[str, ...]] = {
    "rationale": ("accept", "edit", "refuse"),
    "rating": ("accept", "rate"),
}
"""What a question is about, to the answers that it allows."""


def unrated(state: RatingState) -> list[Json]:
    """The rationales that wait to be rated with."""
    return state["rationales"][len(state["distributions"]) :]


def refused(state: RatingState) -> int:
    """Rationales that a person refused in this run."""
    return sum(answer.get("refused", 0) for answer in state.get("answers", []))


def question(state: RatingState) -> Json:
    """What a person is asked now: about rationales that wait, else about the rating.

    Returns:
        `about`, `answers`, `user_id`, `item_id`, `title`, `rationales`; about a rating also
        `rating`, `confidence` (the mode's probability) and `distribution`.
    """
    case, waiting = state["case"], unrated(state)
    about = "rationale" if waiting else "rating"
    asked: Json = {
        "about": about,
        "answers": list(ACTIONS[about]),
        "user_id": case["user_id"],
        "item_id": case["item_id"],
        "title": case["item"]["title"],
        "rationales": [drawn["text"] for drawn in (waiting or state["rationales"])],
    }
    if about == "rating":
        rated = state["recommendation"]
        asked |= {
            "rating": rated["rating"],
            "confidence": confidence(state),
            "distribution": rated["distribution"],
        }
    return asked


def plain_answer(answer: Any) -> Json:
    """`"accept"` as `{"action": "accept"}`; mappings as they are, anything else as no action."""
    if isinstance(answer, str):
        return {"action": answer}
    return dict(answer) if isinstance(answer, Mapping) else {}


def fault(answer: Json, asked: Mapping[str, Any], scale: RatingScale) -> str | None:
    """What is wrong with an answer, in words; None where nothing is."""
    action = answer.get("action")
    if action not in asked["answers"]:
        return f"action {action!r} is none of {', '.join(asked['answers'])}"
    if action == "edit":
        texts, count = _edited(answer), len(asked["rationales"])
        if len(texts) != count or not all(isinstance(t, str) and t.strip() for t in texts):
            wanted = "a rationale" if count == 1 else f"{count} rationales"
            return f"an edit holds {wanted}, none of them blank"
    if action == "rate":
        rating: Any = answer.get("rating")
        number = isinstance(rating, int | float) and not isinstance(rating, bool)
        if not number or not scale.low <= rating <= scale.high:  # nan is within nothing
            return f"rating {rating!r} is no number from {scale.low:g} to {scale.high:g}"
    return None


def decided(answer: Json, asked: Mapping[str, Any]) -> Json:
    """The answer as the state keeps it: `about`, `action`, and `rationales` of an edit, `rating` of
    a rating, or how many rationales were `refused`."""
    kept: Json = {"about": asked["about"], "action": answer["action"]}
    if answer["action"] == "edit":
        kept["rationales"] = [text.strip() for text in _edited(answer)]
    elif answer["action"] == "refuse":
        kept["refused"] = len(asked["rationales"])
    elif answer["action"] == "rate":
        kept["rating"] = plain_number(answer["rating"])
    return kept


def rationales_after(state: RatingState, kept: Json) -> list[Json] | None:
    """The run's rationales once the answer stands; None where it leaves them alone."""
    rated = state["rationales"][: len(state["distributions"])]
    if kept["action"] == "refuse":
        return rated
    if kept["action"] == "edit":
        pairs = zip(unrated(state), kept["rationales"], strict=True)
        return [*rated, *({**drawn, "text": text, "edited": True} for drawn, text in pairs)]
    return None


def _edited(answer: Json) -> Sequence[Any]:
    texts = answer.get("rationales", [answer["rationale"]] if "rationale" in answer else [])
    return texts if isinstance(texts, list | tuple) else ()
