"""What Flower's commands are told, and what their answers are taken for."""

import tomllib
from pathlib import Path

import pytest

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.commands import Commands, _check_outcome, add_connection
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.processes import environment
from fedkd_flwr.flower.settings import flower_home
from tests.flower.test_archive import full_disk


def connections(home: Path) -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"]
    return found


def test_a_first_connection_is_the_default_and_names_the_authority_absolutely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add_connection(tmp_path / "home", "site", "fl.example.org:8000", Path("ca.crt"))
    assert connections(tmp_path / "home") == {
        "default": "site",
        "site": {"address": "fl.example.org:8000", "root-certificates": str(tmp_path / "ca.crt")},
    }


def test_a_second_connection_leaves_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.touch(0o600)
    file.write_text('# mine\n[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"')
    add_connection(tmp_path, "dep", "127.0.0.1:8000", None)
    assert file.read_text().startswith("# mine\n")
    assert file.stat().st_mode & 0o777 == 0o600
    assert connections(tmp_path) == {
        "default": "local",
        "local": {"address": ":local:"},
        "dep": {"address": "127.0.0.1:8000", "insecure": True},
    }


def test_a_connection_is_not_replaced(tmp_path: Path) -> None:
    add_connection(tmp_path, "dep", "a:1", None)
    with pytest.raises(ConfigError, match="has a connection 'dep' already"):
        add_connection(tmp_path, "dep", "b:1", None)
    assert connections(tmp_path)["dep"] == {"address": "a:1", "insecure": True}


def test_a_configuration_that_is_no_toml_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[superlink")
    with pytest.raises(ConfigError, match="can't be read as TOML"):
        add_connection(tmp_path, "dep", "a:1", None)
    assert (tmp_path / "config.toml").read_text() == "[superlink"


@pytest.mark.parametrize("text", ['C:\\data "x" \U0001f600', "a\nb", "é"])
def test_any_text_of_a_run_config_arrives_as_it_was(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flower = Commands(tmp_path, "dep")
    monkeypatch.setattr(flower, "_ask", lambda *_: {"run-id": 7})
    flower.submit(tmp_path, {"set": text})
    assert tomllib.loads((tmp_path / "run.toml").read_text(encoding="utf-8")) == {"set": text}


def test_a_refused_registration_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flower = Commands(tmp_path, "dep")
    said = "Using SuperLink: dep (127.0.0.1:8000)\n[code: 23] Key\nin use"
    monkeypatch.setattr(flower, "_ask", lambda *_: {"success": False, "error-message": said})
    with pytest.raises(RunError, match=r"^node1\.pub was not registered: \[code: 23\] Key in use$"):
        flower.register(tmp_path / "node1.pub", "node1")


def test_an_answer_that_is_no_json_is_told_from_its_end(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "flwr"
    program.write_text(f"#!/bin/sh\necho 'begin {'x ' * 300} {{no}} end'\n")
    program.chmod(0o700)
    with pytest.raises(RunError, match=r"^\S*flwr ls: \.\.\. x x .* \{no\} end$"):
        Commands(tmp_path, "dep")._ask(str(program), "ls")


def test_a_connection_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_connection(tmp_path, "first", "a:1", None)
    before = (tmp_path / "config.toml").read_text()
    with full_disk(20), pytest.raises(ConfigError, match="can't be written: File too large"):
        add_connection(tmp_path, "second", "b:1", None)
    assert (tmp_path / "config.toml").read_text() == before


def test_flowers_home_is_absolute_because_its_commands_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", "home")
    assert flower_home() == tmp_path / "home"


def test_a_proxy_is_not_asked_for_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "intranet")
    assert environment(tmp_path)["no_proxy"] == environment(tmp_path)["NO_PROXY"] == "intranet,127.0.0.1,localhost"


LOG = """\x1b[91mERROR \x1b[0m: client 3
ValueError: a client's, long before
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  raise OSError(
OSError: No space left on device: '/tmp/x'

The above exception was the direct cause of the following exception:

RuntimeError: Simulation Runtime crashed.
RuntimeError: An error was encountered. Ending simulation.
"""


@pytest.mark.parametrize(
    ("details", "log", "said"),
    [
        (
            "Simulation failed with exception: An error was encountered. Ending simulation.",
            LOG,
            "OSError: No space left",
        ),
        ("", LOG, "OSError: No space left on device: '/tmp/x' "),
        (
            "Task failed with unknown error.",
            "ray.exceptions.RaySystemError: full\n",
            "ray.exceptions.RaySystemError: full",
        ),
        ("Task failed with unknown error.", "nothing of use\n", "Task failed with unknown error."),
        ("", "", "no reason given"),
        ("No heartbeat received from the task", "", "the process of the run died (out of memory?); go on with: fedkd"),
        ("no round had 2 good replies", LOG, "no round had 2 good replies"),
        ("\x1b[2Jno \u202eround", "", r"\x1b[2Jno \u202eround"),
    ],
)
def test_a_run_that_failed_says_why_also_where_flower_has_the_reason_in_its_log_alone(
    details: str, log: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as caught:
        _check_outcome({"status": "finished:failed", "status-details": details}, tmp_path, log)
    assert str(caught.value).startswith(said)
    assert str(tmp_path) in str(caught.value)
