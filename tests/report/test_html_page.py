"""The page of a run: what it says, that it asks for nothing, and that no text of a client becomes markup."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.measure.ledger import LEDGER_FILE
from fedkd_flwr.report import read_run, reported, write_report
from fedkd_flwr.report.account import NOBODY, account_of
from fedkd_flwr.report.charts import MOST_DOTS, Axes, Series, _ticks, bar_chart, line_chart
from fedkd_flwr.report.html_page import PAGE_FILE, html_page
from tests.conftest import Run

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&\x1b[31m\u202e\ud800"
NO_METRICS = dict.fromkeys(("shared_global", "shared_local", "private_local", "ensemble_local"))
START = {
    "kind": "start",
    "experiment": "x",
    "task": "digits",
    "algorithm": "fedkd",
    "compressor": "svd",
    "aggregator": "fedavg",
    "seed": 0,
    "num_clients": 2,
    "num_rounds": 3,
}


def round_row(number: int, **values: Any) -> dict[str, Any]:
    facts = {"round": number, "skipped": False, "local_version": 0, "metrics": NO_METRICS, "seconds": {}}
    return {"kind": "round", **facts, **values}


def written(directory: Path, *rows: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    lines = [json.dumps({"elapsed_seconds": float(second), **row}) for second, row in enumerate(rows)]
    (directory / LEDGER_FILE).write_text("\n".join([*lines, ""]))
    return directory


class Page(HTMLParser):
    """A page's tags, whether they are closed in order, and its text."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(directory: Path) -> Page:
    return Page(html_page(read_run(directory)))


def test_a_page_stands_in_the_run_directory_and_says_what_the_summary_says(run: Run) -> None:
    directory = run()
    write_report([directory])
    result = read_run(directory)
    page = Page((directory / PAGE_FILE).read_text(encoding="utf-8"))
    assert f"{result.score('shared_global'):.3f}" in page.text
    assert f"{100 * result.summary['bytes']['reduction_vs_dense_teacher']:.1f} %" in page.text
    assert "completed" in page.text and "3 of 3" in page.text and "3 clients, by name" in page.text
    assert page.count("svg") == 4
    assert "energy_start" in page.text  # of the configuration


def test_the_page_of_a_run_stands_beside_it_and_where_it_was_asked_for(run: Run, tmp_path: Path) -> None:
    first, second = run("num_rounds=1"), run("num_rounds=1", "seed=5")
    write_report([first, second], tmp_path / "both")
    assert not any((place / PAGE_FILE).exists() for place in (first, second))
    for place in (first, second):
        write_report([place])
    assert "seed 1" in (first / PAGE_FILE).read_text() and "seed 5" in (second / PAGE_FILE).read_text()
    write_report([second], tmp_path / "one")
    assert (tmp_path / "one" / PAGE_FILE).read_text() == (second / PAGE_FILE).read_text()


def test_a_page_fetches_nothing_and_runs_nothing(run: Run) -> None:
    directory = run("num_rounds=1")
    text = html_page(read_run(directory))
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    attributes = [(tag, name, value) for tag, attrs in page.tags for name, value in attrs.items()]
    assert [(tag, value) for tag, name, value in attributes if name in ("src", "href", "data")] == [("link", "data:,")]
    assert not [name for _, name, _ in attributes if name.startswith("on")]
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none';")


def test_text_of_clients_and_of_the_configuration_never_becomes_markup(tmp_path: Path) -> None:
    start = {key: HOSTILE if isinstance(value, str) and key != "kind" else value for key, value in START.items()}
    message = {"kind": "message", "round": 0, "node": HOSTILE, "direction": "uplink", "purpose": "train"}
    rejected = [{"client": HOSTILE, "kind": HOSTILE, "reason": HOSTILE}]
    metrics = NO_METRICS | {"shared_global": {HOSTILE: 0.5}}
    directory = written(
        tmp_path / "run",
        {**start, "notes": [HOSTILE], "environment": {HOSTILE: HOSTILE}},
        {**message, "wire_bytes": 1},
        {"kind": "event", "round": 0, "client": HOSTILE, "event": HOSTILE},
        round_row(0, metrics=metrics, rejected=rejected, sampled=[HOSTILE], clients=[HOSTILE], offline=[HOSTILE]),
        {"kind": "end", "status": HOSTILE, "reason": HOSTILE},
    )
    (directory / "config.yaml").write_text("name: </pre><script>alert(3)</script>")
    text = html_page(read_run(directory))
    text.encode()  # half a character, as \ud800, can't be written to a file
    page = Page(text)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert not {"\x1b", "\u202e"} & set(text)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "</pre><script>alert(3)</script>" in page.text


