"""Runs that are compared: many conditions, the same seeds, each written down when it ends.

Runs are in-process. A benchmark that is started again goes on where it was stopped, and several processes can share the
work. The score of a run is the mean of its last three rounds; bytes are every serialised message of a client, both
ways.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import client_app
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.measure.metrics import last_mean

CONF = Path(__file__).resolve().parent.parent / "conf"
LAST_ROUNDS = 3
# Half-width of a 95 % interval is this times the standard error: Student's t for N - 1 degrees of freedom.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

Scores = Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Condition:
    """One point of the picture.

    Attributes:
        label: in table and legend.
        conf: file in conf/.
        overrides: over what the file says.
        family: points of one family share a colour.
    """

    label: str
    conf: str
    overrides: tuple[str, ...] = ()
    family: str = ""


def measure(condition: Condition, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: scores by round and over the last ones, bytes of a client by round and in all, seconds."""
    experiment = resolved(condition, seed, overrides)
    with tempfile.TemporaryDirectory() as directory:
        run_dir = run_in_process(experiment, client_app.app, Path(directory) / "run")
        rows = list(read_rows(run_dir / LEDGER_FILE))
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    rounds = [row for row in rows if row["kind"] == "round"]
    moved = [row["wire_bytes"] for row in rounds]
    shared = [row["metrics"]["shared_global"] for row in rounds]
    # Of the model that clients are left with: the shared one, or where there is none their own, on their own data.
    of_client = summary["metrics"]["shared_local"] or summary["metrics"]["private_local"]
    metric = next(iter(shared[-1] or of_client))
    scores = [of_round[metric] for of_round in shared if of_round]
    return {
        "label": condition.label,
        "seed": seed,
        "experiment": experiment.to_yaml(),
        "metric": metric,
        "score": last_mean(scores, LAST_ROUNDS),
        "scores": scores,
        "last_rounds": _last_rounds(shared),
        "metrics": summary["metrics"],
        "bytes": [sum(moved[: i + 1]) / experiment.num_clients for i in range(len(moved))],
        "per_client_bytes": summary["bytes"]["per_client"],
        "fewer": summary["bytes"]["reduction_vs_dense_teacher"],
        "seconds": summary["seconds"],
    }


def _last_rounds(by_round: Sequence[Scores]) -> dict[str, float | None]:
    """Every metric's mean over the last rounds."""
    last = by_round[-1] or {}
    return {name: last_mean([row[name] for row in by_round if row and name in row], LAST_ROUNDS) for name in last}


def carry_out(
    conditions: Sequence[Condition], seeds: Sequence[int], overrides: list[str], directory: Path
) -> list[dict[str, Any]]:
    """Measure what `directory` does not hold yet; everything it holds, in the order of conditions and seeds."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for condition in conditions:
            name = "".join(c if c.isalnum() else "_" for c in condition.label)
            path = directory / f"{name}_{seed}.json"
            if not is_done(path, condition, seed, overrides):
                found = measure(condition, seed, overrides)
                write_whole(path, json.dumps(found))
                print(
                    f"{condition.label} seed {seed}: {found['score'] or 0:.4f}, {found['fewer'] or 0:.2%} fewer",
                    flush=True,
                )
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]


def is_done(path: Path, condition: Condition, seed: int, overrides: list[str]) -> bool:
    """Whether a run of the same experiment, every default written out, is written down."""
    if not path.exists():
        return False
    if json.loads(path.read_text(encoding="utf-8")).get("experiment") != resolved(condition, seed, overrides).to_yaml():
        raise SystemExit(f"{path} is of another experiment; remove it, or give another --output")
    return True


def resolved(condition: Condition, seed: int, overrides: list[str]) -> Experiment:
    """The experiment of one run."""
    return load(CONF / condition.conf, [*condition.overrides, f"seed={seed}", *overrides])


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: other processes read the folder."""
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):.4f}"
    half = STUDENT_T[min(len(values), max(STUDENT_T))] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.4f} +- {half:.4f}"
