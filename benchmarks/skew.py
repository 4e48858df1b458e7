"""Whom the teacher helps, by how skewed the labels are and how many clients share the data.

python benchmarks/skew.py [--seeds N] [--set KEY=VALUE]... [--output DIR]

Digits, divided among 4, 10 and 20 clients by Dirichlet's distribution or evenly: more clients have less each, a smaller
alpha makes their labels less alike. FedKD as in conf/digits_fedkd.yaml beside its baselines, in ten rounds. Writes
skew.json and skew.png: how much better the shared student is than FedAvg of it under the same compressor, and how much
better clients predict on their own data than with the better of a teacher trained alone and FedAvg of the student.
"""

import argparse
import json
import logging
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from runs import CONF, Condition, carry_out
from tasks import conditions_of

from fedkd_flwr.experiment import load
from fedkd_flwr.report.verdict import LOCAL

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ALPHAS = ("0.1", "0.5", "1", "even")
CLIENTS = (4, 10, 20)
ALONE, LOCAL_ONLY, FEDKD = "FedAvg(student), default codec", "local_only(teacher)", "FedKD, default codec"
NUM_ROUNDS = 10
POINTS = 100


def cell(alpha: str, clients: int) -> list[str]:
    """Overrides of one place in the figure."""
    partition = "{name: iid}" if alpha == "even" else f"{{name: dirichlet, alpha: {alpha}, min_examples: 5}}"
    return [f"num_clients={clients}", f"num_rounds={NUM_ROUNDS}", f"task.partition={partition}"]


def gains(rows: list[dict[str, Any]], predict_with: str) -> tuple[float, float]:
    """Points that FedKD adds: to the shared model, and to a client on its own data over the better way without it."""
    of = {(row["label"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    scope = LOCAL[predict_with][1]

    def local(label: str, seed: int, where: str) -> float:
        found = of[label, seed]
        return float(found["metrics"][where][found["metric"]])

    shared = [of[FEDKD, seed]["score"] - of[ALONE, seed]["score"] for seed in seeds]
    own = [
        local(FEDKD, seed, scope) - max(local(LOCAL_ONLY, seed, "private_local"), local(ALONE, seed, "shared_local"))
        for seed in seeds
    ]
    return POINTS * mean(shared), POINTS * mean(own)


def draw(found: dict[tuple[str, int], tuple[float, float]], path: Path) -> None:
    """One map for the student, one for the clients' own data."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = ("shared student,\nover FedAvg of it", "clients' own data,\nover the better of local and FedAvg(student)")
    for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        values = np.array([[found[alpha, clients][index] for clients in CLIENTS] for alpha in ALPHAS])
        bound = max(1.0, float(np.abs(values).max()))
        image = axis.imshow(values, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            strong = abs(value) > 0.6 * bound
            axis.text(column, row, f"{value:+.1f}", ha="center", va="center", color="white" if strong else "black")
        axis.set_xticks(range(len(CLIENTS)), [str(clients) for clients in CLIENTS])
        axis.set_yticks(range(len(ALPHAS)), ALPHAS)
        axis.set(title=title, xlabel="clients", ylabel="alpha of the labels' distribution")
        figure.colorbar(image, ax=axis, label="points of accuracy")
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Measure what is missing, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    algorithm = load(CONF / "digits_fedkd.yaml", options.set).algorithm
    conditions = [c for c in conditions_of("digits") if c.label in (ALONE, LOCAL_ONLY, FEDKD)]
    found, results = {}, []
    for clients in CLIENTS:
        for alpha in ALPHAS:
            directory = options.output / "skew_runs" / f"{alpha}_{clients}"
            of_cell = [Condition(c.label, c.conf, (*c.overrides, *cell(alpha, clients))) for c in conditions]
            rows = carry_out(of_cell, range(options.seeds), options.set, directory)
            results += [{"alpha": alpha, "clients": clients, **row} for row in rows]
            found[alpha, clients] = gains(rows, algorithm.model_dump()["predict_with"])
    (options.output / "skew.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(found, options.output / "skew.png")
    print("| alpha, clients | shared student | clients' own data |\n|---|---:|---:|")
    for (alpha, clients), (shared, own) in found.items():
        print(f"| {alpha}, {clients} | {shared:+.1f} | {own:+.1f} |")


if __name__ == "__main__":
    main()
