"""Figures: score by round, and score against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedkd_flwr.disk import replacing

INCHES = (13.0, 4.6)
DOTS_PER_INCH = 150
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":")
MARGIN = 0.01  # above a score of 1, so that its mark is whole
SMALLEST_FACTOR, MANY_FACTOR = 6.0, 200.0  # from the least to the most bytes: a log scale; powers of ten alone
NUM_COLORS = 10  # of matplotlib's cycle; from the eleventh curve on, lines differ


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's line.

    Attributes:
        label: for the legend.
        rounds: x of the left panel.
        megabytes: x of the middle panel: moved until then, for each client, both ways.
        seconds: x of the right panel: what that takes over the link of the figure.
        scores: y, as many as x.
    """

    label: str
    rounds: list[int]
    megabytes: list[float]
    seconds: list[float]
    scores: list[float]


def draw_curves(curves: Sequence[Curve], metric: str, link: str, path: Path) -> None:
    """Draw all panels into a PNG file.

    Args:
        curves: the runs.
        metric: name of the score, in [0, 1] where it is an accuracy.
        link: over which bytes are turned into seconds, in words.
        path: of the file.
    """
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    by_round, by_bytes, by_seconds = figure.subplots(1, 3, sharey=True)
    for index, curve in enumerate(curves):
        line = LINES[index // NUM_COLORS % len(LINES)]
        # The first is the widest, so that those with the same scores still show on top of one another.
        wider = (len(curves) - 1 - index) / max(len(curves) - 1, 1)
        style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5 + 2.5 * wider, "linewidth": 1.2 + 2 * wider}
        style |= {"linestyle": line}
        by_round.plot(curve.rounds, curve.scores, label=curve.label, **style)
        # Version 0 costs nothing but a greeting; it has no place on a scale of bytes.
        by_bytes.plot(curve.megabytes[1:], curve.scores[1:], **style)
        by_seconds.plot(curve.seconds[1:], curve.scores[1:], **style)
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_round.set(xlabel="round", ylabel=f"{metric} (fraction of 1)", title=f"{metric} by round")
    by_bytes.set(xlabel="MB moved per client, up and down", title=f"{metric} against bytes")
    by_seconds.set(xlabel=f"s of transfer, {link}", title=f"{metric} against transfer")
    for axes, places in ((by_bytes, "megabytes"), (by_seconds, "seconds")):
        _scale_by_factors(axes, [x for curve in curves for x in getattr(curve, places)[1:]])
    scores = [score for curve in curves for score in curve.scores]
    if scores and min(scores) >= 0 and max(scores) <= 1 < by_round.get_ylim()[1]:
        by_round.set_ylim(top=1 + MARGIN)
    for axes in (by_round, by_bytes, by_seconds):
        _tidy(axes)
    # Below all panels: a dozen names in one of them would hide its lines.
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(curves)))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _scale_by_factors(axes: Axes, values: Sequence[float]) -> None:
    """A log scale with so few numbers on it that none stands on another; linear where values are of one size."""
    known = [value for value in values if value > 0]
    if not known:
        return
    factor = max(known) / min(known)
    if factor < SMALLEST_FACTOR:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        return
    axes.set(xscale="log", xlabel=f"{axes.get_xlabel()} (log scale)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if factor < MANY_FACTOR else (1,), numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
