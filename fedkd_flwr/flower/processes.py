"""Flower's long-running commands as children of this process: started, watched, ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from fedkd_flwr.core.printable import printable
from fedkd_flwr.flower.errors import RunError

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_LEFT_OVER_SECONDS = 5.0
_TAIL_CHARACTERS = 500

# By a key, by an init system, by a terminal that is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

NO_SETTINGS: Mapping[str, str] = MappingProxyType({})
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def environment(home: Path) -> dict[str, str]:
    """What Flower's commands are given: a home of their own, this installation's programs, one thread, no traps."""
    no_proxy = [os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)][:1]
    direct = ",".join([*no_proxy, LOOPBACK, "localhost"])
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",  # whatever this process writes in, Flower prints what only UTF-8 has
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "no_proxy": direct,
        "NO_PROXY": direct,
    }


def without_colours(text: str) -> str:
    """What a program printed, without the colours that it gave it."""
    return _COLOUR.sub("", text)


def free_ports(count: int) -> list[int]:
    """So many different loopback ports on which nothing listens now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started here.

    Attributes:
        name: for messages.
        process: itself, the leader of a session of its own.
        log: what it prints goes there.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def failure(self, what: str) -> RunError:
        """The error that it failed so, with the end of its log."""
        text = " ".join(without_colours(self.log.read_text(encoding="utf-8", errors="replace")).split())
        return RunError(f"{self.name} {what}: {printable(text[-_TAIL_CHARACTERS:]) or 'it printed nothing'}")


class Children:
    """Processes that end together, with the block that they were started in.

    Their Flower homes are theirs alone: whatever else has one of these in its environment was started by them.
    """

    def __init__(self) -> None:
        self._servers: list[Child] = []
        self._homes: set[Path] = set()

    def __enter__(self) -> Self:
        """Begin with none."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all, the youngest first; a second Ctrl-C has to wait."""
        with interrupts_wait():
            groups = _groups_of(self._homes)  # now: some forget their environment, and are orphans when others end
            end([child.process for child in reversed(self._servers)])
            _end_groups(groups | _groups_of(self._homes))

    def start(
        self, name: str, command: Sequence[str], home: Path, log: Path, settings: Mapping[str, str] = NO_SETTINGS
    ) -> Child:
        """Start a server.

        Args:
            name: for messages.
            command: the program, one of this installation's, and its arguments.
            home: its Flower home and its working directory.
            log: file to append what it prints to.
            settings: environment variables that it is given beyond those of all.

        Raises:
            RunError: if there is no such program.
        """
        with interrupts_wait():  # or a process would run that nobody knows of
            child = start(name, command, home, log, settings)
            self._servers.append(child)
            self._homes.add(home)
        return child

    def require_running(self) -> None:
        """Do nothing while every server runs.

        Raises:
            RunError: naming the first that has ended, with the end of its log.
        """
        for child in self._servers:
            if not child.running:
                raise child.failure(f"ended with exit status {child.process.returncode}")

    def wait_for_port(self, child: Child, port: int) -> None:
        """Return once a child listens on a loopback port.

        Raises:
            RunError: if it ends, or a minute passes, before that.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and child.running:
            try:
                socket.create_connection((LOOPBACK, port), timeout=1).close()
                return
            except OSError:
                time.sleep(POLL_SECONDS)
        raise child.failure("did not start")


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Hold back what ends a run until the block has ended; only the main thread can, and only it is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    # Handlers, not a mask: a mask is one thread's, and the signal would reach another.
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n))
        for number in ENDING
        if signal.getsignal(number) is not signal.SIG_IGN  # what nohup has switched off stays so
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if caught:
            signal.raise_signal(caught[0])


def start(name: str, command: Sequence[str], home: Path, log: Path, settings: Mapping[str, str] = NO_SETTINGS) -> Child:
    """Start a process in a session of its own, so that Ctrl-C reaches this process alone; see `Children.start`."""
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=home,
                env={**environment(home), **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"{command[0]} can't be started: {error.strerror}; reinstall with `make install`") from error
    return Child(name, process, log)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that `start` made, and whatever is left of what they started themselves."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_session(process, signal.SIGKILL)
            process.wait()
    # What servers started themselves need not end with them: a SuperNode's client, in the middle of its training.
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in processes if _signal_session(process, number)]
        deadline = time.monotonic() + _LEFT_OVER_SECONDS
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = [process for process in left if _signal_session(process, 0)]


def _end_groups(groups: Iterable[int]) -> None:
    """End what a server started in a session of its own, as a SuperLink does with a simulation and its Ray."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = {group for group in groups if _signal_group(group, number)}
        deadline = time.monotonic() + _LEFT_OVER_SECONDS
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = {group for group in left if _signal_group(group, 0)}


def _groups_of(homes: Iterable[Path]) -> set[int]:
    """Process groups with a process whose Flower home is one of these; none where the system does not tell."""
    wanted = {f"FLWR_HOME={home}".encode() for home in homes}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone
            if wanted & set((process / "environ").read_bytes().split(b"\0")):
                found.add(os.getpgid(int(process.name)))
    return found - {os.getpgrp()}


def _signal_session(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal all that is left of the session of a process; whether there was anything."""
    return _signal_group(process.pid, number)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
