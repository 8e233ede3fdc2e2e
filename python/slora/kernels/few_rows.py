"""A linear layer of few rows (`cuda/few_rows.cu`): which ones it serves, and its launch."""

from functools import cache

import torch
from torch import Tensor

from slora.kernels import nvrtc
from slora.kernels.nvrtc import Kernel
from slora.kernels.tile_map import LINE, tile_map

MAX_ROWS = 16
MAX_WEIGHT_BYTES = 1 << 40
"""Larger weights are left to cuBLAS."""
STAGES = 3
"""Of a warp. With 3, two blocks fit a multiprocessor: those of the next linear begin while the last ones end."""
_UNIT, _LINES, _WARPS = 8, 4, 8
_SUMS_BYTES, _STAGE_BYTES = 16384, _WARPS * (_UNIT * _LINES * LINE * 2 + 8)
"""Of shared memory; a stage of each warp with its barrier."""
_DTYPE_MACRO = {torch.bfloat16: 1, torch.float16: 2}


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, programmatic: bool = True) -> Tensor:
    """x [rows, in], weight [out, in] -> [rows, out].

    If `programmatic`, weights are read while the kernel before runs, which must not write them.
    """
    (rows, in_size), out_size = x.shape, weight.shape[0]
    out = x.new_empty(rows, out_size)
    kernel, num_blocks = _kernel(x.dtype, x.device)
    blocks = min(num_blocks, out_size // _UNIT)
    args = (tile_map(weight, _UNIT, _LINES), x, bias, out, rows, in_size, out_size)
    kernel(blocks, _WARPS * 32, args, shared_bytes(STAGES), programmatic=programmatic)
    return out


def shared_bytes(stages: int) -> int:
    return _SUMS_BYTES + stages * _STAGE_BYTES


@cache
def _has_bulk_copies(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in nvrtc.CLUSTER_MAJORS


@cache
def _kernel(dtype: torch.dtype, device: torch.device) -> tuple[Kernel, int]:
    """And how many blocks it has, at most: one for each multiprocessor."""
    module = nvrtc.load("few_rows", {"DTYPE": _DTYPE_MACRO[dtype], "STAGES": STAGES})
    return module.kernel("few_rows"), torch.cuda.get_device_properties(device).multi_processor_count