def test_a_private_run_says_what_epsilon_bounds_and_any_other_says_nothing_of_it(run: Run) -> None:
    private = run("privacy={clip_norm: 1, noise_multiplier: 0}", "compressor={name: quantize}", "num_rounds=1")
    page = html_page(read_run(private))
    assert "Differential privacy" in page
    assert page.count("no bound") == 2
    assert "Differential privacy" not in html_page(read_run(run("num_rounds=1")))


def test_a_run_without_a_single_round_has_a_page(tmp_path: Path) -> None:
    directory = written(tmp_path / "run", START, {"kind": "end", "status": "failed", "reason": "2 clients wanted"})
    write_report([directory])
    page = Page((directory / PAGE_FILE).read_text(encoding="utf-8"))
    assert "The run ended: 2 clients wanted" in page.text
    assert "No round has been scored yet." in page.text and "No client has taken part yet." in page.text


def test_a_run_that_goes_on_says_so_and_an_unfinished_row_is_left_out(tmp_path: Path) -> None:
    directory = written(tmp_path / "run", START, round_row(0), round_row(1, skipped=True))
    with (directory / LEDGER_FILE).open("a") as file:
        file.write('{"kind": "round", "ro')
    page = page_of(directory)
    assert "running or interrupted" in page.text and "1 of 3" in page.text
    assert "Skipped, for want of good replies: round 1." in page.text


def test_scores_that_are_absent_or_not_finite_are_dashes_and_no_points(tmp_path: Path) -> None:
    metrics = NO_METRICS | {"shared_global": {"accuracy": 0.5, "loss": None}}
    directory = written(tmp_path / "run", START, round_row(0, metrics=metrics), round_row(1, metrics=metrics))
    page = page_of(directory)
    assert page.text.count("0.500") == 3  # tiles of the last round and of the last rounds, and the table
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_an_algorithm_without_a_shared_model_is_shown_by_its_private_ones(run: Run) -> None:
    result = read_run(run("algorithm.name=local_only"))
    page = Page(html_page(result))
    assert "accuracy, private models" in page.text
    assert f"{result.score('private_local'):.3f}" in page.text
    assert page.count("svg") == 4
    assert "shared model" not in page.text


def test_rejected_replies_are_counted_by_kind_and_reason_and_many_reasons_are_cut(tmp_path: Path) -> None:
    rejected = [{"client": "a", "kind": "norm", "reason": f"too long {n}"} for n in range(50)]
    rejected += [{"client": "b", "kind": "late", "reason": "x" * 10_000}] * 3
    page = page_of(written(tmp_path / "run", START, round_row(1, rejected=rejected, sampled=["a", "b"])))
    assert "and 40 other reasons" in page.text
    assert "3 times: " + "x" * 400 + "…" in page.text
    assert "x" * 401 not in page.text


def test_a_node_that_has_not_said_who_it_is_is_no_client_of_the_page() -> None:
    rejection = {"kind": "hello", "client": NOBODY, "reason": "r"}
    found = account_of(
        [
            {"kind": "event", "client": NOBODY, "round": 1, "event": "refused"},
            {"kind": "round", "round": 1, "skipped": True, "rejected": [rejection]},
        ]
    )
    assert found.clients == {}
    assert found.rejected["hello"]["r"] == 1


