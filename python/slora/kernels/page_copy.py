"""Swap-ins: host pages to pool pages on a copy stream, ordered against the steps by events, never waited for."""

import ctypes
from collections import deque
from functools import cache
from typing import Any

import torch

from slora.kernels.nvrtc import _check as check
from slora.kernels.nvrtc import _driver as driver
from slora.memory import HostTier, PagePool
from slora.plan import StepPlan

GROUP_PAGES = 16
"""Pages of one call, at least: a call takes the host as long as the link takes for two pages of 2 MiB."""
Arrivals = list[tuple[int, torch.cuda.Event]]
"""(first layer that needs the pages, when they and all before them have arrived), in the order of the copies."""


class PageCopies:
    """The copy stream of one pool."""

    def __init__(self, pool: PagePool, host: HostTier | None) -> None:
        self._pool, self._host = pool, host
        self._stream = torch.cuda.Stream(pool.device)
        self._pending: deque[tuple[int, Arrivals]] = deque()

    def issue(self, plan: StepPlan, wait_for: torch.cuda.Event | None) -> None:
        """Start the plan's copies, behind `wait_for` (the last step that may still read what they overwrite)."""
        if not plan.counts.num_copies:
            return
        assert self._host is not None, "a plan copies from a host tier that is not there"
        if wait_for is not None:
            self._stream.wait_event(wait_for)
        addresses, base = self._host.addresses, self._pool.pages.data_ptr()
        size = self._pool.page_bytes
        sources = [addresses[page] for page in plan.array("copy_host_pages").tolist()]
        targets = [base + page * size for page in plan.array("copy_pages").tolist()]
        arrivals: Arrivals = []
        for layer, start, end in _groups(plan.array("copy_layers").tolist()):
            _copy(targets[start:end], sources[start:end], size, self._stream.cuda_stream)
            event = torch.cuda.Event()
            event.record(self._stream)
            arrivals.append((layer, event))
        self._pending.append((plan.counts.step, arrivals))

    def needed(self, step: int) -> Arrivals:
        """What the compute stream must still wait for so that the copies of `step` and before have arrived."""
        ordered = [arrival for copied, arrivals in self._pending if copied <= step for arrival in arrivals]
        return [] if not ordered or ordered[-1][1].query() else ordered

    def done(self) -> list[int]:
        """Steps whose copies have arrived since the last call."""
        steps = []
        while self._pending and self._pending[0][1][-1][1].query():
            steps.append(self._pending.popleft()[0])
        return steps

    def close(self) -> None:
        self._stream.synchronize()
        self._pending.clear()
        self._host = None


def _groups(layers: list[int]) -> list[tuple[int, int, int]]:
    """(layer, start, end) of the copies that one event stands for: cut where the layer changes, once there are many."""
    groups, start = [], 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or (layers[i] != layers[i - 1] and i - start >= GROUP_PAGES):
            groups.append((layers[start], start, i))
            start = i
    return groups


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


_STREAM_ORDER, _OVERLAP = 1, 1
_PORTABLE = 1


def _copy(targets: list[int], sources: list[int], num_bytes: int, stream: int) -> None:
    """Enqueue copies of equal size: by one call where the driver has it (12.8 on), else one by one."""
    n = len(targets)
    batch = _batch_copy()
    if batch is None:
        copy = driver().cuMemcpyHtoDAsync_v2
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        for target, source in zip(targets, sources, strict=True):
            check(copy(target, source, num_bytes, stream), "swap a page in")
        return
    name, function = batch
    pointers = ctypes.c_void_p * n
    sizes = (ctypes.c_size_t * n)(*[num_bytes] * n)
    attributes = _Attributes(_STREAM_ORDER, _Location(), _Location(), _OVERLAP)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    which = () if name.endswith("_v2") else (ctypes.byref(failed),)
    args = (pointers(*targets), pointers(*sources), sizes, ctypes.c_size_t(n), ctypes.byref(attributes))
    more = (ctypes.byref(first), ctypes.c_size_t(1), *which, ctypes.c_void_p(stream))
    check(function(*args, *more), f"swap {n} pages in")


@cache
def _batch_copy() -> tuple[str, Any] | None:
    for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"):
        try:
            return name, getattr(driver(), name)
        except AttributeError:
            continue
    return None


class DevicePinning:
    """Pins memory for a device's copies. Calls may come from any thread."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # makes the device's context this thread's
        self._context = ctypes.c_void_p()
        check(driver().cuCtxGetCurrent(ctypes.byref(self._context)), "find the device's context")

    def pin(self, address: int, num_bytes: int) -> None:
        check(driver().cuCtxSetCurrent(self._context), "use the device on another thread")
        pointer, size = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
        check(driver().cuMemHostRegister_v2(pointer, size, ctypes.c_uint(_PORTABLE)), f"pin {num_bytes} bytes")

    def unpin(self, address: int) -> None:
        check(driver().cuCtxSetCurrent(self._context), "use the device on another thread")
        check(driver().cuMemHostUnregister(ctypes.c_void_p(address)), "unpin host memory")
