"""A StepPlan as the executor sees it: named views on the one buffer that Rust fills.

What each array means is stated in docs/architecture.md. The same buffer is filled again for every step of its turn, so
views are cut to their length when they are first asked for: an array that a step does not use costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PlanLayout = Sequence[tuple[str, int, int, bool]]
"""(name, offset in words, capacity in words, whether the words are f32) of every array."""

HAS_LORA, HAS_RANDOM, HAS_PENALTIES = 1, 2, 4


class Counts(NamedTuple):
    """The plan's scalars, in the order in which they lie in `counts`."""

    step: int
    num_rows: int
    num_decode: int
    num_requests: int
    num_segments: int
    num_sampled: int
    num_prompt_logprobs: int
    num_page_indices: int
    num_bias: int
    num_resets: int
    num_reset_tokens: int
    num_copies: int
    num_changed: int
    num_changed_pages: int
    max_query_len: int
    max_seq_len: int
    max_logprobs: int
    max_prompt_logprobs: int
    copies_wait_step: int
    flags: int
    copies_needed_step: int


_ARRAYS_BY_COUNT = {
    "num_rows": "token_ids positions slots",
    "num_requests": "query_indptr+ seq_lens page_indptr+",
    "num_page_indices": "page_indices",
    "num_segments": "seg_indptr+ seg_adapter",
    "num_sampled": "sample_rows state_rows temperature top_p min_p presence frequency repetition uniform top_k "
    "num_logprobs bias_indptr+",
    "num_bias": "bias_ids bias_values",
    "num_resets": "reset_rows reset_prompt_lens reset_indptr+",
    "num_reset_tokens": "reset_tokens",
    "num_prompt_logprobs": "prompt_rows prompt_targets prompt_num_logprobs",
    "num_copies": "copy_host_pages copy_pages copy_layers",
    "num_changed": "changed_rows changed_pages_indptr+",
    "num_changed_pages": "changed_pages",
}
_HOST_ONLY = ("copy_host_pages", "copy_pages", "copy_layers")
UPLOAD_GAP_WORDS = 16384
"""Ranges of a plan that lie closer than this are uploaded in one copy: a copy costs as much as this many words."""
# name -> (index of its count, entries beyond the count)
_LENGTHS = {
    name.rstrip("+"): (Counts._fields.index(count), int(name.endswith("+")))
    for count, names in _ARRAYS_BY_COUNT.items()
    for name in names.split()
}


class StepPlan:
    """Views on a plan's buffer; call `refresh` after it was filled.

    `plan[name]` is a torch view, `plan.array(name)` the same as numpy, cheaper for arithmetic on a few numbers.
    `changed_modules` is as long as its capacity: its length follows from the model (`num_changed` descriptors).
    """

    def __init__(self, buffer: Tensor, layout: PlanLayout) -> None:
        assert buffer.dtype == torch.int32, "a plan lies in an int32 buffer"
        self.buffer = buffer
        self.counts = Counts(*[0] * len(Counts._fields))
        self._tensors: dict[str, Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._trimmed: dict[str, Tensor] = {}
        for name, offset, capacity, is_float in layout:
            view = buffer[offset : offset + capacity]
            self._tensors[name] = view.view(torch.float32) if is_float else view
            self._arrays[name] = self._tensors[name].numpy()

    def refresh(self) -> Counts:
        """Read the counts of the plan that now lies in the buffer."""
        self._trimmed.clear()
        self.counts = Counts(*self._arrays["counts"][: len(Counts._fields)].tolist())
        return self.counts

    def __getitem__(self, name: str) -> Tensor:
        view = self._trimmed.get(name)
        if view is None:
            view = self._trimmed[name] = self._tensors[name][: self._length(name)]
        return view

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name][: self._length(name)]

    def _length(self, name: str) -> int | None:
        if name not in _LENGTHS:
            return None
        count, extra = _LENGTHS[name]
        return self.counts[count] + extra


class DevicePlan:
    """A plan's mirror on the device, at a fixed address: what kernels read, also inside a captured graph.

    `plan[name]` is the whole array, as long as its capacity; kernels find its length in `counts`.
    """

    def __init__(self, layout: PlanLayout, descriptor_words: int, device: torch.device) -> None:
        self.layout, self.descriptor_words = layout, descriptor_words
        self.capacity = {name: capacity for name, _, capacity, _ in layout}
        self.num_words = max(offset + capacity for _, offset, capacity, _ in layout)
        self._buffer = torch.zeros(self.num_words, dtype=torch.int32, device=device)
        self._arrays = {
            name: view.view(torch.float32) if is_float else view
            for name, offset, capacity, is_float in layout
            for view in (self._buffer[offset : offset + capacity],)
        }
        self.counts = Counts(*[0] * len(Counts._fields))

    def __getitem__(self, name: str) -> Tensor:
        return self._arrays[name]

    def upload(self, plan: StepPlan, copy: Callable[[Tensor, Tensor], object]) -> None:
        """Copy what the plan uses of its buffer; `copy` takes target and source."""
        self.counts = plan.counts
        for start, end in self._used(plan.counts):
            copy(self._buffer[start:end], plan.buffer[start:end])

    def clear(self) -> None:
        """An empty plan: kernels that run on it write nothing to the pool."""
        self._buffer.zero_()
        self.counts = Counts(*[0] * len(Counts._fields))

    def _used(self, counts: Counts) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        for name, offset, capacity, _ in self.layout:
            if name in _HOST_ONLY:
                continue
            length = capacity
            if name in _LENGTHS:
                count, extra = _LENGTHS[name]
                if not counts[count]:
                    continue
                length = counts[count] + extra
            elif name == "changed_modules":
                if not counts.num_changed:
                    continue
                length = counts.num_changed * self.descriptor_words
            if ranges and offset - ranges[-1][1] < UPLOAD_GAP_WORDS:
                ranges[-1] = (ranges[-1][0], offset + length)
            else:
                ranges.append((offset, offset + length))
        return ranges
