"""Many requests that schemathesis makes of the server's OpenAPI document, against the embedded example on the CPU.

    python benches/python/server_fuzz.py            # writes benches/results/server-fuzz.json

Rounds of other seeds, with the document as it is and with the names of adapters that are there, until there were enough
requests or the time is over. The test of the same name in tests/python makes a few thousand.
"""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "tests" / "python")]
from fuzzing import ARGUMENTS, fuzz, statuses  # noqa: E402
from record import machine, output_of  # noqa: E402
from serving import Served  # noqa: E402

NUM_CASES, MAX_EXAMPLES, SEED, AT_ONCE = 100_000, 400, 1, 2
RESULT = ROOT / "benches" / "results" / "server-fuzz.json"


def one_round(given: tuple[Served, int]) -> dict[str, Any]:
    """Cases of one seed; half of the seeds take the narrowed document."""
    served, seed = given
    report = fuzz(served, seed % 2 == 0, MAX_EXAMPLES, seed)
    return {"seed": seed, **report["test_cases"], "failures": report["failures"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=15 * 60, help="no round begins later")
    max_s, start = parser.parse_args().seconds, time.time()
    rounds: list[dict[str, Any]] = []
    with Served(*ARGUMENTS) as served, ThreadPoolExecutor(AT_ONCE) as pool:
        descriptors = served.num_descriptors()
        while sum(cases["generated"] for cases in rounds) < NUM_CASES and time.time() - start < max_s:
            rounds += pool.map(one_round, [(served, SEED + len(rounds) + i) for i in range(AT_ONCE)])
            print(f"{time.time() - start:.0f} s: {sum(cases['generated'] for cases in rounds)} cases", flush=True)
        is_idle = json.loads(served.call("/load")[1])["server_load"] == 0
        time.sleep(1)  # The last connections may still be closing.
        more_descriptors = served.num_descriptors() - descriptors
    found: Counter[int] = statuses(served)
    result = {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "is_clean": not output_of("git", "status", "--porcelain", "--untracked-files=no"),
        "command": f"python benches/python/server_fuzz.py --seconds {max_s}",
        "versions": {name: version(name) for name in ("schemathesis", "hypothesis")},
        "machine": machine(),
        "seconds": round(time.time() - start),
        "num_cases": sum(cases["generated"] for cases in rounds),
        "num_failures": sum(len(cases["failures"]) for cases in rounds),
        "num_answers_by_status": {str(status): count for status, count in sorted(found.items())},
        "is_idle_afterwards": is_idle,
        "more_descriptors_afterwards": more_descriptors,
        "rounds": rounds,
    }
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return 1 if result["num_failures"] or any(status >= 500 for status in found) else 0


if __name__ == "__main__":
    sys.exit(main())
