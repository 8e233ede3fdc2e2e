"""The LoRA op on CUDA (`cuda/lora.cu`): once a step the work lists of all layer groups, then for each group one kernel
(segments of few rows, where there are clusters), or two (others), of which the consumer may be the second.

Nothing here depends on which adapters a step has, on how many, or on their ranks up to UNIT_RANKS: all of that is read
on the device, so the launches may be captured in a graph.
"""

import ctypes
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from slora.kernels import nvrtc
from slora.kernels.adapters import GROUPS, NUM_MODULES
from slora.memory import PagePool
from slora.models.config import ModelConfig

DTYPE_MACRO = {"float32": 0, "bfloat16": 1, "float16": 2}
MAX_SEGMENTS = 1024
"""A warp finds an item's segment in two looks of 32 lanes."""
MANY_ROWS = 64
"""Segments of more rows share their weights among many rows, if the step has prefill rows or linears of many ranks."""
CLUSTERS = {8: 16, 4: 32, 2: 1 << 30}
"""Blocks of a cluster, by the rows of a step: the fewer units there are, the more blocks must share one."""
_PART_ROWS = ((1024, 1), (4096, 2))
"""Steps of up to so many rows sum up so many chunks of a row of many at once: more parts for more blocks."""
_LISTS, _TOTALS, _SEGMENT_WORDS, _TILE, _THREADS, _BLOCKS_PER_SM = 5, 8, 36, 16, 256, 2
_TEAM_THREADS, _LEAVES, _SUM_CHUNKS, _MAX_BLOCKS = 256, 16, 4, 256
_CLUSTER_BYTES, _SHRINK_BYTES, _EXPAND_BYTES = 199168, 101376, 40960
"""Shared memory of a block of `lora_cluster`, `lora_shrink`, and for each module that it expands, `lora_expand`."""
_GATE_UP = 2
UNIT_RANKS = 256
"""Clusters have no room for a linear of more ranks: there its segment counts as one of many rows, however few."""


class Shrunk(NamedTuple):
    """The delta of gate_up that its consumer expands: see `Lora.silu_mul`."""

    lora: "Lora"
    layer: int
    few: Tensor | None
    """The rows of segments of few rows [rows, 2 intermediate], if there are such segments."""


class _Pool(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_longlong),
        ("modules", ctypes.c_void_p),
        ("adapter_pages", ctypes.c_void_p),
        ("max_adapter_pages", ctypes.c_int),
        ("num_layers", ctypes.c_int),
        ("arrived", ctypes.c_void_p),
        ("needed_step", ctypes.c_void_p),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        ("in_size", ctypes.c_int),
        ("first_module", ctypes.c_int),
        ("num_modules", ctypes.c_int),
        ("out", ctypes.c_int * 3),
        ("out_stride", ctypes.c_int),
    )


class _Groups(ctypes.Structure):
    _fields_ = (("of", _Group * 4),)


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("totals", "ends", "segments", "sums", "units", "starts")),
        ("max_segments", ctypes.c_int),
        ("sums_stride", ctypes.c_int),
        ("max_units", ctypes.c_int),
    )


