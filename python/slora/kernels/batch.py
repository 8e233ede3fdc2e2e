"""Metadata of a step for the reference ops: computed once from the plan, used by every layer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slora.kernels.adapters import AdapterTables, Tile
from slora.memory import PagePool
from slora.plan import HAS_LORA, StepPlan

MAX_PADDING = 2.0
"""Decode requests are attended together, padded to the longest, unless that reads this many times what they hold."""


@dataclass
class AttentionGroup:
    """Requests that are attended in one call: equally many query rows, KV of one (padded) length.

    They are decode requests (one row each), or neighbouring prefill requests of the same shape.
    """

    num_requests: int
    query_len: int
    kv_len: int
    rows: slice | Tensor  # of the step
    kv_rows: Tensor  # [num_requests * kv_heads * kv_len] head rows; padding repeats the request's own last token
    mask: Tensor | None  # added to the scores: [num_requests, kv_heads, 1, kv_len] or [query_len, kv_len]
    is_causal: bool  # the mask is the plain triangle


@dataclass
class Batch:
    """A step, ready for the ops."""

    pool: PagePool
    slots: Tensor  # [rows] token rows that K and V go to
    cos: Tensor  # [rows, 1, head_dim]
    sin: Tensor  # [rows, 1, head_dim], the first half negated
    groups: list[list[AttentionGroup]]  # per layer; layers with equal windows share a list
    tiles: list[Tile]  # none: no segment has an adapter


def make_batch(plan: StepPlan, pool: PagePool, tables: AdapterTables, frequencies: Tensor, scaling: float) -> Batch:
    """Everything that the layers share. `frequencies` [head_dim / 2] in fp32."""
    dtype = pool.flat.dtype
    angles = plan["positions"].to(torch.float32)[:, None] * frequencies
    cos, sin = (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
    by_window = {window: _attention_groups(plan, pool, window, dtype) for window in set(pool.config.windows)}
    return Batch(
        pool=pool,
        slots=torch.from_numpy(_token_rows(plan.array("slots").astype(np.int64), pool)),
        cos=torch.cat((cos, cos), -1)[:, None],
        sin=torch.cat((-sin, sin), -1)[:, None],
        groups=[by_window[window] for window in pool.config.windows],
        tiles=tables.tiles(plan) if plan.counts.flags & HAS_LORA else [],
    )


def _token_rows(slots: np.ndarray, pool: PagePool) -> np.ndarray:
    page, token = np.divmod(slots, pool.page_tokens)
    rows: np.ndarray = page * pool.page_rows + token
    return rows


def _attention_groups(plan: StepPlan, pool: PagePool, window: int | None, dtype: torch.dtype) -> list[AttentionGroup]:
    tables = _PageTables(plan, pool)
    num_decode = plan.counts.num_decode
    lens = tables.seq_lens[:num_decode] if window is None else np.minimum(tables.seq_lens[:num_decode], window)
    groups = [_decode_group(tables, requests, lens[requests], dtype) for requests in _similar_lengths(lens)]
    if len(groups) == 1:
        groups[0].rows = slice(0, num_decode)
    query_lens = np.diff(plan.array("query_indptr"))
    start = num_decode
    while start < plan.counts.num_requests:
        assert query_lens[start] > 1, "requests with one row come first"
        end = start + 1
        shape = (query_lens[start], tables.seq_lens[start])
        while end < plan.counts.num_requests and (query_lens[end], tables.seq_lens[end]) == shape:
            end += 1
        first_row = int(plan.array("query_indptr")[start])
        groups.append(_prefill_group(tables, range(start, end), first_row, int(shape[0]), window, dtype))
        start = end
    return groups


class _PageTables:
    """The requests' page tables, as rows of the pool."""

    def __init__(self, plan: StepPlan, pool: PagePool) -> None:
        self.pool = pool
        self.seq_lens = plan.array("seq_lens").astype(np.int64)
        self.indptr = plan.array("page_indptr").astype(np.int64)
        self.pages = plan.array("page_indices").astype(np.int64)

    def head_rows(self, requests: np.ndarray, first: np.ndarray, kv_len: int) -> Tensor:
        """Rows [request, kv_head, token] of `kv_len` tokens of each request from `first` on.

        What lies beyond a request's end is its last token: memory that nothing was written to may hold NaN, which no
        mask takes out of a weighted sum.
        """
        positions = first[:, None] + np.arange(kv_len)
        np.minimum(positions, self.seq_lens[requests, None] - 1, out=positions)
        page, token = np.divmod(positions, self.pool.page_tokens)
        page += self.indptr[requests, None]
        rows = self.pages[page] * self.pool.page_rows
        rows += token
        kv_heads = self.pool.config.num_kv_heads
        rows *= kv_heads
        return torch.from_numpy((rows[:, None] + np.arange(kv_heads)[:, None]).ravel())


def _similar_lengths(lens: np.ndarray) -> list[np.ndarray]:
    """Split requests so that padding stays small: all together, or by the power of two of their length."""
    if not len(lens):
        return []
    if len(lens) * int(lens.max()) <= MAX_PADDING * int(lens.sum()):
        return [np.arange(len(lens))]
    classes = np.ceil(np.log2(lens)).astype(np.int64)
    return [np.flatnonzero(classes == value) for value in np.unique(classes)]


def _decode_group(tables: _PageTables, requests: np.ndarray, lens: np.ndarray, dtype: torch.dtype) -> AttentionGroup:
    """`lens`: how many tokens each request sees, its last ones."""
    kv_len = int(lens.max())
    mask = None
    if int(lens.min()) < kv_len:
        hidden = torch.from_numpy(np.arange(kv_len) >= lens[:, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        mask = mask[:, None, None].repeat(1, tables.pool.config.num_kv_heads, 1, 1)
    kv_rows = tables.head_rows(requests, tables.seq_lens[requests] - lens, kv_len)
    return AttentionGroup(len(requests), 1, kv_len, torch.from_numpy(requests), kv_rows, mask, is_causal=False)


def _prefill_group(
    tables: _PageTables, requests: range, first_row: int, query_len: int, window: int | None, dtype: torch.dtype
) -> AttentionGroup:
    """`requests` have the same shape. KV that the first row does not see any more is not read."""
    seq_len = int(tables.seq_lens[requests[0]])
    cached = seq_len - query_len
    first = 0 if window is None else max(0, cached - window + 1)
    kv_len = seq_len - first
    is_causal = cached == 0 and (window is None or window >= seq_len)
    indices = np.arange(requests.start, requests.stop)
    kv_rows = tables.head_rows(indices, np.full(len(requests), first), kv_len)
    mask = None if is_causal else _prefill_mask(np.arange(cached, seq_len), np.arange(first, seq_len), window, dtype)
    rows = slice(first_row, first_row + len(requests) * query_len)
    return AttentionGroup(len(requests), query_len, kv_len, rows, kv_rows, mask, is_causal)


def _prefill_mask(queries: np.ndarray, keys: np.ndarray, window: int | None, dtype: torch.dtype) -> Tensor:
    hidden = keys > queries[:, None]
    if window is not None:
        hidden |= keys <= queries[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
