"""Flower's run config and node config, read once at each end.

The run config stays small: `config` (path of the YAML, relative to the app), `config-text` (YAML that wins over it),
`set` (overrides, as a shell would split them), `output-dir`, `run-name`, `resume` (name of a run to go on with, or
"latest"), `resume-force` (with another number of rounds), `state-dir`, `code-digest`.
"""

import fcntl
import hashlib
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import fedkd_flwr
from fedkd_flwr.core.quoting import quoted
from fedkd_flwr.disk import make_directory, write_whole
from fedkd_flwr.experiment import NAME_PATTERN, ConfigError, Experiment, load, parse
from fedkd_flwr.flower.retention import KEEP_HALF_A_YEAR, Retention

UserConfig = Mapping[str, bool | float | int | str]

APP_FILES = ("server_app.py", "client_app.py")
NAME_FILE = "client-id"
NODE_KEYS = (
    *("partition-id", "num-partitions", "client-id", "name", "data-path", "state-dir", "device"),
    *("state-max-age-days", "state-max-bytes"),
)
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server run needs beside the grid.

    Attributes:
        experiment: the validated configuration.
        run_dir: where the ledger and the results go; not made yet, unless it is to be resumed.
        resume: go on with the run that is there.
        force: even with another number of rounds.
    """

    experiment: Experiment
    run_dir: Path
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs beside the message.

    Attributes:
        experiment: the validated configuration, on the device that the node names.
        state_dir: root of client states on this machine.
        client_key: the client's lasting name.
        partition_id: which part of the task's data is its own, and which of several teachers.
        data_path: where its own data is; None where it has a part of the task's.
        retention: how long, and how much, the node keeps of all trainings below `state_dir`.
    """

    experiment: Experiment
    state_dir: Path
    client_key: str
    partition_id: int
    data_path: Path | None = None
    retention: Retention = KEEP_HALF_A_YEAR


def server_settings(run_config: UserConfig, app_dir: Path) -> ServerSettings:
    """Read a run config on the server.

    Raises:
        ConfigError: if the experiment can't be run as written.
    """
    experiment = _experiment(run_config, app_dir)
    root = _directory(run_config, "output-dir", "run config") or flower_home() / "fedkd" / "results"
    runs = root / experiment.name
    if resume := str(run_config.get("resume", "")):
        return ServerSettings(experiment, _run_to_resume(runs, resume), True, run_config.get("resume-force") is True)
    return ServerSettings(experiment, runs / _run_name(run_config))


def client_settings(run_config: UserConfig, node_config: UserConfig, app_dir: Path) -> ClientSettings:
    """Read run config and node config on a client.

    Raises:
        ConfigError: if the experiment can't be run as written, or the node is not told which client it is.
    """
    _check_node_keys(node_config)
    experiment = _experiment(run_config, app_dir, _device(node_config))
    data_path = _data_path(node_config)
    partition_id = node_config.get("partition-id", 0 if data_path else None)
    if not isinstance(partition_id, int) or isinstance(partition_id, bool):
        raise ConfigError(
            f"node config: partition-id must be an integer from 0, got {quoted(partition_id)}; set it, or a data-path"
        )
    if not 0 <= partition_id < experiment.num_clients:
        raise ConfigError(
            f"node config: partition-id must be in [0, {experiment.num_clients - 1}] for num_clients "
            f"{experiment.num_clients}, got {partition_id}"
        )
    state_dir = _directory(node_config, "state-dir", "node config") or _directory(run_config, "state-dir", "run config")
    state_dir = state_dir or default_state_dir()
    client_key = _client_key(node_config, partition_id, state_dir)
    return ClientSettings(experiment, state_dir, client_key, partition_id, data_path, _retention(node_config))


def _check_node_keys(node_config: UserConfig) -> None:
    """Refuse a key that is one of ours but for its spelling; others may be for other apps of the node."""
    for key in node_config:
        meant = key.lower().replace("_", "-")
        if key not in NODE_KEYS and meant in NODE_KEYS:
            raise ConfigError(f"node config: unknown key {quoted(key)}; write {meant}")


def _run_name(run_config: UserConfig) -> str:
    """The name of a new run: as configured, else the time; it becomes the name of a folder."""
    name = str(run_config.get("run-name", "")) or datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"run config: run-name must match {NAME_PATTERN}, got {name!r}; leave it out to have the run named by time"
        )
    return name


def _retention(node_config: UserConfig) -> Retention:
    """How long, and how much, the node keeps; see `Retention` for what it does unless told otherwise."""
    default = KEEP_HALF_A_YEAR
    days = node_config.get("state-max-age-days", default.max_age_days)
    if isinstance(days, bool | str) or not 0 <= days < math.inf:
        raise ConfigError(
            "node config: state-max-age-days must be a number of days from 0, where 0 keeps state for ever, "
            f"got {days!r}"
        )
    num_bytes = node_config.get("state-max-bytes", default.max_bytes)
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 0:
        raise ConfigError(
            "node config: state-max-bytes must be a whole number of bytes from 0, where 0 is no quota, "
            f"got {num_bytes!r}"
        )
    return Retention(float(days), num_bytes)


