"""What differential privacy of a whole client costs on digits: accuracy against epsilon.

python benchmarks/privacy.py [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

FedKD and FedAvg of its student, with noise on the clients (`privacy`) and, for comparison, with the server's noise
(`dp_fixed_clipping`), at several noise multipliers; none only clips. Two federations: the ten clients of
conf/digits_fedkd.yaml, and a hundred of a dozen images each, whose noise averages out better. Epsilon is as the run's
own summary states it, for one client replaced. Prints a table and writes privacy.json.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from runs import Condition, carry_out, interval

from fedkd_flwr.experiment import parse
from fedkd_flwr.measure.privacy_account import PrivacyAccount

FEDKD, STUDENT = "digits_fedkd.yaml", "digits_fedavg_student.yaml"
CLIP = 1.0
MULTIPLIERS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
HUNDRED = ("num_clients=100", "server.num_train=100", "task.partition.alpha=100.0")


def conditions() -> tuple[Condition, ...]:
    """Every run of the table."""
    found = []
    for size, many in (("10 clients", ()), ("100 clients", HUNDRED)):
        for name, conf in (("FedKD", FEDKD), ("FedAvg(student)", STUDENT)):
            for multiplier in MULTIPLIERS:
                noise = f"privacy={{clip_norm: {CLIP}, noise_multiplier: {multiplier}}}"
                found.append(Condition(f"{name}, {size}, noise {multiplier:g}", conf, (noise, *many)))
    return tuple(found)


def epsilons(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Towards the server and of what is released, of a run without trouble."""
    experiment = parse(row["experiment"])
    assert experiment.noise_facts is not None
    spent = PrivacyAccount(experiment.noise_facts).forecast(experiment.num_rounds, experiment.num_sampled)
    return spent["epsilon_server"], spent["epsilon_released"]
