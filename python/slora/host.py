"""The host tier's memory: slabs that page images are packed into, and swapped in from."""

import mmap
from typing import Protocol

import torch
from torch import Tensor


class HostMemory(Protocol):
    """Slabs of whole pages, outside torch's allocators."""

    slabs: list[tuple[int, int]]
    """(address, bytes) of each."""

    def close(self) -> None:
        """Free them. Nothing may use them any more."""


class LazySlab:
    """One slab of zero pages, which cost nothing until they are written to."""

    def __init__(self, num_bytes: int) -> None:
        from slora.errors import DeviceError

        try:
            memory = mmap.mmap(-1, num_bytes)
        except OSError as error:
            raise DeviceError(f"cannot allocate a host tier of {num_bytes} bytes: {error}") from error
        self._memory: list[Tensor] = [torch.frombuffer(memory, dtype=torch.uint8)]
        self.slabs = [(self._memory[0].data_ptr(), num_bytes)]

    def close(self) -> None:
        self.slabs.clear()
        self._memory.clear()


def allocate_host(host_bytes: int, page_bytes: int, device: torch.device) -> HostMemory:
    """Pinned for a CUDA device, so that copies run at the link's speed and beside the computation."""
    from slora.errors import ConfigError

    if host_bytes < page_bytes:
        raise ConfigError(f"host_bytes = {host_bytes}: at least one page of {page_bytes} bytes is needed")
    if device.type == "cuda":
        from slora.kernels.page_copy import PinnedSlabs

        return PinnedSlabs(host_bytes, page_bytes)
    return LazySlab(host_bytes // page_bytes * page_bytes)
