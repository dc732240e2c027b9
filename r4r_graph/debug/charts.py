"""Where things stand in a report's pictures: the graph as executed, and the time line.

Figures only: the templates draw them. Lengths are in the units of the picture's own view box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from r4r_graph.debug.steps import Step, busy_seconds
from r4r_graph.debug.trace import GraphEdge, GraphNode

# The graph ---------------------------------------------------------------------------------------

_WIDE, _HIGH, _END_HIGH = 212.0, 52.0, 28.0
_GAP = 36.0
_LANE = 24.0
_MARGIN = 14.0
_ROUND = 9.0
_ARROW = 7.0
_ENDS = ("__start__", "__end__")


@dataclass(frozen=True, slots=True)
class Box:
    """A node, drawn."""

    node: GraphNode
    x: float
    """Its left edge."""
    y: float
    width: float
    height: float
    is_end: bool
    """Whether it is the graph's start or end."""

    @property
    def middle(self) -> float:
        """Half way from left to right."""
        return self.x + self.width / 2


@dataclass(frozen=True, slots=True)
class Wire:
    """An edge, drawn."""

    edge: GraphEdge
    path: str
    """SVG path of the line."""
    head: str
    """SVG points of the arrow's head."""
    x: float
    """Where its count stands."""
    y: float


@dataclass(frozen=True, slots=True)
class GraphPicture:
    """The graph, laid out; taken edges come last, so that they lie above the others."""

    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    width: float
    height: float


def lay_out(nodes: Sequence[GraphNode], edges: Sequence[GraphEdge]) -> GraphPicture:
    """The nodes below each other, in the order in which they come.

    An edge to the next node is a straight line. One that passes nodes by runs beside them, forward
    to their right and back to their left, each in a lane of its own, the shorter further in: lines
    then cross as little as they can, and time runs downwards.
    """
    place = {node.name: at for at, node in enumerate(nodes)}
    known = [edge for edge in edges if edge.source in place and edge.target in place]
    spans = {edge: (place[edge.source], place[edge.target]) for edge in known}
    forward = _lanes([e for e in known if spans[e][1] - spans[e][0] > 1], spans)
    back = _lanes([e for e in known if spans[e][1] <= spans[e][0]], spans)
    left = _MARGIN + _LANE * (1 + max(back.values(), default=-1))
    boxes, y = [], _MARGIN
    for node in nodes:
        small = node.name in _ENDS
        width, height = (_WIDE / 2, _END_HIGH) if small else (_WIDE, _HIGH)
        boxes.append(Box(node, left + (_WIDE - width) / 2, y, width, height, small))
        y += height + _GAP
    wires = [
        _straight(edge, boxes[at], boxes[to]) for edge, (at, to) in spans.items() if to == at + 1
    ]
    wires += _beside(forward, boxes, spans, left + _WIDE, 1)
    wires += _beside(back, boxes, spans, left, -1)
    width = left + _WIDE + _LANE * (1 + max(forward.values(), default=-1)) + _MARGIN
    wires.sort(key=lambda wire: wire.edge.taken > 0)
    return GraphPicture(tuple(boxes), tuple(wires), width, y - _GAP + _MARGIN)


def _lanes(
    edges: Iterable[GraphEdge], spans: dict[GraphEdge, tuple[int, int]]
) -> dict[GraphEdge, int]:
    """Each edge's lane, 0 next to the nodes: the first in which no other one is beside it."""
    found: dict[GraphEdge, int] = {}
    for edge in sorted(edges, key=lambda e: (abs(spans[e][1] - spans[e][0]), spans[e])):
        low, high = sorted(spans[edge])
        taken = {
            lane
            for other, lane in found.items()
            if min(spans[other]) < high and max(spans[other]) > low
        }
        found[edge] = next(lane for lane in itertools.count() if lane not in taken)
    return found


def _straight(edge: GraphEdge, source: Box, target: Box) -> Wire:
    x, start, end = source.middle, source.y + source.height, target.y
    return Wire(
        edge,
        path=f"M{x:g} {start:g}V{end - _ARROW:g}",
        head=f"{x - 4.5:g},{end - _ARROW:g} {x + 4.5:g},{end - _ARROW:g} {x:g},{end:g}",
        x=x,
        y=(start + end - _ARROW) / 2,
    )


def _beside(
    lanes: dict[GraphEdge, int],
    boxes: Sequence[Box],
    spans: dict[GraphEdge, tuple[int, int]],
    edge_of_column: float,
    side: int,
) -> list[Wire]:
    """Edges in lanes to the right (side 1) or to the left (side -1) of the column."""
    ports = _ports(lanes, boxes, spans)
    found = []
    for edge, lane in lanes.items():
        source, target = (boxes[at] for at in spans[edge])
        start, end = ports[edge, "out"], ports[edge, "in"]
        x = edge_of_column + side * _LANE * (lane + 0.75)
        down = math.copysign(min(_ROUND, abs(end - start) / 2), end - start)
        turn = side * abs(down)
        begin, stop = (box.x + (box.width if side > 0 else 0) for box in (source, target))
        tip = stop + side * _ARROW
        found.append(
            Wire(
                edge,
                path=f"M{begin:g} {start:g}H{x - turn:g}Q{x:g} {start:g} {x:g} {start + down:g}"
                f"V{end - down:g}Q{x:g} {end:g} {x - turn:g} {end:g}H{tip:g}",
                head=f"{tip:g},{end - 4.5:g} {tip:g},{end + 4.5:g} {stop:g},{end:g}",
                x=x,
                y=(start + end) / 2,
            )
        )
    return found


