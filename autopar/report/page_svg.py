"""Charts as inline SVG: strips of rectangles along an axis, and curves over two.

Places along the width are percentages and places along the height pixels, so that a chart fits every width and its
text keeps its size. Each picture says in `aria-label` what it shows, each mark in `<title>`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autopar.report.page_html import Markup, tag
from autopar.units import format_bytes

COLOURS = tuple(f"k{i}" for i in range(9))
"""Classes of the style sheet."""
STRIP_HEIGHT = 18
PLOT_HEIGHT = 260
NUM_TICKS = 5
MOST_OUTLINED = 60
"""More marks in a strip have no gaps between them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A rectangle from `start` to `stop` along the axis; `top` and `bottom` are shares of the height."""

    start: float
    stop: float
    colour: str
    title: str
    top: float = 0.0
    bottom: float = 1.0


@dataclass(frozen=True, slots=True)
class Series:
    """Points joined by straight lines of class `style`, or by stairs, or not at all."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str = "s0"
    colour: str = "k0"
    is_stair: bool = False
    has_dots: bool = True
    is_joined: bool = True


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis; `ticks` are its marked values with their words."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where the value lies, 0 at the low end."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def strip(
    marks: Iterable[Mark], end: float, label: str, *, height: int = STRIP_HEIGHT, limit: float | None = None
) -> Markup:
    """Rectangles between 0 and `end`; a line stands at `limit`."""
    drawn = [_rectangle(mark, end, height) for mark in marks if mark.stop > mark.start]
    if limit is not None and 0 < limit <= end:
        drawn.append(tag("rect", class_="edge", x=_percent(limit / end), y="0", width="2", height=str(height)))
    lane = tag("rect", class_="lane", width="100%", height=str(height))
    dense = {"class_": "dense"} if len(drawn) > MOST_OUTLINED else {}
    return tag("svg", lane, *drawn, **dense, height=str(height), role="img", aria_label=label)


def _rectangle(mark: Mark, end: float, height: int) -> Markup:
    return tag(
        "rect",
        tag("title", mark.title),
        class_=mark.colour,
        x=_percent(mark.start / end),
        y=_pixels(mark.top * height),
        width=_percent((mark.stop - mark.start) / end),
        height=_pixels((mark.bottom - mark.top) * height),
    )


def stacked(parts: Sequence[tuple[str, float, str]], show: Callable[[float], str]) -> list[Mark]:
    """Marks end to end of (name, size, colour)."""
    ends = list(itertools.accumulate((size for _, size, _ in parts), initial=0.0))
    return [
        Mark(start, stop, colour, f"{name}: {show(size)}")
        for (name, size, colour), (start, stop) in zip(parts, itertools.pairwise(ends), strict=True)
    ]


def rows(entries: Iterable[tuple[str, Markup, str]]) -> Markup:
    """Pictures below each other, each between its name and its words."""
    cells = [(tag("div", name), picture, tag("div", words, class_="end")) for name, picture, words in entries]
    return tag("div", *(cell for row in cells for cell in row), class_="rows")


def ticks(end: float, show: Callable[[float], str]) -> Markup:
    """Words below strips that end at `end`, at round values."""
    step = _round_step(end / NUM_TICKS, is_binary=show is format_bytes)
    drawn = []
    for i in range(math.floor(end / step * (1 + 1e-9)) + 1):
        share = i * step / end
        anchor = "start" if i == 0 else "end" if share > 0.94 else "middle"
        drawn.append(tag("text", show(i * step) if i else "0", x=_percent(share), y="11", text_anchor=anchor))
    return tag("svg", *drawn, height="14", aria_hidden="true")


def key(entries: Iterable[tuple[str, str]]) -> Markup:
    """What the colours mean: (colour, words)."""
    swatches = (
        tag("li", tag("svg", tag("rect", class_=colour, width="12", height="12"), aria_hidden="true"), words)
        for colour, words in entries
    )
    return tag("ul", *swatches, class_="key")


