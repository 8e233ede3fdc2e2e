"""`python tests/python/screenshot.py docs/page.png`: the page under some traffic, for the docs."""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import IO

from browser import Browser

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
WORDS = ["banana", "hello world", "letter kernel", "open window", "paper boat", "quiet river"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of traffic before the picture is taken")
    parser.add_argument("--scheme", default="light", choices=["light", "dark"])
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    options = parser.parse_args()
    arguments = ["serve", str(EXAMPLE / "base"), "--adapter-dir", str(EXAMPLE / "adapters"), "--port", "0"]
    sizes = ["--pool-bytes", str(9 << 20), "--max-running", "12", "--device", "cpu"]
    command = [sys.executable, "-m", "slora", *arguments, *sizes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
        threading.Thread(target=drain, args=(process.stdout,), daemon=True).start()
        with Browser(options.width, options.height) as browser, Traffic(url, options.seconds):
            browser.prefer(options.scheme)
            browser.open(url)
            time.sleep(options.seconds * 0.9)
            browser.fill("try-model", "piglatin")
            browser.click("try-send")
            browser.wait("document.getElementById('try-stop').disabled")
            browser.screenshot(options.path)
        process.terminate()


def drain(lines: IO[str]) -> None:
    """Read until the process has ended, so that its log never blocks it."""
    with contextlib.suppress(ValueError):
        collections.deque(lines, maxlen=0)


class Traffic:
    """Requests for adapters of unequal popularity, more and fewer by turns."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._end = url, time.monotonic() + seconds + 30
        self._pool = concurrent.futures.ThreadPoolExecutor(16)

    def __enter__(self) -> None:
        names = sorted(path.name for path in (EXAMPLE / "adapters").iterdir())
        for number in range(16):
            self._pool.submit(self._ask, names, number)

    def __exit__(self, *_: object) -> None:
        self._end = 0
        self._pool.shutdown()

    def _ask(self, names: list[str], number: int) -> None:
        source = random.Random(number)
        weights = [1 / (rank + 1) for rank, _ in enumerate(names)]
        for _ in itertools.takewhile(lambda _: time.monotonic() < self._end, itertools.count()):
            if number >= 4 and time.monotonic() % 24 < number:
                time.sleep(0.5)
                continue
            [name] = source.choices(names, weights)
            body = {"model": name, "prompt": source.choice(WORDS), "max_tokens": 60, "ignore_eos": True}
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
            urllib.request.urlopen(request, timeout=60).read()


if __name__ == "__main__":
    main()
