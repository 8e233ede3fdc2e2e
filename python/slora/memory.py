"""The page pool on the device, and the host tier beside it.

Rust's core owns the pages and says what lies in them; here they are bytes, and views that give the bytes a shape.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from slora.models.config import DTYPE_BYTES, ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_POOL_BYTES = 512 << 20
DEFAULT_POOL_FRACTION = 0.9
MAX_GRAPH_ROWS, LOGITS_ROWS = 512, 256
"""Rows of the largest recorded step, and of logits at a time for prompts."""
LIBRARY_BYTES = 256 << 20
"""Of libraries' workspace and modules."""
SPARE_BYTES = 256 << 20
"""What stays free on the device beside everything that is known."""
GRAPH_LAYER_BYTES = 48 << 10
"""What the driver keeps of a layer of a recorded graph: 38 to 47 KB were measured (docs/kernels.md)."""
ROW_ALIGN_BYTES = 16
"""Rows of an adapter's image start on a multiple of this."""


class PagePool:
    """One buffer of `num_pages` pages [num_pages, page_bytes], with its KV cache and adapter rows as views.

    A *token row* is K or V of one token in one layer, [kv_heads * head_dim]. A page holds `page_rows` of them, as
    [layer][k|v][token], so token t of page p has row `p * page_rows + t` in `keys[layer]` and in `values[layer]`: one
    index serves all layers. `key_heads` and `value_heads` are the same with a row for each head, [head_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str,
        device: str = "cpu",
        pool_bytes: int = DEFAULT_POOL_BYTES,
        page_tokens: int | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.page_tokens = page_tokens or config.default_page_tokens(dtype)
        self.page_bytes = config.page_bytes(self.page_tokens, dtype)
        self.num_pages = pool_bytes // self.page_bytes
        self._check(pool_bytes)
        self.page_rows = self.page_tokens * 2 * config.num_layers
        self._pages: Tensor | None = _allocate(self.num_pages * self.page_bytes, self.device)
        self._row_views: dict[int, Tensor] = {}
        rows = self.flat.view(-1, config.kv_size)
        self.keys = [rows[2 * layer * self.page_tokens :] for layer in range(config.num_layers)]
        self.values = [rows[(2 * layer + 1) * self.page_tokens :] for layer in range(config.num_layers)]
        self.key_heads = [rows.view(-1, config.head_dim) for rows in self.keys]
        self.value_heads = [rows.view(-1, config.head_dim) for rows in self.values]

    @property
    def pages(self) -> Tensor:
        """uint8 [num_pages, page_bytes]."""
        assert self._pages is not None, "the pool is closed"
        return self._pages.view(self.num_pages, self.page_bytes)

    @property
    def flat(self) -> Tensor:
        """All pages as elements of the base's dtype, one-dimensional."""
        assert self._pages is not None, "the pool is closed"
        return self._pages.view(DTYPES[self.dtype])

    @property
    def kv(self) -> Tensor:
        """[page, layer, k|v, token, kv_head, head_dim]."""
        c = self.config
        return self.flat.view(self.num_pages, c.num_layers, 2, self.page_tokens, c.num_kv_heads, c.head_dim)

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def adapter_rows(self, width: int) -> Tensor:
        """Overlapping rows of `width` elements, one from every place where a row may start: row i from byte 16 i."""
        view = self._row_views.get(width)
        if view is None:
            flat = self.flat
            step = ROW_ALIGN_BYTES // flat.element_size()
            view = flat.as_strided(((flat.numel() - width) // step + 1, width), (step, 1))
            self._row_views[width] = view
        return view

    def close(self) -> None:
        """Free the buffer; nothing may use the pool any more."""
        self._pages = None
        self._row_views.clear()
        for views in (self.keys, self.values, self.key_heads, self.value_heads):
            views.clear()

    def _check(self, pool_bytes: int) -> None:
        from slora.errors import ConfigError

        if self.page_tokens < 16 or self.page_tokens & (self.page_tokens - 1):
            raise ConfigError(f"page_tokens = {self.page_tokens}: must be a power of two, at least 16")
        longest = self.config.longest_row_bytes(self.dtype)
        if longest > self.page_bytes:
            raise ConfigError(
                f"page_tokens = {self.page_tokens} makes pages of {self.page_bytes} bytes, but the longest adapter row "
                f"has {longest}; hint: {self.config.default_page_tokens(self.dtype)} is the default"
            )
        if self.num_pages < 2:
            raise ConfigError(
                f"pool_bytes = {pool_bytes} holds {self.num_pages} pages of {self.page_bytes} bytes "
                f"({self.page_tokens} tokens each); at least 2 are needed; hint: raise pool_bytes"
            )


def device_pool_bytes(
    config: ModelConfig,
    *,
    dtype: str,
    device: str,
    page_tokens: int | None = None,
    max_batch_tokens: int,
    max_running: int,
    max_rank: int,
    fraction: float = DEFAULT_POOL_FRACTION,
) -> int:
    """How large a pool the CUDA device still has room for: `fraction` of what is free beside a step's workspace and the
    graphs that are recorded at the start.

    Call it when the weights are on the device. The workspace is allocated meanwhile, and torch keeps it for the steps.
    Raises ConfigError if not even two pages fit.
    """
    from slora.errors import ConfigError

    sizes = {"max_batch_tokens": max_batch_tokens, "max_running": max_running, "max_rank": max_rank}
    needed = workspace_bytes(config, dtype=dtype, **sizes)
    kept = graph_bytes(config, dtype=dtype, max_running=max_running) + spare_bytes(config, max_running)
    before, total = torch.cuda.mem_get_info(device)
    page_bytes = config.page_bytes(page_tokens or config.default_page_tokens(dtype), dtype)
    if before < needed + kept + 2 * page_bytes / fraction:
        raise ConfigError(
            f"{before} of {total} bytes are free on {device}; a step of {max_batch_tokens} tokens needs {needed}, "
            f"recorded graphs and what must stay free {kept}, and 2 pages {2 * page_bytes}; "
            "hint: a smaller max_batch_tokens or max_rank"
        )
    workspace = _allocate(needed, torch.device(device))
    free = torch.cuda.mem_get_info(device)[0] - kept
    del workspace
    return int(free * fraction) // page_bytes * page_bytes


def workspace_bytes(config: ModelConfig, *, dtype: str, max_batch_tokens: int, max_running: int, max_rank: int) -> int:
    """What a step holds at most, generously: activations and deltas of a layer, LoRA's sums, logits, libraries'
    workspace."""
    from slora.kernels.lora import sums_bytes

    rows = max_batch_tokens + MAX_GRAPH_ROWS
    sums = sums_bytes(config, max_batch_tokens + 8, max_rank)  # rows are rounded up to a graph's
    logits = 2 * max(max_running, LOGITS_ROWS) * config.vocab_size * 16
    return rows * _row_bytes(config, dtype) + sums + logits + LIBRARY_BYTES


def graph_bytes(config: ModelConfig, *, dtype: str, max_running: int) -> int:
    """What the graphs hold that are recorded at the start: activations and logits, which do not come from the
    workspace, and what the driver keeps. Four graphs for each size: with and without adapters and splits."""
    from slora.graphs import buckets

    rows = min(max_running, MAX_GRAPH_ROWS)
    launches = 4 * len(buckets(rows)) * config.num_layers * GRAPH_LAYER_BYTES
    return MAX_GRAPH_ROWS * _row_bytes(config, dtype) + rows * config.vocab_size * 4 + launches


def spare_bytes(config: ModelConfig, max_running: int) -> int:
    """What must be free on the device for one more graph: that of the largest logits fits, too."""
    return SPARE_BYTES + min(max_running, MAX_GRAPH_ROWS) * config.vocab_size * 4


def _row_bytes(config: ModelConfig, dtype: str) -> int:
    """Activations and deltas of a token row in a layer."""
    c = config
    widths = 4 * c.hidden_size + 2 * (c.q_size + 2 * c.kv_size) + 2 * c.q_size + 5 * c.intermediate_size
    return widths * DTYPE_BYTES[dtype]


class HostTier:
    """Host pages, the second pool: slabs that were allocated elsewhere, each of whole pages."""

    def __init__(self, slabs: Sequence[tuple[int, int] | Tensor], page_bytes: int) -> None:
        """`slabs`: (address, bytes) pairs, whose memory must outlive this object, or uint8 tensors."""
        self.page_bytes = page_bytes
        self.slabs = [self._view(slab) for slab in slabs]
        self.num_pages = sum(len(slab) for slab in self.slabs)

    def page(self, index: int) -> Tensor:
        """uint8 [page_bytes]."""
        for slab in self.slabs:
            if index < len(slab):
                return slab[index]
            index -= len(slab)
        raise IndexError(f"host page beyond the {self.num_pages} of the tier")

    @cached_property
    def addresses(self) -> list[int]:
        """Of every page."""
        return [slab.data_ptr() + i * self.page_bytes for slab in self.slabs for i in range(len(slab))]

    def _view(self, slab: tuple[int, int] | Tensor) -> Tensor:
        if not isinstance(slab, Tensor):
            address, num_bytes = slab
            slab = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
        slab = slab.view(-1)
        return slab[: len(slab) // self.page_bytes * self.page_bytes].view(-1, self.page_bytes)


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    from slora.errors import DeviceError

    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # out of memory, on any device
        raise DeviceError(
            f"cannot allocate a pool of {num_bytes} bytes on {device}: {error}; hint: lower pool_bytes"
        ) from error
