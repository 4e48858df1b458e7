"""The row of always giving the same answer: in the table, on the page, and where ledgers have none."""

from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.measure.link import USUAL
from fedkd_flwr.measure.summary import summarise
from fedkd_flwr.report.html_page import html_page
from fedkd_flwr.report.runs import RunResult, table_rows
from fedkd_flwr.report.table import markdown_table

FOUND = {"label": "fi|ne", "share": 0.95, "num_classes": 2, "scores": {"accuracy": 0.934, "macro_f1": 0.483}}
SCORES = {"accuracy": 0.934, "macro_f1": 0.5}
START = {"kind": "start", "experiment": "x", "seed": 0, "num_clients": 2, "num_rounds": 1, "elapsed_seconds": 0.0}


def run_of(directory: Path, **start: Any) -> RunResult:
    metrics = {"shared_global": SCORES, "shared_local": None, "private_local": None, "ensemble_local": None}
    row = {"kind": "round", "round": 1, "skipped": False, "local_version": 0, "metrics": metrics, "seconds": {}}
    rows = ({**START, **start}, {**row, "elapsed_seconds": 1.0})
    return RunResult(directory, summarise(rows), rows)


def test_a_table_has_one_row_of_it_and_macro_f1_where_classes_are_uneven(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, majority=FOUND)] * 2
    head, _, *rows = markdown_table(table_rows(runs, USUAL), "a link", "round 1").splitlines()
    assert "| macro-F1 |" in head
    assert [row.split(" | ")[0] for row in rows[:3]] == ["| x (seed 0)"] * 2 + ["| always 'fi?ne' (95 %)"]
    assert rows[0].split(" | ")[1:4] == ["0.934", "0.934", "0.500"]
    assert rows[2].split(" | ")[1:4] == ["0.934", "0.934", "0.483"]


@pytest.mark.parametrize("share", [0.6, None])
def test_macro_f1_is_left_out_where_accuracy_tells_enough(share: float | None, tmp_path: Path) -> None:
    rows = table_rows([run_of(tmp_path, majority=FOUND | {"share": share})], USUAL)
    assert "macro-F1" not in markdown_table(rows, "a link", "round 1").splitlines()[0]
    assert rows[-1]["shared model"] == "0.934"


def test_a_page_has_a_row_of_it(tmp_path: Path) -> None:
    page = html_page(run_of(tmp_path, majority=FOUND, leaves="<the update>"))
    assert "always &#x27;fi?ne&#x27; (95 %), server's test set" in page
    assert "0.483" in page and "Scores after round 1" in page
    assert "What leaves a client: &lt;the update&gt;." in page


def test_a_ledger_of_an_earlier_version_has_no_such_row(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert len(table_rows([run], USUAL)) == 1
    assert "always" not in html_page(run) and "What leaves" not in html_page(run)
