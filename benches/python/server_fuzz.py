"""Many requests that schemathesis makes of the server's OpenAPI document, against the embedded example on the CPU.

    python benches/python/server_fuzz.py            # writes benches/results/server-fuzz.json

Rounds of other seeds, with the document as it is and with the names of adapters that are there, until there were enough
requests or the time is over. The test of the same name in tests/python makes a few thousand.
"""

import json
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "tests" / "python")]
from fuzzing import ARGUMENTS, fuzz, num_descriptors, statuses  # noqa: E402
from record import machine, output_of  # noqa: E402
from serving import Served  # noqa: E402

NUM_CASES, MAX_S, MAX_EXAMPLES, SEED = 100_000, 15 * 60, 400, 1
RESULT = ROOT / "benches" / "results" / "server-fuzz.json"


def main() -> int:
    start, rounds = time.time(), []
    with Served(*ARGUMENTS) as served:
        descriptors = num_descriptors(served)
        while sum(cases["generated"] for cases in rounds) < NUM_CASES and time.time() - start < MAX_S:
            seed = SEED + len(rounds)
            report = fuzz(served, seed % 2 == 0, MAX_EXAMPLES, seed)
            rounds.append({"seed": seed, **report["test_cases"], "failures": report["failures"]})
            print(f"{time.time() - start:.0f} s: {rounds[-1]['generated']} cases, {len(report['failures'])} failures")
        is_idle = json.loads(served.call("/load")[1])["server_load"] == 0
        more_descriptors = num_descriptors(served) - descriptors
    found: Counter[int] = statuses(served)
    result = {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "is_clean": not output_of("git", "status", "--porcelain", "--untracked-files=no"),
        "command": "python benches/python/server_fuzz.py",
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
