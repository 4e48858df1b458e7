"""The figure of a partition: what is drawn, and that any names and numbers of clients and labels can be drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from fedkd_flwr.core.protocols import DataReport
from fedkd_flwr.report.partition import draw_partition


def drawn_report(num_clients: int, num_labels: int, names: Sequence[str] = ()) -> DataReport:
    counts = np.random.default_rng(0).integers(0, 50, (num_clients, num_labels)).tolist()
    return DataReport(tuple(names) or tuple(f"label {i}" for i in range(num_labels)), tuple(map(tuple, counts)))


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been drawn: each map, and each label of a chart of bars."""
    drawn: list[str] = []
    for name, method in (("imshow", Axes.imshow), ("barh", Axes.barh)):

        def recorded(axes, *arguments, name=name, method=method, **options):  # type: ignore[no-untyped-def]
            drawn.append(name)
            return method(axes, *arguments, **options)

        monkeypatch.setattr(Axes, name, recorded)
    return drawn


@pytest.mark.parametrize(
    ("num_clients", "num_labels", "kind"),
    [(1, 1, "barh"), (2, 2, "barh"), (10, 10, "barh"), (40, 20, "barh"), (3, 21, "imshow"), (41, 2, "imshow")],
)
def test_few_clients_of_few_labels_are_bars_and_others_a_map(
    num_clients: int, num_labels: int, kind: str, tmp_path: Path, kinds: list[str]
) -> None:
    draw_partition(drawn_report(num_clients, num_labels), tmp_path / "partition.png")
    assert set(kinds) == {kind}
    assert len(kinds) == (num_labels if kind == "barh" else 1)


def test_a_large_map_has_pixels_for_every_client_and_label(tmp_path: Path) -> None:
    draw_partition(drawn_report(500, 100), tmp_path / "partition.png")
    height, width, _ = imread(tmp_path / "partition.png").shape
    assert height / 500 > 3
    assert width / 100 > 15


@pytest.mark.parametrize("more", [0, 20], ids=["bars", "map"])
@pytest.mark.filterwarnings("error")
def test_no_name_of_a_label_is_too_odd_to_draw(more: int, tmp_path: Path) -> None:
    names = ["_hidden", "$x_{", "over\ntwo lines", "a" * 500, "", "日本", *map(str, range(more))]
    draw_partition(drawn_report(2, len(names), names), tmp_path / "partition.png")
    height, width, _ = imread(tmp_path / "partition.png").shape
    assert max(height, width) < 2000


def test_a_map_of_ones_and_none_can_be_drawn(tmp_path: Path) -> None:
    counts = tuple((1, 0) for _ in range(50))
    draw_partition(DataReport(("a", "b"), counts), tmp_path / "partition.png")
    assert (tmp_path / "partition.png").stat().st_size > 0
