"""Figure: how the labels that clients learn from lie among the clients."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedkd_flwr.core.protocols import DataReport
from fedkd_flwr.disk import replacing

DOTS_PER_INCH = 150
WIDTH, TALLEST = 10.0, 12.0  # inches
MOST_BARS = 40
MOST_COLOURS = 20  # that a reader can tell apart, with a legend
NAME_LENGTH = 18
PALETTES = {10: "tab10", MOST_COLOURS: "tab20"}

Counts = np.ndarray[Any, np.dtype[np.int64]]  # [clients, labels]


def draw_partition(report: DataReport, path: Path) -> None:
    """Draw each client's training labels into a PNG file.

    A bar for each client where clients and labels are few; else a map of clients by labels, the colour for the count.

    Args:
        report: of at least one client and one label.
        path: of the file.
    """
    counts = np.array(report.label_counts, np.int64)
    num_clients, num_labels = counts.shape
    names = [_short(name) for name in report.label_names]
    bars = num_clients <= MOST_BARS and num_labels <= MOST_COLOURS
    if bars:
        size = (WIDTH, max(3.6, 0.24 * num_clients + 1.6, 0.2 * num_labels + 1.0))  # so many names in the legend
    else:
        size = (max(WIDTH, 0.13 * num_labels + 2), min(max(4.2, 0.06 * num_clients + 1.6), TALLEST))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if bars:
        _draw_bars(axes, counts, names)
    else:
        _draw_map(figure, axes, counts, names)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=MOST_BARS if bars else "auto", integer=True, min_n_ticks=1))
    axes.set(ylabel="client")
    axes.set_title(
        f"{counts.sum():,} labels that {num_clients} clients learn from, without those that they keep to score on"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # boxes instead, in scripts the font lacks
        with replacing(path) as partial:
            figure.savefig(partial, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _draw_bars(axes: Axes, counts: Counts, names: list[str]) -> None:
    num_clients, num_labels = counts.shape
    colours = colormaps[next(name for most, name in PALETTES.items() if num_labels <= most)].colors  # type: ignore[attr-defined]
    starts = np.cumsum(counts, axis=1) - counts
    for label in range(num_labels):
        axes.barh(range(num_clients), counts[:, label], left=starts[:, label], height=0.8, color=colours[label])
    axes.set_ylim(num_clients - 0.5, -0.5)
    axes.set(xlabel="labels to learn from")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    # Made without names first: a legend leaves out those that begin with an underscore.
    patches = [Patch(color=colours[label], label=str(label)) for label in range(num_labels)]
    legend = axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def _draw_map(figure: Figure, axes: Axes, counts: Counts, names: list[str]) -> None:
    shades = colormaps["viridis_r"].with_extremes(bad="white")
    image = axes.imshow(
        np.ma.masked_equal(counts, 0),
        norm=LogNorm(1, max(2, counts.max())),
        cmap=shades,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label="labels to learn from (log scale; white: none)", pad=0.01)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)


def _short(name: str) -> str:
    if name != name.strip():
        name = repr(name)  # or the legend shows two classes alike
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
