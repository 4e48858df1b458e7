"""A simulation's Ray and SuperLink serve one user."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from fedkd_flwr.flower import deployment, launcher, private_ray, private_superlink
from fedkd_flwr.flower.commands import Commands
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.private_ray import MOST_DIRECTORY_BYTES
from fedkd_flwr.flower.private_superlink import OneUser, _as_listed, can_tell_users_apart
from fedkd_flwr.flower.processes import LOOPBACK, NO_SETTINGS, Child, Children, environment, free_ports
from tests.conftest import ROOT, small

tells_users_apart = pytest.mark.skipif(not can_tell_users_apart(), reason="this system does not say whose a socket is")


async def greeting(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"welcome"})


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an application that serves one user."""
    [port] = free_ports(1)
    config = uvicorn.Config(
        OneUser(greeting, request.param),
        host=LOOPBACK,
        port=port,
        lifespan="off",
        proxy_headers=False,
        ws="none",
        log_level="error",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://{LOOPBACK}:{port}"
    server.should_exit = True
    thread.join()


def status(url: str, **headers: str) -> int:
    return httpx.get(url, headers=headers, trust_env=False).status_code


@tells_users_apart
@pytest.mark.parametrize("served", [os.getuid()], indirect=True)
def test_the_user_whose_superlink_it_is_is_served(served: str) -> None:
    assert [status(served) for _ in range(3)] == [200, 200, 200]


@tells_users_apart
@pytest.mark.parametrize("served", [os.getuid() + 1], indirect=True)
def test_another_user_is_refused_whatever_the_request_says(served: str) -> None:
    assert status(served) == 403
    assert (
        status(served, **{"X-Forwarded-For": LOOPBACK, "X-Forwarded-Proto": "http", "Forwarded": "for=127.0.0.1"})
        == 403
    )


@tells_users_apart
@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("served", [0], indirect=True)
def test_a_process_of_another_user_is_refused(served: str) -> None:
    port = int(served.rpartition(":")[2])
    knock = (
        "import os, socket; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"s = socket.socket(); s.connect(('{LOOPBACK}', {port})); s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n"
        "print(s.recv(100).split()[1].decode())"
    )
    done = subprocess.run([sys.executable, "-c", knock], capture_output=True, text=True)
    assert done.stdout.strip() == "403", done.stderr


def test_an_address_is_written_as_the_system_lists_it() -> None:
    listed = "0100007F:1F90" if sys.byteorder == "little" else "7F000001:1F90"
    assert _as_listed("127.0.0.1", 8080) == listed


def test_where_the_system_does_not_list_sockets_nobody_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_superlink, "SOCKETS", tmp_path / "none")
    assert not can_tell_users_apart()
    (tmp_path / "empty").write_text("  sl  local_address rem_address\n")
    monkeypatch.setattr(private_superlink, "SOCKETS", tmp_path / "empty")
    assert not can_tell_users_apart()


