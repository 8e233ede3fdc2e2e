"""The host tier's memory: slabs that page images are packed into, and swapped in from."""

import ctypes
import mmap
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from slora.errors import ConfigError, DeviceError

MAX_SLAB_BYTES = 256 << 20
"""Of pinned memory: pinning holds up other calls of the driver, so it is done in pieces."""
POPULATED_BYTES = 8 << 20
"""How much memory the system is asked to provide at a time: page faults of other threads wait for it."""
_NO_RESERVE = 0x4000  # of mmap, which has a name for it from Python 3.12 on
_DONT_FORK, _HUGE_PAGE, _POPULATE_WRITE = 10, 14, 23  # of madvise


class HostMemory(Protocol):
    """Slabs of whole pages, outside torch's allocators."""

    slabs: list[tuple[int, int]]
    """(address, bytes) of each. All may be written to."""

    @property
    def num_ready(self) -> int:
        """So many slabs, from the first on, may be copied to the device."""

    def prepare(self, report: Callable[[int], None], fail: Callable[[str], None]) -> None:
        """Make the others ready meanwhile: `report(num_ready)` after each, or `fail(reason)` and no more."""

    def close(self) -> None:
        """Free them. Nothing may use them any more."""


class LazySlab:
    """One slab of zero pages, which cost nothing until they are written to."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = [_reserve(num_bytes)]
        self.slabs = [(self._memory[0].data_ptr(), num_bytes)]
        self.num_ready = 1

    def prepare(self, report: Callable[[int], None], fail: Callable[[str], None]) -> None:
        pass

    def close(self) -> None:
        self.slabs.clear()
        self._memory.clear()


class Pinning(Protocol):
    """How memory is pinned, on any thread."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Raises DeviceError."""

    def unpin(self, address: int) -> None: ...


class PinnedSlabs:
    """Pinned memory, so that copies run at the link's speed and beside the computation.

    All of it is there from the start. The first slab is pinned at once, to see that it works, the others on a thread.
    """

    def __init__(self, num_bytes: int, page_bytes: int, pinning: Pinning, max_slab_bytes: int = MAX_SLAB_BYTES) -> None:
        """Raises DeviceError if the system does not let memory be pinned."""
        num_bytes = num_bytes // page_bytes * page_bytes
        size = max(1, max_slab_bytes // page_bytes) * page_bytes
        self._memory = [_reserve(num_bytes)]
        address = self._memory[0].data_ptr()
        self.slabs = [(address + start, min(size, num_bytes - start)) for start in range(0, num_bytes, size)]
        self._pinning, self._is_closed = pinning, threading.Event()
        self._thread: threading.Thread | None = None
        self.num_ready = 0
        self._pin_next()

    def prepare(self, report: Callable[[int], None], fail: Callable[[str], None]) -> None:
        self._thread = threading.Thread(target=self._pin_all, args=(report, fail), name="slora-pin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.num_ready:
            self.num_ready -= 1
            self._pinning.unpin(self.slabs[self.num_ready][0])
        self.slabs.clear()
        self._memory.clear()

    def _pin_all(self, report: Callable[[int], None], fail: Callable[[str], None]) -> None:
        try:
            while self.num_ready < len(self.slabs) and not self._is_closed.is_set():
                self._pin_next()
                report(self.num_ready)
        except Exception as error:
            fail(f"{type(error).__name__}: {error}")

    def _pin_next(self) -> None:
        address, num_bytes = self.slabs[self.num_ready]
        # Most of what pinning takes, but without holding up the driver; what was written is kept.
        for start in range(0, num_bytes, POPULATED_BYTES):
            _advise(address + start, min(POPULATED_BYTES, num_bytes - start), _POPULATE_WRITE)
        try:
            self._pinning.pin(address, num_bytes)
        except DeviceError as error:
            total = sum(size for _, size in self.slabs)
            raise DeviceError(f"cannot pin {total} bytes of host memory: {error}; hint: a smaller host tier") from error
        self.num_ready += 1


def allocate_host(host_bytes: int, page_bytes: int, device: torch.device) -> HostMemory:
    if host_bytes < page_bytes:
        raise ConfigError(f"host_bytes = {host_bytes}: at least one page of {page_bytes} bytes is needed")
    if device.type == "cuda":
        from slora.kernels.page_copy import DevicePinning

        return PinnedSlabs(host_bytes, page_bytes, DevicePinning(device))
    return LazySlab(host_bytes // page_bytes * page_bytes)


def _reserve(num_bytes: int) -> Tensor:
    """Zero bytes that take no memory yet. A child process does not get them: its parent's writes would move pages."""
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        raise DeviceError(
            f"cannot allocate a host tier of {num_bytes} bytes: {error}; hint: lower host_bytes"
        ) from error
    reserved: Tensor = torch.frombuffer(memory, dtype=torch.uint8)
    for advice in (_DONT_FORK, _HUGE_PAGE):
        _advise(reserved.data_ptr(), num_bytes, advice)
    return reserved


def _advise(address: int, num_bytes: int, advice: int) -> None:
    """The system does not follow advice that it does not know, and nothing depends on it."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