def test_two_hundred_clients_are_rows_of_one_table_that_scrolls(tmp_path: Path) -> None:
    names = [f"site-{n}" for n in range(200)]
    page = page_of(
        written(tmp_path / "run", START, round_row(1, sampled=names, clients=names[:150], offline=names[:1]))
    )
    assert "200 clients, by name" in page.text
    assert [attrs.get("tabindex") for _, attrs in page.tags if "tall" in (attrs.get("class") or "")] == ["0"]
    assert page.text.count("offline") == 1


def test_a_failed_run_is_reported_and_its_own_error_is_heard(tmp_path: Path) -> None:
    directory = written(tmp_path / "run", START, {"kind": "end", "status": "failed", "reason": "gone"})
    with pytest.raises(RuntimeError, match="gone"), reported(directory):
        raise RuntimeError("gone")
    assert "The run ended: gone" in (directory / PAGE_FILE).read_text()
    (directory / LEDGER_FILE).write_text("{}\n")
    with pytest.raises(RuntimeError, match="again"), reported(directory):
        raise RuntimeError("again")


# Charts

AXES = Axes("round", "accuracy", str, str)


def test_a_chart_of_nothing_is_nothing() -> None:
    for points in ((), [(0, float("nan"))]):
        assert line_chart([Series("a", points, 0)], AXES) == bar_chart([Series("a", points, 0)], AXES) == ""


@pytest.mark.parametrize("values", [[0], [5], [0.1, 0.1], [0, 1], [-3, 1e9], [1e-12, 3e-12], [0.05, 0.93], [7, 7.0001]])
def test_ticks_are_few_and_enclose_the_values(values: list[float]) -> None:
    ticks = _ticks(values)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= min(values) + 1e-9 * abs(min(values))
    assert ticks[-1] >= max(values) - 1e-9 * abs(max(values))


@pytest.mark.parametrize("values", [[0.9342281152705306, 0.9342281152705307], [0.0, 5e-324], [1.0, 1.0 + 2e-16]])
def test_values_that_differ_in_their_last_bits_alone_can_be_drawn(values: list[float]) -> None:
    ticks = _ticks(values)
    assert ticks == sorted(set(ticks)) and len(ticks) > 1


def test_whole_ticks_are_whole() -> None:
    for last in (0, 1, 2, 7, 12, 100, 1234):
        assert all(tick == int(tick) for tick in _ticks([0, last], whole=True))


def test_every_value_of_a_chart_lies_in_the_picture_and_has_a_title() -> None:
    points = [(x, (x * 37) % 11 - 5.0) for x in range(MOST_DOTS + 20)]
    chart = line_chart([Series("a<b", points, 0)], AXES)
    places = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', chart)
    assert len(places) == len(points) == chart.count("<title>a&lt;b, round ")
    assert all(0 <= float(x) <= 560 and 0 <= float(y) <= 300 for x, y in places)


def test_zero_is_shown_where_sizes_are_compared() -> None:
    series = [Series("a", [(0, 40.0), (1, 42.0)], 0)]
    assert ">0.0<" not in line_chart(series, AXES)
    assert ">0.0<" in line_chart(series, replace(AXES, from_zero=True))


def test_bars_stand_side_by_side_within_their_round() -> None:
    chart = bar_chart([Series("up", [(1, 2.0), (2, 1.0)], 0), Series("down", [(1, 1.0), (2, 0.0)], 1)], AXES)
    bars = re.findall(r'<rect class="bar c\d" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', chart)
    spans = sorted((float(x), float(x) + float(width)) for x, width, _ in bars)
    assert all(end <= start + 0.02 for (_, end), (start, _) in pairwise(spans))
    assert sorted(float(height) > 0 for *_, height in bars) == [False, True, True, True]


def test_the_scores_at_the_end_are_no_round_beyond_the_last(run: Run) -> None:
    page = html_page(read_run(run("num_rounds=2")))
    assert "<title>up, round end: " in page and "<title>up, round 3: " not in page


def test_few_clients_have_no_tenth(run: Run) -> None:
    page = html_page(read_run(run("num_rounds=1")))
    assert "90th percentile of clients" in page and "tenth ends" not in page and "tenth begins" not in page


def test_equal_scores_are_drawn_below_one() -> None:
    assert _ticks([0.97, 0.97])[-1] == pytest.approx(1.0)
