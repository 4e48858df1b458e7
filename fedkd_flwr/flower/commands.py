"""Flower's short commands for one SuperLink, and a run from `flwr run` to its real outcome.

`flwr run` exits with 0 even when the run failed, so success is believed only if Flower's list of runs and our own
summary both say so.
"""

import json
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedkd_flwr.core.printable import printable
from fedkd_flwr.disk import make_directory, write_whole
from fedkd_flwr.experiment import ConfigError, Experiment
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.processes import POLL_SECONDS, Child, end, environment, interrupts_wait, start, without_colours
from fedkd_flwr.flower.settings import APP_FILES, code_digest
from fedkd_flwr.measure.ledger import LEDGER_FILE, Listener
from fedkd_flwr.measure.summary import read_summary

RUN_LOG = "run.log"
CONFIG_FILE = "config.toml"
_COMMAND_SECONDS = 300.0
_SHOWN_CHARACTERS = 300  # of an answer that is no JSON
_REASON_CHARACTERS = 1000
# What Flower puts in the place of a reason, and how its log begins to tell the real one.
_SAYS_NOTHING = ("An error was encountered. Ending simulation", "Simulation Runtime crashed", "unknown error")
_NO_HEARTBEAT = "No heartbeat received"
_LAST_CHAIN = "raised an exception"
_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b")


def check_app(app_dir: Path) -> None:
    """Do nothing if a directory holds the Flower app.

    Raises:
        ConfigError: naming what is missing.
    """
    if missing := [name for name in ("pyproject.toml", *APP_FILES) if not (app_dir / name).is_file()]:
        raise ConfigError(f"{app_dir} is no Flower app: {missing[0]} is missing; run from a clone, or --in-process")


def add_connection(home: Path, name: str, address: str, root_certificates: Path | None) -> Path:
    """Tell Flower's commands where a SuperLink is.

    Args:
        home: Flower's home; made if it isn't there.
        name: of the connection, new there; the first one becomes the default.
        address: host:port.
        root_certificates: of the authority that signed the SuperLink's certificate; None for one without TLS.

    Returns:
        Flower's configuration file.

    Raises:
        ConfigError: if there is a connection of that name, or the file can't be read or written.
    """
    file = home / CONFIG_FILE
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else f"[superlink]\ndefault = {toml(name)}\n"
        if name in tomllib.loads(text).get("superlink", {}):
            raise ConfigError(f"{str(file)!r} has a connection {name!r} already; edit it there, or take another name")
        rows: dict[str, bool | str] = {"address": address}
        rows |= {"root-certificates": str(root_certificates.resolve())} if root_certificates else {"insecure": True}
        section = "".join(f"{key} = {toml(value)}\n" for key, value in rows.items())
        make_directory(home)
        write_whole(file, f"{text.rstrip()}\n\n[superlink.{toml(name)}]\n{section}")
    except OSError as error:
        raise ConfigError(
            f"{str(file)!r} can't be written: {error.strerror}; set FLWR_HOME to a directory that can"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{str(file)!r} can't be read as TOML: {error}") from error
    return file


def require_connection(home: Path, name: str) -> None:
    """Do nothing if Flower's commands know that connection.

    Raises:
        ConfigError: if they do not, or their configuration can't be read.
    """
    file = home / CONFIG_FILE
    try:
        known = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {}) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} can't be read as TOML: {error}") from error
    if not isinstance(known.get(name), dict):
        raise ConfigError(f"{str(file)!r} has no connection {name!r}; make it with `fedkd deploy connection`")


def toml(value: bool | float | int | str) -> str:
    """A value as TOML writes it."""
    # JSON's escapes are TOML's, but for characters beyond 16 bits, which stay as they are.
    return json.dumps(value, ensure_ascii=False)


def run_config(
    experiment: Experiment, app_dir: Path, run_dir: Path, *, resume: bool = False, force: bool = False
) -> dict[str, bool | str]:
    """The run config of a run whose results go to `run_dir`: <output>/<experiment name>/<run name>."""
    if run_dir.parent.name != experiment.name:
        raise ConfigError(f"{str(run_dir)!r} must lie in a folder named {experiment.name!r}, as the run is")
    try:
        str(run_dir).encode()
    except UnicodeEncodeError:  # Flower's configuration is TOML, which has no other characters
        raise ConfigError(
            f"output_dir: must be a path that UTF-8 can write, got {str(run_dir.parent.parent)!r}; "
            "give another one, or run --in-process"
        ) from None
    return {
        "config-text": experiment.to_yaml(),
        "output-dir": str(run_dir.parent.parent),
        "resume" if resume else "run-name": run_dir.name,
        "resume-force": force,
        "state-dir": str(run_dir / "state"),
        "code-digest": code_digest(app_dir),
    }


