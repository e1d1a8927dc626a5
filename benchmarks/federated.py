"""What a federation costs beyond its local work: seconds and bytes a round, memory; simulated and with real processes.

Simulated with 2, 4, 8 and 16 sites, the same images divided among them; deployed with 3 sites on this machine, with
TLS and node keys. "beyond" is the time of a round without the work of its sites: their sum in a simulation, where they
take turns, and the longest in a deployment, where they work side by side.

    python benchmarks/federated.py [--sites 2 4 8 16] [--rounds 4] [--base_channels 16] [--skip_deployed]
"""

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _report import report

from ml_src.core.config_file import load_config, to_yaml
from ml_src.core.data.sample import write_sample

BIN = Path(sys.executable).parent


def prepare(folder: Path, num_images: int, side: int) -> None:
    """Write images, a split of them and a configuration."""
    write_sample(folder / "data", num_images, side, side)
    run("ml-split", "--raw_data", "data/images", "--mask_data", "data/masks", "--folds", "4", cwd=folder)
    run("ml-init-config", "data", "--yes", cwd=folder)


def run(*words: str, cwd: Path) -> None:
    subprocess.run([str(BIN / words[0]), *words[1:]], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def settings(folder: Path, rounds: int, base_channels: int, **federated: Any) -> Path:
    """Write a configuration of a federation; the weights are those of every row."""
    changes = {
        "training.trainer_type": "federated",
        "training.num_workers": 0,
        "training.callbacks": [],
        "model.base_channels": base_channels,
        "federated": {"rounds": rounds, "local_epochs": 1, **federated},
    }
    path = folder / "federated.yaml"
    path.write_text(to_yaml(load_config(folder / "configs" / "data_config.yaml", changes)))
    return path


def simulated(folder: Path, config: Path, num_sites: int) -> dict[str, Any]:
    """Run a simulation in a process of its own; the first round, which builds the networks, is left out."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        code = subprocess.call(
            [str(BIN / "ml-train"), "--config", str(config), "--overwrite"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        (folder / "peak").write_text(str(peak))
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"the simulation of {num_sites} sites failed")
    return row(f"simulated, {num_sites} sites", folder / "runs" / "data_fold_0", sum) | {
        "peak_mib": int((folder / "peak").read_text()) / 1024
    }


def row(name: str, run_dir: Path, local: Any) -> dict[str, Any]:
    """Medians over the rounds but the first."""
    rounds = json.loads((run_dir / "federation.json").read_text())["rounds"][1:]
    work = [local(site["work_seconds"] for site in one["sites"].values()) for one in rounds]
    beyond = [one["seconds"] - seconds for one, seconds in zip(rounds, work, strict=True)]
    sites = [site for one in rounds for site in one["sites"].values()]
    return {
        "what": name,
        "round_s": statistics.median(one["seconds"] for one in rounds),
        "local_s": statistics.median(work),
        "beyond_s": statistics.median(beyond),
        "ratio": statistics.median(one["seconds"] / seconds for one, seconds in zip(rounds, work, strict=True)),
        "mib_down": statistics.median(site["bytes_down"] for site in sites) / 2**20,
        "mib_up": statistics.median(site["bytes_up"] for site in sites) / 2**20,
    }


def deployed(folder: Path, config: Path, num_sites: int) -> dict[str, Any]:
    """Run a server and its sites as real processes; each site has its share of the images."""
    names = [f"site_{number}" for number in range(num_sites)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kits = folder / "kits"
    shutil.rmtree(kits, ignore_errors=True)
    words = [
        "init",
        "--config",
        str(config),
        "--sites",
        *names,
        "--address",
        f"127.0.0.1:{port}",
        "--output",
        str(kits),
    ]
    run("ml-federated", *words, cwd=folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = str(BIN / "ml-federated")
    started = [subprocess.Popen([command, "server", str(kits / "server")], env=environment, **quiet)]
    try:
        for name in names:
            data = folder / f"data_{name}"
            started.append(
                subprocess.Popen([command, "site", str(kits / name), "--data_dir", str(data)], env=environment, **quiet)
            )
        if started[0].wait(timeout=900):
            raise RuntimeError(f"the server failed: {(kits / 'server' / 'state' / 'server.log').read_text()[-2000:]}")
        peaks = [peak_of_children(process.pid) for process in started[1:]]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(timeout=60)
    return row(f"deployed, {num_sites} sites", kits / "server" / "run", max) | {"peak_mib": max(peaks)}


def peak_of_children(pid: int) -> float:
    """Return the largest memory that the processes of a site have had so far, summed up (MiB)."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    total = 0
    for one in pids:
        status = Path(f"/proc/{one}/status").read_text()
        total += int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--base_channels", type=int, default=16)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--skip_deployed", action="store_true")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args.images, args.side)
        for number in args.sites:
            config = settings(folder, args.rounds, args.base_channels, num_sites=number)
            rows.append(simulated(folder, config, number))
            print(rows[-1], flush=True)
        if not args.skip_deployed:
            for number in range(3):
                own = folder / f"part_{number}"
                own.mkdir()
                write_sample(folder / f"data_site_{number}", args.images // 3, args.side, args.side, seed=number)
                data = f"data_site_{number}"
                run(
                    "ml-split",
                    "--raw_data",
                    f"{data}/images",
                    "--mask_data",
                    f"{data}/masks",
                    "--folds",
                    "4",
                    cwd=folder,
                )
            rows.append(deployed(folder, settings(folder, args.rounds, args.base_channels), 3))
    report("federated", vars(args) | {"time": time.strftime("%H:%M")}, rows)


if __name__ == "__main__":
    main()
