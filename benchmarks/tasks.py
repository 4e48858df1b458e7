"""One task under every method: what each scores, and what it sends.

python benchmarks/tasks.py ade [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

Reads conf/TASK_fedkd.yaml and conf/TASK_fedavg.yaml; the other conditions are changes of these two. Prints one table
and writes tasks_TASK.json. Scores of the shared model are of the server's test set, over the last three rounds; local
ones are of the clients' own test examples, at the end.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import mean
from typing import Any

from runs import CONF, Condition, carry_out, interval

from fedkd_flwr.experiment import load

SCOPES = ("shared_local", "private_local", "ensemble_local")
PAPER_CODEC = "compressor={name: svd, energy_start: 0.95, energy_end: 0.98}"


def conditions_of(task: str) -> tuple[Condition, ...]:
    """Every method on one task, FedAvg of the teacher first: the others are compared with it."""
    fedkd, fedavg = f"{task}_fedkd.yaml", f"{task}_fedavg.yaml"
    resolved = load(CONF / fedkd).model_dump(mode="json")
    codec = f"compressor={json.dumps(resolved['compressor'])}"
    of_student = (
        "algorithm.model=student",
        f"algorithm.optimizer={json.dumps(resolved['algorithm']['student_optimizer'])}",
        f"algorithm.keep_moments={json.dumps(resolved['algorithm']['keep_student_moments'])}",
    )
    # A file may be about the student; these conditions never are.
    of_teacher = (
        () if load(CONF / fedavg).model_dump()["algorithm"]["model"] == "teacher" else ("algorithm.model=teacher",)
    )
    return (
        Condition("FedAvg(teacher)", fedavg, of_teacher),
        Condition("local_only(teacher)", fedavg, (*of_teacher, "algorithm.name=local_only")),
        Condition("FedAvg(teacher), default codec", fedavg, (*of_teacher, codec)),
        Condition("FedAvg(student)", fedavg, of_student),
        Condition("FedAvg(student), default codec", fedavg, (*of_student, codec)),
        Condition("FedKD, paper codec", fedkd, (PAPER_CODEC,)),
        Condition("FedKD, default codec", fedkd),
    )


def print_table(results: list[dict[str, Any]], task: str, reference: str) -> None:
    """A Markdown table; differences are paired by seed."""
    of_reference = {row["seed"]: row["score"] for row in results if row["label"] == reference}
    metric = results[0]["metric"]
    local = " | ".join(f"{scope.removesuffix('_local')}, local" for scope in SCOPES)
    print(f"| {task} | seeds | {metric}, shared model | minus {reference} | {local} | MB | fewer |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for label in dict.fromkeys(row["label"] for row in results):
        rows = [row for row in results if row["label"] == label]
        scores = [row["score"] for row in rows if row["score"] is not None]
        gaps = [
            row["score"] - of_reference[row["seed"]]
            for row in rows
            if row["score"] is not None and row["seed"] in of_reference
        ]
        fewer = [row["fewer"] for row in rows if row["fewer"] is not None]
        cells = [
            label,
            f"{len(rows)}",
            interval(scores) if scores else "-",
            interval(gaps) if gaps and label != reference else "-",
            *(_local(rows, scope, metric) for scope in SCOPES),
            f"{mean(row['per_client_bytes'] for row in rows) / 1e6:.3f}",
            f"{mean(fewer):.2%}" if fewer else "-",
        ]
        print(f"| {' | '.join(cells)} |")


def _local(rows: list[dict[str, Any]], scope: str, metric: str) -> str:
    values = [row["metrics"][scope][metric] for row in rows if row["metrics"].get(scope)]
    return interval(values) if values else "-"


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="first part of the names of two files in conf/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    conditions = conditions_of(options.task)
    wanted = [c for c in conditions if not options.run or c.label in options.run]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = carry_out(wanted, seeds, options.set, options.output / f"tasks_{options.task}_runs")
    order = {condition.label: index for index, condition in enumerate(conditions)}
    results.sort(key=lambda row: (order[row["label"]], row["seed"]))
    (options.output / f"tasks_{options.task}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results, options.task, conditions[0].label)


if __name__ == "__main__":
    main()