def linear_scale(values: Sequence[float], show: Callable[[float], str], *, from_zero: bool = False) -> Scale:
    """Around the values, with round ticks."""
    low, high = (0.0 if from_zero else min(values)), max(values)
    if high <= low:
        low, high = low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0)
    margin = 0.06 * (high - low)
    low, high = (low if from_zero else low - margin), high + margin
    step = _round_step((high - low) / NUM_TICKS)
    marked = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Scale(low, high, tuple((value, show(value)) for value in marked))


def log_scale(values: Sequence[float], show: Callable[[float], str], marked: Sequence[float] | None = None) -> Scale:
    """Around positive values; ticks at `marked`, else at 1, 2 and 5 of each power of ten."""
    low, high = min(values), max(values)
    spread = 1.12 * (high / low) ** 0.05
    low, high = low / spread, high * spread
    if marked is None:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if high / low < 500 else (1,)
        marked = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
    return Scale(low, high, tuple((value, show(value)) for value in marked), is_log=True)


def plot(series: Sequence[Series], x: Scale, y: Scale, label: str, show: Callable[[float, float], str]) -> Markup:
    """Curves; `show` gives the words of a point."""
    lines = [
        tag("line", class_="grid", x1="0", x2="100%", y1=_height(y, value), y2=_height(y, value))
        for value, _ in y.ticks
    ]
    lines += [
        tag("line", class_="grid", y1="0", y2=str(PLOT_HEIGHT), x1=_percent(x.share(v)), x2=_percent(x.share(v)))
        for v, _ in x.ticks
    ]
    drawn = [mark for own in series for mark in _curve(own, x, y, show)]
    names = [
        tag("text", words, x="100%", dx="-6", y=_pixels(_top(y, value) + 4), text_anchor="end")
        for value, words in y.ticks
    ]
    below = [tag("text", words, x=_percent(x.share(v)), y="14", text_anchor="middle") for v, words in _spread(x)]
    return tag(
        "div",
        tag("svg", *names, height=str(PLOT_HEIGHT), aria_hidden="true"),
        tag("svg", *lines, *drawn, height=str(PLOT_HEIGHT), role="img", aria_label=label),
        tag("span"),
        tag("svg", *below, height="18", aria_hidden="true"),
        class_="plot",
    )


def _curve(own: Series, x: Scale, y: Scale, show: Callable[[float, float], str]) -> list[Markup]:
    corners = list(own.points)
    if own.is_stair:
        corners = [p for a, b in itertools.pairwise(own.points) for p in (a, (b[0], a[1]))] + [*own.points[-1:]]
    drawn = [
        tag(
            "line",
            class_=own.style,
            x1=_percent(x.share(a[0])),
            y1=_height(y, a[1]),
            x2=_percent(x.share(b[0])),
            y2=_height(y, b[1]),
        )
        for a, b in itertools.pairwise(corners if own.is_joined else ())
    ]
    for point in own.points if own.has_dots else ():
        title = tag("title", show(*point))
        place = {"cx": _percent(x.share(point[0])), "cy": _height(y, point[1])}
        drawn.append(tag("circle", title, class_=own.colour, r="5", **place))
    return drawn


def _spread(x: Scale) -> list[tuple[float, str]]:
    """The ticks whose words have room at 300 pixels."""
    found: list[tuple[float, str]] = []
    end = -math.inf
    for value, words in x.ticks:
        half = 0.5 * (7 * len(words) + 8) / 300
        if x.share(value) - half >= max(end, 0.0) and x.share(value) + half <= 1.0:
            found.append((value, words))
            end = x.share(value) + half
    return found


def _round_step(step: float, is_binary: bool = False) -> float:
    """The next power of two, or the next 1, 2 or 5 times a power of ten."""
    if is_binary:
        return 2.0 ** math.ceil(math.log2(step))
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def _top(y: Scale, value: float) -> float:
    return (1.0 - y.share(value)) * PLOT_HEIGHT


def _height(y: Scale, value: float) -> str:
    return _pixels(_top(y, value))


def _pixels(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.3f}".rstrip("0").rstrip(".") + "%"
