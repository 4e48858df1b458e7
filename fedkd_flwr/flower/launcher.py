"""`flwr run` in simulation, without its traps.

A SuperLink of its own on a free loopback port, with its own home and a neutral working directory, so that neither an
old SuperLink's environment nor a module that happens to lie in the current directory takes part; as many SuperNodes as
the experiment has clients, one CPU each; no installation of dependencies at run time; and the real outcome: Flower's
own command exits with 0 even when a run failed.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkd_flwr.experiment import ConfigError, Experiment
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.settings import APP_FILES, code_digest
from fedkd_flwr.measure.ledger import LEDGER_FILE, Listener
from fedkd_flwr.measure.summary import read_summary

RUN_LOG = "run.log"
_CONNECTION = "fedkd"
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.2


def launch(
    experiment: Experiment,
    app_dir: Path,
    run_dir: Path,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Run an experiment with `flwr run` in simulation and wait for its end.

    Args:
        experiment: what to run.
        app_dir: the Flower app: pyproject.toml, server_app.py, client_app.py.
        run_dir: where results go: <output>/<experiment name>/<run name>.
        listener: called with every row of the ledger as it is written.
        resume: go on with the run that is there.
        force: even with another number of rounds.

    Returns:
        The run directory.

    Raises:
        ConfigError: if `app_dir` is no app, or the run directory has another name than <experiment name>/<run name>.
        RunError: if the run did not complete; with the reason.
        KeyboardInterrupt: on Ctrl-C, after the run was stopped.
    """
    if missing := [name for name in ("pyproject.toml", *APP_FILES) if not (app_dir / name).is_file()]:
        raise ConfigError(f"{app_dir} is no Flower app: {missing[0]} is missing; run from a clone, or --in-process")
    if run_dir.parent.name != experiment.name:
        raise ConfigError(f"{str(run_dir)!r} must lie in a folder named {experiment.name!r}, as the run is")
    with tempfile.TemporaryDirectory(prefix="fedkd-", ignore_cleanup_errors=True) as home:
        flower = _Flower(Path(home))
        with flower.superlink():
            run_id = flower.submit(experiment, app_dir, run_dir, resume=resume, force=force)
            try:
                _follow(flower, run_id, run_dir, listener)
            except KeyboardInterrupt:
                flower.stop(run_id)
                raise
            _check_outcome(flower.status(run_id), run_dir)
    return run_dir


def _follow(flower: "_Flower", run_id: int, run_dir: Path, listener: Listener | None) -> None:
    """Pass the ledger's rows on until Flower's log of the run ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    tail = _Tail(run_dir / LEDGER_FILE, listener)
    with (run_dir / RUN_LOG).open("ab") as log:
        process = flower.start("flwr", "log", str(run_id), _CONNECTION, "--stream", output=log)
        try:
            while process.poll() is None:
                tail.read()
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    tail.read()


def _check_outcome(status: Mapping[str, Any], run_dir: Path) -> None:
    """Believe in success only if Flower and our own summary both say so."""
    summary = read_summary(run_dir)
    flower_says = str(status.get("status", "unknown"))
    if flower_says == "finished:completed" and summary is not None and summary["status"] == "completed":
        return
    reason = status.get("status-details") or status.get("details") or "no reason given"
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    raise RunError(f"{lines[-1] if lines else flower_says} (Flower says {flower_says}; log: {run_dir / RUN_LOG})")


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


class _Flower:
    """Flower's commands, with a home of their own."""

    def __init__(self, home: Path) -> None:
        self._home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    def start(self, *command: str, output: Any) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, so that Ctrl-C reaches this process alone."""
        return subprocess.Popen(
            command,
            cwd=self._home,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @contextmanager
    def superlink(self) -> Iterator[None]:
        """A SuperLink for as long as the block lasts, its state in memory."""
        log_path = self._home / "superlink.log"
        with log_path.open("wb") as log:
            process = self.start(
                *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
                *("--host", "127.0.0.1", "--port", str(self._port), "--disable-runtime-dependency-installation"),
                output=log,
            )
        try:
            self._wait_for_port(process, log_path)
            yield
        finally:
            _end(process)

    def _wait_for_port(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                time.sleep(_POLL_SECONDS)
        raise RunError(f"SuperLink did not start: {log_path.read_text(errors='replace')[-500:].strip()}")

    def submit(self, experiment: Experiment, app_dir: Path, run_dir: Path, *, resume: bool, force: bool) -> int:
        """Send the app; Flower's id of the run."""
        config = {
            "config-text": experiment.to_yaml(),
            "output-dir": str(run_dir.parent.parent),
            "resume" if resume else "run-name": run_dir.name,
            "resume-force": force,
            "state-dir": str(run_dir / "state"),
            "code-digest": code_digest(app_dir),
        }
        config_file = self._home / "run.toml"
        config_file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        federation = f"num-supernodes={experiment.num_clients} client-resources-num-cpus=1"
        answer = self._ask(
            *("flwr", "run", str(app_dir), _CONNECTION, "-c", str(config_file)),
            *("--federation-config", federation, "--format", "json"),
        )
        if "run-id" not in answer:
            raise RunError(f"flwr run was refused: {answer.get('error-message', answer)}")
        return int(answer["run-id"])

    def status(self, run_id: int) -> dict[str, Any]:
        """What `flwr ls` says of the run."""
        runs = self._ask("flwr", "ls", _CONNECTION, "--run-id", str(run_id), "--format", "json").get("runs", [])
        return dict(runs[0]) if runs else {}

    def stop(self, run_id: int) -> None:
        """Stop the run."""
        self._ask("flwr", "stop", str(run_id), _CONNECTION, "--format", "json")

    def _ask(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            command, cwd=self._home, env=self._environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        start = done.stdout.find("{")  # a line of text may come first
        if start < 0:
            text = (done.stderr or done.stdout).strip()
            raise RunError(f"{shlex.join(command[:2])}: {' '.join(text.split())[-300:] or 'no answer'}")
        answer: dict[str, Any] = json.loads(done.stdout[start:])
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this module started, and its children through it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that `start` gave it
            process.wait()
