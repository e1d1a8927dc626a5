"""How soon do `ml-train --help` and a mistake in the YAML answer? Whole processes, in turn, medians."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    command = Path(sys.executable).with_name("ml-train")
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder, "wrong.yaml")
        wrong.write_text("data: {data_dir: x, num_clases: 3}\n")
        cases = {
            "ml-train --help": ([command, "--help"], 0),
            "ml-train, a mistake in the YAML": ([command, "--config", wrong], 2),
            "python -c pass": ([sys.executable, "-c", "pass"], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds + 1):
            for name, (words, code) in cases.items():
                start = time.perf_counter()
                done = subprocess.run(words, capture_output=True)
                if done.returncode != code:
                    raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr.decode()}")
                if number:  # the first is the warm-up
                    seconds[name].append(time.perf_counter() - start)
    rows = [
        {"command": name, "median s": statistics.median(values), "min s": min(values), "max s": max(values)}
        for name, values in seconds.items()
    ]
    report("startup", vars(args), rows)


if __name__ == "__main__":
    main()
