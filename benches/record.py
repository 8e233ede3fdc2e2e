"""What benches write to benches/results/; run as a script, one crate's Criterion benches and their figures.

    python benches/record.py slora-core core-bookkeeping

Median and spread (the 95% interval of the median) come from Criterion's own estimates; nanoseconds throughout.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


class Row(TypedDict):
    """A figure: the median of repetitions."""

    value: float
    unit: str
    values: list[float]


def row(values: Sequence[float], unit: str) -> Row:
    return {"value": statistics.median(values), "unit": unit, "values": list(values)}


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments that `write_rows` reads. By default results go to benches/results/`name`.json."""
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the file to write")
    what = "what is measured; by default COMMIT of the environment, else the checkout's"
    parser.add_argument("--commit", default=os.environ.get("COMMIT"), help=what)


def write_rows(args: argparse.Namespace, rows: Mapping[str, Row], *, is_shown: bool = True, **details: object) -> None:
    """Write a run of a bench on a device, and print it as one table, unless the bench has one of its own."""
    import torch

    import slora

    has_device = torch.cuda.is_available()
    result = {
        "device": torch.cuda.get_device_name() if has_device else machine()["cpu"],
        "commit": args.commit if args.commit is not None else commit(),
        "torch": torch.__version__,
        "slora": slora.__version__,
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "rows": dict(rows),
        **details,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in rows.items() if is_shown else ():
        shown = ", ".join(f"{value:.4g}" for value in found["values"])
        print(f"{name:44} {found['value']:>10.4g} {found['unit']:8} ({shown})")
    print(f"wrote {args.out}", flush=True)


def commit() -> str:
    """The checkout's; empty where there is none."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "os": platform.system()}


def figures(folder: Path, since: float) -> dict[str, dict[str, float]]:
    """Every estimate that Criterion wrote since then, by the name of its bench."""
    found = {}
    for path in sorted(folder.glob("**/new/estimates.json")):
        if path.stat().st_mtime >= since:
            name = json.loads(path.with_name("benchmark.json").read_text())["full_id"]
            median = json.loads(path.read_text())["median"]
            interval = median["confidence_interval"]
            spread = [round(interval[bound], 2) for bound in ("lower_bound", "upper_bound")]
            found[name] = {"median_ns": round(median["point_estimate"], 2), "spread_ns": spread}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crate", help="the crate whose benches run")
    parser.add_argument("name", help="the file in benches/results, without its ending")
    arguments = parser.parse_args()
    command = ["cargo", "bench", "-p", arguments.crate, "--benches", "--", "--noplot"]
    since = time.time()
    subprocess.run(command, cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    result = {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "is_clean": not output_of("git", "status", "--porcelain", "--untracked-files=no"),
        "command": " ".join(command),
        "rustc": output_of("rustc", "--version"),
        "machine": machine(),
        "figures": figures(target / "criterion", since),
    }
    path = RESULTS / f"{arguments.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
