"""Figures: score by round, and score against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INCHES = (13.0, 4.6)
DOTS_PER_INCH = 150
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":")
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
        style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5, "linewidth": 1.4, "linestyle": line}
        by_round.plot(curve.rounds, curve.scores, label=curve.label, **style)
        # Version 0 costs nothing but a greeting; it has no place on a scale of bytes.
        by_bytes.plot(curve.megabytes[1:], curve.scores[1:], **style)
        by_seconds.plot(curve.seconds[1:], curve.scores[1:], **style)
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_round.set(xlabel="round", ylabel=f"{metric} (fraction of 1)", title=f"{metric} by round")
    by_bytes.set(xlabel="MB moved per client, up and down (log scale)", title=f"{metric} against bytes")
    by_seconds.set(xlabel=f"s of transfer, {link} (log scale)", title=f"{metric} against transfer")
    for axes in (by_bytes, by_seconds):
        if any(len(curve.megabytes) > 1 for curve in curves):
            axes.set_xscale("log")
    for axes in (by_round, by_bytes, by_seconds):
        _tidy(axes)
    # Below all panels: a dozen names in one of them would hide its lines.
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(curves)))
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
