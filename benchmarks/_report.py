"""What every benchmark prints and writes: a table, and JSON with the machine and the versions under results/."""

import importlib.metadata
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "opencv-python-headless", "pydantic")


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def report(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table and write them with settings and machine."""
    widths = {key: max(len(key), *(len(_text(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(_text(row[key]).ljust(width) for key, width in widths.items()))
    RESULTS.mkdir(exist_ok=True)
    contents = {"settings": settings, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(contents, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
