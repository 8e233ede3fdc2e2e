"""Small copies to the device that do not queue behind swap-ins, as those of the copy engine do."""

from typing import NamedTuple

import torch
from torch import Tensor

from slora.kernels import nvrtc

THREADS, LOADS = 256, 4  # a thread's loads on their way
MAX_BLOCKS = 64
BUS_BLOCKS = 16
"""Enough to keep the bus busy: they run beside another step's kernels."""
SLOTS = 4
"""Copies that are on their way, or wait for their turn on the device: a step has one or two."""


class Slot(NamedTuple):
    words: Tensor
    filled: torch.cuda.Event
    emptied: torch.cuda.Event


class Staging:
    """Brings words to the device before their turn has come: while the steps before still run.

    A copy reads the host's memory on a stream of its own, into one of a few slots; the current stream copies them on.
    """

    def __init__(self, num_words: int, device: torch.device) -> None:
        """`num_words` of the longest copy."""
        self._stream = torch.cuda.Stream(device, priority=-1)
        words = torch.empty((SLOTS, num_words), dtype=torch.int32, device=device)
        self._slots = [Slot(row, torch.cuda.Event(), torch.cuda.Event()) for row in words]
        self._num_copies = 0
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> None:
        """int32, contiguous. Pinned memory must stay as it is until the current stream comes to what follows."""
        if not source.is_pinned():
            target.copy_(source)
            return
        slot, n, main = self._slots[self._num_copies % SLOTS], len(source), torch.cuda.current_stream()
        self._num_copies += 1
        self._stream.wait_event(slot.emptied)
        _launch(source, slot.words[:n], BUS_BLOCKS, self._stream)
        slot.filled.record(self._stream)
        main.wait_event(slot.filled)
        _launch(slot.words[:n], target, MAX_BLOCKS, main)
        slot.emptied.record(main)


def _launch(source: Tensor, target: Tensor, most_blocks: int, stream: torch.cuda.Stream) -> None:
    n = len(source)
    blocks = min(most_blocks, -(-n // (THREADS * LOADS)))
    _kernel()(blocks, THREADS, (source, target, n), stream=stream.cuda_stream)


@nvrtc.cached_by_device
def _kernel() -> nvrtc.Kernel:
    return nvrtc.load("upload").kernel("upload")
