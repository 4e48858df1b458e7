"""Outputs or weights: FD, MixFLD and Mix2FLD beside FedAvg, where each of ten devices lacks three digits.

python benchmarks/outputs.py --set task.data.source=DIR [--seeds N] [--run LABEL]... [--output DIR]

The setting of Jeong et al. 2018 (https://arxiv.org/abs/1811.11479): 2,000 images a device, of three digits five each,
16 rounds; but one epoch a round (about 30 steps of 64 images, not 250), and a network of 37,610 parameters, not
1,199,648. Every model is scored on the whole test set: the shared one, and where there is none each client's own, whose
mean is what the paper prints for FD. Bits are those of payloads, up and down, of one device over the whole run. Prints
a table and writes outputs.json.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from runs import Condition, interval, resolved, write_whole

import client_app
from fedkd_flwr.algorithms.own_models import OwnModelClient
from fedkd_flwr.core.protocols import score_of
from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.store import ClientStore
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows
from fedkd_flwr.measure.metrics import last_mean

FEDAVG = "mnist_rare_fedavg.yaml"
CODED = "compressor={name: transform_coding}"
FEDKD = {
    "name": "fedkd",
    "hidden": False,
    "attention": False,
    "local": {"num_epochs": 1, "batch_size": 64},
    "student_optimizer": {"name": "adam", "learning_rate": 0.002},
}
CONDITIONS = (
    Condition("alone", "mnist_fd.yaml", ("algorithm.gamma=0.0",)),
    Condition("FD", "mnist_fd.yaml"),
    Condition("FD, gamma 1", "mnist_fd.yaml", ("algorithm.gamma=1.0",)),
    Condition("MixFLD", "mnist_mixfld.yaml"),
    Condition("Mix2FLD", "mnist_mix2fld.yaml"),
    Condition("MixFLD, 10 seeds", "mnist_mixfld.yaml", ("algorithm.num_seeds=10",)),
    Condition("Mix2FLD, 10 seeds", "mnist_mix2fld.yaml", ("algorithm.num_seeds=10",)),
    Condition("Mix2FLD, mixing 0.4", "mnist_mix2fld.yaml", ("algorithm.mixing=0.4",)),
    Condition("FedAvg, dense", FEDAVG),
    Condition("FedAvg, default codec", FEDAVG, (CODED,)),
    Condition("FedKD, default codec", FEDAVG, (CODED, f"algorithm={json.dumps(FEDKD)}")),
)


def measure(condition: Condition, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: scores on the whole test set, bits of a device."""
    experiment = resolved(condition, seed, overrides)
    with tempfile.TemporaryDirectory() as directory:
        run_dir = run_in_process(experiment, client_app.app, Path(directory) / "run")
        rows = list(read_rows(run_dir / LEDGER_FILE))
        shared = [row["metrics"]["shared_global"] for row in rows if row["kind"] == "round"]
        score = (
            last_mean([scores["accuracy"] for scores in shared]) if shared[-1] else own_score(experiment, run_dir, rows)
        )
        first = next((i for i, scores in enumerate(shared) if scores and scores["accuracy"] >= 0.9), None)
    messages = [row for row in rows if row["kind"] == "message" and row["purpose"] == "train"]
    bits = {
        way: 8 * sum(row["payload_bytes"] for row in messages if row["direction"] == way) / experiment.num_clients
        for way in ("uplink", "downlink")
    }
    wire = sum(row["wire_bytes"] for row in rows if row["kind"] == "message") / experiment.num_clients
    return {
        "label": condition.label,
        "seed": seed,
        "experiment": experiment.to_yaml(),
        "score": score,
        "scores": [scores and scores["accuracy"] for scores in shared],
        "rounds_to_90": first,
        "bits": bits,
        "wire_bytes": wire,
    }


def own_score(experiment: Experiment, run_dir: Path, rows: list[dict[str, Any]]) -> float:
    """Mean accuracy of the clients' own models on the whole test set."""
    runtime = runtime_of(experiment)
    half = runtime.algorithm.client
    assert isinstance(half, OwnModelClient)
    scores = []
    for client in range(experiment.num_clients):
        state = ClientStore(run_dir / "state", rows[0]["training_id"], f"{client:05d}").load()
        assert state is not None
        module = half.model(state.private, runtime.task.client_data(client))
        scores.append(score_of(runtime.task, module, runtime.task.test_data())["accuracy"])
    return mean(scores)


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    directory = options.output / "outputs_runs"
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [c for c in CONDITIONS if not options.run or c.label in options.run]
    for seed in range(options.seeds):
        for condition in wanted:
            path = directory / f"{''.join(c if c.isalnum() else '_' for c in condition.label)}_{seed}.json"
            if not path.exists():
                found = measure(condition, seed, options.set)
                write_whole(path, json.dumps(found))
                print(f"{condition.label} seed {seed}: {found['score']:.4f}", flush=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    (options.output / "outputs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("| | seeds | accuracy | bits up | bits down | wire, kB |\n|---|---:|---:|---:|---:|---:|")
    for condition in CONDITIONS:
        rows = [row for row in results if row["label"] == condition.label]
        if rows:
            up, down = (mean(row["bits"][way] for row in rows) for way in ("uplink", "downlink"))
            wire = mean(row["wire_bytes"] for row in rows) / 1e3
            score = interval([row["score"] for row in rows])
            print(f"| {condition.label} | {len(rows)} | {score} | {up:,.0f} | {down:,.0f} | {wire:.1f} |")


if __name__ == "__main__":
    main()
