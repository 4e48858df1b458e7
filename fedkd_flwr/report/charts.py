"""Small charts as inline SVG: colours come from the page's style sheet, values are shown on hover by titles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from fedkd_flwr.report.markup import as_text

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 44
MOST_DOTS = 80  # beyond, a line alone is easier to read
NUM_TICKS = 5

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one colour of bars.

    Attributes:
        name: for the legend.
        points: (x, y), by x.
        color: number of a colour of the page.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes say, and how values are written.

    Attributes:
        x: what lies along x.
        y: what lies along y.
        x_format: of a value of x.
        y_format: of a value of y.
        from_zero: whether zero is shown, where sizes are to be compared.
    """

    x: str
    y: str
    x_format: Format
    y_format: Format
    from_zero: bool = False


def line_chart(series: Sequence[Series], axes: Axes) -> str:
    """Lines with a dot for each value; empty where there is no value."""
    drawn = [_finite(each) for each in series]
    points = [point for each in drawn for point in each.points]
    if not points:
        return ""
    frame = _Frame(
        _ticks([x for x, _ in points], whole=axes.x == "round"),
        _ticks([*(y for _, y in points), *[0.0] * axes.from_zero]),
    )
    parts = [frame.grid(axes)]
    for each in drawn:
        corners = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="line c{each.color}" points="{corners}"/>')
        radius = 3 if len(each.points) <= MOST_DOTS else 1
        for x, y in each.points:
            title = as_text(f"{each.name}, {axes.x} {axes.x_format(x)}: {axes.y_format(y)}")
            parts.append(
                f'<circle class="dot c{each.color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}">'
                f"<title>{title}</title></circle>"
            )
    return _svg(parts, f"{axes.y} by {axes.x}: " + ", ".join(each.name for each in drawn if each.points))


def bar_chart(series: Sequence[Series], axes: Axes) -> str:
    """Bars side by side at whole numbers of x; empty where there is no value."""
    drawn = [_finite(each) for each in series]
    points = [point for each in drawn for point in each.points]
    if not points:
        return ""
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    frame = _Frame(
        [x for x in _ticks([first, last], whole=True) if first <= x <= last],
        _ticks([0.0, *(y for _, y in points)]),
        (first - 0.5, last + 0.5),
    )
    parts = [frame.grid(axes)]
    width = 0.8 * (frame.x(1) - frame.x(0)) / len(drawn)
    for index, each in enumerate(drawn):
        for x, y in each.points:
            left = frame.x(x) + (index - len(drawn) / 2) * width
            title = as_text(f"{each.name}, {axes.x} {axes.x_format(x)}: {axes.y_format(y)}")
            parts.append(
                f'<rect class="bar c{each.color}" x="{left:.2f}" y="{frame.y(y):.1f}" width="{width:.2f}" '
                f'height="{frame.y(0) - frame.y(y):.1f}"><title>{title}</title></rect>'
            )
    return _svg(parts, f"{axes.y} by {axes.x}: " + ", ".join(each.name for each in drawn))


class _Frame:
    """From values to places in the picture."""

    def __init__(
        self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_range: tuple[float, float] | None = None
    ) -> None:
        self._x_ticks, self._y_ticks = x_ticks, y_ticks
        self._left, self._right = x_range or (x_ticks[0], x_ticks[-1])

    def x(self, value: float) -> float:
        return LEFT + (value - self._left) / (self._right - self._left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y_ticks[0], self._y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, axes: Axes) -> str:
        bottom = HEIGHT - BOTTOM
        parts = []
        for tick in self._y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{axes.y_format(tick)}</text>')
        for tick in self._x_ticks:
            text = axes.x_format(tick)
            parts.append(f'<text x="{self.x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{as_text(axes.x)}</text>')
        return "".join(parts)


def _finite(series: Series) -> Series:
    return Series(series.name, [(x, y) for x, y in series.points if isfinite(x) and isfinite(y)], series.color)


def _ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """Round numbers that enclose the values, about `NUM_TICKS` of them, at least two."""
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # the same, but for the last bits of a mean
        low, high = (low, low + 1) if whole or low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
        high = 1.0 if not whole and 0 < values[0] <= 1 < high else high  # what may be a share has no place above 1
    raw = (high - low) / NUM_TICKS
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{as_text(label)}">{"".join(parts)}</svg>'
