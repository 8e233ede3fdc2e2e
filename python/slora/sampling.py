"""From logits to tokens: penalties, bias, the choice itself, and log-probabilities.

Order: repetition, presence and frequency penalties → bias → temperature → top-k → top-p → min-p. The repetition penalty
counts prompt and output, as in transformers; presence and frequency count the output only, as in the OpenAI API.
Log-probabilities are the raw model's, before all of this. Of equal tokens the lowest id comes first, everywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slora.kernels.reference import best, sample
from slora.plan import HAS_PENALTIES, HAS_RANDOM, StepPlan


class LogProbs(NamedTuple):
    """Log-probabilities of some rows."""

    chosen: Tensor  # [rows]
    best_ids: Tensor | None  # int64 [rows, k]; None if k = 0
    best: Tensor | None  # [rows, k]


def log_probs(logits: Tensor, chosen: Tensor, k: int) -> LogProbs:
    """Of the `chosen` tokens [rows] and of the k best, for raw logits [rows, vocab] fp32."""
    norm = logits.logsumexp(-1, keepdim=True)
    chosen_values = (logits.gather(1, chosen[:, None]) - norm)[:, 0]
    if k <= 0:
        return LogProbs(chosen_values, None, None)
    values, ids = best(logits, k)
    return LogProbs(chosen_values, ids, values - norm)


class PenaltyState:
    """How often each running request has seen each token: one state row per request, allocated on first use."""

    def __init__(self, max_running: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (max_running, vocab_size), device
        self._output_counts: Tensor | None = None  # int32 [max_running, vocab]
        self._in_prompt: Tensor | None = None  # bool [max_running, vocab]

    def reset(self, plan: StepPlan) -> None:
        """State rows that start with this step: count what their requests hold so far."""
        if not plan.counts.num_resets:
            return
        output_counts, in_prompt = self._tables()
        indptr, tokens = plan.array("reset_indptr").tolist(), plan["reset_tokens"].long()
        rows, prompt_lens = plan.array("reset_rows").tolist(), plan.array("reset_prompt_lens").tolist()
        for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True)):
            prompt, output = tokens[indptr[i] : indptr[i + 1]].tensor_split([prompt_len])
            in_prompt[row].zero_().index_fill_(0, prompt.to(self._device), True)
            counts = torch.bincount(output, minlength=self._shape[1])
            output_counts[row].copy_(counts)

    def apply(self, logits: Tensor, plan: StepPlan) -> None:
        """Change the logits [num_sampled, vocab] in place."""
        counts, in_prompt = self._rows(plan)
        repetition, presence, frequency = (
            plan[name].to(self._device)[:, None] for name in ("repetition", "presence", "frequency")
        )
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        torch.where(in_prompt | (counts > 0), repeated, logits, out=logits)
        logits -= presence * (counts > 0) + frequency * counts

    def update(self, ids: Tensor, plan: StepPlan) -> None:
        """Count the sampled ids [num_sampled]; -1 is none."""
        output_counts, _ = self._tables()
        rows = plan["state_rows"].long().to(self._device)
        output_counts.index_put_((rows, ids.clamp(min=0)), (ids >= 0).int(), accumulate=True)

    def _rows(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        output_counts, in_prompt = self._tables()
        rows = plan["state_rows"].to(self._device)
        return output_counts.index_select(0, rows), in_prompt.index_select(0, rows)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._output_counts is None or self._in_prompt is None:
            self._output_counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        return self._output_counts, self._in_prompt


class Sampler:
    """Chooses one token per sampled row of a plan."""

    def __init__(self, max_running: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._penalties = PenaltyState(max_running, vocab_size, device)

    def reset(self, plan: StepPlan) -> None:
        """Take over the state rows that start; due in every step, sampled or not."""
        self._penalties.reset(plan)

    def sample(self, raw: Tensor, plan: StepPlan) -> Tensor:
        """Token ids int64 [num_sampled] for the raw logits [num_sampled, vocab], which are left as they are.

        A row whose logits are not finite, or whose bias forbids every token, gets -1; other rows do not notice.
        """
        is_finite = raw.sum(-1).isfinite()
        has_penalties = bool(plan.counts.flags & HAS_PENALTIES)
        logits = raw.clone() if has_penalties or plan.counts.num_bias else raw
        if has_penalties:
            self._penalties.apply(logits, plan)
        if plan.counts.num_bias:
            self._add_bias(logits, plan)
            is_finite &= logits.amax(-1) > -torch.inf
        ids = logits.argmax(-1)
        if plan.counts.flags & HAS_RANDOM:
            self._sample_random(logits, ids, is_finite, plan)
        ids.masked_fill_(~is_finite, -1)
        if has_penalties:
            self._penalties.update(ids, plan)
        return ids

    def _add_bias(self, logits: Tensor, plan: StepPlan) -> None:
        lens = plan["bias_indptr"].diff()
        rows = torch.repeat_interleave(torch.arange(len(lens)), lens).to(self._device)
        ids = plan["bias_ids"].long().to(self._device)
        logits.index_put_((rows, ids), plan["bias_values"].to(self._device), accumulate=True)

    def _sample_random(self, logits: Tensor, ids: Tensor, is_finite: Tensor, plan: StepPlan) -> None:
        """Replace the greedy ids of rows with a temperature."""
        rows = torch.nonzero((plan["temperature"].to(self._device) > 0) & is_finite)[:, 0]
        if len(rows):
            names = ("temperature", "top_k", "top_p", "min_p", "uniform")
            ids[rows] = sample(logits[rows], *(plan[name].to(self._device)[rows] for name in names))
