"""Swap-ins: host pages to pool pages on a copy stream. Kernels wait for them, layer by layer; the host never does."""

import ctypes
from collections import deque
from functools import cache
from typing import Any

import torch

from slora.kernels.nvrtc import _check as check
from slora.kernels.nvrtc import _driver as driver
from slora.memory import HostTier, PagePool
from slora.plan import StepPlan

GROUP_PAGES, GROWTH = 16, 4
"""Pages of one call, at least: a call takes the host as long as the link takes for two pages of 2 MiB. A step's first
call has those of one layer, the next ones so many times more: so kernels wait for little."""


class PageCopies:
    """The copy stream of one pool.

    Kernels wait on the device for the pages of their layer (`wait_for_weights` in `cuda/lora_work.cuh`). That ends: a
    step's copies are enqueued before its kernels, need no multiprocessor, and wait for earlier steps at most.
    """

    def __init__(self, pool: PagePool, host: HostTier | None) -> None:
        self._pool, self._host = pool, host
        self._stream = torch.cuda.Stream(pool.device)
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()
        self.arrived = torch.zeros(1, dtype=torch.int64, device=pool.device)
        """step << 32 | n: what the first n layers need of the step's copies has arrived, and all of earlier steps."""
        self._last_step = 0
        self._kernels_wait = _can_write_values()
        if not self._kernels_wait:
            self.arrived.fill_(-1)  # the highest number
        self._stream.wait_stream(torch.cuda.current_stream())

    def issue(self, plan: StepPlan, wait_for: torch.cuda.Event | None) -> None:
        """Start the plan's copies, behind `wait_for` (the last step that may still read what they overwrite)."""
        if not plan.counts.num_copies:
            return
        step = plan.counts.step
        assert plan.counts.copies_wait_step != step, "copies wait for the step that waits for them"
        assert self._host is not None, "a plan copies from a host tier that is not there"
        if step <= self._last_step and self._kernels_wait:
            # Numbers began again, and no step in flight waits for copies (Engine::restart_steps).
            self.arrived.zero_()
            self._stream.wait_stream(torch.cuda.current_stream())
        self._last_step = step
        if wait_for is not None:
            self._stream.wait_event(wait_for)
        addresses, base = self._host.addresses, self._pool.pages.data_ptr()
        size = self._pool.page_bytes
        sources = [addresses[page] for page in plan.array("copy_host_pages").tolist()]
        targets = [base + page * size for page in plan.array("copy_pages").tolist()]
        for num_layers, start, end in _groups(plan.array("copy_layers").tolist(), self._pool.config.num_layers):
            _copy(targets[start:end], sources[start:end], size, self._stream.cuda_stream)
            if self._kernels_wait:
                _write_value(self.arrived, step << 32 | num_layers, self._stream.cuda_stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        self._pending.append((step, event))

    def wait(self, step: int) -> None:
        """Have the current stream wait for the copies of `step` and before, unless kernels do."""
        for copied, event in self._pending:
            if copied <= step and not self._kernels_wait:
                torch.cuda.current_stream().wait_event(event)

    def done(self) -> list[int]:
        """Steps whose copies have arrived since the last call."""
        steps = []
        while self._pending and self._pending[0][1].query():
            steps.append(self._pending.popleft()[0])
        return steps

    def close(self) -> None:
        self._stream.synchronize()
        self._pending.clear()
        self._host = None


def _groups(layers: list[int], num_layers: int) -> list[tuple[int, int, int]]:
    """(n, start, end) of the copies of each call, after which the first n layers have their pages.

    `layers`, ascending: the first layer that needs each page. So calls are cut where it changes.
    """
    groups, start, least = [], 0, 1
    for i in range(1, len(layers)):
        if layers[i] != layers[i - 1] and min(i - start, len(layers) - i) >= least:
            groups.append((layers[i], start, i))
            start, least = i, min(GROWTH * least, GROUP_PAGES)
    return [*groups, (num_layers, start, len(layers))]


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
_CAN_WRITE_VALUES = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS


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


def _write_value(word: torch.Tensor, value: int, stream: int) -> None:
    """Once the copies enqueued before are visible on the device."""
    args = (ctypes.c_void_p(stream), ctypes.c_void_p(word.data_ptr()), ctypes.c_uint64(value), ctypes.c_uint(0))
    check(driver().cuStreamWriteValue64_v2(*args), "say that pages have arrived")


def _can_write_values() -> bool:
    """Whether the current device's streams can."""
    device, found = ctypes.c_int(), ctypes.c_int()
    check(driver().cuCtxGetDevice(ctypes.byref(device)), "find the current device")
    check(driver().cuDeviceGetAttribute(ctypes.byref(found), _CAN_WRITE_VALUES, device), "ask what a stream can do")
    return bool(found.value)


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
