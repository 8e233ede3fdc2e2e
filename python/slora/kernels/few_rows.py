"""A linear layer of few rows (`cuda/few_rows.cu`): which ones it serves, and its launch."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from slora.kernels import nvrtc
from slora.kernels.nvrtc import Kernel
from slora.kernels.tile_map import LINE, tile_map

MAX_ROWS = 16
MAX_WEIGHT_BYTES = 1 << 40
"""Larger weights are left to cuBLAS."""
_UNIT, _LINES = 8, 4
_DTYPE_MACRO = {torch.bfloat16: 1, torch.float16: 2}


class Layout(NamedTuple):
    """How a block is cut; with up to 113 KB of shared memory, the next linear's begins while this one's ends."""

    warps: int
    stages: int
    """Of a warp."""
    group: int
    """Units of features that share a look at x."""
    is_ahead: bool
    """x is loaded before it is used, into registers that more than 4 warps have not."""
    far: int
    """Pieces that a warp needs after its first stages, brought to L2 while the kernel waits for x."""

    @property
    def shared_bytes(self) -> int:
        stage = _UNIT * _LINES * LINE * 2 + 8
        return self.warps * (self.stages * stage + self.group * 512)

    @property
    def macros(self) -> dict[str, int]:
        names = ("WARPS", "STAGES", "GROUP", "IS_AHEAD", "FAR")
        return {name: int(value) for name, value in zip(names, self, strict=True)}


LAYOUT = Layout(warps=8, stages=3, group=4, is_ahead=False, far=0)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes x [rows, in] and weight [out, in]."""
    rows, in_size = x.shape
    return (
        0 < rows <= MAX_ROWS
        and x.dtype in _DTYPE_MACRO
        and in_size % LINE == 0
        and weight.shape[0] % _UNIT == 0
        and weight.nbytes <= MAX_WEIGHT_BYTES
        and x.is_contiguous()
        and weight.is_contiguous()
        and _has_bulk_copies(x.device)
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, programmatic: bool = True, layout: Layout = LAYOUT
) -> Tensor:
    """x [rows, in], weight [out, in] -> [rows, out].

    If `programmatic`, weights are read while the kernel before runs, which must not write them.
    """
    (rows, in_size), out_size = x.shape, weight.shape[0]
    out = x.new_empty(rows, out_size)
    kernel, num_blocks = _kernel(x.dtype, x.device, layout)
    blocks = min(num_blocks, out_size // _UNIT)
    args = (tile_map(weight, _UNIT, _LINES), x, bias, out, rows, in_size, out_size)
    kernel(blocks, layout.warps * 32, args, layout.shared_bytes, programmatic=programmatic)
    return out


@cache
def _has_bulk_copies(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in nvrtc.CLUSTER_MAJORS


@cache
def _kernel(dtype: torch.dtype, device: torch.device, layout: Layout) -> tuple[Kernel, int]:
    """And how many blocks it has, at most: one for each multiprocessor."""
    module = nvrtc.load("few_rows", {"DTYPE": _DTYPE_MACRO[dtype], **layout.macros})
    return module.kernel("few_rows"), torch.cuda.get_device_properties(device).multi_processor_count
