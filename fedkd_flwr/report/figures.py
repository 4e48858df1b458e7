"""Figures: score by round, and score against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INCHES = (10.0, 4.4)
DOTS_PER_INCH = 150
MARKERS = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's line.

    Attributes:
        label: for the legend.
        rounds: x of the left panel.
        megabytes: x of the right panel: moved until then, for each client, both ways.
        scores: y, as many as x.
    """

    label: str
    rounds: list[int]
    megabytes: list[float]
    scores: list[float]


def draw_curves(curves: Sequence[Curve], metric: str, path: Path) -> None:
    """Draw both panels into a PNG file.

    Args:
        curves: the runs.
        metric: name of the score, in [0, 1] where it is an accuracy.
        path: of the file.
    """
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for index, curve in enumerate(curves):
        style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5, "linewidth": 1.4}
        by_round.plot(curve.rounds, curve.scores, label=curve.label, **style)
        # Version 0 costs nothing but a greeting; it has no place on a scale of bytes.
        by_bytes.plot(curve.megabytes[1:], curve.scores[1:], label=curve.label, **style)
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_round.set(xlabel="round", ylabel=f"{metric} (fraction of 1)", title=f"{metric} by round")
    by_bytes.set(xlabel="MB moved per client, up and down (log scale)", title=f"{metric} against bytes")
    if any(len(curve.megabytes) > 1 for curve in curves):
        by_bytes.set_xscale("log")
    for axes in (by_round, by_bytes):
        _tidy(axes)
    by_round.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
