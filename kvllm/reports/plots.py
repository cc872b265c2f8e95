"""Where things lie in a plot: scales, ticks, paths and cells in SVG units. Draws nothing; `page.html.j2` does.

Numbers in, coordinates out. Hand-made instead of a plotting library: the page takes its colours from the reader's
light or dark mode, and five simple shapes are all there is to draw.

    retention_plot(points).line       # 'M44,20 L130,64'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvllm.metrics import shown
from kvllm.records import EditPoint, RetentionPoint
from kvllm.reports.curves import DistancePoint

# Small, so that the letters stay readable when a phone shrinks the picture to its width.
WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A measured point; `told` says it in words."""

    x: float
    y: float
    told: str


@dataclass(frozen=True)
class Plot:
    """A line with points, and a band of confidence where there is one."""

    name: str
    title: str
    told: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    line: str
    band: str
    dots: tuple[Dot, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Series:
    """One line of several, with its points; `label` names it and `values` are its numbers, for plain text."""

    label: str
    line: str
    dots: tuple[Dot, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Lines:
    """Several lines in one frame, told apart by colour and dashes."""

    name: str
    title: str
    told: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Bar:
    """One horizontal bar; `measure` is its place among the measures, `told` says it in words."""

    measure: int
    y: float
    width: float
    told: str


@dataclass(frozen=True)
class Bars:
    """Shares in [0, 1] as horizontal bars, one group a name and one bar a measure; `rows` are them for plain text."""

    name: str
    title: str
    told: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    names: tuple[Tick, ...]
    measures: tuple[str, ...]
    bars: tuple[Bar, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    height: int
    thick: float = 8
    width: int = WIDTH
    left: int = 100
    right: int = WIDTH - _RIGHT
    top: int = _TOP

    @property
    def bottom(self) -> int:
        """Where the x axis lies."""
        return self.height - _BOTTOM


@dataclass(frozen=True)
class Cell:
    """One cell of a matrix; `share` in [0, 1] sets its colour."""

    x: float
    y: float
    share: float
    label: str
    told: str
    diagonal: bool


@dataclass(frozen=True)
class Matrix:
    """A square matrix with numbered rows and columns; the names stand beside it."""

    name: str
    title: str
    told: str
    keys: tuple[str, ...]
    cells: tuple[Cell, ...]
    ticks: tuple[Tick, ...]
    cell: float
    origin: float
    width: float
    height: float


@dataclass(frozen=True)
class Strip:
    """One fact's questions along their distance: those that passed above, the others below."""

    told: str
    passed: tuple[Dot, ...]
    failed: tuple[Dot, ...]
    ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = 62


def distance_strip(marks: Sequence[tuple[float, bool, str]]) -> Strip | None:
    """One fact's (distance, passed, question) as two rows of points; None where no distance is known."""
    if not marks:
        return None
    ticks = _steps(max(0.2, math.ceil(max(distance for distance, _, _ in marks) * 5) / 5), 0.2, 1)
    x_of = _scale(0.0, ticks[-1][0], _LEFT, WIDTH - _RIGHT)
    dots = [(ok, Dot(x_of(x), 12.0 if ok else 28.0, f"distance {shown(x)}: {told}")) for x, ok, told in marks]
    passed, failed = tuple(dot for ok, dot in dots if ok), tuple(dot for ok, dot in dots if not ok)
    told = f"{len(passed)} of {len(dots)} questions passed, by distance from the trained ones"
    return Strip(told, passed, failed, _placed(ticks, x_of))


def distance_plot(points: Sequence[DistancePoint]) -> Plot:
    """Recall (0 to 1) against mean distance of the bin."""
    far = max(0.2, math.ceil(max(point.distance for point in points) * 10) / 10)
    spots = [
        (point.distance, point.value, point.low, point.high, _said("distance", point.distance, point.value, point.n))
        for point in points
    ]
    title, axis = "Recall against semantic distance", "distance to the nearest trained question (1 − cosine)"
    return _shares("distance", title, axis, spots, _steps(far, 0.1 if far <= 0.6 else 0.2, 1))


def retention_plot(points: Sequence[RetentionPoint]) -> Plot:
    """Share recalled (0 to 1) against further edits."""
    spots = [
        (
            float(point.further_edits),
            point.value,
            point.low,
            point.high,
            f"{point.further_edits} further edits: {shown(point.value)} of {point.n}",
        )
        for point in points
    ]
    most = max(1.0, *(spot[0] for spot in spots))
    return _shares("retention", "Retention over edits", "further edits after the fact's own", spots, _whole(most))


def drift_plot(points: Sequence[EditPoint]) -> Plot:
    """drift_kl against the edits of the history."""
    measured = [(float(point.edit_id), point.drift_kl) for point in points if point.drift_kl is not None]
    x_ticks = _whole(max(1.0, *(x for x, _ in measured)))
    top = max(y for _, y in measured)
    step = _nice(max(top, 1e-3) / 4)
    y_ticks = _steps(math.ceil(max(top, 1e-3) / step) * step, step, max(0, -math.floor(math.log10(step))))
    x_of, y_of = _x(x_ticks), _y(y_ticks)
    ops = {point.edit_id: point.op for point in points}
    dots = tuple(
        Dot(x_of(x), y_of(y), f"edit {int(x)} ({ops[int(x)] if x else 'base'}): drift_kl {shown(y)}")
        for x, y in measured
    )
    return Plot(
        "drift",
        "Drift over edits",
        f"drift_kl of {len(dots)} states from edit {int(measured[0][0])} to edit {int(measured[-1][0])}; "
        f"last {shown(measured[-1][1])}.",
        "edit",
        "drift_kl (nats per token)",
        _placed(x_ticks, x_of),
        _placed(y_ticks, y_of),
        _path([(dot.x, dot.y) for dot in dots]),
        "",
        dots,
    )


def lines_plot(
    name: str,
    title: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    most: float | None = None,
) -> Lines | None:
    """Draw several lines of (x, y) points; None where there is no point.

    Args:
        name, title: Of the plot.
        series: Label and points of each line.
        x_label, y_label: Of the axes, which both begin at 0.
        most: Upper end of the y axis; by default what the points need.
    """
    given = [(label, sorted(points)) for label, points in series if points]
    if not given:
        return None
    x_ticks = _whole(max(1.0, *(x for _, points in given for x, _ in points)))
    top = most or max(1e-3, *(y for _, points in given for _, y in points))
    step = _nice(top / 4) if most is None else most / 4
    digits = 2 if most is not None else max(0, -math.floor(math.log10(step)))
    y_ticks = _steps(math.ceil(top / step - 1e-9) * step, step, digits)
    x_of, y_of = _x(x_ticks), _y(y_ticks)
    drawn = tuple(
        Series(
            label,
            _path([(x_of(x), y_of(y)) for x, y in points]),
            tuple(Dot(x_of(x), y_of(y), f"{label}: {shown(y)} at {x:g}") for x, y in points),
            tuple(y for _, y in points),
        )
        for label, points in given
    )
    told = "; ".join(f"{label}: {shown(points[-1][1])} at {points[-1][0]:g}" for label, points in given)
    return Lines(name, title, told, x_label, y_label, _placed(x_ticks, x_of), _placed(y_ticks, y_of), drawn)


def bars_plot(
    name: str,
    title: str,
    measures: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    x_label: str,
) -> Bars | None:
    """Draw shares in [0, 1] as bars; None where there is none.

    Args:
        name, title: Of the plot.
        measures: What each bar of a group is.
        rows: Name and shares of each group, one per measure; None where it was not measured, which draws no bar.
        x_label: Of the axis.
    """
    given = tuple((label, tuple(shares)) for label, shares in rows if any(share is not None for share in shares))
    if not given:
        return None
    thick, gap = Bars.thick, 8
    group = thick * len(measures) + gap
    x_of = _scale(0.0, 1.0, Bars.left, Bars.right)
    bars = tuple(
        Bar(
            j,
            _TOP + i * group + j * thick,
            round(x_of(share) - Bars.left, 1),
            f"{label}: {shown(share)} {measures[j]}",
        )
        for i, (label, shares) in enumerate(given)
        for j, share in enumerate(shares)
        if share is not None
    )
    names = tuple(Tick(_TOP + i * group + (group - gap) / 2, label) for i, (label, _) in enumerate(given))
    told = "; ".join(f"{label}: {_in_words(measures, shares)}" for label, shares in given)
    ticks = _placed(_steps(1.0, 0.25, 2), x_of)
    height = round(_TOP + group * len(given) + _BOTTOM)
    return Bars(name, title, told, x_label, ticks, names, tuple(measures), bars, given, height)


def in_text(figure: Lines | Bars) -> tuple[str, ...]:
    """Return a plot as lines of plain text, first what it shows; its values are blocks of eight heights.

    One line per series or group: its label, its values as blocks (a dot: not measured), and in numbers the first and
    the last, or all.
    """
    told: list[tuple[str, Sequence[float | None], str]]
    if isinstance(figure, Bars):
        head, top = f"{figure.title}: {figure.x_label}", 1.0
        told = [(label, shares, _in_words(figure.measures, shares)) for label, shares in figure.rows]
    else:
        head = f"{figure.title}: {figure.y_label} against {figure.x_label}"
        top = max((value for series in figure.series for value in series.values), default=0.0) or 1.0
        told = [
            (series.label, series.values, f"{shown(series.values[0])} … {shown(series.values[-1])}")
            for series in figure.series
        ]
    wide = max(len(label) for label, _, _ in told)
    return (head, *(f"{label:<{wide}}  {_blocks(values, top)}  {words}" for label, values, words in told))


def _blocks(values: Sequence[float | None], top: float) -> str:
    return "".join("·" if value is None else "▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in values)


def _in_words(measures: Sequence[str], shares: Sequence[float | None]) -> str:
    return ", ".join(
        f"{measure} {shown(share)}" for measure, share in zip(measures, shares, strict=True) if share is not None
    )


def matrix_plot(keys: Sequence[str], matrix: Sequence[Sequence[float]]) -> Matrix:
    """Which key's questions recite which fact's text; rows are asked about, columns are recited."""
    cell = max(16.0, min(44.0, (WIDTH - _LEFT - _RIGHT) / len(keys)))
    cells = tuple(
        Cell(
            _LEFT + j * cell,
            _LEFT + i * cell,
            matrix[i][j],
            shown(matrix[i][j], 2) if cell >= 30 and matrix[i][j] else "",
            f"asked about {asked}, recited {told}: {shown(matrix[i][j])}",
            i == j,
        )
        for i, asked in enumerate(keys)
        for j, told in enumerate(keys)
    )
    ticks = tuple(Tick(_LEFT + (i + 0.5) * cell, str(i + 1)) for i in range(len(keys)))
    side = _LEFT + cell * len(keys) + _RIGHT
    off = sum(1 for i in range(len(keys)) for j in range(len(keys)) if i != j and matrix[i][j])
    told = f"{len(keys)} keys; {off} cells off the diagonal are not 0."
    return Matrix(
        "collisions", "Which key recites which text", told, tuple(keys), cells, ticks, cell, _LEFT, side, side
    )


def _shares(
    name: str,
    title: str,
    x_label: str,
    spots: Sequence[tuple[float, float, float, float, str]],
    x_ticks: Sequence[tuple[float, str]],
) -> Plot:
    y_ticks = _steps(1.0, 0.25, 2)
    x_of, y_of = _x(x_ticks), _y(y_ticks)
    high = [(x_of(x), y_of(top)) for x, _, _, top, _ in spots]
    low = [(x_of(x), y_of(bottom)) for x, _, bottom, _, _ in spots]
    if len(spots) == 1:  # one point has no width: its interval is drawn as a bar
        (x, top), (_, bottom) = high[0], low[0]
        high, low = [(x - 4, top), (x + 4, top)], [(x - 4, bottom), (x + 4, bottom)]
    first, last = spots[0], spots[-1]
    return Plot(
        name,
        title,
        f"From {shown(first[1])} at {first[0]:g} to {shown(last[1])} at {last[0]:g}; the band is the 95 % interval.",
        x_label,
        "share recalled",
        _placed(x_ticks, x_of),
        _placed(y_ticks, y_of),
        _path([(x_of(x), y_of(y)) for x, y, *_ in spots]),
        _path([*high, *reversed(low)]) + " Z",
        tuple(Dot(x_of(x), y_of(y), told) for x, y, _, _, told in spots),
    )


def _said(what: str, x: float, value: float, n: int) -> str:
    return f"{what} {shown(x)}: {shown(value)} (n={n})"


def _x(ticks: Sequence[tuple[float, str]]) -> _Scale:
    return _scale(0.0, ticks[-1][0], _LEFT, WIDTH - _RIGHT)


def _y(ticks: Sequence[tuple[float, str]]) -> _Scale:
    return _scale(0.0, ticks[-1][0], HEIGHT - _BOTTOM, _TOP)


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def _placed(ticks: Sequence[tuple[float, str]], scale: _Scale) -> tuple[Tick, ...]:
    return tuple(Tick(scale(value), label) for value, label in ticks)


def _steps(most: float, step: float, digits: int) -> list[tuple[float, str]]:
    return [(i * step, shown(i * step, digits)) for i in range(round(most / step) + 1)]


def _whole(most: float) -> list[tuple[float, str]]:
    step = max(1.0, _nice(most / 6))
    return [(i * step, f"{i * step:g}") for i in range(math.ceil(most / step) + 1)]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