def _device(node_config: UserConfig) -> tuple[str, ...]:
    """The override that puts the client's models where its node wants them; see `LocalTraining.device`."""
    device = node_config.get("device", "auto")
    if device not in DEVICES:
        raise ConfigError(f"node config: device must be one of {', '.join(DEVICES)}, got {quoted(device)}")
    return () if device == "auto" else (f"algorithm.local.device={device}",)


def _data_path(node_config: UserConfig) -> Path | None:
    # Its value stays out of the message, which the server gets to read.
    try:
        path = _directory(node_config, "data-path", "node config")
        there = path is None or path.exists()
    except (OSError, ConfigError):  # a parent that is closed to this user, a name that can't be one
        there = False
    if not there:
        raise ConfigError("node config: data-path must be a folder or file of the node, there is none")
    return path


def client_key_of(partition_id: int) -> str:
    """The name of a client that has a part of the experiment's data and was given no other."""
    return f"{partition_id:05d}"


def _client_key(node_config: UserConfig, partition_id: int, state_dir: Path) -> str:
    """The lasting name: as configured, else by partition, else drawn once and kept beside the state."""
    names = {key: str(node_config[key]) for key in ("client-id", "name") if key in node_config}
    if len(set(names.values())) > 1:
        raise ConfigError(
            f"node config: client-id and name say the same, got {' and '.join(map(quoted, names.values()))}"
        )
    for key, name in names.items():
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(f"node config: {key} must match {NAME_PATTERN}, got {quoted(name)}")
        return name
    return client_key_of(partition_id) if "partition-id" in node_config else lasting_name(state_dir)


def lasting_name(state_dir: Path) -> str:
    """The name of the client that keeps its state there: drawn when it is first asked for, the same ever after.

    Raises:
        ConfigError: if the directory can't be written.
    """
    path = state_dir / NAME_FILE
    try:
        make_directory(state_dir)
        with (state_dir / f".{NAME_FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or two that draw at once would have a name each
            if path.is_file() and re.fullmatch(NAME_PATTERN, name := path.read_text(encoding="utf-8")):
                return name
            write_whole(path, name := uuid4().hex)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"node config: state-dir can't keep a name ({type(error).__name__}); correct it, or set client-id"
        ) from None
    return name


def default_state_dir() -> Path:
    """Where clients keep their state unless node or run say otherwise."""
    return flower_home() / "fedkd" / "state"


def code_digest(app_dir: Path) -> str:
    """Digest of the package's files and both apps, as they are where this runs."""
    package = Path(fedkd_flwr.__file__).parent
    state = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        state.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    for name in APP_FILES:
        state.update(name.encode() + b"\0" + (app_dir / name).read_bytes())
    return state.hexdigest()


def _run_to_resume(runs: Path, name: str) -> Path:
    there = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    if name == "latest" and there:
        name = there[-1]
    if name not in there:
        raise ConfigError(f"run config: resume must be a run in {str(runs)!r} or 'latest', got {quoted(name)}")
    return runs / name


def _experiment(run_config: UserConfig, app_dir: Path, of_node: tuple[str, ...] = ()) -> Experiment:
    _check_code(str(run_config.get("code-digest", "")), app_dir)
    try:
        overrides = [*shlex.split(str(run_config.get("set", ""))), *of_node]
    except ValueError as error:
        raise ConfigError(f"run config: set can't be split into overrides: {error}") from None
    if text := str(run_config.get("config-text", "")):
        return _parsed(text, tuple(overrides))
    path = str(run_config.get("config", ""))
    if not path:
        raise ConfigError("run config: config must be the path of a YAML file in the app, got nothing")
    return load(app_dir / path, overrides)


@lru_cache(maxsize=1)
def _parsed(text: str, overrides: tuple[str, ...]) -> Experiment:
    """An experiment from its text, read once in a process that gets many messages of it."""
    return parse(text, overrides, source="config-text")


def _check_code(expected: str, app_dir: Path) -> None:
    """Refuse to run other code than was started: a package imported from elsewhere shadows the one that was sent."""
    if expected and (found := code_digest(app_dir)) != expected:
        raise ConfigError(
            f"code-digest: this process runs {Path(fedkd_flwr.__file__).parent} with apps from {app_dir}, which is "
            f"other code than was started ({found[:12]} != {expected[:12]}); stop the old SuperLink or reinstall"
        )


def _directory(config: UserConfig, key: str, where: str) -> Path | None:
    """A directory that a configuration names, absolute; None where it names none."""
    value = config.get(key)
    try:
        return Path(str(value)).expanduser().resolve() if value else None
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a name too long, no such user
        # Where a node's are, the server need not know.
        got = "none that this machine can have" if where == "node config" else f"{value!r}: {error}"
        raise ConfigError(f"{where}: {key} must be the path of a directory, got {got}") from None


def flower_home() -> Path:
    """Where Flower keeps what is its own, and we our results and state unless told otherwise."""
    # Resolved: Flower's commands are run in that folder.
    home = os.environ.get("FLWR_HOME") or "~/.flwr"
    try:
        return Path(home).expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a user without a home
        raise ConfigError(f"FLWR_HOME: must be the path of a directory, got {home!r}: {error}") from None