class Commands:
    """Flower's commands for one SuperLink.

    Args:
        home: Flower's home, with a configuration file that names the connection.
        connection: its name.
    """

    def __init__(self, home: Path, connection: str) -> None:
        self._home = home
        self._connection = connection

    def submit(self, app_dir: Path, config: Mapping[str, bool | str], *options: str) -> int:
        """Send the app, with a run config and options of `flwr run`; Flower's id of the run.

        Raises:
            RunError: if it was refused.
        """
        file = self._home / "run.toml"
        file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in config.items()), encoding="utf-8")
        answer = self._ask("flwr", "run", str(app_dir), self._connection, "-c", str(file), *options)
        if "run-id" not in answer:
            raise RunError(f"flwr run was refused: {_refusal(answer)}")
        return int(answer["run-id"])

    def status(self, run_id: int) -> dict[str, Any]:
        """What `flwr ls` says of the run."""
        runs = self._ask("flwr", "ls", self._connection, "--run-id", str(run_id)).get("runs", [])
        return dict(runs[0]) if runs else {}

    def stop(self, run_id: int) -> None:
        """Stop the run."""
        self._ask("flwr", "stop", str(run_id), self._connection)

    def register(self, public_key: Path, name: str) -> str:
        """Let a node of that public key in; Flower's id of the node.

        Raises:
            RunError: if it was refused, as it is when the key is known already.
        """
        answer = self._ask("flwr", "supernode", "register", str(public_key), self._connection, "--name", name)
        if "node-id" not in answer:
            raise RunError(f"{public_key.name} was not registered: {_refusal(answer)}")
        return str(answer["node-id"])

    def num_online(self) -> int:
        """How many nodes are connected."""
        nodes = self._ask("flwr", "supernode", "ls", self._connection).get("nodes", [])
        return sum(node["status"] == "online" for node in nodes)

    def run_to_end(
        self, run_id: int, run_dir: Path, listener: Listener | None, check: Callable[[], None]
    ) -> dict[str, Any]:
        """Follow a run until it has ended.

        Args:
            run_id: Flower's.
            run_dir: where its ledger is or will be; Flower's log of the run goes there, too.
            listener: called with every row of the ledger as it is written.
            check: called often; what it raises ends the wait.

        Returns:
            What Flower says of the run.

        Raises:
            RunError: if the run did not complete; with the reason.
            KeyboardInterrupt: on Ctrl-C, after the run was stopped.
        """
        log = run_dir / RUN_LOG
        before = log.stat().st_size if log.exists() else 0  # of earlier attempts
        try:
            self._follow(run_id, run_dir, listener, check)
        except KeyboardInterrupt:
            with suppress(RunError):
                self.stop(run_id)
            raise
        status = self.status(run_id)
        _check_outcome(status, run_dir, log.read_bytes()[before:].decode(errors="replace"))
        return status

    def _follow(self, run_id: int, run_dir: Path, listener: Listener | None, check: Callable[[], None]) -> None:
        """Pass the ledger's rows on until Flower's log of the run ends."""
        run_dir.mkdir(parents=True, exist_ok=True)
        tail = _Tail(run_dir / LEDGER_FILE, listener)
        command = ("flwr", "log", str(run_id), self._connection, "--stream")
        log: Child | None = None
        try:
            with interrupts_wait():  # or it would run without anybody to end it
                log = start("flwr log", command, self._home, run_dir / RUN_LOG)
            while log.running:
                check()
                tail.read()
                time.sleep(POLL_SECONDS)
        finally:
            if log is not None:
                with interrupts_wait():
                    end([log.process])
        tail.read()

    def _ask(self, *command: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [*command, "--format", "json"],
                cwd=self._home,
                env=environment(self._home),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=_COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"{shlex.join(command[:3])}: no answer in {_COMMAND_SECONDS:g} s") from None
        except OSError as error:
            raise RunError(f"{command[0]} can't be started: {error.strerror}") from error
        first = done.stdout.find("{")  # a line of text may come first
        try:
            answer: dict[str, Any] = json.loads(done.stdout[first:] if first >= 0 else "")
        except ValueError:
            text = " ".join(without_colours(done.stderr or done.stdout).split())
            shown = printable(text if len(text) <= _SHOWN_CHARACTERS else f"... {text[-_SHOWN_CHARACTERS:]}")
            raise RunError(f"{shlex.join(command[:2])}: {shown or 'no answer'}") from None
        return answer


def _refusal(answer: Mapping[str, Any]) -> str:
    lines = str(answer.get("error-message", answer)).splitlines()
    return printable(" ".join(line for line in lines if not line.startswith("Using SuperLink")))


def _check_outcome(status: Mapping[str, Any], run_dir: Path, log: str) -> None:
    """Believe in success only if Flower and our own summary both say so.

    Args:
        status: what Flower says.
        run_dir: of the run.
        log: Flower's, of this attempt.

    Raises:
        RunError: with the reason, from the log where Flower has a phrase in its place.
    """
    summary = read_summary(run_dir)
    flower_says = str(status.get("status", "unknown"))
    if flower_says == "finished:completed" and summary is not None and summary["status"] == "completed":
        return
    reason = str(status.get("status-details") or status.get("details") or "")
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    said = lines[-1] if lines else "no reason given"
    if not lines or any(words in said for words in _SAYS_NOTHING):
        said = _reason_in(log) or said
    if _NO_HEARTBEAT in said:
        said = f"the process of the run died (out of memory?); go on with: fedkd resume {shlex.quote(str(run_dir))}"
    said = printable(said, _REASON_CHARACTERS)
    raise RunError(f"{said} (Flower says {flower_says}; log: {run_dir / RUN_LOG})")


def _reason_in(log: str) -> str:
    """What ended a run according to Flower's log of it: the first error of the last chain of them; empty if none."""
    _, found, chain = without_colours(log).rpartition(_LAST_CHAIN)
    errors = [line for line in (chain if found else log).splitlines() if _ERROR.match(line)]
    told = [line for line in errors if not any(words in line for words in _SAYS_NOTHING)]
    return (told[0] if found else told[-1]) if told else ""


class _Tail:
    """Reads whole new lines of a growing file."""

    def __init__(self, path: Path, listener: Listener | None) -> None:
        self._path = path
        self._listener = listener
        self._offset = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0  # of a resumed run, only what is new

    def read(self) -> None:
        if self._listener is None or not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._listener(json.loads(line))
