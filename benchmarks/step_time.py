"""What a step of FedKD costs beside a step of its student and one of its teacher, and what each term adds.

python benchmarks/step_time.py [CONF]... [--set KEY=VALUE]... [--repeats N] [--output FILE]

One client's round on the same batches under each condition, in turn, so that whatever else the machine does falls on
all alike; medians of processor time for each step, one thread. Reading and writing of the models at both ends of a
round, and of the moments at its end, is in it. A term that the models have nothing for is left out.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from runs import CONF

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.runtime import Runtime, runtime_of

TERMS = ("mutual", "hidden", "attention")


def conditions_of(experiment: Experiment) -> dict[str, Any]:
    """Algorithms by label: each model alone, then FedKD with more and more terms."""
    student, teacher = (baseline.algorithm for baseline in experiment.algorithm.baselines()[:2])
    found: dict[str, Any] = {"student alone": student, "teacher alone": teacher}
    for label, on in (
        ("FedKD, no term", ()),
        ("FedKD, mutual", ("mutual",)),
        ("FedKD, hidden", ("hidden",)),
        ("FedKD, attention", ("attention",)),
        ("FedKD, all terms", TERMS),
    ):
        found[label] = experiment.algorithm.model_copy(update={term: "auto" if term in on else False for term in TERMS})
        found[label] = found[label].model_copy(update={"mutual": "mutual" in on})
    return found


def seconds_of(runtime: Runtime, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of a step, by label, one for each repeat after a first that does not count."""
    data = runtime.task.client_data(0)
    experiment = runtime.experiment
    halves = {label: options.build(runtime.task, 0) for label, options in conditions_of(experiment).items()}
    num_steps = experiment.algorithm.local.num_steps(len(data.train))  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {label: [] for label in halves}
    for repeat in range(repeats + 1):
        for label, algorithm in halves.items():
            shared, private = algorithm.shared.initial(), algorithm.client.initial_private(data)
            started = process_time()
            algorithm.client.train(shared, private, data, Assignment(0.0, repeat))
            if repeat:
                found[label].append((process_time() - started) / num_steps)
    return found


def main() -> None:
    """Measure, print a table for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", nargs="*", type=Path, default=[CONF / "digits_fedkd.yaml"])
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("step_time.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for conf in options.conf:
        experiment = load(conf, options.set)
        times = seconds_of(runtime_of(experiment), options.repeats)
        results[experiment.name] = times
        both = median(a + b for a, b in zip(times["student alone"], times["teacher alone"], strict=True))
        print(f"| {experiment.name} | ms a step | of student and teacher alone |\n|---|---:|---:|")
        for label, seconds in times.items():
            print(f"| {label} | {1e3 * median(seconds):.1f} | {median(seconds) / both:.2f} |")
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
