"""CUDA graphs: a step's launches, recorded once per shape and replayed.

A graph depends on the number of rows, on whether there are decode rows, prefill rows, adapters, splits to merge and
adapters of many ranks, and on nothing else: kernels read what differs from the plan's mirror on the device. All graphs
share one memory pool, because they run one after the other and leave their results in buffers of their own.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from slora.kernels.streams import RECORDING, recording_streams
from slora.memory import MAX_GRAPH_ROWS

RECORDED_RUN = 3
"""When a key comes for this time it is recorded: that takes as long as some ten steps, and rare ones come no more."""
MAX_ROWS = MAX_GRAPH_ROWS
"""Steps of more rows run eagerly: their kernels take longer than their launches."""


def bucket(num_rows: int) -> int:
    """How many rows the graph for so many rows has: 1, 2, 4, 8, then multiples of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def buckets(most: int = MAX_ROWS) -> list[int]:
    return [1, 2, 4, *range(8, most + 1, 8)]


class Graphs:
    """Recorded launches by key. A new key runs eagerly a few times, is recorded, and is replayed from then on."""

    def __init__(self, device: torch.device, spare_bytes: int) -> None:
        """No more is recorded when less is free on the device, so that nothing else runs out of memory."""
        self._device, self._spare_bytes = device, spare_bytes
        self._memory = torch.cuda.graph_pool_handle()
        self._stream, _ = recording_streams(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._num_runs: dict[Hashable, int] = {}
        """Of keys that are not recorded."""
        self._has_room = True

    def run(self, key: Hashable, body: Callable[[], object]) -> None:
        """`body` launches the same kernels with the same arguments whenever it is called for `key`."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        self._num_runs[key] = self._num_runs.get(key, 0) + 1
        if self._num_runs[key] < RECORDED_RUN:
            with RECORDING, _uncollected():
                body()
        else:
            self.record(key, body)

    def record(self, key: Hashable, body: Callable[[], object]) -> None:
        """Run it, and record it at once, if the device has room."""
        with RECORDING, _uncollected():
            body()  # also makes what must not come from a graph's memory
            if not self._check_room():
                return
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    body()
                finally:
                    graph.capture_end()
        self._graphs[key] = graph
        self._num_runs.pop(key, None)

    def close(self) -> None:
        self._graphs.clear()

    def _check_room(self) -> bool:
        if self._has_room and torch.cuda.mem_get_info(self._device)[0] < self._spare_bytes:
            self._has_room = False
            logging.getLogger("slora").warning(
                "there is no memory left to record more graphs: there are %d, and other steps take longer; "
                "hint: a smaller pool",
                len(self._graphs),
            )
        return self._has_room


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection in here: it may free another engine's graphs, which ends this thread's recording, or wait
    for its step thread, which may wait for RECORDING."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def progress(keys: Iterable[Hashable], total: int, show: bool | None) -> Iterable[Hashable]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    disable = None if show is None else not show  # None: tqdm shows nothing unless stderr is a terminal
    bar: Iterable[Hashable] = tqdm(keys, desc="recording graphs", total=total, disable=disable, leave=False)
    return bar
