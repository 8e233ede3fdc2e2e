"""What the device draws, and how fast it runs, while something goes on: its power limit bounds long runs."""

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits")
SECONDS, INTERVAL_S = 2.0, 0.2


class Load(NamedTuple):
    call_ms: float
    clock_mhz: float
    power_w: float


def under_load(body: Callable[[], object]) -> Load | None:
    """Medians of the second half of a long run of `body`, which waits for the device; None without nvidia-smi."""
    if shutil.which(QUERY[0]) is None:
        return None
    samples: list[tuple[float, float]] = []

    def sample() -> None:
        for _ in range(round(SECONDS / INTERVAL_S)):
            found = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split("\n")[0]
            clock, power = map(float, found.split(","))
            samples.append((clock, power))
            time.sleep(INTERVAL_S)

    thread = threading.Thread(target=sample)
    thread.start()
    ends = [time.perf_counter()]
    while thread.is_alive():
        body()
        ends.append(time.perf_counter())
    calls_ms = [(end - start) * 1e3 for start, end in pairwise(ends[len(ends) // 2 :])]
    clocks, powers = zip(*samples[len(samples) // 2 :], strict=True)
    return Load(statistics.median(calls_ms), statistics.median(clocks), statistics.median(powers))
