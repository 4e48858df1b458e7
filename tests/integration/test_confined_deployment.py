"""A deployment under the system calls that the units leave to it; needs libseccomp and systemd-analyze."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd_flwr.measure.summary import read_summary
from tests.conftest import ROOT
from tests.test_deploy_files import UNITS, unit

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not (shutil.which("systemd-analyze") and ctypes.util.find_library("seccomp")),
        reason="systemd-analyze or libseccomp is not installed",
    ),
]

# Loads a filter into itself, as systemd does for a unit, and becomes the command: allowed calls, and EPERM for others.
CONFINED = """
import ctypes, os, sys
names, command = sys.argv[1].split(","), sys.argv[2:]
allow, refuse = 0x7FFF0000, 0x00050001
lib = ctypes.CDLL("libseccomp.so.2")
lib.seccomp_init.restype = ctypes.c_void_p
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(refuse)))
for name in names:
    number = lib.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:
        assert lib.seccomp_rule_add_array(context, ctypes.c_uint32(allow), number, 0, None) == 0, name
assert lib.seccomp_load(context) == 0
os.execvp(command[0], command)
"""


def expanded(name: str) -> set[str]:
    """The system calls of a set, such as @system-service."""
    if not name.startswith("@"):
        return {name}
    done = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in done.stdout.splitlines()[1:]]
    return set().union(*(expanded(line) for line in lines if line and not line.startswith("#")))


def allowed() -> set[str]:
    """What every unit leaves; they are alike."""
    [filters] = {tuple(unit(path)["SystemCallFilter"]) for path in UNITS}
    given, taken = filters
    refused = set().union(*(expanded(name) for name in taken.removeprefix("~").split()))
    return expanded(given) - refused | {"execve"}


def confined(*command: str, **options: object) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-c", CONFINED, ",".join(sorted(allowed())), *command]
    return subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_the_filter_refuses_what_it_is_to_refuse() -> None:
    done = confined(sys.executable, "-c", "import os; os.sched_setaffinity(0, {0})")
    assert "PermissionError" in done.stderr


def test_a_deployment_completes_with_the_system_calls_that_units_leave(tmp_path: Path) -> None:
    fedkd = str(Path(sys.executable).parent / "fedkd")
    conf = str(ROOT / "conf" / "digits_fedkd.yaml")
    arguments = ("--nodes", "2", "--set", "num_rounds=1", "--output-dir", str(tmp_path))
    done = confined(fedkd, "deploy", "--demo", conf, *arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    [run_dir] = (tmp_path / "digits_fedkd").iterdir()
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["status"] == "completed"
