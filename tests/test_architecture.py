import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fedkd_flwr"
APPS = ("server_app", "client_app")
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py")) + [ROOT / f"{app}.py" for app in APPS]

LAYERS = {
    "core": 0,
    "disk": 0,
    "algorithms": 1,
    "compressors": 1,
    "tasks": 1,
    "measure": 1,
    "server_options": 1,
    "privacy": 1,
    "yaml_text": 1,
    "console": 1,
    "experiment": 2,
    "flower": 3,
    "report": 3,
    "cli": 5,
    "cli_deploy": 4,
    "cli_places": 4,
    "cli_state": 4,
    "server_app": 4,
    "client_app": 4,
}
ONLY_IN = {
    "flwr": {"flower", "cli", "server_app", "client_app", "algorithms"},
    "flwr_datasets": {"tasks"},
    "transformers": {"tasks"},
    "datasets": {"tasks"},
    "peft": {"algorithms"},
    "gymnasium": {"tasks"},
}
CORE_LIBRARIES = {"torch", "numpy"}
FILES_AND_CLOCKS = {
    *("os", "io", "shutil", "tempfile", "glob", "fileinput", "pathlib", "mmap", "pickle", "shelve", "sqlite3"),
    *("time", "datetime", "sched", "timeit", "socket", "subprocess"),
}
EXEMPT = {
    # `Path` names the type of an argument there; nothing in core opens one.
    ("fedkd_flwr.core.protocols", "pathlib"),
    # `fedkd run --in-process` drives the very app that Flower would; flower/ is handed it and never imports it.
    ("fedkd_flwr.cli", "client_app"),
}
MAX_APP_LINES = 39
MAX_LINES = 400
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "constants"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str | None:
    """The box of the layer diagram that a module of ours is in; the bare package for the package itself."""
    names = module.split(".")
    if names[0] == PACKAGE:
        return names[1] if len(names) > 1 else PACKAGE
    return names[0] if names[0] in APPS else None


