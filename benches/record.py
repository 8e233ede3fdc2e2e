"""Run one crate's Criterion benches and write their figures to benches/results/.

    python benches/record.py slora-core core-bookkeeping

Median and spread (the 95% interval of the median) come from Criterion's own estimates; nanoseconds throughout.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
    path = ROOT / "benches" / "results" / f"{arguments.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
