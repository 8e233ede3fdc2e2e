"""Runs StepPlans on a CUDA device, without waiting for it: a step is launched while the one before still runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slora import graphs
from slora.errors import DeviceError
from slora.graphs import Graphs
from slora.kernels import backend
from slora.kernels.attention import SPLIT_TOKENS
from slora.kernels.descriptors import DeviceTables
from slora.kernels.lora import MANY_ROWS
from slora.kernels.page_copy import PageCopies
from slora.kernels.sampling import DeviceSampler
from slora.kernels.step import Step
from slora.kernels.upload import Staging
from slora.memory import HostTier, PagePool, spare_bytes
from slora.models.config import ModelConfig
from slora.models.decoder import Decoder
from slora.models.rope import inverse_frequencies
from slora.plan import HAS_LORA, Counts, DevicePlan, PlanLayout, StepPlan
from slora.runner import PROMPT_LOGPROB_ROWS, StepOutput
from slora.sampling import LogProbs, log_probs
from slora.weights import Weights

RING = 3
"""Buffers for what comes back: one is used again only after its step's result was taken."""
KEPT_STEPS = 8
"""Steps whose end can still be waited for by a copy; older ones have ended."""


class StepShape(NamedTuple):
    """What a step's launches depend on."""

    num_rows: int
    has_decode: bool
    has_prefill: bool
    has_lora: bool
    has_splits: bool
    """Of decode rows. As the plan's longest sequence decides, there may be none."""
    has_large: bool
    """Adapters have linears of more ranks than clusters have room for."""

    @classmethod
    def of(cls, counts: Counts, has_large: bool = False) -> "StepShape":
        has_decode, has_prefill = counts.num_decode > 0, counts.num_requests > counts.num_decode
        has_splits = has_decode and counts.max_seq_len > SPLIT_TOKENS
        return cls(counts.num_rows, has_decode, has_prefill, bool(counts.flags & HAS_LORA), has_splits, has_large)

    @property
    def is_recordable(self) -> bool:
        return self.num_rows <= graphs.MAX_ROWS


class CudaPending:
    """A launched step. `result` waits for it; it must be called before the step after the next is launched."""

    def __init__(self, done: torch.cuda.Event, arrays: dict[str, Tensor]) -> None:
        self._done, self._arrays = done, arrays

    @property
    def is_done(self) -> bool:
        return bool(self._done.query())

    def result(self) -> StepOutput:
        try:
            self._done.synchronize()
        except RuntimeError as error:  # an illegal access, a lost device
            raise DeviceError(f"a step failed on the device: {error}") from error
        output = StepOutput(np.empty(0, np.int32))
        for name, array in self._arrays.items():
            setattr(output, name, array.numpy().copy())
        return output