def imported_modules(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Every module that an import statement names, wherever it stands, relative ones resolved."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = module.split(".")
            keep = len(names) - node.level + is_package
            base = ".".join([*(names[:keep] if node.level else []), *([node.module] if node.module else [])])
            # `from fedkd_flwr import flower` names a box, `from fedkd_flwr.core import losses` is inside one.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == PACKAGE else {base}
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    found = []
    for target in sorted(imported_modules(source, module, is_package=is_package)):
        if (module, target.split(".")[0]) not in EXEMPT and (problem := _problem(module, target)):
            found.append(f"{module} imports {target}: {problem}")
    return found


def _problem(module: str, target: str) -> str | None:
    here, there = part_of(module), part_of(target)
    assert here is not None, f"{module} is not ours"
    library = target.split(".")[0]
    if there is None:
        if here not in ONLY_IN.get(library, {here}):
            return f"{library} only in {sorted(ONLY_IN[library])}"
        if here == "core" and library not in CORE_LIBRARIES | sys.stdlib_module_names:
            return "core is torch and numpy only"
        return "core touches no file and no clock" if here == "core" and library in FILES_AND_CLOCKS else None
    if there not in LAYERS:
        # `import fedkd_flwr` and `from fedkd_flwr import __version__` reach no box.
        return None if there == PACKAGE or there.startswith("__") else f"{there} has no layer"
    if here not in LAYERS:
        return f"{here} has no layer"
    return None if here == there or LAYERS[there] < LAYERS[here] else "imports point strictly downwards"


def test_the_walk_finds_the_whole_package() -> None:
    assert {part_of(module_name(path)) for path in SOURCES} == {*LAYERS, PACKAGE}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_downwards_and_libraries_stay_where_they_belong(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == []


def test_every_exemption_is_still_needed() -> None:
    used = {
        (module_name(path), target.split(".")[0])
        for path in SOURCES
        for target in imported_modules(path.read_text(encoding="utf-8"), module_name(path))
    }
    assert used >= EXEMPT


@pytest.mark.parametrize(
    ("source", "module", "problem"),
    [
        ("from fedkd_flwr.algorithms.base import Algorithm", "fedkd_flwr.core.arrays", "strictly downwards"),
        ("from fedkd_flwr.tasks import TASKS", "fedkd_flwr.algorithms.fedkd", "strictly downwards"),
        ("import fedkd_flwr.report.table", "fedkd_flwr.flower.server", "strictly downwards"),
        ("from fedkd_flwr import flower", "fedkd_flwr.experiment", "strictly downwards"),
        ("from ..report import table", "fedkd_flwr.flower.server", "strictly downwards"),
        ("import server_app", "fedkd_flwr.flower.launcher", "strictly downwards"),
        ("import client_app", "server_app", "strictly downwards"),
        ("def f():\n    from fedkd_flwr import cli", "fedkd_flwr.flower.server", "strictly downwards"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedkd_flwr.experiment import Experiment",
            "fedkd_flwr.measure.summary",
            "strictly downwards",
        ),
        ("from fedkd_flwr.core import arrays", "fedkd_flwr", "has no layer"),
        ("from fedkd_flwr.extras import x", "fedkd_flwr.cli", "extras has no layer"),
        ("from flwr.app import Message", "fedkd_flwr.measure.ledger", "flwr only in"),
        ("from flwr.app import Message", "fedkd_flwr.core.arrays", "flwr only in"),
        ("import os, flwr", "fedkd_flwr.experiment", "flwr only in"),
        ("def f():\n    import transformers", "fedkd_flwr.algorithms.fedkd", "transformers only in"),
        ("from datasets import Dataset", "fedkd_flwr.flower.runtime", "datasets only in"),
        ("from flwr_datasets.partitioner import Partitioner", "fedkd_flwr.flower.runtime", "flwr_datasets only in"),
        ("import pydantic", "fedkd_flwr.core.losses", "torch and numpy only"),
        ("import yaml", "fedkd_flwr.core.losses", "torch and numpy only"),
        ("from pathlib import Path", "fedkd_flwr.core.losses", "no file and no clock"),
        ("from time import monotonic", "fedkd_flwr.core.losses", "no file and no clock"),
        ("import os.path", "fedkd_flwr.core.losses", "no file and no clock"),
    ],
)
def test_the_checker_catches(source: str, module: str, problem: str) -> None:
    found = violations(source, module)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from fedkd_flwr.algorithms.base import Algorithm", "fedkd_flwr.algorithms.fedkd"),
        ("from .base import Algorithm", "fedkd_flwr.algorithms.fedkd"),
        ("from ..core import losses", "fedkd_flwr.algorithms.fedkd"),
        ("import fedkd_flwr\nfrom fedkd_flwr import __version__", "fedkd_flwr.cli"),
        ("from flwr.serverapp.strategy import Strategy\nimport torch", "fedkd_flwr.algorithms.fedavg"),
        ("import transformers\nimport datasets\nimport time", "fedkd_flwr.tasks.digits"),
        ("import math\nimport numpy as np\nfrom torch.nn import functional", "fedkd_flwr.core.losses"),
    ],
)
def test_the_checker_allows(source: str, module: str) -> None:
    assert violations(source, module) == []


def test_a_relative_import_in_a_package_is_resolved_from_the_package() -> None:
    assert imported_modules("from .base import x", "fedkd_flwr.tasks", is_package=True) == {"fedkd_flwr.tasks.base"}
    assert imported_modules("from .base import x", "fedkd_flwr.tasks.digits") == {"fedkd_flwr.tasks.base"}


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "core").glob("*.py")), ids=module_name)
def test_core_opens_no_file(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "open"]


@pytest.mark.parametrize("app", APPS)
def test_an_app_is_wiring_of_under_40_lines(app: str) -> None:
    assert len((ROOT / f"{app}.py").read_text(encoding="utf-8").splitlines()) <= MAX_APP_LINES


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_source_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_is_named_after_what_it_holds(path: Path) -> None:
    names = {part.strip("_").lower() for part in module_name(path).split(".")}
    assert not names & VAGUE_NAMES


def test_a_client_begins_without_what_only_some_of_its_work_needs() -> None:
    """Every message to a real node starts a process: what takes a second to import waits until it is needed."""
    heavy = {"datasets", "flwr_datasets", "matplotlib", "pandas", "peft", "scipy", "sklearn", "transformers"}
    program = f"import sys, client_app; print(*sorted({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
