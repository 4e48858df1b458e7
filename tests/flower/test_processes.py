"""Children: watched, and gone when their block ends."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedkd_flwr.flower import processes
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.processes import ENDING, Child, Children, free_ports

SLEEP = "import time; time.sleep(600)"
# Starts a process of its own, says its id, and dies of SIGTERM without ending it.
PARENT = f"""
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "{SLEEP}"]).pid, flush=True)
time.sleep(600)
"""

# Answers SIGTERM by interrupting whoever sent it, and takes a moment to end.
STUBBORN = """
import os, signal, time
def interrupt(*_):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.5)
    raise SystemExit
signal.signal(signal.SIGTERM, interrupt)
print("ready", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_children_and_what_they_started_are_gone_after_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="mine"), Children() as children:
        child = children.start("parent", [sys.executable, "-c", PARENT], tmp_path, log)
        while not log.read_text().endswith("\n"):
            time.sleep(0.05)
        grandchild = int(log.read_text())
        assert alive(child.process.pid)
        assert alive(grandchild)
        raise RuntimeError("mine")
    assert not alive(child.process.pid)
    assert not alive(grandchild)


def test_what_a_child_starts_in_a_session_of_its_own_is_gone_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    apart = PARENT.replace('"])', '"], start_new_session=True)')
    with Children() as children:
        children.start("parent", [sys.executable, "-c", apart], tmp_path, log)
        while not log.read_text().endswith("\n"):
            time.sleep(0.05)
        grandchild = int(log.read_text())
        assert alive(grandchild)
    assert not alive(grandchild)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, even where the tests were started in the background and so ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_comes_after_all_have_ended(tmp_path: Path) -> None:
    children = Children()
    child = children.start("stubborn", [sys.executable, "-c", STUBBORN], tmp_path, tmp_path / "log")
    while not (tmp_path / "log").read_text():
        time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt), children:  # it interrupts us while we end it
        pass
    assert not alive(child.process.pid)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", ENDING)
def test_an_interrupt_while_a_child_starts_does_not_lose_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Child] = []
    really_start = processes.start

    def start(*arguments: Any) -> Child:
        started.append(really_start(*arguments))
        signal.raise_signal(number)
        return started[0]

    before = signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr(processes, "start", start)
    try:
        with pytest.raises(KeyboardInterrupt), Children() as children:
            children.start("sleeper", [sys.executable, "-c", SLEEP], tmp_path, tmp_path / "log")
    finally:
        signal.signal(number, before)
    assert not alive(started[0].process.pid)


def test_a_child_that_ended_is_named_with_what_it_said(tmp_path: Path) -> None:
    with Children() as children:
        child = children.start(
            "SuperX", [sys.executable, "-c", "print('no such key'); exit(3)"], tmp_path, tmp_path / "x"
        )
        child.process.wait()
        with pytest.raises(RunError, match="SuperX ended with exit status 3: no such key"):
            children.require_running()
        with pytest.raises(RunError, match="SuperX did not start: no such key"):
            children.wait_for_port(child, 1)


def test_a_running_child_is_left_in_peace(tmp_path: Path) -> None:
    with Children() as children:
        children.start("SuperX", [sys.executable, "-c", SLEEP], tmp_path, tmp_path / "x")
        children.require_running()


def test_a_program_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with Children() as children, pytest.raises(RunError, match="flower-nothing can't be started"):
        children.start("x", ["flower-nothing"], tmp_path, tmp_path / "x")


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
