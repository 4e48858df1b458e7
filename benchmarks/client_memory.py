"""Memory and disk of a simulation, by the number of its clients: models in memory only where one is at work.

python benchmarks/client_memory.py [CONF] [--clients 10 100] [--rounds N] [--set KEY=VALUE]... [--output FILE]

Runs `fedkd run` (Ray) once for each number of clients and reads, twice a second, the proportional set size of every
process of the run. Prints, and writes as JSON, the peak of all of them together and of the largest one, and what the
clients' states take on disk.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "FEDKD_MEMORY_RUN"
POLL_SECONDS = 0.5
MEGABYTE = 1e6
KIBIBYTE = 1024


def marked(token: str) -> Iterator[int]:
    """Processes that inherited the mark, whatever has become of their parents: Ray's detach themselves."""
    wanted = f"{MARK}={token}".encode()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                environment = (directory / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted in environment:
                yield int(directory.name)


def proportional_bytes(process: int) -> int:
    """Memory of a process, what it shares divided by those who share it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * KIBIBYTE for line in lines if line.startswith("Pss:")), 0)


def measure(conf: Path, num_clients: int, num_rounds: int, overrides: list[str]) -> dict[str, Any]:
    """One run under observation."""
    token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as directory:
        changes = [f"num_clients={num_clients}", f"num_rounds={num_rounds}", *overrides]
        command = [sys.executable, "-m", "fedkd_flwr.cli", "run", str(conf), "--output-dir", directory]
        command += [part for change in changes for part in ("--set", change)]
        process = subprocess.Popen(command, env=os.environ | {MARK: token}, stdout=subprocess.DEVNULL)
        peak, largest = 0, 0
        while process.poll() is None:
            sizes = [proportional_bytes(found) for found in marked(token)]
            peak, largest = max(peak, sum(sizes)), max([largest, *sizes])
            time.sleep(POLL_SECONDS)
        if process.returncode:
            raise SystemExit(f"the run of {num_clients} clients failed")
        states = [path for path in Path(directory).glob("*/*/state/**/*") if path.is_file()]
        on_disk = sum({(s := path.stat()).st_ino: s.st_size for path in states}.values())
    return {"num_clients": num_clients, "peak_bytes": peak, "largest_process_bytes": largest, "state_bytes": on_disk}


def main() -> None:
    """Measure each number of clients, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", type=Path, nargs="?", default=Path("conf/digits_fedkd.yaml"))
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="key.key=value, over what the YAML says")
    parser.add_argument("--output", type=Path, default=Path("client_memory.json"))
    options = parser.parse_args()
    results = [measure(options.conf, clients, options.rounds, options.set) for clients in options.clients]
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("| clients | peak of all processes, MB | largest process, MB | client states on disk, MB |")
    print("|---:|---:|---:|---:|")
    for row in results:
        sizes = [row[key] / MEGABYTE for key in ("peak_bytes", "largest_process_bytes", "state_bytes")]
        print(f"| {row['num_clients']} | {' | '.join(f'{size:.0f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
