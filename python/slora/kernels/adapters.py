"""Descriptors of the running adapters, and what the reference `lora` op makes of them.

Shrink and expand read an adapter's rows where they lie in the pool: as a view where they are evenly spaced, else
gathered by row for the moment of use. No weights are kept, only where they are, and that until the descriptor changes.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from slora.memory import ROW_ALIGN_BYTES, PagePool
from slora.plan import StepPlan

MODULE_WORDS = 12
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
"""Modules of qkv, o, gate_up, down."""
NUM_MODULES = 7
MAX_TILE_ROWS = 32
"""Segments are joined to tiles of at most this many rows; a longer segment is a tile of its own."""
MAX_CACHED_TILES = 64


class Rows:
    """Rows of equal width in the pool, by where they start."""

    def __init__(self, pool: PagePool, starts: np.ndarray, row_bytes: int, width: int) -> None:
        """`starts`: in units of ROW_ALIGN_BYTES."""
        self._source = pool.adapter_rows(width)
        self._view: Tensor | None = None
        steps = np.diff(starts)
        if not steps.size or (steps == row_bytes // ROW_ALIGN_BYTES).all():
            first = self._source.storage_offset() + int(starts[0]) * self._source.stride(0)
            stride = row_bytes // self._source.element_size()
            self._view = self._source.as_strided((len(starts), width), (stride, 1), first)
        self._index = torch.from_numpy(starts)

    def read(self) -> Tensor:
        """[rows, width]; a view, or a copy for immediate use."""
        return self._source.index_select(0, self._index) if self._view is None else self._view


@dataclass
class Expand:
    """The second half of one module in a tile: columns of the shrunk rows times B give columns of delta."""

    ranks: slice
    out: slice
    b: Rows


@dataclass
class TileGroup:
    """LoRA of one group of modules for one tile: A of all its modules and adapters below each other."""

    a: Rows  # [ranks, in]
    scale: Tensor  # [ranks] fp32
    foreign: Tensor | None  # bool [rows, ranks]: the rank is another adapter's; None: there is only one adapter
    expands: list[Expand]
    out_size: int  # of the group's modules side by side, present or not


@dataclass
class Tile:
    """Neighbouring segments that are computed together: their products with all their adapters, what is foreign zeroed.

    That does a few rows' arithmetic in vain, and saves a pair of calls per adapter and module.
    """

    rows: slice
    groups: list[TileGroup | None]  # [layers * 4]


@dataclass
class _Module:
    """Where one module of one adapter lies, in units of ROW_ALIGN_BYTES."""

    scale: float
    a: np.ndarray  # [rank] starts
    b: np.ndarray
    a_row_bytes: int
    b_row_bytes: int


class AdapterTables:
    """The descriptor tables: modules [max_adapters, layers * 7, 12] and pages [max_adapters, max_adapter_pages]."""

    def __init__(self, pool: PagePool, max_adapters: int, max_adapter_pages: int) -> None:
        self.pool = pool
        self.num_modules = pool.config.num_layers * NUM_MODULES
        self.modules = torch.zeros((max_adapters, self.num_modules, MODULE_WORDS), dtype=torch.int32)
        self.pages = torch.zeros((max_adapters, max_adapter_pages), dtype=torch.int32)
        self._versions = [0] * max_adapters
        self._adapters: dict[int, list[_Module | None]] = {}
        self._tiles: OrderedDict[tuple[tuple[int, int, int], ...], list[TileGroup | None]] = OrderedDict()

    def update(self, plan: StepPlan) -> None:
        """Write the changed rows, and forget what was known of them."""
        words = self.num_modules * MODULE_WORDS
        rows, indptr = plan.array("changed_rows").tolist(), plan.array("changed_pages_indptr").tolist()
        for i, row in enumerate(rows):
            self.modules[row] = plan["changed_modules"][i * words : (i + 1) * words].view(-1, MODULE_WORDS)
            pages = plan["changed_pages"][indptr[i] : indptr[i + 1]]
            self.pages[row, : len(pages)] = pages
            self._versions[row] += 1
            self._adapters.pop(row, None)

    def tiles(self, plan: StepPlan) -> list[Tile]:
        """The step's segments with an adapter, as tiles."""
        bounds, adapters = plan.array("seg_indptr").tolist(), plan.array("seg_adapter").tolist()
        tiles: list[Tile] = []
        members: list[tuple[int, int, int]] = []  # (descriptor row, its version, rows)
        start = end = 0
        for adapter, (first, last) in zip(adapters, pairwise(bounds), strict=True):
            if members and (adapter < 0 or first > end or last - start > MAX_TILE_ROWS):
                tiles.append(Tile(slice(start, end), self._tile_groups(tuple(members))))
                members = []
            if adapter >= 0:
                start = start if members else first
                end = last
                members.append((adapter, self._versions[adapter], last - first))
        if members:
            tiles.append(Tile(slice(start, end), self._tile_groups(tuple(members))))
        return tiles

    def _tile_groups(self, members: tuple[tuple[int, int, int], ...]) -> list[TileGroup | None]:
        groups = self._tiles.get(members)
        if groups is None:
            adapters = [self._adapter(row) for row, _, _ in members]
            builder = _TileBuilder(self.pool, adapters, [num_rows for _, _, num_rows in members])
            groups = self._tiles[members] = builder.build()
            if len(self._tiles) > MAX_CACHED_TILES:
                self._tiles.popitem(last=False)
        self._tiles.move_to_end(members)
        return groups

    def _adapter(self, row: int) -> list[_Module | None]:
        adapter = self._adapters.get(row)
        if adapter is None:
            words, pages = self.modules[row].numpy(), self.pages[row].numpy().astype(np.int64)
            adapter = self._adapters[row] = [_module(w, pages, self.pool.page_bytes) for w in words]
        return adapter


