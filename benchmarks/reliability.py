"""Kills, stops and damaged inputs: what is lost, and what ends in a traceback.

    python benchmarks/reliability.py                      # writes benchmarks/results/reliability.json
    python benchmarks/reliability.py --cycles=20 --mutants=50 --output=/tmp/reliability.json

Cycles: each of the five experiments is started again and again in its run directory and interrupted at a
random moment (SIGKILL, SIGTERM or SIGINT; at its start, in training, or while a checkpoint is written) until
it ends. Its weights and metric stream are compared with an uninterrupted run's, bit for bit.

Mutants: a small valid input of each format is damaged at random and given to the program, which must either
accept it or refuse it with one line and exit status 1, 2 or 3, and then leave no run directory behind.

Everything is drawn from `--seed`; a failure prints what reproduces it.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import damage
import interruptions
from machine import machine

RESULTS = Path(__file__).resolve().parent / "results" / "reliability.json"


def main() -> int:
    """Runs both parts; returns 1 if anything was lost, differed, crashed or hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="interruptions over all experiments")
    parser.add_argument("--mutants", type=int, default=1000, help="damaged inputs over all formats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--keep", action="store_true", help="keep the directories of failures")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began = time.perf_counter()
    directory = Path(tempfile.mkdtemp(prefix="reliability-"))
    rows = {}
    with ThreadPoolExecutor(arguments.workers) as pool:
        share = -(-arguments.cycles // len(interruptions.CASES))
        started = {
            case: pool.submit(interruptions.torture, case, directory / "cycles" / case, share, arguments.seed)
            for case in interruptions.CASES
        }
        for case, future in started.items():
            rows[case] = future.result()
            print(line(case, rows[case]), flush=True)
    damaged = damage.torture(directory / "mutants", arguments.mutants, arguments.seed, arguments.workers)
    for name, row in damaged.items():
        rows[name] = row
        print(line(name, row), flush=True)
    names = ("cycles", "kills", "lost", "mismatches", "mutants", "tracebacks", "hangs", "partial_directories")
    figures = {name: sum(row.get(name, 0) for row in rows.values()) for name in names}
    seconds = round(time.perf_counter() - began)
    content = {
        "header": machine() | {"seed": arguments.seed, "seconds": seconds},
        "figures": figures,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(line("all", figures), f"{seconds} s", sep="\n")
    failed = any(figures[name] for name in names[2:4] + names[5:])
    if not (failed and arguments.keep):
        shutil.rmtree(directory, ignore_errors=True)
    return int(failed)


def line(name: str, row: dict) -> str:
    """One line of the table."""
    return f"{name:18}" + "  ".join(f"{key} {value}" for key, value in row.items() if key != "failures")


if __name__ == "__main__":
    sys.exit(main())
