"""Whether the memory of a long run grows: resident memory after every round of a federation of many clients.

python benchmarks/server_memory.py [CONF] [--rounds N] [--clients N]: one table, and server_memory.json in the current
directory. Server and clients share one process here, so the figure is an upper bound of what the server holds.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import client_app
from fedkd_flwr.experiment import Experiment, load
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.measure.ledger import Row

CONF = Path(__file__).resolve().parent.parent / "conf" / "digits_fedkd_paper.yaml"
# Four images a client and one small batch each: what is kept from round to round matters here, not what is learned.
FEDERATION = (
    "task.partition.name=iid",
    "task.teacher={num_layers: 2, hidden_size: 32, num_heads: 2, intermediate_size: 32}",
    "task.student={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 32}",
    "algorithm.local={num_epochs: 1, batch_size: 16}",
    "server.fraction_train=0.05",
)
WARM_UP_ROUNDS = 5  # allocators and caches fill; not what a long run adds
PRINTED_ROWS = 9


def resident_megabytes() -> float:
    """Resident memory of this process now, in MB; the `resource` module knows only the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("/proc/self/status has no VmRSS")


def measure(experiment: Experiment) -> dict[int, float]:
    """MB by round; round 0 is before training, when every client has said who it is."""
    megabytes: dict[int, float] = {}

    def listen(row: Row) -> None:
        if row["kind"] == "round":
            megabytes[row["round"]] = resident_megabytes()

    with tempfile.TemporaryDirectory() as directory:
        run_in_process(experiment, client_app.app, Path(directory) / "run", listen)
    return megabytes


def slope_of(megabytes: dict[int, float]) -> float:
    """MB a round after the warm-up, by least squares."""
    rounds = [number for number in megabytes if number > WARM_UP_ROUNDS]
    return float(np.polyfit(rounds, [megabytes[number] for number in rounds], 1)[0])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", type=Path, nargs="?", default=CONF)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clients", type=int, default=300)
    options = parser.parse_args()
    if options.rounds < WARM_UP_ROUNDS + 2:
        parser.error(f"--rounds must be at least {WARM_UP_ROUNDS + 2}: a slope needs two rounds after the warm-up")
    experiment = load(options.conf, [f"num_clients={options.clients}", f"num_rounds={options.rounds}", *FEDERATION])
    megabytes = measure(experiment)
    slope = slope_of(megabytes)
    printed = set(np.linspace(0, options.rounds, PRINTED_ROWS).round().astype(int).tolist()) | {WARM_UP_ROUNDS}
    print(f"{'round':>5}{'MB':>10}")
    for number, value in megabytes.items():
        if number in printed:
            print(f"{number:>5}{value:>10.1f}")
    print(f"slope after round {WARM_UP_ROUNDS}: {slope:.3f} MB a round")
    found = {
        "num_clients": options.clients,
        "clients_per_round": experiment.num_sampled,
        "warm_up_rounds": WARM_UP_ROUNDS,
        "slope_megabytes_per_round": slope,
        "megabytes": megabytes,
    }
    Path("server_memory.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
