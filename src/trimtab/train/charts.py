"""Charts as inline SVG, drawn from numbers. Runs are not known here: curves and points go in, escaped markup comes out.

Colours and fonts are CSS classes of the page (`c0` … `c7`), so that they follow light and dark mode. Series number n has colour n mod 8,
dash n mod 4 and marker n mod 7. So two series can be told apart without colour, and 56 series all differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
Box = tuple[float, float, float, float]
"""left, top, right, bottom"""

COLOURS = 8
DASHES = ("", "8 4", "2 3", "10 3 2 3")
_MARKERS = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6L5.5 4.5H-5.5z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
    "M0 6L5.5 -4.5H-5.5z",
    "M-1.7 -5.5h3.4v3.8h3.8v3.4h-3.8v3.8h-3.4v-3.8h-3.8v-3.4h3.8z",
    "M-5.5 -3.3L-3.3 -5.5L0 -2.2L3.3 -5.5L5.5 -3.3L2.2 0L5.5 3.3L3.3 5.5L0 2.2L-3.3 5.5L-5.5 3.3L-2.2 0z",
)
MAX_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One series over steps. faint: the same unsmoothed. dots: single measurements beside it. cut: it ends because it was stopped."""

    number: int
    label: str
    points: Points
    faint: Points = ()
    dots: Points = ()
    cut: bool = False


@dataclass(frozen=True)
class Point:
    """One series as cost x against score y. base: the score without it."""

    number: int
    label: str
    x: float
    y: float
    base: float | None = None


