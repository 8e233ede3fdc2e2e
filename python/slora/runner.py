"""Runs one StepPlan: descriptors, swap-ins, the model, sampling, log-probabilities."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from slora.kernels import backend, reference
from slora.kernels.adapters import AdapterTables
from slora.memory import LOGITS_ROWS, HostTier, PagePool
from slora.models.config import ModelConfig
from slora.models.decoder import Decoder
from slora.models.rope import inverse_frequencies
from slora.plan import PlanLayout, StepPlan
from slora.sampling import LogProbs, Sampler, log_probs
from slora.weights import Weights

if TYPE_CHECKING:
    from slora.cuda_runner import CudaRunner

AnyRunner: TypeAlias = "Runner | CudaRunner"

PROMPT_LOGPROB_ROWS = LOGITS_ROWS
"""Prompt log-probabilities are computed for this many rows at a time, which bounds the logits in memory."""


@dataclass
class StepOutput:
    """What a step brought; None: not asked for. Arrays are int32 and float32, in the order of the plan's arrays."""

    ids: np.ndarray
    """[num_sampled]; -1: the row's logits were not finite, or every token was forbidden."""
    chosen_logprobs: np.ndarray | None = None
    best_ids: np.ndarray | None = None
    best_logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    prompt_best_ids: np.ndarray | None = None
    prompt_best_logprobs: np.ndarray | None = None


class Pending(Protocol):
    """A launched step."""

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> StepOutput:
        """Wait for the step's end."""


@dataclass
class Done:
    """A step that ended with its launch."""

    output: StepOutput
    is_done: bool = True

    def result(self) -> StepOutput:
        return self.output


class Runner:
    """The executor of one device: everything that a plan's numbers refer to.

    This one runs each step to its end; `CudaRunner` has the same methods, and launches without waiting.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        pool: PagePool,
        *,
        max_running: int,
        max_adapters: int,
        max_adapter_pages: int,
        host: HostTier | None = None,
    ) -> None:
        self.pool, self.host = pool, host
        self._tables = AdapterTables(pool, max_adapters, max_adapter_pages)
        self._decoder = Decoder(config, weights, backend(pool.device.type))
        self._sampler = Sampler(max_running, config.vocab_size, pool.device)
        frequencies, self._rope_scaling = inverse_frequencies(config)
        self._frequencies = frequencies.to(pool.device)
        self._copied: list[int] = []
        self._sampled = torch.empty(0, dtype=torch.int64, device=pool.device)  # the previous step's ids

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Run a refreshed plan to its end."""
        reference.update_descriptors(self._tables, plan)
        reference.copy_pages(self.pool, self.host, plan)
        self._sampler.reset(plan)
        if not plan.counts.num_rows:
            return StepOutput(np.empty(0, np.int32))
        batch = reference.prepare(plan, self.pool, self._tables, self._frequencies, self._rope_scaling)
        hidden = self._decoder.forward(self._token_ids(plan), batch)
        output = StepOutput(np.empty(0, np.int32))
        if plan.counts.num_sampled:
            self._sample(hidden, plan, output)
        if plan.counts.num_prompt_logprobs:
            self._score_prompts(hidden, plan, output)
        return output

    def launch(self, plan: StepPlan) -> Pending:
        """Start a refreshed plan."""
        output = self.run(plan)
        if plan.counts.num_copies:
            self._copied.append(plan.counts.step)
        return Done(output)

    def warm_up(self, max_tokens: int) -> None:
        """Do before the first step what would otherwise hold it up: nothing, here."""

    def copies_done(self) -> list[int]:
        """Steps whose swap-ins have arrived since the last call."""
        copied, self._copied = self._copied, []
        return copied

    def close(self) -> None:
        """Let go of everything that refers to the pool, and free it."""
        del self._tables, self._decoder, self._sampler
        self.host = None
        self.pool.close()

    def _token_ids(self, plan: StepPlan) -> Tensor:
        """int32 [num_rows]: -1 - i stands for row i of the previous step's sampled ids."""
        ids = plan["token_ids"].to(self.pool.device)
        if plan.array("token_ids").min() >= 0:
            return ids
        # A row whose sampling failed has no token (-1): its request has ended, and what the row computes is discarded.
        previous = self._sampled.clamp(min=0).int()
        return torch.where(ids < 0, previous[(-1 - ids).clamp(min=0)], ids)

    def _sample(self, hidden: Tensor, plan: StepPlan, output: StepOutput) -> None:
        logits = self._decoder.logits(hidden, plan["sample_rows"].to(self.pool.device))
        self._sampled = self._sampler.sample(logits, plan)
        output.ids = _int32(self._sampled)
        if plan.counts.max_logprobs >= 0:
            found = log_probs(logits, self._sampled.clamp(min=0), plan.counts.max_logprobs)
            output.chosen_logprobs = found.chosen.cpu().numpy()
            if found.best_ids is not None and found.best is not None:
                output.best_ids, output.best_logprobs = _int32(found.best_ids), found.best.cpu().numpy()

    def _score_prompts(self, hidden: Tensor, plan: StepPlan, output: StepOutput) -> None:
        rows, targets = (plan[name].to(self.pool.device) for name in ("prompt_rows", "prompt_targets"))
        chunks: list[LogProbs] = []
        for start in range(0, len(rows), PROMPT_LOGPROB_ROWS):
            some = slice(start, start + PROMPT_LOGPROB_ROWS)
            logits = self._decoder.logits(hidden, rows[some])
            chunks.append(log_probs(logits, targets[some].long(), plan.counts.max_prompt_logprobs))
        output.prompt_logprobs = torch.cat([chunk.chosen for chunk in chunks]).cpu().numpy()
        best_ids = [chunk.best_ids for chunk in chunks if chunk.best_ids is not None]
        best = [chunk.best for chunk in chunks if chunk.best is not None]
        if best:
            output.prompt_best_ids = _int32(torch.cat(best_ids))
            output.prompt_best_logprobs = torch.cat(best).cpu().numpy()


def create_runner(
    config: ModelConfig,
    weights: Weights,
    pool: PagePool,
    *,
    layout: PlanLayout,
    max_running: int,
    max_adapters: int,
    max_adapter_pages: int,
    max_rank: int | None,
    host: HostTier | None = None,
) -> "AnyRunner":
    """The executor for the pool's device. `layout` is that of its plans, `max_rank` the adapters'; None: any, not on
    CUDA."""
    if pool.device.type == "cuda":
        assert max_rank is not None
        from slora.cuda_runner import CudaRunner

        return CudaRunner(
            config,
            weights,
            pool,
            layout=layout,
            max_running=max_running,
            max_adapters=max_adapters,
            max_adapter_pages=max_adapter_pages,
            max_rank=max_rank,
            host=host,
        )
    return Runner(
        config,
        weights,
        pool,
        max_running=max_running,
        max_adapters=max_adapters,
        max_adapter_pages=max_adapter_pages,
        host=host,
    )


def _int32(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.to(device="cpu", dtype=torch.int32).numpy()
    return array
