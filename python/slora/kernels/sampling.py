"""From logits to tokens on the device, without waiting for it; the order of things is that of `slora.sampling`."""

import torch
from torch import Tensor

from slora.kernels import cuda, nvrtc
from slora.kernels.nvrtc import Argument
from slora.kernels.step import Step
from slora.plan import HAS_PENALTIES, DevicePlan

THREADS = 1024


class DeviceSampler:
    """Chooses one token per sampled row, and keeps the penalty counts of running requests."""

    def __init__(self, step: Step, max_running: int, vocab_size: int) -> None:
        self._step, self._plan = step, step.plan
        self._shape, self._device = (max_running, vocab_size), step.pool.device
        module = nvrtc.load("penalties")
        self._reset, self._penalise, self._count = (
            module.kernel(name) for name in ("reset_counts", "penalise", "count_sampled")
        )
        self._counts: tuple[Tensor, Tensor] | None = None  # output counts, in prompt: allocated on first use

    def reset(self, plan: DevicePlan) -> None:
        """Take over the state rows that start; due in every step, sampled or not."""
        if plan.counts.num_resets:
            names = ("reset_rows", "reset_prompt_lens", "reset_indptr", "reset_tokens")
            args: tuple[Argument, ...] = (*(plan[name] for name in names), self._shape[1], *self._tables())
            self._reset(plan.counts.num_resets, THREADS, args)

    @property
    def is_plain(self) -> bool:
        """Whether the plan's rows need neither penalties nor bias: then `choose` may be recorded."""
        return not (self._plan.counts.num_bias or self._plan.counts.flags & HAS_PENALTIES)

    def choose(self, raw: Tensor) -> None:
        """Leave the ids of the raw logits [rows, vocab] in `step.sampled`."""
        cuda.sample_rows(raw, raw, self._step, self._step.sampled)

    def choose_with_penalties(self, raw: Tensor) -> None:
        """`raw` has exactly the plan's rows, and is left as it is."""
        counts = self._plan.counts
        has_penalties = int(bool(counts.flags & HAS_PENALTIES))
        logits = torch.empty_like(raw)
        names = ("state_rows", "repetition", "presence", "frequency", "bias_indptr", "bias_ids", "bias_values")
        tables = self._tables() if has_penalties else (None, None)
        numbers = (has_penalties, int(counts.num_bias > 0), self._shape[1])
        self._penalise(len(raw), THREADS, (raw, *(self._plan[name] for name in names), *tables, *numbers, logits))
        cuda.sample_rows(raw, logits, self._step, self._step.sampled)
        if has_penalties:
            args = (self._step.sampled, self._plan["state_rows"], len(raw), self._shape[1], self._tables()[0])
            self._count(-(-len(raw) // THREADS), THREADS, args)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None:
            self._counts = (
                torch.zeros(self._shape, dtype=torch.int32, device=self._device),
                torch.zeros(self._shape, dtype=torch.uint8, device=self._device),
            )
        return self._counts