class Lora:
    """LoRA over the adapters of a pool. `prepare` once a step, then a call for each layer and group, in any order."""

    def __init__(
        self,
        pool: PagePool,
        modules: Tensor,
        adapter_pages: Tensor,
        *,
        max_rows: int,
        max_segments: int = 512,
        max_rank: int,
        swap_ins: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`modules` [max_adapters, layers * 7, 12] and `adapter_pages` [max_adapters, max_adapter_pages] are the
        descriptor tables on the device, int32; they are read anew in each step. `max_rank` bounds a module's rank.
        `swap_ins`: how far they are (`PageCopies.arrived`), int64, and the plan's `copies_needed_step`, int32."""
        assert modules.is_cuda
        assert modules.is_contiguous()
        assert adapter_pages.is_contiguous()
        assert max_segments <= MAX_SEGMENTS
        config, device = pool.config, pool.device
        self.max_rows, self._dtype = max_rows, pool.flat.dtype
        self._groups = [_group(config.module_dims, group) for group in GROUPS]
        sums = sums_bytes(config, max_rows, max_rank)
        stride = sums // (_sum_rows(max_rows) * 4)
        num_lists, max_units = config.num_layers * 4, 3 * (max_rows // 8 + max_segments)
        self._buffers = (
            torch.zeros(num_lists * _TOTALS, dtype=torch.int32, device=device),
            torch.zeros(num_lists * _LISTS * max_segments, dtype=torch.int32, device=device),
            torch.zeros(num_lists * max_segments * _SEGMENT_WORDS, dtype=torch.int32, device=device),
            torch.empty(sums // 4, dtype=torch.float32, device=device),
            torch.zeros(num_lists * (2 + max_units), dtype=torch.int32, device=device),
            torch.zeros(num_lists * _MAX_BLOCKS * (4 + _SEGMENT_WORDS), dtype=torch.int32, device=device),
        )
        if swap_ins is None:
            swap_ins = (
                torch.zeros(1, dtype=torch.int64, device=device),
                torch.zeros(1, dtype=torch.int32, device=device),
            )
        self._tables = (pool.pages, modules, adapter_pages, *swap_ins)
        self._pool = _Pool(
            pool.pages.data_ptr(),
            pool.page_bytes,
            modules.data_ptr(),
            adapter_pages.data_ptr(),
            adapter_pages.shape[1],
            config.num_layers,
            *(word.data_ptr() for word in swap_ins),
        )
        self._work = _Work(*(buffer.data_ptr() for buffer in self._buffers), max_segments, stride, max_units)
        aligned = all(size % 8 == 0 for dims in config.module_dims for size in dims)
        macros = {"DTYPE": DTYPE_MACRO[pool.dtype], "ALIGNED": int(aligned)}
        module = nvrtc.load("lora", macros)
        self._prepare = module.kernel("lora_work")
        self._shrink, self._expand = module.kernel("lora_shrink"), module.kernel("lora_expand")
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count * _BLOCKS_PER_SM
        self._cluster = None
        self.num_clusters: dict[int, int] = {}
        """How many the device holds at once, by their size."""
        if module.has_clusters and aligned and pool.dtype != "float32":  # HAS_CLUSTER
            self._cluster = module.kernel("lora_cluster")
            for size in CLUSTERS:
                room = self._cluster.max_clusters(_TEAM_THREADS, _CLUSTER_BYTES, size)
                if room:
                    self.num_clusters[size] = min(room, _MAX_BLOCKS // size)
        self._silu_mul = module.kernel("lora_silu_mul") if aligned and pool.dtype != "float32" else None
        self._has_many, self._has_few, self._num_rows, self._cluster_size = True, True, max_rows, 0
        self.leaves_expand = False
        """Whether the step's gate_up deltas are left to `silu_mul` to expand."""
        self._launches = [self._bind(index) for index in range(num_lists)]

    def prepare(
        self,
        num_segments: Tensor,
        seg_indptr: Tensor,
        seg_adapter: Tensor,
        stream: int | None = None,
        *,
        num_rows: int | None = None,
        has_prefill: bool = True,
        has_few: bool = True,
        has_large: bool = False,
        leaves_expand: bool = False,
        cluster: int | None = None,
    ) -> None:
        """Make the step's lists from the plan's arrays on the device, int32; `num_segments` is one number.

        At most `num_rows` rows. Steps without prefill rows, or without segments of at most MANY_ROWS rows (`has_few`),
        need fewer kernels for each layer group, a linear of more than UNIT_RANKS ranks (`has_large`) more.
        With `leaves_expand`, where the types allow it, gate_up's delta is a `Shrunk` for `silu_mul`, and all rows must
        belong to segments. `cluster`, one of CLUSTERS, overrules the choice by the number of rows.
        """
        self._has_few = has_few
        self._num_rows = self.max_rows if num_rows is None else num_rows
        fitting = (size for size in self.num_clusters if self._num_rows <= CLUSTERS[size])
        self._cluster_size = cluster or next(fitting, 0)
        self._has_many = has_prefill or has_large or self._cluster is None
        tables = (self._pool, _Groups((_Group * 4)(*self._groups)), self._work)
        most_few = MANY_ROWS if self._has_many else 2**30
        self.leaves_expand = leaves_expand and self._has_many and self._silu_mul is not None
        num_clusters = self.num_clusters.get(self._cluster_size, 0)
        expanding = _GATE_UP if self.leaves_expand else -1
        numbers = (most_few, self._sum_chunks(), self._num_rows, num_clusters, self._cluster_size, expanding)
        args = (*tables, num_segments, seg_indptr, seg_adapter, *numbers)
        self._prepare(len(self._launches), _THREADS, args, 0, stream)

    def __call__(
        self, x: Tensor, layer: int, group: int, stream: int | None = None, out: Tensor | None = None
    ) -> Tensor | Shrunk:
        """delta [rows, out] of x [rows, in]; rows of no segment keep whatever `out` holds."""
        assert x.is_contiguous()
        assert x.dtype == self._dtype
        assert x.shape[0] <= self.max_rows
        assert x.shape[1] == self._groups[group].in_size
        shrink, expand, cluster = self._launches[layer * 4 + group]
        is_left = self.leaves_expand and group == _GATE_UP
        if out is None and (not is_left or cluster is None or self._has_few):
            out = x.new_empty(x.shape[0], self._groups[group].out_stride)
        if cluster is not None and self._has_few:
            cluster.set(4, x)
            cluster.set(5, out)
            # As many as `lora_work` has made lists for: one for each module of a row, if there are.
            most = self._num_rows * self._groups[group].num_modules
            cluster.set_clusters(min(self.num_clusters[self._cluster_size], most), self._cluster_size)
            cluster(stream)
        if self._has_many:
            shrink.set(4, x)
            shrink(stream)
        if self._has_many and (not is_left or cluster is None):
            expand.set(4, out)
            expand(stream)
        if is_left:
            return Shrunk(self, layer, out)
        assert out is not None
        return out

    def silu_mul(self, gate_up: Tensor, delta: Shrunk) -> Tensor:
        """silu(gate) * up of gate_up + delta: gate_up [rows, 2 intermediate] -> [rows, intermediate]."""
        assert self._silu_mul is not None
        assert gate_up.is_contiguous()
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        tables = (self._pool, self._groups[_GATE_UP], self._work, delta.layer * 4 + _GATE_UP)
        args = (*tables, gate_up, delta.few, out)
        self._silu_mul(self._grid, _THREADS, args, 2 * _EXPAND_BYTES, programmatic=True)
        return out

    @property
    def has_clusters(self) -> bool:
        return self._cluster is not None

    def _sum_chunks(self) -> int:
        if self._cluster is None:
            return _SUM_CHUNKS
        return next((chunks for most, chunks in _PART_ROWS if self._num_rows <= most), _SUM_CHUNKS)

    def _bind(self, index: int) -> tuple[nvrtc.Launch, nvrtc.Launch, nvrtc.Launch | None]:
        args = (self._pool, self._groups[index % 4], self._work, index, self._buffers[0])
        # The first op may directly follow `prepare`, whose lists it reads before anything else.
        stages = (0, 0) if self._dtype == torch.float32 else (_SHRINK_BYTES, _EXPAND_BYTES)
        shrink = self._shrink.bind(self._grid, _THREADS, args, stages[0], programmatic=index > 0)
        expand = self._expand.bind(self._grid, _THREADS, args, stages[1], programmatic=True)
        if self._cluster is None:
            return shrink, expand, None
        both = (*args, self._buffers[0])
        size = min(CLUSTERS)
        cluster = self._cluster.bind(size, _TEAM_THREADS, both, _CLUSTER_BYTES, cluster=size, programmatic=index > 0)
        return shrink, expand, cluster


def _group(dims: tuple[tuple[int, int], ...], modules: tuple[int, ...]) -> _Group:
    assert all(b - a == 1 for a, b in pairwise(modules))
    assert modules[-1] < NUM_MODULES
    outs = [dims[module][1] for module in modules]
    return _Group(dims[modules[0]][0], modules[0], len(modules), (ctypes.c_int * 3)(*outs), sum(outs))


def _sum_rows(max_rows: int) -> int:
    """Rows whose sums take the most room, counted as rows of the fewest sums."""
    return max(max_rows, *(min(max_rows, most) * _SUM_CHUNKS // chunks for most, chunks in _PART_ROWS))


def sums_bytes(config: ModelConfig, max_rows: int, max_rank: int) -> int:
    """What the partial sums of so many rows take, where the linears of an adapter have at most so many ranks."""
    strides = (_sums_stride(config.module_dims[group[0]][0], len(group) * max_rank) for group in GROUPS)
    return _sum_rows(max_rows) * max(strides) * 4


def _sums_stride(in_size: int, max_ranks: int) -> int:
    """Floats that the partial sums of a row take at most: one for each rank and chunk of columns (`chunk_columns`)."""
    chunks, tiles = -(-in_size // (512 if in_size > 8192 else 256)), -(-max_ranks // _TILE)
    # n tiles have ceil(chunks / ceil(n / 4)) chunks each: no more than 4 * chunks + n + 3 together
    without_clusters = chunks * tiles if tiles <= 4 else 4 * chunks + tiles + 3
    return max(without_clusters, _LEAVES // _SUM_CHUNKS * tiles) * _TILE