@dataclass(frozen=True)
class Axis:
    """From values to pixels. log: base 10; then low > 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, log: bool = False, pad: float = 0.0) -> Axis:
        """An axis that holds all values with a share `pad` of room at either end; logarithmic only where all are positive."""
        found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(found), max(found)
        log = log and low > 0
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1))
        elif log:
            room = (high / low) ** pad
            low, high = low / room, high * room
        else:
            low, high = low - pad * (high - low), high + pad * (high - low)
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (v - a) / (b - a) * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the axis."""
        if self.log and self.high / self.low > 4:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [float(f"{d}e{e}") for e in range(first, last + 1) for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= count + 1:
                    return found
            return found[:: math.ceil(len(found) / count)]
        raw = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
        return [round(k * step, 12) for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element; everything in it is escaped unless it is markup already. `class_` is class, `data_v` is data-v."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items() if v not in (None, ""))
    return Markup(f"<{name}{given}>{''.join(map(escape, inside))}</{name}>")


def short(value: float) -> str:
    """A number in few characters: 4.88 M, 0.0123, 2e-05."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:.0e}" if abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def smooth(points: Points) -> Points:
    """Centred mean over a twentieth of the points (no lag); the window shrinks towards the ends, which stay in place."""
    half = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        h = min(half, i, len(points) - 1 - i)
        found.append((x, (sums[i + h + 1] - sums[i - h]) / (2 * h + 1)))
    return found


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points: of each stretch its lowest and its highest, so that spikes stay; first and last stay too."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = {points[0], points[-1]}
    for a in range(0, len(points), size):
        stretch = points[a : a + size]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)


def marker(number: int, x: float = 0, y: float = 0, *inside: object, **attributes: object) -> Markup:
    """The series' marker at a place."""
    return tag("path", *inside, d=_MARKERS[number % len(_MARKERS)], transform=f"translate({x} {y})", class_="mark", **attributes)


def swatch(number: int) -> Markup:
    """A sample of the series' line and marker, for legends and tables."""
    line = tag("line", x1=0, x2=34, y1=8, y2=8, class_="line", stroke_dasharray=DASHES[number % len(DASHES)])
    return tag("svg", line, marker(number, 17, 8), viewBox="0 0 34 16", class_=f"swatch c{number % COLOURS}", aria_hidden="true")


def line_chart(curves: Sequence[Curve], *, title: str, y_title: str, size: tuple[int, int], log: bool = False, key: str) -> Markup:
    """Curves over steps, which share both axes. key: an id that no other chart of the page has. A chart less than 400 wide is a small
    multiple: its caption names what it shows."""
    width, height = size
    small = width < 400
    left, right, top, bottom = 50 if small else 64, width - 22, 12, height - (24 if small else 44)
    every = [p for c in curves for part in (c.points, c.faint, c.dots) for p in part]
    x = Axis.over([p[0] for p in every], left, right)
    y = Axis.over([p[1] for p in every], bottom, top, log=log, pad=0.04)
    body = [_grid(x, y, "" if small else "step", "" if small else y_title, whole=True, count=3 if small else 5)]
    body += [_curve(c, x, y, marks=not small) for c in curves]
    body.append(tag("line", class_="cross", x1=0, x2=0, y1=top, y2=bottom))
    described = "; ".join(f"{c.label} from {short(c.points[0][1])} to {short(c.points[-1][1])}" for c in curves if c.points)
    scale = {"data_x": f"{x.low} {x.high} {left} {right}", "data_y": f"{y.low} {y.high} {bottom} {top}", "data_log": int(y.log)}
    crowded = " crowded" * (len(curves) > 5)
    return _svg(body, size, title, described or "no finite values", key, class_="chart hover" + crowded, **scale)


def scatter_chart(points: Sequence[Point], *, title: str, x_title: str, y_title: str, size: tuple[int, int], log: bool, key: str) -> Markup:
    """Cost against score. Where all points have one base, its score is a line across (or a remark, where it is far off); else a stroke
    leads from each point's base to the point."""
    width, height = size
    left, right, top, bottom = 58, width - 22, 14, height - 44
    bases = {p.base for p in points}
    shared = bases.pop() if len(bases) == 1 and len(points) > 1 else None
    x = Axis.over([p.x for p in points], left, right, log=log, pad=0.12)
    lifted = [p.base for p in points if p.base is not None and shared is None]
    y = Axis.over([*(p.y for p in points), *lifted], bottom, top, pad=0.1)
    body = [_grid(x, y, x_title, y_title, whole=False, count=4)]
    if shared is not None:
        body.append(_base_line(shared, x, y))
    for p in points:
        known = "" if p.base is None else f" (base {short(p.base)})"
        inside = [tag("title", f"{p.label}: {y_title} {short(p.y)}{known}, {x_title} {short(p.x)}")]
        if p.base is not None and shared is None:
            place = {"x1": x(p.x), "x2": x(p.x), "y1": y(p.base), "y2": y(p.y)}
            inside.append(tag("line", **place, class_="lift", stroke_dasharray=DASHES[p.number % len(DASHES)]))
            inside.append(tag("line", x1=x(p.x) - 6, x2=x(p.x) + 6, y1=y(p.base), y2=y(p.base), class_="lift"))
        body.append(tag("g", *inside, marker(p.number, x(p.x), y(p.y)), class_=f"series c{p.number % COLOURS}", data_v=p.number))
    barred = [] if shared is None else [_base_room(shared, x, y)]
    body += _labels([(p, x(p.x), y(p.y)) for p in points], (left, top, right, bottom), barred)
    described = "; ".join(f"{p.label}: {short(p.x)}, {short(p.y)}" for p in points)
    return _svg(body, size, title, described, key, class_="chart")


def _base_room(score: float, x: Axis, y: Axis) -> Box:
    """Where the base's line, or its remark, leaves no room for names."""
    if y.low <= score <= y.high:
        return (x.start, y(score) - 1, x.end, y(score) + 1)
    edge = y.start - 6 if score < y.low else y.end + 10
    return (x.end - 70, edge - 11, x.end, edge + 4)


def _base_line(score: float, x: Axis, y: Axis) -> Markup:
    if y.low <= score <= y.high:
        line = tag("line", x1=x.start, x2=x.end, y1=y(score), y2=y(score), class_="base-line")
        return tag("g", line, tag("text", f"base {short(score)}", x=x.end, y=y(score) + 14, text_anchor="end"))
    below = score < y.low
    return tag("text", f"base {short(score)} {'↓' if below else '↑'}", x=x.end, y=y.start - 6 if below else y.end + 10, text_anchor="end")


def _labels(placed: Sequence[tuple[Point, float, float]], inside: Box, barred: Sequence[Box]) -> list[Markup]:
    """The points' names beside them, where there is room; a name without room is left to the legend."""
    taken = [*barred, *((a - 6, b - 6, a + 6, b + 6) for _, a, b in placed)]
    found = []
    for p, a, b in placed:
        length = 6.6 * len(p.label)
        sides = ((a + 9, "start", a + 9), (a - 9 - length, "end", a - 9), (a - length / 2, "middle", a))
        tried = [
            ((x0, b + dy - 10, x0 + length, b + dy + 3), at, b + dy, anchor) for dy in (4, -9, 17, -20, 28) for x0, anchor, at in sides
        ]
        for box, at, line, anchor in tried:
            clear = all(box[0] > t[2] or box[2] < t[0] or box[1] > t[3] or box[3] < t[1] for t in taken)
            if clear and box[0] >= inside[0] and box[2] <= inside[2] + 18 and box[1] >= inside[1] - 10 and box[3] <= inside[3]:
                taken.append(box)
                text = tag("text", p.label, x=round(at, 1), y=round(line, 1), text_anchor=anchor, class_="name")
                found.append(tag("g", text, class_=f"series c{p.number % COLOURS}", data_v=p.number))
                break
    return found


def _svg(body: Sequence[Markup], size: tuple[int, int], title: str, described: str, key: str, **attributes: object) -> Markup:
    heads = tag("title", title, id=f"{key}-t"), tag("desc", described, id=f"{key}-d")
    return tag("svg", *heads, *body, viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_labelledby=f"{key}-t {key}-d", **attributes)


def _grid(x: Axis, y: Axis, x_title: str, y_title: str, *, whole: bool, count: int) -> Markup:
    """Grid lines, tick labels and the axes' titles. whole: x counts steps, so fractions are no ticks."""
    parts = []
    for v in y.ticks(count):
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(v), y2=y(v), class_="grid"))
        parts.append(tag("text", short(v), x=x.start - 7, y=y(v) + 4, text_anchor="end"))
    for v in x.ticks(count):
        if not whole or v == int(v):
            parts.append(tag("line", x1=x(v), x2=x(v), y1=y.start, y2=y.end, class_="grid"))
            parts.append(tag("text", short(v), x=x(v), y=y.start + 17, text_anchor="middle"))
    if x_title:
        parts.append(tag("text", x_title, x=(x.start + x.end) / 2, y=y.start + 36, text_anchor="middle", class_="name"))
    if y_title:
        middle = (y.start + y.end) / 2
        turn = f"rotate(-90 14 {middle})"
        parts.append(tag("text", y_title, x=14, y=middle, text_anchor="middle", transform=turn, class_="name"))
    return tag("g", *parts, class_="axes")


