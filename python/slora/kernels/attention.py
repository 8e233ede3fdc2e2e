"""Paged attention on the device: which kernel attends which rows, and the work lists that they loop over.

Decode rows: split-KV on tensor cores, or, in fp32 and for odd head dimensions, the simple kernel for all rows.
Prefill rows: cuDNN in large steps, if it takes them; in captured graphs, whose grid must not depend on the plan, a
kernel of our own, which runs beside that for decode rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from slora.kernels import cudnn, nvrtc
from slora.kernels.nvrtc import Argument, Kernel
from slora.memory import PagePool
from slora.plan import DevicePlan

ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
SPLIT_TOKENS, TILE_TOKENS = 512, 16
MERGE_THREADS = 128
MERGE_BLOCKS = 16  # of a multiprocessor, at most
WARPS = 4
CHUNK_ROWS = 16 * WARPS
SIMPLE_THREADS = 256
MAX_HEAD_DIM = 256
_RESERVED_BYTES = 1024  # of shared memory, by the system, for each block
_LOG2_E = 1.4426950408889634


class KernelShape(NamedTuple):
    kernel: Kernel
    num_blocks: int
    shared_bytes: int


class Attention:
    """Attention over one pool, for plans of one layout: kernels, work lists, and what splits leave for their merge."""

    def __init__(self, pool: PagePool, plan: DevicePlan) -> None:
        self.pool, self.plan, self.config = pool, plan, pool.config
        self.dtype = pool.flat.dtype
        self.group = self.config.num_heads // self.config.num_kv_heads
        self._properties = torch.cuda.get_device_properties(pool.device)
        self._windows = list(dict.fromkeys(self.config.windows))
        self._items = {window: self._new_items() for window in self._windows}
        self._has_prefill = False
        self._cudnn: cudnn.PrefillAttention | None = None
        if self.is_tensor_core and cudnn.is_available():
            self._cudnn = cudnn.PrefillAttention(pool, plan)

    @cached_property
    def is_tensor_core(self) -> bool:
        """Whether the tensor-core kernels serve this model on this device; else the simple one serves all rows."""
        dim = self.config.head_dim
        is_served = dim % 16 == 0 and dim <= MAX_HEAD_DIM and self.group <= CHUNK_ROWS
        return self.dtype != torch.float32 and is_served and self._decode_stages(1, 0) is not None

    def warm_up(self, max_tokens: int, num_rows: range) -> None:
        """Make what eager steps of so many rows need, for sequences of up to `max_tokens`."""
        if self._cudnn is None or not num_rows:
            return
        with self._without_cudnn_if_it_refuses():
            self._cudnn.warm_up(max_tokens, num_rows)

    def prepare(self, *, is_graph: bool) -> None:
        """Build the work lists of the uploaded plan. In a graph its counts are unknown, and nothing depends on them."""
        counts = self.plan.counts
        self._has_prefill = counts.num_requests > counts.num_decode
        if self.is_tensor_core:
            for window in self._windows:
                self._list_work(window)
        if self._cudnn is not None and self._has_prefill and not is_graph:
            with self._without_cudnn_if_it_refuses():
                self._cudnn.prepare()

    def run(
        self, q: Tensor, layer: int, *, has_decode: bool, has_prefill: bool, has_splits: bool, is_graph: bool
    ) -> Tensor:
        """q [rows, heads, head_dim] -> [rows, heads * head_dim].

        `has_splits`: decode rows may see more than SPLIT_TOKENS tokens.
        """
        out = q.new_empty(q.shape[0], self.config.q_size)
        if not self.is_tensor_core:
            self._run_simple(q, out, layer)
            return out
        has_chunks = has_prefill and (is_graph or self._cudnn is None)
        if has_decode:
            self._run_decode(q, out, layer, leaves_room=has_chunks)
        if has_chunks:
            self._run_chunks(q, out, layer, is_beside_decode=has_decode)
        elif has_prefill:
            assert self._cudnn is not None
            self._cudnn.run(q, out, layer)
        if has_decode and has_splits:
            self._run_merge(out, layer)
        return out

    @contextmanager
    def _without_cudnn_if_it_refuses(self) -> Iterator[None]:
        """Then, and from then on, chunk_attention serves all prompts."""
        try:
            yield
        except cudnn.UnsupportedError as error:
            logging.getLogger("slora").warning("prompts are attended by a kernel of our own: %s", error)
            self._cudnn = None

    # What the kernels are compiled for, and launched with

    @property
    def _macros(self) -> dict[str, int | str]:
        c = self.config
        shape = {"HEAD_DIM": c.head_dim, "HEADS": c.num_heads, "KV_HEADS": c.num_kv_heads}
        return {"ELEMENT": ELEMENTS[self.dtype], "PAGE_TOKENS": self.pool.page_tokens, **shape}

    @cached_property
    def _decode(self) -> KernelShape:
        """Two blocks share a multiprocessor, if that is possible, with as many stages as fit."""
        shape = self._decode_shape(2, 0) or self._decode_shape(1, 0)
        assert shape is not None, "is_tensor_core says that one fits"
        return shape

    @cached_property
    def _decode_beside_chunks(self) -> KernelShape:
        """The same, with room for a block of chunk_attention, if that is possible."""
        return self._decode_shape(2, self._chunks.shared_bytes + _RESERVED_BYTES) or self._decode

    def _decode_shape(self, blocks: int, spare: int) -> KernelShape | None:
        """With so many blocks on a multiprocessor, whose shared memory keeps `spare` bytes for others."""
        stages = self._decode_stages(blocks, spare)
        if stages is None:
            return None
        kernel = nvrtc.load("paged_attention", {**self._macros, "STAGES": stages}).kernel("paged_attention")
        return KernelShape(kernel, blocks * self._properties.multi_processor_count, self._decode_bytes(stages))

    def _decode_stages(self, blocks: int, spare: int) -> int | None:
        p = self._properties
        most = (p.shared_memory_per_multiprocessor - spare) // blocks - _RESERVED_BYTES
        most = min(most, p.shared_memory_per_block_optin)
        return next((stages for stages in (4, 3, 2) if self._decode_bytes(stages) <= most), None)

    def _decode_bytes(self, stages: int) -> int:
        merge = WARPS * min(self.group, 16) * (self.config.head_dim + 2) * 4
        return -(-merge // 16) * 16 + WARPS * stages * 2 * TILE_TOKENS * (self.config.head_dim + 8) * 2

    @cached_property
    def _merge(self) -> Kernel:
        # stages are nothing to it; with two, its module serves decode beside chunks, too
        return nvrtc.load("paged_attention", {**self._macros, "STAGES": 2}).kernel("merge_splits")

    @cached_property
    def _chunks(self) -> KernelShape:
        kv_tile = 32 if self.config.head_dim > 128 else 64
        size = 2 * 2 * kv_tile * (self.config.head_dim + 8) * 2
        blocks = max(1, min(3, self._properties.shared_memory_per_multiprocessor // (size + _RESERVED_BYTES)))
        kernel = nvrtc.load("chunk_attention", self._macros).kernel("chunk_attention")
        return KernelShape(kernel, blocks * self._properties.multi_processor_count, size)

    @cached_property
    def _simple(self) -> Kernel:
        return nvrtc.load("simple_attention", self._macros).kernel("simple_attention")

    @cached_property
    def _work(self) -> Kernel:
        return nvrtc.load("step").kernel("attention_work")

    @cached_property
    def _max_splits(self) -> int:
        tokens = self.plan.capacity["page_indices"] * self.pool.page_tokens
        return tokens // SPLIT_TOKENS + self.plan.capacity["seq_lens"]

    @cached_property
    def _partials(self) -> Tensor:
        """What splits leave for the merge."""
        rows = min(self.group, 16)
        units = self.config.num_kv_heads * -(-self.group // 16)
        size = rows * self.config.head_dim + -(-2 * rows // 4) * 4
        return torch.empty(self._max_splits * units * size, dtype=torch.float32, device=self.pool.device)

    @property
    def _chunk_tokens(self) -> int:
        return CHUNK_ROWS // self.group

    def _new_items(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(how many, decode items, prefill items, spans of decode requests) of one window."""
        tiles = self.plan.capacity["token_ids"] // max(1, self._chunk_tokens) + self.plan.capacity["seq_lens"]
        count, decode, prefill, spans = (
            torch.zeros(size, dtype=torch.int32, device=self.pool.device)
            for size in (4, self._max_splits * 4, tiles * 4, self.plan.capacity["seq_lens"] * 2)
        )
        return count, decode, prefill, spans

    def _list_work(self, window: int | None) -> None:
        names = ("counts", "query_indptr", "seq_lens", "page_indptr")
        sizes = (window or 0, self._chunk_tokens, self.pool.page_tokens)
        threads = 512
        args: tuple[Argument, ...] = (*(self.plan[name] for name in names), *sizes, *self._items[window])
        self._work(1, threads, args, (threads + 1) * 4, programmatic=True)

    def _run_decode(self, q: Tensor, out: Tensor, layer: int, *, leaves_room: bool) -> None:
        kernel, blocks, shared = self._decode_beside_chunks if leaves_room else self._decode
        window = self.config.windows[layer]
        num_items, decode, *_ = self._items[window]
        tensors = (q, out, self.pool.keys[layer], self.pool.values[layer], num_items, decode, self.plan["page_indices"])
        numbers = (self.pool.page_rows, window or 0, self.config.head_dim**-0.5 * _LOG2_E)
        kernel(blocks, WARPS * 32, (*tensors, self._partials, *numbers), shared, programmatic=True)

    def _run_merge(self, out: Tensor, layer: int) -> None:
        spans = self._items[self.config.windows[layer]][3]
        heads = min(out.shape[0] * self.config.num_heads, MERGE_BLOCKS * self._properties.multi_processor_count)
        self._merge(heads, MERGE_THREADS, (out, self.plan["counts"], spans, self._partials), programmatic=True)

    def _run_chunks(self, q: Tensor, out: Tensor, layer: int, *, is_beside_decode: bool) -> None:
        kernel, blocks, shared = self._chunks
        window = self.config.windows[layer]
        num_items, _, prefill, _ = self._items[window]
        tensors = (q, out, self.pool.keys[layer], self.pool.values[layer], num_items, prefill)
        arrays = tuple(self.plan[name] for name in ("query_indptr", "seq_lens", "page_indptr", "page_indices"))
        numbers = (self.pool.page_rows, window or 0, self.config.head_dim**-0.5 * _LOG2_E)
        args = (*tensors, *arrays, *numbers, int(is_beside_decode))
        kernel(blocks, WARPS * 32, args, shared, programmatic=True)

    def _run_simple(self, q: Tensor, out: Tensor, layer: int) -> None:
        names = ("counts", "query_indptr", "seq_lens", "page_indptr", "page_indices")
        tensors = (q, out, self.pool.keys[layer], self.pool.values[layer], *(self.plan[name] for name in names))
        numbers = (self.pool.page_rows, self.config.windows[layer] or 0, self.config.head_dim**-0.5)
        self._simple(8 * self._properties.multi_processor_count, SIMPLE_THREADS, (*tensors, *numbers))
