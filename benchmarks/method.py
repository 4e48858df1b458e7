"""What each part of FedKD earns on one task: the paper's ablation, and every lever beyond it, one at a time.

python benchmarks/method.py digits [--seeds N] [--run LABEL]... [--set KEY=VALUE]... [--output DIR]

Reads conf/TASK_fedkd.yaml and conf/TASK_fedavg.yaml. All conditions have the same seeds, partitions, version 0, epochs
and batches, so as many examples and steps for each model that trains; seconds are in the JSON. Prints one table and
writes method_TASK.json. Differences are paired by seed and to FedAvg of the student under the same codec, whose
optimiser is that of FedKD's student: what is above it is what the teacher is worth. Three levers need no teacher; the
last rows show what they do without one. "Without adaptive" is a constant divisor of 1, so three times the guidance or
more; teacher_guidance and student_guidance tell strength from adaptivity.
"""

import argparse
import json
import logging
from pathlib import Path

from runs import CONF, Condition, carry_out
from tasks import conditions_of, print_table

from fedkd_flwr.experiment import ConfigError, load

REFERENCE = "FedAvg(student), default codec"
TERMS = ("mutual", "hidden", "attention", "adaptive")
LEVERS = {
    "trust: right": ("algorithm.trust=right",),
    "trust: probability": ("algorithm.trust=probability",),
    "guide_warmup 0.3": ("algorithm.guide_warmup=0.3",),
    "logit_adjustment 1": ("algorithm.logit_adjustment=1.0",),
    "proximal_mu 0.01": ("algorithm.proximal_mu=0.01",),
    "teacher_anchor 0.5": ("algorithm.teacher_anchor=0.5",),
    "temperature 2": ("algorithm.temperature=2.0",),
    "divisor_floor 0.1": ("algorithm.divisor_floor=0.1",),
    "divisor_floor 1": ("algorithm.divisor_floor=1.0",),
    "student_guidance 3": ("algorithm.student_guidance=3.0",),
    "teacher_guidance 5": ("algorithm.teacher_guidance=5.0",),
    "trust: better": ("algorithm.trust=better",),
    "divisor_floor 10": ("algorithm.divisor_floor=10.0",),
    "student moments kept": ("algorithm.keep_student_moments=true",),
    "student moments reset": ("algorithm.keep_student_moments=false",),
    "server momentum 0.5": ("server.aggregator={name: fedavgm, eta: 1.0, momentum: 0.5}",),
}
# What FedAvg of the student can have as well; without these a lever's gain would be put down to the teacher.
OF_STUDENT_ALONE = {
    "logit_adjustment 1": ("algorithm.logit_adjustment=1.0",),
    "moments kept": ("algorithm.keep_moments=true",),
    "moments reset": ("algorithm.keep_moments=false",),
    "server momentum 0.5": ("server.aggregator={name: fedavgm, eta: 1.0, momentum: 0.5}",),
}


def returned(conf: str, term: str, overrides: list[str]) -> bool:
    """Whether the models have what a term compares."""
    experiment = load(CONF / conf, [*overrides, f"algorithm.{term}=true"])
    try:
        experiment.build_algorithm(experiment.build_task())
    except ConfigError:
        return False
    return True


def ablation_of(task: str, overrides: list[str]) -> tuple[Condition, ...]:
    """The conditions of the task's table, then one change of FedKD at a time."""
    fedkd = f"{task}_fedkd.yaml"
    algorithm = load(CONF / fedkd).model_dump(mode="json")["algorithm"]
    conditions = [c for c in conditions_of(task) if "paper" not in c.label]
    alone = next(c for c in conditions if c.label == REFERENCE)
    local = next(c for c in conditions if c.label == "local_only(teacher)")
    optimizer = f"algorithm.optimizer={json.dumps(algorithm['student_optimizer'])}"
    conditions.append(
        Condition("local_only(student)", local.conf, (*local.overrides, "algorithm.model=student", optimizer))
    )
    conditions.append(Condition("FedKD, identity", fedkd, ("compressor={name: identity}",)))
    for name in TERMS:
        on = algorithm[name] is not False
        if not on and not returned(fedkd, name, overrides):
            continue
        value = "false" if on else "true"
        conditions.append(
            Condition(f"FedKD, {'without' if on else 'with'} {name}", fedkd, (f"algorithm.{name}={value}",))
        )
    conditions += [Condition(f"FedKD, {label}", fedkd, overrides) for label, overrides in LEVERS.items()]
    conditions += [
        Condition(f"{REFERENCE}, {label}", alone.conf, (*alone.overrides, *overrides))
        for label, overrides in OF_STUDENT_ALONE.items()
    ]
    return tuple(conditions)


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="first part of the names of two files in conf/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--run", action="append", help="a label; several may be given; all when none is")
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    logging.getLogger("fedkd").setLevel(logging.ERROR)
    conditions = ablation_of(options.task, options.set)
    wanted = [c for c in conditions if not options.run or c.label in options.run]
    results = carry_out(wanted, range(options.seeds), options.set, options.output / f"method_{options.task}_runs")
    order = {condition.label: index for index, condition in enumerate(conditions)}
    results.sort(key=lambda row: (order[row["label"]], row["seed"]))
    (options.output / f"method_{options.task}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results, options.task, REFERENCE)


if __name__ == "__main__":
    main()
