"""Prefill attention by cuDNN, which reads the pool's pages as they are (package nvidia-cudnn-frontend)."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slora.errors import DeviceError
from slora.kernels import nvrtc
from slora.kernels.nvrtc import Argument
from slora.memory import PagePool
from slora.plan import DevicePlan

MIN_QUERY_LEN = 64
"""Plans are built for powers of two of requests and of rows of the longest one, from this on."""


class UnsupportedError(DeviceError):
    """cuDNN has no plan: which head dimensions and windows it takes depends on its version and on the device."""


@cache
def is_available() -> bool:
    try:
        import cudnn  # noqa: F401
    except ImportError:
        return False
    return True


class PrefillAttention:
    """Causal attention of a step's prefill requests over their pages; plans are built per size and kept."""

    def __init__(self, pool: PagePool, plan: DevicePlan) -> None:
        import cudnn

        self.pool, self.plan, self.config = pool, plan, pool.config
        self._cudnn: Any = cudnn
        self._handle = cudnn.create_handle()
        self._graphs: dict[tuple[int, int, int, int | None], Any] = {}
        self._width = 1  # of page tables: it only grows, so that it seldom makes new plans
        self._tables, self._clear = (nvrtc.load("step").kernel(name) for name in ("page_tables", "clear_tails"))
        self._size = (0, 0, 0)
        self._arrays: tuple[Tensor, ...] = ()
        self._workspace = torch.empty(0, dtype=torch.uint8, device=pool.device)

    def warm_up(self, max_tokens: int, num_rows: range) -> None:
        """Build the plans of steps of so many rows whose prompts are of about one length, for sequences of up to
        `max_tokens`. Others are built when they first come, which takes as long as some ten steps.

        Raises UnsupportedError.
        """
        self._widen(max_tokens)
        for requests, query_len in usual_sizes(num_rows, self.plan.capacity["seq_lens"]):
            for window in dict.fromkeys(self.config.windows):
                self._graph(requests, query_len, self._width, window)

    def prepare(self) -> None:
        """Page tables and lengths of the uploaded plan's prefill requests; what lies behind their ends is zeroed.

        Raises UnsupportedError.
        """
        counts, device = self.plan.counts, self.pool.device
        num_requests = _power_of_two(counts.num_requests - counts.num_decode, 1)
        self._widen(counts.max_seq_len)
        width = self._width
        self._size = (num_requests, _power_of_two(counts.max_query_len, MIN_QUERY_LEN), width)
        for window in dict.fromkeys(self.config.windows):
            self._graph(*self._size, window)
        shapes = (num_requests * width, num_requests, num_requests, num_requests + 1)
        self._arrays = tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
        names = ("counts", "query_indptr", "seq_lens", "page_indptr", "page_indices")
        args: tuple[Argument, ...] = (*(self.plan[n] for n in names), width, self.config.q_size, *self._arrays)
        self._tables(num_requests, 128, args)
        row_bytes = self.config.kv_size * self.pool.flat.element_size()
        numbers = (self.pool.page_tokens, self.pool.page_rows, row_bytes)
        arrays = (self.plan[name] for name in ("counts", "seq_lens", "page_indptr", "page_indices"))
        self._clear((num_requests, 2 * self.config.num_layers), 128, (*arrays, *numbers, self.pool.pages))

    def run(self, q: Tensor, out: Tensor, layer: int) -> None:
        """Rows of q and out [rows, heads, head_dim] from the first prefill row on."""
        graph = self._graph(*self._size, self.config.windows[layer])
        first = self.plan.counts.num_decode
        table, query_lens, kv_lens, offsets = (array.data_ptr() for array in self._arrays)
        pool = self.pool
        pointers = (q[first:].data_ptr(), pool.keys[layer].data_ptr(), pool.values[layer].data_ptr())
        values = (*pointers, out[first:].data_ptr(), query_lens, kv_lens, table, table, offsets)
        self._cudnn.set_stream(handle=self._handle, stream=nvrtc.current_stream())
        graph.execute(dict(enumerate(values, 1)), self._workspace.data_ptr(), handle=self._handle)

    def _widen(self, num_tokens: int) -> None:
        self._width = _power_of_two(-(-num_tokens // self.pool.page_tokens), self._width)

    def _graph(self, num_requests: int, query_len: int, width: int, window: int | None) -> Any:
        key = (num_requests, query_len, width, window)
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = self._graphs[key] = self._build(*key)
            except (RuntimeError, self._cudnn.cudnnGraphNotSupportedError) as error:
                raise UnsupportedError(
                    f"cuDNN does not attend {num_requests} prompts of {query_len} rows: {error}; hint: a newer "
                    "cuDNN may, and without nvidia-cudnn-frontend a kernel of our own does"
                ) from error
            size = graph.get_workspace_size()
            if size > self._workspace.numel():
                self._workspace = torch.empty(size, dtype=torch.uint8, device=self.pool.device)
        return graph

    def _build(self, num_requests: int, query_len: int, width: int, window: int | None) -> Any:
        """Tensors have the uids 1 to 9: q, k, v, out, query lengths, KV lengths, page table twice, row offsets."""
        cudnn, c, pool = self._cudnn, self.config, self.pool
        kind = cudnn.data_type.BFLOAT16 if pool.flat.dtype == torch.bfloat16 else cudnn.data_type.HALF
        graph = cudnn.pygraph(
            io_data_type=kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )

        def tensor(uid: int, dim: tuple[int, ...], stride: tuple[int, ...], data_type: Any = kind) -> Any:
            made = graph.tensor(dim=dim, stride=stride, data_type=data_type)
            made.set_uid(uid)
            return made

        def integers(uid: int, *dim: int) -> Any:
            return tensor(uid, dim, (dim[2], dim[2], 1, 1), cudnn.data_type.INT32)

        q_dim = (num_requests, c.num_heads, query_len, c.head_dim)
        q_stride = (query_len * c.q_size, c.head_dim, c.q_size, 1)
        kv_dim = (pool.num_pages, c.num_kv_heads, pool.page_tokens, c.head_dim)
        kv_stride = (pool.page_rows * c.kv_size, c.head_dim, c.kv_size, 1)
        offsets = integers(9, num_requests + 1, 1, 1, 1)
        q = tensor(1, q_dim, q_stride)
        q.set_ragged_offset(offsets)
        band = {} if window is None else {"diagonal_band_left_bound": window}
        out, _ = graph.sdpa(
            name="prefill",
            q=q,
            k=tensor(2, kv_dim, kv_stride),
            v=tensor(3, kv_dim, kv_stride),
            is_inference=True,
            attn_scale=c.head_dim**-0.5,
            use_padding_mask=True,
            seq_len_q=integers(5, num_requests, 1, 1, 1),
            seq_len_kv=integers(6, num_requests, 1, 1, 1),
            diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
            diagonal_band_right_bound=0,
            paged_attention_k_table=integers(7, num_requests, 1, width, 1),
            paged_attention_v_table=integers(8, num_requests, 1, width, 1),
            paged_attention_max_seq_len_kv=width * pool.page_tokens,
            **band,
        )
        out.set_output(True).set_dim(q_dim).set_stride(q_stride).set_data_type(kind)
        out.set_uid(4)
        out.set_ragged_offset(offsets)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph


def usual_sizes(num_rows: range, max_requests: int) -> Iterator[tuple[int, int]]:
    """(requests, rows of each) as plans are built for them: of steps of so many rows, prompts of about one length, and
    perhaps some decode rows."""
    query_len, most = MIN_QUERY_LEN, num_rows[-1]
    while query_len < 2 * most:
        # Either is less than twice what is there, but for short prompts.
        most_requests = 4 * most // query_len if query_len > MIN_QUERY_LEN else most
        requests = 1
        while requests < min(2 * max_requests, most_requests):
            if 2 * requests * query_len > num_rows.start:
                yield requests, query_len
            requests *= 2
        query_len *= 2


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
