"""Policies in proxy states, models, or nothing: four agents learn CartPole.

python benchmarks/cartpole.py [--seeds N] [--first SEED] [--run LABEL]... [--output DIR] [--set KEY=VALUE]...

An agent plays five episodes a round. A round counts as solved when the return after it, a mean over all agents and ten
episodes of each, actions the likeliest, is at least 195; for episodes and bytes to solve it is the first such
round, and a run without one counts with its whole budget. Bytes are payloads of one agent, up and down, and every
serialised message of it ("wire"). Prints a table and writes cartpole.json.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from runs import Condition, interval, is_done, resolved, write_whole

import client_app
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows

SOLVED = 195.0
EPISODES_A_ROUND = 5
CONDITIONS = (
    Condition("alone", "cartpole_local_only.yaml"),
    Condition("FRD", "cartpole_frd.yaml"),
    Condition("MixFRD", "cartpole_mixfrd.yaml"),
    Condition("FRL, default codec", "cartpole_frl.yaml"),
    Condition("FRL, dense", "cartpole_frl.yaml", ("compressor={name: identity}",)),
)


def measure(condition: Condition, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: the mean return after each round, and bytes of an agent by round."""
    experiment = resolved(condition, seed, overrides)
    with tempfile.TemporaryDirectory() as directory:
        rows = list(read_rows(run_in_process(experiment, client_app.app, Path(directory) / "run") / LEDGER_FILE))
    # A round's clients are scored when they begin it, so each row tells what the round before has left.
    of_rounds = [row["metrics"] for row in rows if row["kind"] == "round" and row["round"] > 1]
    of_rounds += [row["metrics"] for row in rows if row["kind"] == "final"]
    returns = [(scores["private_local"] or scores["shared_local"])["mean_return"] for scores in of_rounds]
    messages = [row for row in rows if row["kind"] == "message" and row["purpose"] == "train"]

    def by_round(name: str) -> list[float]:
        rounds = range(1, experiment.num_rounds + 1)
        return [sum(m[name] for m in messages if m["round"] == r) / experiment.num_clients for r in rounds]

    return {
        "label": condition.label,
        "seed": seed,
        "experiment": experiment.to_yaml(),
        "returns": returns,
        "payload_bytes": by_round("payload_bytes"),
        "wire_bytes": by_round("wire_bytes"),
    }


def facts(run: dict[str, Any]) -> dict[str, float]:
    """What the table is made of."""
    first = next((i for i, value in enumerate(run["returns"]) if value >= SOLVED), None)
    used = len(run["returns"]) if first is None else first + 1
    return {
        "solved": float(first is not None),
        "episodes": float(EPISODES_A_ROUND * used),
        "payload": sum(run["payload_bytes"][:used]),
        "a_round": mean(run["payload_bytes"][1:]),
        "wire": sum(run["wire_bytes"][:used]) / 1000,
        "mean": mean(run["returns"]),
        "last": mean(run["returns"][-10:]),
    }


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1, help="seed 0 was used to choose distillation_steps")
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    directory = options.output / "cartpole_runs"
    directory.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first, options.first + options.seeds):
        for condition in CONDITIONS:
            if options.run and condition.label not in options.run:
                continue
            name = "".join(c if c.isalnum() else "_" for c in condition.label)
            path = directory / f"{name}_{seed}.json"
            if not is_done(path, condition, seed, options.set):
                write_whole(path, json.dumps(measure(condition, seed, options.set)))
                print(path.stem, facts(json.loads(path.read_text(encoding="utf-8"))), flush=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    (options.output / "cartpole.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    """One line for each condition, with 95 % intervals over seeds."""
    columns = {"episodes": 0, "mean": 0, "last": 0, "a_round": 0, "payload": 0, "wire": 0}
    print("| | solved | " + " | ".join(columns) + " |")
    for condition in CONDITIONS:
        found = [facts(run) for run in results if run["label"] == condition.label]
        if found:
            cells = [interval([f[name] for f in found]) for name in columns]
            print(
                f"| {condition.label} | {sum(f['solved'] for f in found):.0f} of {len(found)} | {' | '.join(cells)} |"
            )


if __name__ == "__main__":
    main()
