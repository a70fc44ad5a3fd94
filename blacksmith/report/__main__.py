"""The command `python -m blacksmith.report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blacksmith import report
from blacksmith.errors import DataError, one_line_errors
from blacksmith.report.read import shared_directory


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of one run or a comparison of several; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m blacksmith.report",
        description="Write a self-contained HTML page that shows a run, or compares several.",
    )
    default = "report.html in the run directory; for several runs comparison.html above them all"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page to write (default: {default})")
    arguments = parser.parse_args(argv)
    runs, output = arguments.runs, arguments.output
    files = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    for run in runs:
        if run.is_dir() and not any((run / name).exists() for name in files):
            raise DataError(f"{run} is not a run directory: it has none of {', '.join(files)}")
    if len(runs) > 1:
        written = report.write_comparison(output or shared_directory(runs) / "comparison.html", runs)
    else:
        written = report.write(runs[0], output)
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
