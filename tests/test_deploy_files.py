"""What `deploy/` and the pages hand to administrators: no option that Flower lacks, no root, no key in the app."""

import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

from fedkd_flwr.flower.retention import KEEP_HALF_A_YEAR
from fedkd_flwr.flower.settings import NODE_KEYS
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SERVERS = ("flower-superlink", "flower-superexec", "flower-supernode")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def known_options(program: str) -> frozenset[str]:
    done = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with all its values."""
    text = path.read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value.strip())
    return found


def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def unit_commands() -> list[list[str]]:
    return [shlex.split(unit(path)["ExecStart"][0]) for path in UNITS]


def page_commands(path: Path) -> list[list[str]]:
    """Commands that start a server in the fenced blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"^(\w+=\S+ )*", "", line) for line in lines]  # without variables set for one command
    return [shlex.split(line, comments=True) for line in commands if line.startswith(SERVERS)]


def unknown_options(command: list[str]) -> set[str]:
    given = {word.partition("=")[0] for word in command if word.startswith("--")}
    return given - known_options(Path(command[0]).name)


def test_there_is_a_unit_and_a_service_for_each_server() -> None:
    assert sorted(Path(command[0]).name for command in unit_commands()) == sorted(SERVERS)
    assert sorted(service["command"][0] for service in compose().values()) == sorted(SERVERS)


@pytest.mark.parametrize("command", unit_commands(), ids=lambda command: Path(command[0]).name)
def test_units_use_options_that_flower_has(command: list[str]) -> None:
    assert not unknown_options(command)


@pytest.mark.parametrize("name", sorted(compose()))
def test_services_use_options_that_flower_has(name: str) -> None:
    assert not unknown_options(compose()[name]["command"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_options_that_flower_has(page: Path) -> None:
    assert not [unknown_options(command) for command in page_commands(page) if unknown_options(command)]


def test_the_walk_through_starts_every_server() -> None:
    assert {command[0] for command in page_commands(ROOT / "docs" / "deploy.md")} == set(SERVERS)


def test_an_option_that_flower_lacks_is_found() -> None:
    assert unknown_options(["flower-supernode", "--superlink", "a:1", "--clientappio-api-address=b"]) == {
        "--clientappio-api-address"
    }


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_no_root_and_never_gives_up(path: Path) -> None:
    settings = unit(path)
    assert settings["User"] == ["fedkd"]
    assert settings["Restart"] == ["always"]
    assert settings["StartLimitIntervalSec"] == ["0"]
    assert int(settings["RestartSec"][0]) >= 5
    for key, value in (("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("UMask", "0077")):
        assert settings[key] == [value]


HARDENED = {
    **dict.fromkeys(("NoNewPrivileges", "PrivateUsers", "PrivateMounts", "PrivateTmp", "ProtectHome"), "yes"),
    **dict.fromkeys(("ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs"), "yes"),
    **dict.fromkeys(("ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces"), "yes"),
    **dict.fromkeys(("RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"), "yes"),
    "ProtectSystem": "strict",
    "ProtectProc": "invisible",
    "CapabilityBoundingSet": "",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "LimitCORE": "0",
    "UMask": "0077",
}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_may_do_what_its_program_needs_and_no_more(path: Path) -> None:
    settings = unit(path)
    assert {key: settings.get(key) for key in HARDENED} == {key: [value] for key, value in HARDENED.items()}
    assert settings["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
    assert int(settings["TasksMax"][0]) >= 512
    if path.name == "fedkd-superlink.service":  # the one that loads no models
        for key, value in (("PrivateDevices", "yes"), ("MemoryDenyWriteExecute", "yes"), ("ProcSubset", "pid")):
            assert settings[key] == [value]
    else:
        assert settings["DevicePolicy"] == ["closed"]
        assert settings["DeviceAllow"] == ["char-nvidia* rw"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_rates_a_unit_below_two_of_ten(path: Path) -> None:
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", path], capture_output=True, text=True)
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert float(exposure[1]) < 2.0


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_environment_file_sets_what_a_unit_reads(path: Path) -> None:
    settings = unit(path)
    [environment] = settings["EnvironmentFile"]
    given = unit(DEPLOY / "systemd" / Path(environment).name)
    assert set(re.findall(r"\$\{(\w+)\}", settings["ExecStart"][0])) <= given.keys()
    assert given["PATH"][0].startswith(str(Path(settings["ExecStart"][0].split()[0]).parent))
    assert given["FLWR_HOME"] == settings["WorkingDirectory"] == [f"/var/lib/{settings['StateDirectory'][0]}"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    copies = []
    for path in UNITS:
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text().replace("/opt/fedkd/.venv/bin", str(BIN)))
    done = subprocess.run(["systemd-analyze", "verify", *copies], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "fedkd" in line]
    assert done.returncode == 0, done.stderr
    assert not said


def test_containers_run_without_root_and_without_privileges() -> None:
    users = re.findall(r"^USER (\S+)", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert users
    assert users[-1] not in ("0", "root")
    for service in compose().values():
        assert "user" not in service
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert all(volume.endswith(":ro") for volume in service["volumes"] if volume.startswith("./"))


def test_the_example_of_a_node_configuration_has_keys_that_nodes_know() -> None:
    text = (DEPLOY / "node.toml").read_text()
    assert tomllib.loads(text).keys() <= set(NODE_KEYS)
    commented = "\n".join(re.findall(r"^# (\S+ = .*)$", text, flags=re.MULTILINE))
    assert tomllib.loads(commented).keys() == {
        *("partition-id", "device", "state-dir", "state-max-age-days", "state-max-bytes")
    }


def test_the_page_and_the_example_tell_the_limits_of_state_as_they_are() -> None:
    page, example = (ROOT / "docs" / "deploy.md").read_text(), (DEPLOY / "node.toml").read_text()
    days = f"{KEEP_HALF_A_YEAR.max_age_days:g}"
    assert f"`state-max-age-days`, {days} unless set" in page
    assert f"# state-max-age-days = {days} " in example
    assert KEEP_HALF_A_YEAR.max_bytes == 0
    assert "`state-max-bytes`, none unless set" in page


def test_what_takes_another_environment_or_minutes_is_left_to_the_night() -> None:
    recipes = dict(re.findall(r"^(\w+): install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in ("test", "slow", "check", "faults"):
        assert "not nightly" in recipes[target], target
    assert "-m nightly" in recipes["nightly"]


def test_no_key_gets_into_the_app_that_is_sent_to_nodes(tmp_path: Path) -> None:
    app = tmp_path / "app"
    for folder in ("conf", "deploy", "fedkd_flwr"):
        shutil.copytree(ROOT / folder, app / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py"):
        shutil.copy(ROOT / name, app / name)
    planted = [f"{folder}{name}" for folder in ("", "keys/", "conf/", "deploy/keys/") for name in ("ca.key", "node1")]
    for name in planted:
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_text("secret")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as fab:
        names = set(fab.namelist())
    assert "fedkd_flwr/flower/client.py" in names
    assert not names & set(planted)
    assert not [name for name in names if name.startswith("deploy/")]


@pytest.mark.parametrize("name", ["keys/node1", "keys/ca.crt", "deploy/keys/node", "a.key", "superexec.secret"])
def test_no_key_gets_into_the_repository(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_takes_no_more_than_a_share_of_the_memory(path: Path) -> None:
    [share] = unit(path)["MemoryMax"]
    assert share in ("50%", "75%")


def test_containers_have_a_limit_of_memory() -> None:
    assert all(service["mem_limit"] == "${FEDKD_MEMORY:-16g}" for service in compose().values())
