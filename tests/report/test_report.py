"""Tables and figures."""

import io
import os
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from fedkd_flwr.core.protocols import DataReport
from fedkd_flwr.measure.ledger import Row
from fedkd_flwr.measure.link import USUAL, NetworkOptions, transfer_of
from fedkd_flwr.measure.summary import summarise, write_summary
from fedkd_flwr.report import common_link, read_run, reported, write_model_card, write_report
from fedkd_flwr.report.figures import Curve, draw_curves
from fedkd_flwr.report.progress import RoundLog, RoundNote
from fedkd_flwr.report.runs import RunResult, rounds_in_words
from fedkd_flwr.report.table import COLUMNS, markdown_table, screen_table
from tests.conftest import Run


def test_a_curve_counts_every_byte_moved_until_its_round(run: Run) -> None:
    result = read_run(run())
    curve = result.curve()
    assert curve.rounds == [0, 1, 2, 3]
    until_final = sum(row["wire_bytes"] for row in result.rows if row["kind"] == "message" and row["round"] <= 3)
    assert curve.megabytes == sorted(curve.megabytes)
    assert curve.megabytes[-1] == pytest.approx(until_final / 1e6 / 3)
    assert curve.scores[-1] == result.score("shared_global")


def test_a_report_that_is_killed_leaves_each_file_as_it_was_or_as_it_was_to_be(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run("num_rounds=1")
    write_report([run_dir])
    write_model_card(run_dir)
    names = ("curves.png", "table.md", "report.html", "summary.json", "student/README.md")
    whole = {name: (run_dir / name).read_bytes() for name in names}
    replace, left = os.replace, [0]

    def killed_at(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", killed_at)
    for name in names:
        (run_dir / name).write_bytes(whole[name] if name == "summary.json" else b"old")
    for number, write in ((2, write_report), (1, write_summary), (1, write_model_card)):
        left[0] = number
        with pytest.raises(KeyboardInterrupt):
            write([run_dir] if write is write_report else run_dir)  # type: ignore[operator]
    found = {name: (run_dir / name).read_bytes() for name in names}
    assert found == dict.fromkeys(names, b"old") | {name: whole[name] for name in ("curves.png", "summary.json")}
    assert not [path.name for path in run_dir.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize(
    ("num_rounds", "count", "words"),
    [(1, 1, "round 1"), (4, 1, "round 4"), (8, 2, "mean of rounds 7 to 8"), (40, 3, "mean of rounds 38 to 40")],
)
def test_last_rounds_are_a_quarter_of_the_rounds_at_most_three_and_say_which_they_are(
    num_rounds: int, count: int, words: str, tmp_path: Path
) -> None:
    rows = [scored(number, number / 100) for number in range(num_rounds + 1)]
    result = RunResult(tmp_path, summarise(rows), tuple(rows))
    assert result.last_rounds() == pytest.approx(sum(range(num_rounds + 1 - count, num_rounds + 1)) / 100 / count)
    assert result.rounds_averaged == words


def scored(number: int, accuracy: float) -> Row:
    metrics = {"shared_global": {"accuracy": accuracy}, "shared_local": None, "private_local": None}
    return {"kind": "round", "round": number, "metrics": metrics, "seconds": {}, "elapsed_seconds": 0.0}


def test_runs_of_other_lengths_are_told_by_the_rule(tmp_path: Path) -> None:
    runs = [
        RunResult(tmp_path, summarise(rows), rows)
        for rows in (tuple(scored(number, 0.5) for number in range(count)) for count in (5, 30))
    ]
    assert rounds_in_words(runs[:1]) == "round 4"
    assert rounds_in_words(runs) == "mean of the last quarter of a run's rounds, at least 1 and at most 3"


def test_an_algorithm_that_shares_nothing_is_drawn_by_its_private_models(run: Run) -> None:
    result = read_run(run("algorithm.name=local_only"))
    assert result.curve().label.endswith("own data")
    assert result.curve().rounds == [0, 1, 2, 3]
    until = [
        sum(row["wire_bytes"] for row in result.rows if row["kind"] == "message" and row["round"] <= number) / 3e6
        for number in range(4)
    ]
    assert result.curve().megabytes == pytest.approx(until)  # a version is scored a round after it has arrived
    row = result.table_row()
    assert (row["shared model"], row["last rounds"], row["shared, local"]) == ("-", "-", "-")
    assert float(row["private, local"]) == pytest.approx(result.score("private_local"), abs=5e-4)


def test_a_comparison_never_takes_the_place_of_what_lies_beside_a_run(run: Run, tmp_path: Path) -> None:
    first, second = run("num_rounds=1"), run("num_rounds=1", "seed=5")
    assert {path.parent for path in write_report([first])} == {first}
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    figure, table = write_report([first, second], tmp_path / "both")
    assert (figure.parent, table.parent) == (tmp_path / "both", tmp_path / "both")
    assert imread(figure).shape[0] > 300
    assert table.read_text().count("\n| small") == 2
    assert {path: path.read_bytes() for path in first.iterdir() if path.is_file()} == before


def test_a_comparison_lies_beside_the_folders_of_the_experiments(run: Run, tmp_path: Path) -> None:
    moved = [tmp_path / "results" / name / "a run" for name in ("one", "two")]
    for place in moved:
        place.parent.mkdir(parents=True)
        run("num_rounds=1").rename(place)
    figure, _ = write_report(moved)
    assert figure.parent.parent == tmp_path / "results" / "comparison"
    assert {path.name for path in figure.parent.iterdir()} == {"curves.png", "table.md", "report.html"}
    assert not any((place / "curves.png").exists() for place in moved)


def test_notes_on_the_data_stand_in_the_first_row_and_in_flowers_log(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = DataReport(("a", "b"), ((1, 1),), ("3 rows are left out",), of_all=False)
    monkeypatch.setattr("fedkd_flwr.tasks.digits.Digits.data_report", lambda self: report)
    first = read_run(run("num_rounds=1")).rows[0]
    assert (first["kind"], first["notes"]) == ("start", ["3 rows are left out"])
    RoundLog().update(first)
    assert capsys.readouterr().out == "note: 3 rows are left out\n"


def test_the_same_curves_give_the_same_picture(tmp_path: Path) -> None:
    curves = [Curve("a", [0, 1, 2], [0.1, 1.0, 2.0], [1.0, 8.0, 16.0], [0.1, 0.5, 0.9])]
    for name in ("one.png", "two.png"):
        draw_curves(curves, "accuracy", "a link", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_markdown_table_has_a_head_a_rule_and_a_row_for_each_run() -> None:
    row = dict.fromkeys(COLUMNS, "x")
    lines = markdown_table([row, row], "a link", "round 7").splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
    assert lines[1].count("---") == len(COLUMNS)
    assert lines[2] == lines[3] == "| " + " | ".join(["x"] * len(COLUMNS)) + " |"
    assert "over a link" in lines[5] and "last rounds: the same, round 7" in lines[5]


@pytest.mark.parametrize("width", [70, 80, 100, 120, 130, 200])
def test_no_number_on_a_screen_is_broken_in_two(width: int) -> None:
    cells = ("an_experiment_of_a_long_name (seed 0)", "0.123", "0.234", "0.321", "0.345", "0.456", "0.567")
    row = dict(zip(COLUMNS, (*cells, "28.123", "28.456", "99.97 %", "247.6", "1234"), strict=True))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen_table([row, row], "a link", "round 7", "accuracy", width))
    text = console.export_text()
    shown = [column for column in COLUMNS if row[column] in text]
    assert {"run", "shared model", "private, local", "fewer bytes"} <= set(shown)
    assert (len(shown) == len(COLUMNS)) == (width >= 130)
    lines = [line.split() for line in text.splitlines() if "an_experiment" in line]
    assert lines == [[word for column in shown for word in row[column].split()]] * 2


def test_a_column_that_no_run_fills_is_not_shown() -> None:
    row = dict.fromkeys(COLUMNS, "1") | {"both, local": "-"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(screen_table([row], "a link", "round 7", "accuracy", 120))
    head = console.export_text().split("─")[0]
    assert "private" in head and "both" not in head


def test_transfer_is_told_over_the_link_that_is_asked_for_or_the_first_that_a_run_names(
    run: Run, tmp_path: Path
) -> None:
    without, slow = run("num_rounds=1"), run("num_rounds=1", "network={uplink_mbps: 0.1, downlink_mbps: 1}")
    runs = [read_run(without), read_run(slow)]
    assert common_link(runs[:1]) == USUAL and common_link(runs) == runs[1].network
    table = write_report([without, slow], tmp_path)[1].read_text()
    assert "over 0.1 Mbit/s up, 1 down" in table
    asked = NetworkOptions(uplink_mbps=2, downlink_mbps=20)
    table = write_report([without, slow], tmp_path, asked)[1].read_text()
    assert "over 2 Mbit/s up, 20 down" in table
    seconds = [transfer_of(result.rows, asked).seconds for result in runs]
    assert all(f"| {value:.1f} |" in table for value in seconds)


def test_a_page_is_of_the_link_that_was_asked_for(run: Run, tmp_path: Path) -> None:
    slow = run("num_rounds=1", "network={uplink_mbps: 0.1, downlink_mbps: 1}")
    write_report([slow], tmp_path, NetworkOptions(uplink_mbps=7, downlink_mbps=7, round_deadline_s=1e-9))
    page = (tmp_path / "report.html").read_text()
    assert "7 Mbit/s up, 7 down" in page and "times beyond the deadline" in page and "0.1 Mbit/s" not in page


def test_a_complete_run_stays_complete_where_its_report_can_not_be_drawn(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run("num_rounds=1")

    def broken(*args: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("fedkd_flwr.report.writing.draw_curves", broken)
    with reported(directory):
        pass
    assert "no font" in caplog.text and str(directory) in caplog.text


def test_a_round_note_gives_the_score_and_the_bytes_so_far() -> None:
    note = RoundNote()
    metrics = {"shared_global": {"accuracy": 0.5}, "shared_local": None, "private_local": None}
    assert note.of({"kind": "message", "wire_bytes": 2_500_000}) is None
    assert (
        note.of({"kind": "round", "round": 1, "metrics": metrics, "skipped": True})
        == "accuracy 0.500, 2.5 MB in all, skipped"
    )


@pytest.mark.parametrize("megabytes", [[0.0, 1.21, 1.22, 1.23], [0.0, 0.01, 0.05, 0.2], [0.0, 0.001, 10.0, 1000.0]])
def test_numbers_below_a_panel_do_not_stand_on_one_another(
    megabytes: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k))[1])
    draw_curves([Curve("a", [0, 1, 2, 3], megabytes, megabytes, [0.9, 0.97, 0.99, 1.0])], "f1", "l", tmp_path / "x.png")
    for axes in figures[0].axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels(which="both") if label.get_text()]
        inside = sorted((box.x0, box.x1) for box in boxes if box.x1 > axes.bbox.x0 and box.x0 < axes.bbox.x1)
        assert len(inside) >= 2 and all(end <= start for (_, end), (start, _) in pairwise(inside))
    assert figures[0].axes[0].get_ylim()[1] < 1.02


def test_the_last_note_is_of_the_scores_at_the_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_run(run("algorithm.name=local_only", "num_rounds=1")).rows
    log = RoundLog()
    for row in rows:
        log.update(row)
    final = next(row for row in rows if row["kind"] == "final")
    score = final["metrics"]["private_local"]["accuracy"]
    assert f"after the last round: accuracy {score:.3f}, " in capsys.readouterr().out
