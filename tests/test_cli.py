"""The command line: exit status, one-line errors, what is printed and written."""

import sys
from pathlib import Path

import pytest

from fedkd_flwr import cli
from tests.conftest import SMALL, Run


def fedkd(*arguments: str) -> int:
    """Exit status of `fedkd ARGUMENTS`."""
    before = sys.argv
    sys.argv = ["fedkd", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def conf(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("num_round=3", "num_round: unknown key; allowed: name, seed, num_clients, num_rounds"),
        ("num_rounds=0", "num_rounds: must be greater than or equal to 1, got 0"),
        ("num_clients=many", "num_clients: must be a whole number, got 'many'"),
        ("algorithm.name=fedsgd", "algorithm.name: must be one of 'fedavg', 'fedkd', 'fedprox', 'local_only', got"),
        ("compressor.energy_start=1.5", "compressor.energy_start: must be less than or equal to 1, got 1.5"),
        ("task.partition.alfa=1", "task.partition.alfa: unknown key; allowed: name"),
        ("task.student.num_layers=3", "task: student.num_layers must be at most teacher.num_layers (2), got 3"),
        ("num_clients=2000", "num_clients: 2000 clients need at least"),
        ("server.fraction_train=0.1", "server.fraction_train: 0.1 of 3 clients is none; raise it"),
        ("server.min_replies=4", "server.min_replies must be at most the 3 clients that train in a round, got 4"),
        ("algorithm.layer_map=[1, 2]", "algorithm.layer_map must name 1 teacher layers in [1, 2], got [1, 2]"),
        ("output_dir=/dev/null/x", "output_dir: must be a directory that can be written, got '/dev/null/x'"),
        ("output_dir=~nobody-here/x", "output_dir: must be a directory that can be written, got '~nobody-here/x'"),
        ("name=2024-13-45", "override name: '2024-13-45' is not a YAML value"),
        ("task.partition={alpha: 0.5}", "task.partition.name: must be one of 'iid', 'dirichlet', got None"),
        (
            "algorithm.student_optimizer.learning_rate=.inf",
            "algorithm.student_optimizer.learning_rate: must be",
        ),
        ("seed", "an override must look like key.key=value, got 'seed'"),
    ],
)
def test_a_mistake_gives_one_line_exit_2_and_no_files(
    conf: str,
    change: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedkd("run", conf, "--in-process", "--set", change) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"fedkd: {says}")
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("run", "nowhere.yaml") == 2
    assert capsys.readouterr().err == "fedkd: config file 'nowhere.yaml' does not exist; give the path of a YAML file\n"


def test_an_unknown_option_is_one_line_and_exit_2(conf: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("run", conf, "--in-proces") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_run_prints_the_table_and_where_the_figure_is(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedkd("run", conf, "--in-process", "--output-dir", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "small (seed 1)" in printed
    run_dir = next((tmp_path / "out" / "small").iterdir())
    assert f"figure: {run_dir / 'curves.png'}" in printed
    for name in ("config.yaml", "ledger.jsonl", "summary.json", "curves.png", "table.md", "student/config.json"):
        assert (run_dir / name).is_file(), name


def test_compare_puts_all_runs_in_one_table(conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("name: small", "name: other"))
    assert fedkd("compare", conf, str(other), "--in-process", "--output-dir", str(tmp_path / "out")) == 0
    table = next((tmp_path / "out" / "comparison").glob("*/table.md")).read_text()
    assert "| small (seed 1) |" in table
    assert "| other (seed 1) |" in table


def test_report_draws_a_finished_run_again(run: Run, tmp_path: Path) -> None:
    run_dir = run()
    assert fedkd("report", str(run_dir), "--output-dir", str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / "curves.png").is_file()


def test_report_of_a_directory_without_a_run_is_exit_2(tmp_path: Path) -> None:
    assert fedkd("report", str(tmp_path)) == 2


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"kind": "round"}\n'])
def test_report_of_something_else_than_a_ledger_is_one_line_and_exit_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    assert fedkd("report", str(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_check_predicts_the_bytes_of_a_first_round(conf: str, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    from tests.flower.test_exchange import rows_of

    assert fedkd("check", conf) == 0
    said = capsys.readouterr().out
    predicted_kb = float(said.split("about ")[1].split(" kB up")[0])
    real = [
        m["wire_bytes"] for m in rows_of(run(), "message") if m["purpose"] == "train" and m["direction"] == "uplink"
    ]
    assert predicted_kb * 1000 == pytest.approx(real[0], rel=0.15)


def test_a_run_that_fails_is_exit_1_with_its_reason(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import client_app

    def broken(message: object, context: object) -> None:
        raise RuntimeError("broken client")

    monkeypatch.setattr(client_app, "app", broken)
    arguments = ("run", conf, "--in-process", "--output-dir", str(tmp_path / "out"))
    assert fedkd(*arguments, "--set", "server.connect_timeout_seconds=0.5") == 1
    assert "broken client" in capsys.readouterr().err


def test_ctrl_c_is_exit_130_and_the_summary_says_stopped(
    conf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedkd_flwr.flower.exchange import Exchange
    from fedkd_flwr.measure.summary import read_summary

    def interrupted(self: object, server_round: int, replies: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exchange, "aggregate_train", interrupted)
    assert fedkd("run", conf, "--in-process", "--output-dir", str(tmp_path / "out")) == 130
    summary = read_summary(next((tmp_path / "out" / "small").iterdir()))
    assert summary is not None
    assert summary["status"] == "stopped"