class CudaRunner:
    """The executor of one CUDA device: everything that a plan's numbers refer to.

    All calls come from one thread. Steps run in the order of their launches, on the stream that is current then.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pool: PagePool,
        *,
        layout: PlanLayout,
        max_running: int,
        max_adapters: int,
        max_adapter_pages: int,
        max_rank: int,
        host: HostTier | None = None,
    ) -> None:
        device = pool.device
        torch.set_float32_matmul_precision("highest")  # fp32 means fp32
        self.pool, self.host = pool, host
        self._tables = DeviceTables(pool, max_adapters, max_adapter_pages)
        self._plan = DevicePlan(layout, self._tables.modules[0].numel(), device)
        self._staging = Staging(self._plan.num_words, device)
        frequencies, scaling = inverse_frequencies(config)
        self._copies = PageCopies(pool, host)
        rotary = (frequencies.to(device), scaling)
        self._step = Step(pool, self._tables, self._plan, self._copies.arrived, *rotary, max_rank)
        self._decoder = Decoder(config, weights, backend("cuda"))
        self._sampler = DeviceSampler(self._step, max_running, config.vocab_size)
        self._graphs = Graphs(device, spare_bytes(config, max_running))
        rows = max(graphs.MAX_ROWS, self._plan.capacity["sample_rows"])
        self._hidden = torch.zeros((rows, config.hidden_size), dtype=pool.flat.dtype, device=device)
        size = self._plan.capacity["sample_rows"]
        self._returned = [torch.empty(size, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._returning = torch.cuda.Stream(device)
        self._num_launched = 0
        self._ends: dict[int, torch.cuda.Event] = {}

    def run(self, plan: StepPlan) -> StepOutput:
        """Run a refreshed plan to its end."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> CudaPending:
        """Enqueue a refreshed plan, whose buffer may be written again once its result was taken."""
        with _device_errors("a step failed on the device"):
            return self._launch(plan)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> CudaPending:
        counts, arrays = plan.counts, dict[str, Tensor]()
        self._copies.issue(plan, self._ends.get(counts.copies_wait_step))
        self._copies.wait(counts.copies_needed_step)
        self._plan.upload(plan, self._staging.copy)
        self._tables.update(plan, self._plan)
        self._sampler.reset(self._plan)
        if counts.num_rows:
            hidden = self._forward(StepShape.of(counts, self._tables.has_large(plan)), plan)
            if counts.num_sampled:
                torch.cuda.current_stream().wait_stream(self._returning)  # which has the last step's ids
                self._sample(hidden, arrays)
            if counts.num_prompt_logprobs:
                self._score_prompts(hidden, arrays)
        done = self._return_ids(counts.num_sampled, arrays)
        self._num_launched += 1
        self._ends[counts.step] = done
        while len(self._ends) > KEPT_STEPS:
            del self._ends[next(iter(self._ends))]
        return CudaPending(done, arrays)

    def warm_up(self, max_tokens: int) -> None:
        """For sequences of up to `max_tokens`: record the graphs of decode steps, and build what large ones need. Other
        shapes are recorded once they have come a few times."""
        hint = "; hint: where memory is short, a smaller pool, max_batch_tokens or max_rank"
        with _device_errors("the first steps failed on the device", hint):
            self._step.attention.warm_up(max_tokens, range(graphs.MAX_ROWS + 1, self._plan.capacity["token_ids"] + 1))
            most_rows = min(graphs.MAX_ROWS, self._plan.capacity["sample_rows"])
            self.record_graphs(with_splits=max_tokens > SPLIT_TOKENS, most_rows=most_rows)

    def copies_done(self) -> list[int]:
        """Steps whose swap-ins have arrived since the last call."""
        return self._copies.done()

    @torch.inference_mode()
    def record_graphs(
        self,
        *,
        with_lora: bool = True,
        with_splits: bool = True,
        most_rows: int = graphs.MAX_ROWS,
        show: bool | None = None,
    ) -> None:
        """Record decode steps of all sizes, without adapters and splits and with. No step may be in flight."""
        self._plan.clear()
        with_splits = with_splits and self._step.attention.is_tensor_core
        sizes, kinds = [*reversed(graphs.buckets(most_rows))], product({False, with_lora}, {False, with_splits})
        shapes = [StepShape(n, True, False, *kind, has_large=False) for kind in kinds for n in sizes]
        for shape in graphs.progress(shapes, len(shapes), show):
            assert isinstance(shape, StepShape)
            self._graphs.record(shape, self._forward_body(shape))
        for n in sizes:
            if n <= self._plan.capacity["sample_rows"]:
                self._graphs.record(n, self._sample_body(n))
        torch.cuda.synchronize()

    def close(self) -> None:
        """Wait for what runs, let go of everything that refers to the pool, and free it."""
        torch.cuda.synchronize()
        self._copies.close()
        self._graphs.close()
        del self._tables, self._plan, self._staging, self._step, self._decoder, self._sampler
        del self._hidden, self._returned
        self.host = None
        self.pool.close()
        torch.cuda.empty_cache()

    def _forward(self, shape: StepShape, plan: StepPlan) -> Tensor:
        """The normed hidden state [rows, hidden]; valid until the next step."""
        if not shape.is_recordable:
            has_few = shape.has_lora and bool(np.any(np.diff(plan.array("seg_indptr")) <= MANY_ROWS))
            self._step.prepare(**shape._asdict(), has_few=has_few)
            return self._decoder.forward(self._step.ids, self._step)
        has_splits = shape.has_splits and self._step.attention.is_tensor_core  # the simple kernel makes none
        # Elsewhere the same kernels are launched, whatever the ranks.
        has_large = shape.has_large and not shape.has_prefill and self._step.lora.has_clusters
        shape = shape._replace(num_rows=graphs.bucket(shape.num_rows), has_splits=has_splits, has_large=has_large)
        self._graphs.run(shape, self._forward_body(shape))
        return self._hidden

    def _forward_body(self, shape: StepShape) -> Callable[[], object]:
        def body() -> None:
            self._step.prepare(**shape._asdict(), is_graph=True)
            self._hidden[: shape.num_rows].copy_(self._decoder.forward(self._step.ids, self._step))

        return body

    def _sample_body(self, num_sampled: int) -> Callable[[], object]:
        def body() -> None:
            self._sampler.choose(self._decoder.logits(self._hidden, self._step.sample_index(num_sampled)))

        return body

    def _sample(self, hidden: Tensor, arrays: dict[str, Tensor]) -> None:
        counts, n = self._plan.counts, self._plan.counts.num_sampled
        has_logprobs = counts.max_logprobs >= 0
        size = min(graphs.bucket(n), self._plan.capacity["sample_rows"])
        if hidden is self._hidden and self._sampler.is_plain and not has_logprobs and n <= graphs.MAX_ROWS:
            self._graphs.run(size, self._sample_body(size))
        else:
            raw = self._decoder.logits(hidden, self._step.sample_index(n))
            if self._sampler.is_plain:
                self._sampler.choose(raw)
            else:
                self._sampler.choose_with_penalties(raw)
            if has_logprobs:
                chosen = self._step.sampled[:n].clamp(min=0).long()
                _return(arrays, log_probs(raw, chosen, counts.max_logprobs), "")

    def _return_ids(self, num_sampled: int, arrays: dict[str, Tensor]) -> torch.cuda.Event:
        """Copy them to the host beside the next step. The event: all that was launched has ended."""
        self._returning.wait_stream(torch.cuda.current_stream())
        if num_sampled:
            ids = self._returned[self._num_launched % RING][:num_sampled]
            with torch.cuda.stream(self._returning):
                arrays["ids"] = ids.copy_(self._step.sampled[:num_sampled], non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._returning)
        return done

    def _score_prompts(self, hidden: Tensor, arrays: dict[str, Tensor]) -> None:
        counts = self._plan.counts
        rows, targets = (self._plan[name][: counts.num_prompt_logprobs] for name in ("prompt_rows", "prompt_targets"))
        chunks: list[LogProbs] = []
        for start in range(0, len(rows), PROMPT_LOGPROB_ROWS):
            some = slice(start, start + PROMPT_LOGPROB_ROWS)
            logits = self._decoder.logits(hidden, rows[some])
            chunks.append(log_probs(logits, targets[some].long(), counts.max_prompt_logprobs))
        best_ids = [chunk.best_ids for chunk in chunks if chunk.best_ids is not None]
        best = [chunk.best for chunk in chunks if chunk.best is not None]
        found = LogProbs(
            torch.cat([chunk.chosen for chunk in chunks]),
            torch.cat(best_ids) if best_ids else None,
            torch.cat(best) if best else None,
        )
        _return(arrays, found, "prompt_")


@contextmanager
def _device_errors(what: str, hint: str = "") -> Iterator[None]:
    """Out of memory, or what an earlier step did and a later call reports."""
    try:
        yield
    except DeviceError:
        raise
    except RuntimeError as error:
        raise DeviceError(f"{what}: {error}{hint}") from error


def _return(arrays: dict[str, Tensor], found: LogProbs, prefix: str) -> None:
    """Start the copies of log-probabilities to the host."""
    names = {"": ("chosen_logprobs", "best_ids", "best_logprobs")}.get(
        prefix, ("prompt_logprobs", "prompt_best_ids", "prompt_best_logprobs")
    )
    for name, values in zip(names, found, strict=True):
        if values is not None:
            kind = torch.int32 if values.dtype == torch.int64 else values.dtype
            target = torch.empty(values.shape, dtype=kind, pin_memory=True)
            arrays[name] = target.copy_(values.to(kind), non_blocking=True)