class Started:
    """What a launch would start, and in which environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.command: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.ray_directory_mode = 0

        def start(
            children: Children, name: str, command: Any, home: Path, log: Path, settings: Any = NO_SETTINGS
        ) -> Child:
            self.command, self.environment = tuple(command), environment(home) | dict(settings)
            if directory := self.environment.get("RAY_TMPDIR"):
                self.ray_directory_mode = Path(directory).stat().st_mode & 0o777
            return Child(name, subprocess.Popen(["true"]), log)

        monkeypatch.setattr(Children, "start", start)
        monkeypatch.setattr(Children, "wait_for_port", lambda *_: None)
        monkeypatch.setattr(Commands, "submit", lambda *_: 7)
        monkeypatch.setattr(Commands, "run_to_end", lambda *_: {})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    return Started(monkeypatch)


def launch(tmp_path: Path) -> None:
    launcher.launch(small(), ROOT, tmp_path / "small" / "run")


def test_a_simulation_has_a_fresh_token_in_its_environment_and_nowhere_else(started: Started, tmp_path: Path) -> None:
    tokens = set()
    for _ in range(2):
        launch(tmp_path)
        assert started.environment["RAY_AUTH_MODE"] == "token"
        tokens.add(token := started.environment["RAY_AUTH_TOKEN"])
        assert len(token) == 64
        assert not any(token in part for part in started.command)
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert not any(token in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert len(tokens) == 2


def test_a_token_of_the_users_own_gives_way_where_a_simulation_starts_its_own_ray(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    launch(tmp_path)
    assert started.environment["RAY_AUTH_MODE"] == "token"
    assert started.environment["RAY_AUTH_TOKEN"] != "mine"


def test_a_cluster_that_is_joined_keeps_the_users_token(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    (tmp_path / "small").mkdir()
    launch(tmp_path)
    assert started.environment["RAY_AUTH_TOKEN"] == "mine"
    assert "RAY_AUTH_MODE" not in started.environment
    assert "RAY_TMPDIR" not in started.environment


def test_no_unguarded_door_of_the_superlink_is_opened(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    launch(tmp_path)
    assert started.environment["FLWR_INTERNAL_GRPC_CONTROL_API"] == "0"
    assert "fedkd_flwr.flower.private_superlink" in started.command


def test_where_users_can_not_be_told_apart_the_run_says_so_first(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "can_tell_users_apart", lambda: False)
    launch(tmp_path)
    assert started.command[0] == "flower-superlink"
    assert "--in-process" in caplog.records[0].getMessage()


@pytest.mark.parametrize("private", [True, False])
def test_the_superlink_of_a_demo_serves_one_user_too_or_the_demo_says_so(
    private: bool, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deployment, "can_tell_users_apart", lambda: private)
    commands: list[tuple[str, ...]] = []
    start = Children.start

    def noted(*arguments: Any) -> Child:
        child = start(*arguments)
        commands.append(started.command)
        if len(commands) == 1:
            assert started.environment["FLWR_INTERNAL_GRPC_CONTROL_API"] == "0"
        return child

    monkeypatch.setattr(Children, "start", noted)
    (tmp_path / "home").mkdir()
    (tmp_path / "logs").mkdir()
    deployment._Site(tmp_path / "home", tmp_path, Children()).start_server()
    assert ("fedkd_flwr.flower.private_superlink" in commands[0]) == private
    assert ("flower-superlink" in commands[0]) != private
    assert ("other users of this machine" in caplog.text) != private


# Ray's directory


@pytest.mark.parametrize("long", [False, True], ids=("short", "long"))
def test_ray_has_a_short_private_directory_that_ends_with_the_run(
    long: bool, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Path("/tmp")
    if long:
        parent = tmp_path / ("project-account-1234567/slurm-job-directory-998877/" + "x" * 40)
        parent.mkdir(parents=True)
        monkeypatch.setattr("tempfile.tempdir", str(parent))
    launch(tmp_path)
    directory = Path(started.environment["RAY_TMPDIR"])
    session = directory / "ray" / "session_2026-11-29_12-00-55_691234_1234567" / "sockets" / "plasma_store"
    assert len(os.fsencode(session)) <= 107
    assert started.ray_directory_mode == 0o700
    assert not directory.exists()
    assert directory.is_relative_to(parent) != long


def test_without_any_short_directory_the_run_ends_at_once_with_the_limit(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / ("y" * 80)
    parent.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(parent))
    monkeypatch.setattr(private_ray, "_SHORT", (str(tmp_path / "none"),))
    with pytest.raises(RunError, match=r"^TMPDIR is too long for Ray's sockets \(107 bytes\)"):
        launch(tmp_path)
    assert not started.command
    assert list(parent.iterdir()) == []


def test_a_socket_in_a_directory_of_the_longest_path_can_be_bound() -> None:
    name = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(OSError, match="No such file"):
        server.bind("x" * MOST_DIRECTORY_BYTES + name)
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(OSError, match="too long"):
        server.bind("x" * (MOST_DIRECTORY_BYTES + 1) + name)
