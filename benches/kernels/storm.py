"""Swap-ins that follow one another: adapters are pinned, which brings them to the device, and let go once they are."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from slora.adapters import Adapters

NUM_WORKERS = 12
WAIT_S = 60.0
POLL_S = 1e-3


class Storm:
    """A pin is heard by the next step, so that several threads are needed to keep swap-ins coming."""

    def __init__(self, adapters: Adapters, names: Sequence[str]) -> None:
        self._adapters = adapters
        self._shares = [names[i::NUM_WORKERS] for i in range(NUM_WORKERS)]
        self._is_over = threading.Event()
        self._workers: list[Future[None]] = []
        self._threads: ThreadPoolExecutor | None = None

    def once(self) -> None:
        """Each adapter one time."""
        with ThreadPoolExecutor(NUM_WORKERS) as threads:
            list(threads.map(self._visit, self._shares, timeout=WAIT_S))

    def bring(self, name: str) -> None:
        """Pin an adapter until it is on the device, or the storm is over."""
        deadline = time.monotonic() + WAIT_S
        self._adapters.pin(name)
        while self._adapters[name].state != "resident" and not self._is_over.is_set():
            assert time.monotonic() < deadline, f"{name} does not become resident"
            time.sleep(POLL_S)

    def start(self) -> None:
        self._is_over.clear()
        self._threads = ThreadPoolExecutor(NUM_WORKERS)
        self._workers = [self._threads.submit(self._run, names) for names in self._shares]

    def stop(self) -> None:
        """Nothing is ordered afterwards. Raises what went wrong."""
        self._is_over.set()
        for worker in self._workers:
            worker.result(WAIT_S)
        self._workers.clear()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _run(self, names: Sequence[str]) -> None:
        while not self._is_over.is_set():
            self._visit(names)

    def _visit(self, names: Sequence[str]) -> None:
        for name in names:
            self.bring(name)
            self._adapters.pin(name, False)