def _curve(c: Curve, x: Axis, y: Axis, *, marks: bool) -> Markup:
    def path(points: Points, **attributes: object) -> Markup:
        placed = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        return tag("polyline", points=placed, **attributes)

    parts = [path(thin(c.faint), class_="faint")] if c.faint else []
    points = thin(c.points)
    if points:
        parts.append(path(points, class_="line", stroke_dasharray=DASHES[c.number % len(DASHES)] if marks else None))
    if marks and points:
        stride = max(1, len(points) // 5)
        offset = (c.number * stride // 4) % stride  # neighbours carry their markers at different steps
        parts += [marker(c.number, x(a), y(b)) for a, b in [*points[offset:-1:stride], points[-1]]]
    for a, b in c.dots:
        parts.append(tag("circle", tag("title", f"{c.label}, valid, step {short(a)}: {short(b)}"), cx=x(a), cy=y(b), r=4, class_="valid"))
    if c.cut and points:
        a, b = points[-1]
        parts.append(
            tag(
                "path",
                tag("title", f"{c.label} has stopped"),
                d="M-8 -8L8 8M-8 8L8 -8",
                class_="cut",
                transform=f"translate({x(a)} {y(b)})",
            )
        )
    return tag("g", *parts, class_=f"series c{c.number % COLOURS}", data_v=c.number)
