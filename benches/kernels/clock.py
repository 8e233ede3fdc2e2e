"""Time on either device: CUDA events in the order of a stream, or the host's clock where calls end as they return."""

import statistics
import time
from collections.abc import Callable

import torch

Mark = torch.cuda.Event | float


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self, stream: "torch.cuda.Stream | None" = None) -> Mark:
        """A moment of the stream (None: the current one); on the CPU, now."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def is_over(self, mark: Mark) -> bool:
        return isinstance(mark, float) or bool(mark.query())

    def ms(self, start: Mark, end: Mark) -> float:
        """Between two moments that are over."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float)
            assert isinstance(end, float)
            return (end - start) * 1e3
        return float(start.elapsed_time(end))

    def settle(self) -> None:
        """Until everything launched has ended."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def median_us(self, body: Callable[[], object], calls: int, repeats: int) -> float:
        return statistics.median(self.replays_us(body, calls, repeats))

    def replays_us(
        self, body: Callable[[], object], calls: int, repeats: int, before: Callable[[], object] = lambda: None
    ) -> list[float]:
        """Of one call, from replays of a graph of `calls` of them: the host's launches do not count. `before` each."""
        body()
        self.settle()
        run = self._recorded(body, calls)
        times = []
        for _ in range(repeats):
            before()
            start = self.mark()
            run()
            end = self.mark()
            self.settle()
            times.append(self.ms(start, end) * 1000 / calls)
        return times

    def _recorded(self, body: Callable[[], object], calls: int) -> Callable[[], object]:
        def repeat() -> None:
            for _ in range(calls):
                body()

        if not self.is_cuda:
            return repeat
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # an engine may pin memory meanwhile
            repeat()
        graph.replay()
        self.settle()
        return graph.replay