def _module(words: np.ndarray, pages: np.ndarray, page_bytes: int) -> _Module | None:
    rank = int(words[0])
    if rank == 0:
        return None
    a, b = words[2:7].tolist(), words[7:12].tolist()
    scale = float(words[1:2].view(np.float32)[0])
    return _Module(scale, _starts(rank, a, pages, page_bytes), _starts(rank, b, pages, page_bytes), a[2], b[2])


def _starts(rank: int, words: list[int], pages: np.ndarray, page_bytes: int) -> np.ndarray:
    """Where the rows of A or of transposed B start in the pool, in units of ROW_ALIGN_BYTES: the image's layout."""
    first, offset, row_bytes, rows_first, rows_per_page = words
    i = np.arange(rank)
    j = i - rows_first
    in_first = j < 0
    page = pages[np.where(in_first, first, first + 1 + j // rows_per_page)]
    byte = np.where(in_first, offset + i * row_bytes, j % rows_per_page * row_bytes)
    starts: np.ndarray = (page * page_bytes + byte) // ROW_ALIGN_BYTES
    return starts


class _TileBuilder:
    """Puts the modules of several adapters together."""

    def __init__(self, pool: PagePool, adapters: list[list[_Module | None]], num_rows: list[int]) -> None:
        self.pool, self.adapters = pool, adapters
        self.row_owner = np.repeat(np.arange(len(adapters)), num_rows)
        self.dims = pool.config.module_dims
        self.masks: dict[bytes, Tensor] = {}  # most groups of a tile have the same ranks: one mask serves them

    def build(self) -> list[TileGroup | None]:
        return [self._group(layer, group) for layer in range(self.pool.config.num_layers) for group in GROUPS]

    def _group(self, layer: int, group: tuple[int, ...]) -> TileGroup | None:
        present: list[tuple[int, _Module]] = []  # (adapter, module), module-major: the order of the ranks
        expands: list[Expand] = []
        rank, out_bounds = 0, [0, *accumulate(self.dims[module][1] for module in group)]
        for i, module in enumerate(group):
            parts = [(a, m) for a, modules in enumerate(self.adapters) if (m := modules[layer * NUM_MODULES + module])]
            if parts:
                end = rank + sum(len(m.a) for _, m in parts)
                b = Rows(self.pool, *_join([(m.b, m.b_row_bytes) for _, m in parts]), self.dims[module][1])
                expands.append(Expand(slice(rank, end), slice(out_bounds[i], out_bounds[i + 1]), b))
                rank = end
                present += parts
        if not present:
            return None
        a = Rows(self.pool, *_join([(m.a, m.a_row_bytes) for _, m in present]), self.dims[group[0]][0])
        ranks = [len(m.a) for _, m in present]
        scale = np.repeat(np.array([m.scale for _, m in present], np.float32), ranks)
        owner = np.repeat([adapter for adapter, _ in present], ranks)
        return TileGroup(a, torch.from_numpy(scale), self._foreign(owner), expands, out_bounds[-1])

    def _foreign(self, owner: np.ndarray) -> Tensor | None:
        if len(self.adapters) == 1:
            return None
        key = owner.tobytes()
        if key not in self.masks:
            self.masks[key] = torch.from_numpy(self.row_owner[:, None] != owner)
        return self.masks[key]


def _join(parts: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """(starts, row bytes): rows of equal length, below each other."""
    return np.concatenate([starts for starts, _ in parts]), parts[0][1]
