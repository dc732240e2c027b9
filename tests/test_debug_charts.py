"""Where things stand in a report's pictures."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from r4r_graph.debug.charts import Box, GraphPicture, lay_out, time_line
from r4r_graph.debug.steps import Step
from r4r_graph.debug.trace import GraphEdge, GraphNode, trace
from tests.kept_runs import Fake, load, run


def node(name: str) -> GraphNode:
    return GraphNode(name, 1, 0, "done", 0.0, 0, 0)


def edge(source: str, target: str, taken: int = 0) -> GraphEdge:
    return GraphEdge(source, target, conditional=False, taken=taken)


def corners(path: str) -> list[tuple[float, float]]:
    """The points that a path runs through; its curves cut a corner each."""
    x = y = 0.0
    found = []
    for letter, numbers in re.findall(r"([MHVQ])([-\d. e]*)", path):
        values = [float(number) for number in numbers.split()]
        if letter in "MQ":
            x, y = values[-2:]
        x, y = (values[0], y) if letter == "H" else (x, values[0]) if letter == "V" else (x, y)
        found.append((x, y))
    return found


def inside(point: tuple[float, float], box: Box) -> bool:
    x, y = point
    return box.x < x < box.x + box.width and box.y < y < box.y + box.height


def check(picture: GraphPicture, edges: list[GraphEdge]) -> None:
    """Every edge is drawn once, begins and ends at its nodes, and passes through none."""
    boxes = {box.node.name: box for box in picture.boxes}
    assert sorted(w.edge.source + ">" + w.edge.target for w in picture.wires) == sorted(
        e.source + ">" + e.target for e in edges
    )
    for above, below in itertools.pairwise(picture.boxes):
        assert above.y + above.height < below.y
    for wire in picture.wires:
        points = corners(wire.path)
        tip = tuple(map(float, wire.head.split()[-1].split(",")))
        source, target = boxes[wire.edge.source], boxes[wire.edge.target]
        for (x, y), box in ((points[0], source), (tip, target)):
            assert box.x <= x <= box.x + box.width
            assert box.y <= y <= box.y + box.height
        for (x1, y1), (x2, y2) in itertools.pairwise([*points, (tip[0], tip[1])]):
            for share in (0.02, 0.25, 0.5, 0.75, 0.98):
                point = (x1 + share * (x2 - x1), y1 + share * (y2 - y1))
                assert not any(inside(point, box) for box in picture.boxes)
                assert 0 <= point[0] <= picture.width
                assert 0 <= point[1] <= picture.height


def test_the_rating_graph_is_laid_out(fake: Fake) -> None:
    recommender = load(fake)
    run(recommender, "mon", rationales=2, round_size=1, sure=1.0)
    told = trace(recommender.graph, "mon")
    picture = lay_out(told.nodes, told.edges)
    check(picture, list(told.edges))
    assert picture.width < 400, "it must be readable on a phone"
    untaken = [wire.edge.taken > 0 for wire in picture.wires]
    assert untaken == sorted(untaken), "what was taken lies above"


@pytest.mark.parametrize("seed", range(20))
def test_any_graph_is_laid_out(seed: int) -> None:
    dice = random.Random(seed)
    names = ["__start__", *(f"n{i}" for i in range(dice.randint(1, 8))), "__end__"]
    pairs = {(dice.choice(names[:-1]), dice.choice(names[1:])) for _ in range(dice.randint(1, 20))}
    edges = [edge(a, b, dice.randint(0, 2)) for a, b in sorted(pairs)]
    check(lay_out([node(name) for name in names], edges), edges)


def test_lines_share_no_lane_where_they_run_side_by_side() -> None:
    names = ["a", "b", "c", "d", "e"]
    edges = [edge("a", "c"), edge("a", "d"), edge("b", "e"), edge("a", "e")]
    picture = lay_out([node(name) for name in names], edges)
    assert len({wire.x for wire in picture.wires}) == 4
    (short,) = (wire for wire in picture.wires if wire.edge.target == "c")
    assert short.x == min(wire.x for wire in picture.wires)


# The time line -----------------------------------------------------------------------------------


def step(name: str, started: float, ended: float | None) -> Step:
    return Step(name, "done" if ended else "waiting", started, ended)


def test_bars_are_where_their_steps_were() -> None:
    line = time_line([step("a", 100, 101), step("b", 101, 104), step("c", 101, 102)])
    assert line is not None
    assert [(round(b.left, 6), round(b.width, 6)) for b in line.bars] == [
        (0, 25),
        (25, 75),
        (25, 25),
    ]
    assert [b.number for b in line.bars] == [1, 2, 3]
    assert [(tick.left, tick.seconds) for tick in line.ticks] == [
        (0, 0),
        (25, 1),
        (50, 2),
        (75, 3),
        (100, 4),
    ]


def test_a_pause_is_cut_short_and_told() -> None:
    line = time_line(
        [step("a", 0, 1), step("human", 1, 3601), step("b", 3601, 3602), step("human", 3602, 9000)]
    )
    assert line is not None
    pauses = [(tick.seconds, tick.pause) for tick in line.ticks if tick.pause]
    assert pauses == [(3601, 3600), (9000, 5398)]
    a, asked, b, again = line.bars
    assert a.width == pytest.approx(b.width)
    assert a.width > 40
    assert asked.left == pytest.approx(a.width)
    assert asked.left + asked.width == pytest.approx(b.left)
    assert 3 < asked.width < 10
    assert again.left + again.width == pytest.approx(100)


def test_what_is_not_over_has_no_bar() -> None:
    assert time_line([]) is None
    assert time_line([step("a", 5, None)]) is None
    line = time_line([step("a", 5, 5), step("b", 5, None)])
    assert line is not None
    assert [bar.step.node for bar in line.bars] == ["a"]
    earlier = Step("a", "earlier", 1, 2)
    assert time_line([earlier]) is None


@pytest.mark.parametrize("seed", range(10))
def test_all_bars_are_on_the_line(seed: int) -> None:
    dice = random.Random(seed)
    steps = []
    for _ in range(dice.randint(1, 30)):
        began = dice.uniform(0, dice.choice([1, 10, 1e5]))
        steps.append(step(dice.choice(["a", "human"]), began, began + dice.uniform(0, 3)))
    steps.append(step("a", 0, 1))
    line = time_line(steps)
    assert line is not None
    assert len(line.bars) == len(steps)
    for bar in line.bars:
        assert -1e-9 <= bar.left <= bar.left + bar.width <= 100 + 1e-9
    assert all(0 <= tick.left <= 100 + 1e-9 for tick in line.ticks)
    assert len(line.ticks) < 80
