"""The host tier's memory: slabs that page images are packed into, and swapped in from."""

import mmap
from typing import Any

import torch
from torch import Tensor

SLAB_BYTES = 1 << 30
"""Slabs are of this size at most, so that a large tier needs no single huge allocation."""


class HostMemory:
    """Page-aligned slabs of whole pages, outside torch's allocators.

    On the CPU they are zero pages until they are written to, so that a tier that is never used costs nothing. For a
    CUDA device they are pinned, so that copies run at the link's speed and beside the computation.
    """

    def __init__(self, host_bytes: int, page_bytes: int, device: torch.device) -> None:
        from slora.errors import ConfigError, DeviceError

        if host_bytes < page_bytes:
            raise ConfigError(f"host_bytes = {host_bytes}: at least one page of {page_bytes} bytes is needed")
        self._is_pinned = device.type == "cuda"
        self.tensors: list[Tensor] = []
        slab_bytes = max(SLAB_BYTES // page_bytes, 1) * page_bytes
        try:
            for start in range(0, host_bytes // page_bytes * page_bytes, slab_bytes):
                self.tensors.append(self._allocate(min(slab_bytes, host_bytes - start) // page_bytes * page_bytes))
        except (OSError, RuntimeError) as error:
            self.close()
            raise DeviceError(f"cannot allocate a host tier of {host_bytes} bytes: {error}") from error

    @property
    def slabs(self) -> list[tuple[int, int]]:
        """(address, bytes) of each."""
        return [(tensor.data_ptr(), tensor.numel()) for tensor in self.tensors]

    def close(self) -> None:
        """Let go of the slabs. Nothing may use them any more."""
        for tensor in self.tensors:
            if self._is_pinned:
                _cudart().cudaHostUnregister(tensor.data_ptr())
        self.tensors.clear()

    def _allocate(self, num_bytes: int) -> Tensor:
        memory = mmap.mmap(-1, num_bytes)  # freed when the tensor is
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        if self._is_pinned:
            error = _cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, 0)
            if int(error):
                raise RuntimeError(f"pinning {num_bytes} bytes failed: {error}")
        return tensor


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
