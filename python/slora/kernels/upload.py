"""Small copies to the device that do not queue behind swap-ins, as those of the copy engine do."""

from functools import cache

from torch import Tensor

from slora.kernels import nvrtc

THREADS, MAX_BLOCKS = 256, 64


def upload(target: Tensor, source: Tensor) -> None:
    """int32, contiguous, from pinned host memory, which must stay until the copy has run on the current stream."""
    if not source.is_pinned():
        target.copy_(source)
        return
    n = len(source)
    _kernel()(min(MAX_BLOCKS, -(-n // THREADS)), THREADS, (source, target, n))


@cache
def _kernel() -> nvrtc.Kernel:
    return nvrtc.load("upload").kernel("upload")