def _ports(
    lanes: dict[GraphEdge, int], boxes: Sequence[Box], spans: dict[GraphEdge, tuple[int, int]]
) -> dict[tuple[GraphEdge, str], float]:
    """At which height each line leaves its source and meets its target. Towards the other end of
    the line stand those of inner lanes, so that no two cross."""
    ends: dict[tuple[int, bool], list[tuple[int, GraphEdge, str]]] = {}
    for edge, lane in lanes.items():
        at, to = spans[edge]
        ends.setdefault((at, to > at), []).append((lane, edge, "out"))
        ends.setdefault((to, at > to), []).append((lane, edge, "in"))
    found: dict[tuple[GraphEdge, str], float] = {}
    for (at, below), meeting in ends.items():
        box = boxes[at]
        room = box.height / (1 if box.is_end else 2)
        for rank, (_, edge, end) in enumerate(sorted(meeting, key=lambda m: m[0]), start=1):
            inwards = rank * room / (len(meeting) + 1)
            found[edge, end] = box.y + (box.height - inwards if below else inwards)
    return found


# The time line -----------------------------------------------------------------------------------

_PAUSE_SHARE = 0.06
"""How much of the time line a long pause takes up, whatever its length."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A step on the time line; per cent of its width."""

    number: int
    """Of the step, from 1."""
    step: Step
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on the time line."""

    left: float
    """Per cent of its width."""
    seconds: float
    """Since the run began."""
    pause: float = 0.0
    """Seconds of a pause that ends here, which is drawn shorter than it was."""


@dataclass(frozen=True, slots=True)
class TimeLine:
    """Steps by time; long pauses (a person was asked, or the process was gone) are cut short."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    begun: float
    """Unix seconds."""


def time_line(steps: Sequence[Step]) -> TimeLine | None:
    """The steps of this run as bars; None where none has ended.

    Steps of an earlier run and those that have not ended are left out. What a person took to
    answer is a pause.
    """
    timed = [
        (number, step)
        for number, step in enumerate(steps, start=1)
        if step.started is not None and step.ended is not None and step.standing != "earlier"
    ]
    work = [step for _, step in timed if step.node != "human"]
    if not work:
        return None
    times = [(step.started or 0.0, step.ended or 0.0) for step in work]
    over = max(step.ended or 0.0 for _, step in timed)  # later, where a person's answer came last
    blocks = _blocks([*times, (over, over)], max(0.1, 0.1 * busy_seconds(work)))
    begun, busy = blocks[0][0], sum(end - start for start, end in blocks) or 1e-9
    stretches, at, ticks = [], 0.0, []
    for block, (start, end) in enumerate(blocks):
        pause = start - blocks[block - 1][1] if block else 0.0
        if pause:
            stretches.append((blocks[block - 1][1], start, at, at + _PAUSE_SHARE))
            at += _PAUSE_SHARE
        width = (end - start) / busy
        stretches.append((start, end, at, at + width))
        ticks.append((at, start - begun, pause))
        ticks += _inner_ticks(start - begun, end - begun, at, width, _nice(busy / 5))
        at += width
    whole, bars = at or 1.0, []
    for number, step in timed:
        left, right = (_where(when or 0.0, stretches) for when in (step.started, step.ended))
        bars.append(Bar(number, step, 100 * left / whole, 100 * (right - left) / whole))
    marks = (Tick(100 * left / whole, seconds, pause) for left, seconds, pause in ticks)
    return TimeLine(tuple(bars), tuple(marks), begun)


def _inner_ticks(
    start: float, end: float, left: float, width: float, apart: float
) -> list[tuple[float, float, float]]:
    """Round times within a block, but for those too near to its beginning to be read."""
    found = []
    for count in range(1, 8):
        seconds = apart * (math.floor(start / apart) + count)
        inwards = width * (seconds - start) / (end - start) if start < seconds <= end else 0.0
        if inwards > 0.1:
            found.append((left + inwards, seconds, 0.0))
    return found


def _blocks(times: Iterable[tuple[float, float]], short: float) -> list[tuple[float, float]]:
    """From when to when something was at work; gaps that are short count as work."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(times):
        if found and start - found[-1][1] <= short:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _where(moment: float, stretches: Sequence[tuple[float, float, float, float]]) -> float:
    """A moment's place on a line of stretches: from when to when, and from where to where."""
    for start, end, left, right in stretches:
        if moment <= end:
            share = max(0.0, moment - start) / (end - start) if end > start else 0.0
            return left + share * (right - left)
    return stretches[-1][3]


def _nice(seconds: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(seconds)) if seconds > 0 else 1e-3
    return next(power * times for times in (1, 2, 5, 10) if power * times >= seconds)
