"""Plans written by hand over a pool, for benches of what runs below the engine."""

import random

import numpy as np
import torch

from slora.memory import PagePool
from slora.plan import Counts, StepPlan

ROWS, REQUESTS = 8192, 512


def make_layout(num_pages: int) -> list[tuple[str, int, int, bool]]:
    rows = {"token_ids", "positions", "slots"}
    names = "counts token_ids positions slots query_indptr seq_lens page_indptr seg_indptr seg_adapter sample_rows"
    names += " state_rows temperature top_p min_p presence frequency repetition uniform top_k num_logprobs bias_indptr"
    names += " bias_ids bias_values page_indices"
    floats = {"temperature", "top_p", "min_p", "presence", "frequency", "repetition", "uniform", "bias_values"}
    layout, offset = [], 0
    for name in names.split():
        capacity = 32 if name == "counts" else ROWS if name in rows else REQUESTS + 4
        capacity = num_pages if name == "page_indices" else capacity
        layout.append((name, offset, capacity, name in floats))
        offset += capacity
    return layout


class Planner:
    """Plans over a pool, pages handed out at random."""

    def __init__(self, pool: PagePool, layout: list[tuple[str, int, int, bool]]) -> None:
        self.pool, self.layout = pool, layout
        self.offsets = {name: (offset, is_float) for name, offset, _, is_float in layout}
        size = sum(capacity for _, _, capacity, _ in layout)
        self.buffer = torch.zeros(size, dtype=torch.int32, pin_memory=pool.device.type == "cuda")
        self.plan = StepPlan(self.buffer, layout)
        self.free = list(range(pool.num_pages))
        random.Random(0).shuffle(self.free)
        self.pages: list[list[int]] = []
        """Of each request of the last plan."""

    def write(self, requests: list[tuple[int, int]], step: int = 1, adapters: list[int] | None = None) -> StepPlan:
        """`requests`: (rows, sequence length after the step); the last row of each is sampled, greedily."""
        a: dict[str, list[float]] = {"query_indptr": [0], "page_indptr": [0], "page_indices": [], "seg_indptr": [0]}
        a |= {"positions": [], "slots": [], "seq_lens": [], "sample_rows": []}
        start, self.pages = 0, []
        for rows, seq_len in requests:
            num_pages = -(-seq_len // self.pool.page_tokens)
            pages = self.free[start : start + num_pages]
            assert len(pages) == num_pages, "the pool is too small"
            start += num_pages
            self.pages.append(pages)
            positions = range(seq_len - rows, seq_len)
            a["positions"] += positions
            t = self.pool.page_tokens
            a["slots"] += [pages[p // t] * t + p % t for p in positions]
            a["query_indptr"].append(len(a["positions"]))
            a["page_indices"] += pages
            a["page_indptr"].append(len(a["page_indices"]))
            a["seq_lens"].append(seq_len)
            a["sample_rows"].append(len(a["positions"]) - 1)
            a["seg_indptr"].append(len(a["positions"]))
        n = len(requests)
        a |= {"token_ids": [5] * len(a["positions"]), "top_p": [1.0] * n, "repetition": [1.0] * n}
        a["seg_adapter"] = adapters or [-1] * n
        a |= {name: [0] * n for name in ("temperature", "min_p", "presence", "frequency", "uniform", "top_k")}
        lens = [rows for rows, _ in requests]
        counts = Counts(*[0] * len(Counts._fields))._replace(
            step=step,
            num_rows=sum(lens),
            num_decode=lens.count(1),
            num_requests=n,
            num_segments=n,
            num_sampled=n,
            num_page_indices=len(a["page_indices"]),
            max_query_len=max(lens),
            max_seq_len=max(seq_len for _, seq_len in requests),
            max_logprobs=-1,
            max_prompt_logprobs=-1,
            flags=int(adapters is not None),
        )
        a["counts"] = list(counts)
        for name, values in a.items():
            offset, is_float = self.offsets[name]
            words = np.array(values, np.float32 if is_float else np.int32).view(np.int32)
            self.buffer.numpy()[offset : offset + len(words)] = words
        self.plan.refresh()
        return self.plan
