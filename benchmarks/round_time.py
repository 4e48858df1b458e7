"""Where the time of an in-process run goes: client training, codec, scores, and the framework around them.

python benchmarks/round_time.py [CONF] [--rounds N]: one table, and round_time.json in the current directory.
"""

import argparse
import json
import tempfile
from pathlib import Path

import client_app
from fedkd_flwr.experiment import load
from fedkd_flwr.flower.in_process import run_in_process
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.measure.ledger import LEDGER_FILE, read_rows

SHARES = ("client_train", "encode", "decode", "aggregate", "evaluate")


def measure(conf: Path, num_rounds: int) -> dict[str, float]:
    """Seconds of one run by what they were spent on; the rest is the framework."""
    experiment = load(conf, [f"num_rounds={num_rounds}"])
    runtime_of(experiment)  # imports and model building are not part of a round
    with tempfile.TemporaryDirectory() as directory:
        run_dir = run_in_process(experiment, client_app.app, Path(directory) / "run")
        rows = list(read_rows(run_dir / LEDGER_FILE))
    timed = [row["seconds"] for row in rows if "seconds" in row]
    seconds = {name: sum(row.get(name, 0.0) for row in timed) for name in SHARES}
    wall = rows[-1]["elapsed_seconds"]
    return {"wall": wall, **seconds, "framework": wall - sum(seconds.values())}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("conf", type=Path, nargs="?", default=Path("conf/digits_fedkd.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds = measure(options.conf, options.rounds)
    print(f"{'spent on':<14}{'seconds':>9}{'share':>8}")
    for name, value in seconds.items():
        print(f"{name:<14}{value:>9.2f}{value / seconds['wall']:>8.1%}")
    Path("round_time.json").write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
