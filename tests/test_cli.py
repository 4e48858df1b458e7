"""The command line: exit status, one-line errors, what is printed and written."""

import fcntl
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedkd_flwr import cli
from fedkd_flwr.experiment import CONFIG_FILE
from fedkd_flwr.flower.checkpoint import Checkpoints
from fedkd_flwr.flower.commands import Commands
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.retention import LOCK_FILE, REFERENCES_DIR
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.server import parts_of
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.measure.summary import SUMMARY_FILE, read_summary
from tests.conftest import ROOT, SMALL, Run, small


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
        (
            "algorithm.name=fedsgd",
            "algorithm.name: must be one of 'fd', 'fedavg', 'fedkd', 'fedkd_paper', 'fedprox', ",
        ),
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
        (
            "task.partition={alpha: 0.5}",
            "task.partition.name: must be one of 'iid', 'dirichlet', 'pathological', 'size', 'rare_labels', got None",
        ),
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


def test_report_turns_bytes_into_seconds_for_another_link(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, other = run("num_rounds=1"), run("num_rounds=1", "network={uplink_mbps: 5, downlink_mbps: 5}")
    link = "--set", "network={uplink_mbps: 0.5, downlink_mbps: 2}"
    assert fedkd("report", str(directory), str(other), *link, "--output-dir", str(tmp_path)) == 0
    assert "over 0.5 Mbit/s up, 2 down" in (tmp_path / "table.md").read_text()
    assert "note: runs name several networks; all are shown over 0.5 Mbit/s up, 2 down" in capsys.readouterr().out
    assert fedkd("report", str(directory), "--set", "num_rounds=3") == 2
    assert "only network can, got 'num_rounds=3'" in capsys.readouterr().err
    assert fedkd("report", str(directory), "--set", "network={uplink_mbps: 0, downlink_mbps: 2}") == 2
    assert "network.uplink_mbps: must be greater than 0, got 0" in capsys.readouterr().err


def test_report_of_a_directory_without_a_run_is_exit_2(tmp_path: Path) -> None:
    assert fedkd("report", str(tmp_path)) == 2


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"kind": "round"}\n'])
def test_report_of_something_else_than_a_ledger_is_one_line_and_exit_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    assert fedkd("report", str(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


ONE_CLASS_EACH = ("--set", "task.partition={name: pathological, classes_per_client: 1}", "--set", "num_clients=10")
ONE_CLASS_NOTE = "note: clients 0, 1, 2, 3, 4 and 5 more have training examples of one class only (10 of 10 clients)"


def test_check_of_what_is_learned_by_acting_draws_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    few = "task={name: cartpole, episodes: 1, test_episodes: 1}"
    assert (
        fedkd("check", str(ROOT / "conf/cartpole_frd.yaml"), "--set", few, "--output-dir", str(tmp_path / "out")) == 0
    )
    said = capsys.readouterr().out
    assert "valid; about" in said and "partition" not in said
    assert not (tmp_path / "out").exists()


def test_check_draws_the_labels_of_the_clients_and_notes_what_is_hard(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedkd("check", conf, *ONE_CLASS_EACH, "--output-dir", str(tmp_path / "out")) == 0
    figure = tmp_path / "out" / "small" / "partition.png"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{conf}: valid; ")
    assert lines[1:] == [ONE_CLASS_NOTE, f"partition: {figure}"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["small", "partition.png"]


def test_a_run_notes_what_is_hard_once_and_before_it_begins(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_execute", lambda *_: cli.err.print("begins"))
    monkeypatch.setattr(cli, "_show", lambda *_: None)
    assert fedkd("run", conf, *ONE_CLASS_EACH, "--output-dir", str(tmp_path)) == 0
    *first, noted, begins = capsys.readouterr().err.splitlines()
    assert (len(first), noted, begins) == (3, ONE_CLASS_NOTE, "begins")
    assert fedkd("compare", conf, conf, *ONE_CLASS_EACH, "--output-dir", str(tmp_path)) == 0
    said = capsys.readouterr().err.splitlines()
    assert (said.count(ONE_CLASS_NOTE), said.count("begins"), said[3]) == (1, 2, ONE_CLASS_NOTE)


def test_a_run_says_first_who_takes_part_what_leaves_a_client_how_much_and_where_it_goes(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_execute", lambda *_: None)
    monkeypatch.setattr(cli, "_show", lambda *_: None)
    assert fedkd("run", conf, "--set", "compressor={name: identity}", "--output-dir", str(tmp_path / "out")) == 0
    who, what, size = capsys.readouterr().err.splitlines()
    assert who.startswith(f"small: 3 clients, 3 rounds; results: {tmp_path / 'out' / 'small'}/")
    assert what == (
        "what leaves a client: the update of the student through identity, with scores and numbers of examples; the "
        "teacher and the data stay"
    )
    assert size.startswith("bytes: about ") and " MB for each client, up and down, " in size


def test_report_of_several_runs_writes_beside_them_and_passes_over_earlier_comparisons(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / "results" / "small" / name for name in ("one", "two")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        run("num_rounds=1").rename(place)
    assert fedkd("report", *map(str, places)) == 0
    (comparison,) = (tmp_path / "results" / "comparison").iterdir()
    assert f"page: {comparison / 'report.html'}" in capsys.readouterr().out
    assert not any((place / "table.md").exists() for place in places)
    assert fedkd("report", *map(str, places), str(comparison)) == 0
    (places[0].parent / "partition.png").touch()  # of `fedkd check`
    assert fedkd("report", *map(str, places[0].parent.iterdir())) == 0


def test_a_change_without_set_is_told_from_a_file(conf: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("compare", conf, "num_rounds=2") == 2
    assert "'num_rounds=2' does not exist; put --set before every change" in capsys.readouterr().err


def test_check_predicts_the_bytes_of_a_reply(
    conf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    from tests.flower.test_exchange import rows_of

    assert fedkd("check", conf, "--output-dir", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    predicted_kb = float(said.split("about ")[1].split(" kB up")[0])
    real = [
        m["wire_bytes"] for m in rows_of(run(), "message") if m["purpose"] == "train" and m["direction"] == "uplink"
    ]
    assert predicted_kb * 1000 == pytest.approx(sum(real) / len(real), rel=0.02)


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


# What clients keep


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """A state directory of two trainings, three clients."""
    from tests.flower.test_store import STATE

    for training, client in (("t1", "alice"), ("t1", "bob"), ("t2", "alice")):
        ClientStore(tmp_path / "state", training, client).commit(STATE)
    return tmp_path / "state"


def kept(states: Path) -> set[str]:
    found = states.glob("*/*") if states.exists() else ()
    return {f"{path.parent.name}/{path.name}" for path in found if path.name not in (REFERENCES_DIR, LOCK_FILE)}


def test_state_lists_what_clients_keep_and_deletes_nothing(states: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("state", str(states)) == 0
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines() if line.strip().startswith("t")]
    assert rows[1:] == [
        [training, client, "4", "round", "5"] for training, client in (("t1", "alice"), ("t1", "bob"), ("t2", "alice"))
    ]
    assert kept(states) == {"t1/alice", "t1/bob", "t2/alice"}


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ((), set()),
        (("--training", "t1"), {"t2/alice"}),
        (("--client", "alice"), {"t1/bob"}),
        (("--training", "t1", "--client", "alice"), {"t1/bob", "t2/alice"}),
    ],
)
def test_state_deletes_what_it_lists(
    states: Path, chosen: tuple[str, ...], left: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedkd("state", str(states), *chosen, "--delete") == 0
    assert capsys.readouterr().out.count("deleted") == 3 - len(left)
    assert kept(states) == left
    assert {path.name for path in states.iterdir()} == {name.split("/")[0] for name in left}


def test_a_damaged_state_is_shown_as_such(states: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (states / "t2" / "alice" / "state.safetensors").write_bytes(b"x")
    assert fedkd("state", str(states), "--training", "t2") == 0
    assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("absent",), "holds no client state"), (("state", "--client", "carol"), "holds no client state of that name")],
)
def test_nothing_to_list_is_one_line_and_exit_2(
    states: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = states.parent / arguments[0]
    assert fedkd("state", str(directory), *arguments[1:], "--delete") == 2
    assert capsys.readouterr().err == f"fedkd: {str(directory)!r} {says}\n"
    assert len(kept(states)) == 3


def test_without_a_directory_state_looks_where_flower_keeps_it(states: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = states.parent / "home"
    (home / "fedkd").mkdir(parents=True)
    states.rename(home / "fedkd" / "state")
    monkeypatch.setenv("FLWR_HOME", str(home))
    assert fedkd("state", "--training", "t2", "--delete") == 0
    assert kept(home / "fedkd" / "state") == {"t1/alice", "t1/bob"}


def test_a_state_that_cannot_be_deleted_is_one_line(
    states: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refused)
    assert fedkd("state", str(states), "--delete") in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1


# Going on


def begun(tmp_path: Path, status: str = "", stopped_early: str | None = None, *overrides: str) -> Path:
    """A run directory of the small experiment, as far as `resume` looks before it starts anything."""
    run_dir = tmp_path / "out" / "small" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / CONFIG_FILE).write_text(small(*overrides).to_yaml())
    if status:
        summary = {"status": status, "num_rounds": 3, "stopped_early": stopped_early}
        (run_dir / SUMMARY_FILE).write_text(json.dumps(summary))
    return run_dir


def resume_says(capsys: pytest.CaptureFixture[str], run_dir: Path, *arguments: str) -> str:
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    assert fedkd("resume", str(run_dir), "--in-process", *arguments) == 2
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    said = capsys.readouterr().err
    assert said.startswith("fedkd: ")
    assert len(said.splitlines()) == 1
    return said.removeprefix("fedkd: ").strip()


def test_a_directory_that_holds_no_run_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = resume_says(capsys, tmp_path)
    assert said == f"{str(tmp_path)!r} holds no config.yaml; give results/<experiment>/<run>"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=2", "seed"),
        ("algorithm.temperature=3", "algorithm.temperature"),
        ("algorithm.name=fedavg", "algorithm.name"),
        ("server.aggregator.weighting=uniform", "server.aggregator.weighting"),
        ("server.aggregator.name=fedmedian", "server.aggregator.name"),
        ("server.validation.max_norm_ratio=null", "server.validation.max_norm_ratio"),
        ("task.partition={name: dirichlet, alpha: 1}", "task.partition.name"),
    ],
)
def test_another_experiment_is_no_continuation_forced_or_not(
    tmp_path: Path, change: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = begun(tmp_path)
    expected = f"{key}: differs from the run in {str(run_dir)!r}, so it can't be resumed; start a new run"
    assert resume_says(capsys, run_dir, "--set", change) == expected
    assert resume_says(capsys, run_dir, "--set", change, "--set", "num_rounds=9", "--force") == expected


def test_another_number_of_rounds_needs_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = begun(tmp_path)
    said = resume_says(capsys, run_dir, "--set", "num_rounds=9")
    assert said == f"num_rounds: differs from the run in {str(run_dir)!r}, so it can't be resumed; force it"


@pytest.mark.parametrize("rounds", [("--set", "num_rounds=2", "--force"), ()])
def test_a_completed_run_has_nothing_to_resume(
    tmp_path: Path, rounds: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = begun(tmp_path, "completed")
    assert resume_says(capsys, run_dir, *rounds) == f"{str(run_dir)!r} is completed; there is nothing to resume"


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rounds and force of every run that `resume` would have started."""
    started: list[tuple[int, bool]] = []

    def execute(experiment: object, run_dir: Path, in_process: bool, *, resume: bool, force: bool) -> None:
        assert resume
        started.append((experiment.num_rounds, force))  # type: ignore[attr-defined]

    monkeypatch.setattr(cli, "_execute", execute)
    monkeypatch.setattr(cli, "_show", lambda *_: None)
    return started


@pytest.mark.parametrize(
    "change",
    [
        "output_dir=elsewhere",
        "server.round_timeout_seconds=5",
        "server.connect_timeout_seconds=5",
        "server.min_available=2",
        "server.keep_checkpoints=9",
        "server.early_stop.target=0.5",
    ],
)
@pytest.mark.parametrize("status", ["", "failed", "stopped", "unfinished"])
def test_what_decides_nothing_may_change(
    tmp_path: Path, status: str, change: str, resumed: list[tuple[int, bool]]
) -> None:
    assert fedkd("resume", str(begun(tmp_path, status)), "--set", change) == 0
    assert resumed == [(3, False)]


def test_a_completed_run_goes_on_for_more_rounds_when_forced(tmp_path: Path, resumed: list[tuple[int, bool]]) -> None:
    assert fedkd("resume", str(begun(tmp_path, "completed")), "--set", "num_rounds=9", "--force") == 0
    assert resumed == [(9, True)]


def test_a_run_that_stopped_early_goes_on_without_the_reason_to_stop(
    tmp_path: Path, resumed: list[tuple[int, bool]]
) -> None:
    run_dir = begun(tmp_path, "completed", "accuracy 0.6 is at least 0.5", "server.early_stop.target=0.5")
    assert fedkd("resume", str(run_dir), "--set", "server.early_stop.target=null") == 0
    assert resumed == [(3, False)]


def test_a_damaged_summary_is_written_again(tmp_path: Path) -> None:
    run_dir = begun(tmp_path)
    (run_dir / SUMMARY_FILE).write_text("{")
    assert fedkd("resume", str(run_dir), "--in-process") == 0
    assert read_summary(run_dir)["status"] == "completed"  # type: ignore[index]


@pytest.mark.parametrize("command", ["resume", "status", "report"])
def test_a_damaged_line_of_the_ledger_is_one_line_that_says_where(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = begun(tmp_path)
    row = '{"kind": "event", "elapsed_seconds": 1.0}\n'
    (run_dir / "ledger.jsonl").write_text(row + "{broken}\n" + row)
    assert fedkd(command, str(run_dir)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fedkd: line 2 of {str(run_dir / 'ledger.jsonl')!r} is damaged: ")
    assert len(said.splitlines()) == 1


def test_a_run_goes_on_from_the_checkpoint_before_one_that_lacks_a_part(tmp_path: Path) -> None:
    run_dir = begun(tmp_path, "", None, "num_rounds=1")
    assert fedkd("resume", str(run_dir), "--in-process") == 0
    student = (run_dir / "student" / "model.safetensors").read_bytes()
    checkpoints = Checkpoints(run_dir, keep=9)
    newest = checkpoints.latest()
    assert newest is not None
    assert parts_of(runtime_of(small("num_rounds=1"))) == newest.parts.keys() - {"account"}
    checkpoints.save(replace(newest, parts={name: of for name, of in newest.parts.items() if name != "roster"}))
    (run_dir / SUMMARY_FILE).unlink()
    assert fedkd("resume", str(run_dir), "--in-process") == 0
    assert (run_dir / "student" / "model.safetensors").read_bytes() == student


def test_a_run_that_is_still_going_on_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = begun(tmp_path)
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert fedkd("resume", str(run_dir), "--in-process") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"fedkd: {str(run_dir)!r} is in use by a run that is still going on"


def test_deploy_alone_says_what_it_starts_and_where_hosts_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("deploy") == 2
    assert capsys.readouterr().err == (
        "fedkd: deploy starts only a demo: --demo CONF --nodes N; how to deploy on hosts is in docs/deploy.md\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--demo", "nowhere.yaml"), "config file 'nowhere.yaml' does not exist"),
        (("--demo", "small.yaml", "--nodes", "0"), "Invalid value for '--nodes'"),
        (("--demo", "small.yaml", "--nodes", "1"), "server.min_replies must be at most the 1 clients"),
        (("--demo", "small.yaml", "--set", "num_round=1"), "num_round: unknown key"),
        (("--demo", "small.yaml", "--output-dir", "/dev/null/x"), "output_dir: must be a directory"),
        (("small.yaml",), "No such command 'small.yaml'"),
        (("certificates", "keys"), "Missing option '--host'"),
        (("certificates", "keys", "--host", "a:8000"), "hosts: must be host names or IP addresses"),
        (("certificates", "small.yaml", "--host", "a"), "'small.yaml' can't be made: "),
        (("certificates", "keys", "--host", "a", "--days", "0"), "Invalid value for '--days'"),
        (("node-key", "small.yaml"), "'small.yaml' is there already"),
        (("connection", "site", "a:8000", "nowhere.crt"), "'nowhere.crt' does not exist"),
        (("register", "site", "nowhere.pub"), "'nowhere.pub' does not exist"),
        (("register", "site", "small.yaml"), "'{home}/config.toml' has no connection 'site'; make it with"),
    ],
)
def test_a_mistake_in_deploying_gives_one_line_exit_2_and_no_files(
    arguments: tuple[str, ...],
    says: str,
    conf: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    assert fedkd("deploy", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"fedkd: {says.format(home=tmp_path / 'home')}")
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_one_key_that_is_refused_does_not_keep_the_others_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(flower: Commands, key: Path, name: str) -> str:
        if name == "a":
            raise RunError("a.pub was not registered: Key in use")
        return "17"

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Commands, "register", register)
    keys = [tmp_path / name for name in ("a.pub", "b.pub")]
    for key in (*keys, tmp_path / "ca.crt"):
        key.write_text("")
    assert fedkd("deploy", "connection", "site", "a:8000", str(tmp_path / "ca.crt")) == 0
    assert fedkd("deploy", "register", "site", *map(str, keys)) == 1
    said = capsys.readouterr()
    assert "a: a.pub was not registered: Key in use\nb: node 17\n" in said.out
    assert said.err == "fedkd: 1 of 2 were not registered: a\n"


def test_certificates_keys_and_connection_are_made_by_one_command_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    assert fedkd("deploy", "certificates", "keys", "--host", "fl.example.org", "--host", "10.0.0.7") == 0
    assert fedkd("deploy", "node-key", "keys/site1") == 0
    assert fedkd("deploy", "connection", "site", "fl.example.org:8000", "keys/ca.crt") == 0
    made = {"ca.crt", "ca.key", "server.crt", "server.key", "superexec.secret", "site1", "site1.pub"}
    assert {path.name for path in (tmp_path / "keys").iterdir()} == made
    assert str(tmp_path / "keys" / "ca.crt") in (tmp_path / "home" / "config.toml").read_text()
