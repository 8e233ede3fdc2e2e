"""Descriptions of matrices for the engine that copies tiles of them to shared memory (sm_90 and newer)."""

import ctypes

from torch import Tensor

from slora.kernels.nvrtc import _check as check
from slora.kernels.nvrtc import _driver as driver

LINE = 64
"""Columns: 128 bytes, within which 16 bytes each are swizzled."""
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_256, _ZEROS = 1, 0, 3, 3, 0
"""CU_TENSOR_MAP_DATA_TYPE_…, INTERLEAVE_…, SWIZZLE_…, L2_PROMOTION_…, FLOAT_OOB_FILL_…"""
_ALIGNMENT = 64


class TileMap(ctypes.Structure):
    """CUtensorMap."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def tile_map(matrix: Tensor, rows: int, lines: int) -> TileMap:
    """For tiles of `rows` x `lines` * LINE of a matrix [height, width] of 16-bit numbers, width a multiple of LINE.

    It holds the matrix's address, and does not keep it alive.
    """
    height, width = matrix.shape
    assert matrix.is_contiguous()
    assert matrix.element_size() == 2
    assert width % LINE == 0
    memory = (ctypes.c_char * (ctypes.sizeof(TileMap) + _ALIGNMENT))()
    found = TileMap.from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)
    sizes = (ctypes.c_uint64 * 3)(LINE, width // LINE, height)
    strides = (ctypes.c_uint64 * 2)(LINE * 2, width * 2)
    tile, steps = (ctypes.c_uint32 * 3)(LINE, lines, rows), (ctypes.c_uint32 * 3)(1, 1, 1)
    encoded = driver().cuTensorMapEncodeTiled(
        ctypes.byref(found),
        _UINT16,
        3,
        ctypes.c_void_p(matrix.data_ptr()),
        sizes,
        strides,
        tile,
        steps,
        _NO_INTERLEAVE,
        _SWIZZLE_128,
        _PROMOTE_256,
        _ZEROS,
    )
    check(encoded, f"describe a matrix of {height} x {width} for copies of {rows} x {lines * LINE}")
    return found
