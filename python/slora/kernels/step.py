"""What the ops of a step share on the device: made once from the uploaded plan, at addresses that never change."""

import torch
from torch import Tensor

from slora import graphs
from slora.kernels import nvrtc
from slora.kernels.attention import Attention
from slora.kernels.descriptors import DeviceTables
from slora.kernels.lora import MAX_SEGMENTS, Lora
from slora.kernels.nvrtc import Argument
from slora.kernels.streams import recording_streams
from slora.memory import PagePool
from slora.plan import Counts, DevicePlan

THREADS = 256
MAX_BLOCKS = 512


class Step:
    """The step that runs. `prepare` makes it from the plan; the ops of all layers read it.

    A step may have more rows than its plan: a captured graph runs as many as its bucket. What it does with them is of
    no consequence, and they write nothing to the pool.
    """

    def __init__(
        self,
        pool: PagePool,
        tables: DeviceTables,
        plan: DevicePlan,
        arrived: Tensor,
        frequencies: Tensor,
        scaling: float,
        max_rank: int,
    ) -> None:
        """`arrived`: how far the swap-ins are (`PageCopies.arrived`). `max_rank`: of any linear of an adapter."""
        device = pool.device
        self.pool, self.tables, self.plan = pool, tables, plan
        self.attention = Attention(pool, plan)
        self._arrived, self._frequencies, self._scaling, self._max_rank = arrived, frequencies, scaling, max_rank
        self._max_rows, max_sampled = graphs.bucket(plan.capacity["token_ids"]), plan.capacity["sample_rows"]
        self._ids = torch.zeros(self._max_rows, dtype=torch.int32, device=device)
        self._rotation = torch.zeros((self._max_rows, len(frequencies), 2), dtype=torch.float32, device=device)
        self._sample_index = torch.zeros(max_sampled, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(max_sampled, dtype=torch.int32, device=device)
        """The ids that the last sampling step sampled; plans refer to them."""
        self._lora: Lora | None = None
        _, self.side_stream = recording_streams(device)
        """For what may run beside the main stream's kernels, between two points of a layer."""
        self._kernel = nvrtc.load("step").kernel("step_rows")
        self.num_rows = 0
        self.has_decode = self.has_prefill = self.has_splits = self.has_lora = False
        self.is_graph = self.has_branches = False

    def prepare(
        self,
        num_rows: int,
        *,
        has_decode: bool,
        has_prefill: bool,
        has_lora: bool,
        has_splits: bool = True,
        has_few: bool = True,
        has_large: bool = False,
        is_graph: bool = False,
    ) -> None:
        """Launch what the layers share, for `num_rows` rows with or without decode rows, prefill rows and adapters.

        `has_splits`: decode rows may see more than SPLIT_TOKENS tokens. `has_few`: there may be segments of few rows,
        `has_large`: adapters with a linear of more than UNIT_RANKS ranks. `is_graph`: only kernels that a graph may
        hold are used, whether or not these launches are recorded.
        """
        self.num_rows = num_rows
        self.has_decode, self.has_prefill, self.has_splits = has_decode, has_prefill, has_splits
        self.has_lora, self.is_graph, self.has_branches = has_lora, is_graph, has_lora and is_graph
        half, num_sampled = len(self._frequencies), len(self._sample_index)
        arrays = tuple(self.plan[name] for name in ("counts", "token_ids", "positions", "sample_rows"))
        numbers = (self._scaling, half, num_rows, num_sampled)
        args: tuple[Argument, ...] = (
            *arrays,
            self.sampled,
            self._frequencies,
            *numbers,
            self._ids,
            self._sample_index,
            self._rotation,
        )
        blocks = min(MAX_BLOCKS, -(-max(num_rows * half, num_sampled) // THREADS))
        self._kernel(blocks, THREADS, args)
        self.attention.prepare(is_graph=is_graph)
        if has_lora:
            segments = (self._count("num_segments"), self.plan["seg_indptr"], self.plan["seg_adapter"])
            self.lora.prepare(
                *segments,
                num_rows=num_rows,
                has_prefill=has_prefill,
                has_few=has_few,
                has_large=has_large,
                leaves_expand=not is_graph,
            )

    @property
    def lora(self) -> Lora:
        """Made when it is first asked for: at the start, where graphs are recorded."""
        if self._lora is None:
            self._lora = Lora(
                self.pool,
                self.tables.modules,
                self.tables.pages,
                max_rows=self._max_rows,
                max_segments=min(self.plan.capacity["seg_adapter"], MAX_SEGMENTS),
                max_rank=self._max_rank,
                swap_ins=(self._arrived, self._count("copies_needed_step")),
            )
        return self._lora

    @property
    def ids(self) -> Tensor:
        """int32 [num_rows]: tokens, references resolved."""
        return self._ids[: self.num_rows]

    @property
    def rotation(self) -> Tensor:
        """fp32 [num_rows, head_dim / 2, (cos, sin)]."""
        return self._rotation

    def _count(self, name: str) -> Tensor:
        """Where the plan has one of its counts."""
        return self.plan["counts"][Counts._fields.index(name) :]

    def sample_index(self, num_sampled: int) -> Tensor:
        """int32 [num_sampled]: which rows are sampled."""
        return self._sample_index[:num_sampled]
