"""Paged attention alone, Llama-3.1-8B shapes, bf16: bytes of K and V per second in decode, TFLOP/s in prefill.

    python benches/kernels/attention.py [--out FILE.json]

Rows of every work are compared with fp32 before it is timed. Decode reads the layers in turn, so that the cache holds
nothing of the next one.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from clock import Clock
from planner import Planner, make_layout
from shapes import LLAMA_8B
from torch import Tensor

from slora.kernels import reference
from slora.kernels.adapters import AdapterTables
from slora.memory import PagePool
from slora.models.config import ModelConfig
from slora.plan import DevicePlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import add_output, row, write_rows

DECODE = [(1, 2048), (1, 8192), (8, 32768), (64, 128), (64, 2048), (256, 256), (256, 1024)]
PREFILL = [(8, 1024, 0), (1, 8192, 0), (1, 1024, 7168), (1, 256, 2048), (4, 100, 1000)]
NUM_PAGES = 17000
TOLERANCE = 1.6e-2
ROUNDS = 3


class AttentionWork:
    """A pool of random K and V, and one attention op over it: the device's kernels, or the reference on the CPU."""

    def __init__(self, config: ModelConfig, dtype: str, device: str, num_pages: int) -> None:
        self.config, self.clock = config, Clock(torch.device(device))
        page_bytes = config.page_bytes(16, dtype)
        self.pool = PagePool(config, dtype=dtype, device=device, pool_bytes=num_pages * page_bytes, page_tokens=16)
        for part in self.pool.flat.split(1 << 30):
            part.normal_()
        layout = make_layout(num_pages)
        self._planner = Planner(self.pool, layout)
        self._frequencies = torch.ones(config.head_dim // 2, device=device)
        self._run: Callable[[Tensor, int], Tensor]
        if self.clock.is_cuda:
            from slora.kernels.descriptors import DeviceTables
            from slora.kernels.step import Step

            self._device_plan = DevicePlan(layout, 0, self.pool.device)
            arrived = torch.zeros(1, dtype=torch.int64, device=device)
            tables = DeviceTables(self.pool, 1, 1)
            self._step = Step(self.pool, tables, self._device_plan, arrived, self._frequencies, 1.0, max_rank=64)

    def decode_us(self, num_requests: int, seq_len: int, repeats: int = 20) -> float:
        q = self._prepare([(1, seq_len)] * num_requests)
        layers = count()
        return self.clock.median_us(lambda: self._run(q, next(layers) % self.config.num_layers), 4, repeats)

    def prefill_us(self, num_requests: int, rows: int, cached: int, *, is_graph: bool = False) -> float:
        q = self._prepare([(rows, cached + rows)] * num_requests, is_graph=is_graph)
        layers = count()
        return self.clock.median_us(lambda: self._run(q, next(layers) % self.config.num_layers), 4, 10)

    def kv_bytes(self, num_requests: int, seq_len: int) -> int:
        return num_requests * seq_len * 2 * self.config.kv_size * self.pool.flat.element_size()

    def flop(self, num_requests: int, rows: int, cached: int) -> float:
        """Of the scores that the causal mask leaves, and of their weighted sums."""
        return 4 * self.config.q_size * num_requests * (rows * cached + rows * (rows + 1) / 2)

    def _prepare(self, requests: list[tuple[int, int]], *, is_graph: bool = False) -> Tensor:
        """Random queries for the requests, (rows, sequence length) each, once some of their results are right."""
        plan, rows = self._planner.write(requests), sum(rows for rows, _ in requests)
        pool, shape = self.pool, (rows, self.config.num_heads, self.config.head_dim)
        q = torch.randn(shape, device=pool.device, dtype=pool.flat.dtype)
        if self.clock.is_cuda:
            from slora.cuda_runner import StepShape
            from slora.kernels import cuda

            self._device_plan.upload(plan, torch.Tensor.copy_)
            shape = StepShape.of(plan.counts)
            self._step.prepare(**shape._asdict(), is_graph=is_graph)
            self._run = lambda q, layer: cuda.paged_attention(q, self._step, layer)
        else:
            tables = AdapterTables(self.pool, 1, 1)
            batch = reference.prepare(plan, self.pool, tables, self._frequencies, 1.0)
            self._run = lambda q, layer: reference.paged_attention(q, batch, layer)
        self._check(requests, q, layer=self.config.num_layers - 1)
        return q

    def _check(self, requests: list[tuple[int, int]], q: Tensor, layer: int) -> None:
        got, first = self._run(q, layer).view(q.shape).float(), 0
        for i, (rows, seq_len) in enumerate(requests):
            if i in (0, len(requests) // 2, len(requests) - 1):
                pages = torch.tensor(self._planner.pages[i], device=self.pool.device)
                kv = self.pool.kv[pages, layer].transpose(0, 1).flatten(1, 2).float()
                for row_index in {0, rows // 2, rows - 1}:
                    length = seq_len - rows + row_index + 1
                    wanted = attend(q[first + row_index].float(), kv[:, :length])
                    error = float((got[first + row_index] - wanted).norm() / wanted.norm())
                    assert error < TOLERANCE, f"request {i}, row {row_index}, {length} tokens: relative error {error}"
            first += rows


def attend(q: Tensor, kv: Tensor) -> Tensor:
    """One row of attention in fp32: q [heads, head_dim], kv [2, tokens, kv_heads, head_dim]."""
    k, v = kv.repeat_interleave(q.shape[0] // kv.shape[2], 2)
    scores = torch.einsum("hd,thd->ht", q, k) * q.shape[1] ** -0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "attention")
    args = parser.parse_args()
    work = AttentionWork(ModelConfig.from_dict(LLAMA_8B), "bfloat16", "cuda", NUM_PAGES)
    rows = {}
    for n, seq_len in DECODE:
        us = [work.decode_us(n, seq_len) for _ in range(ROUNDS)]
        name = f"attention_decode_{n}x{seq_len}"
        rows[f"{name}_us"] = row(us, "us")
        rows[f"{name}_tb_s"] = row([work.kv_bytes(n, seq_len) / value / 1e6 for value in us], "TB/s")
    for n, query_len, cached in PREFILL:
        for is_graph in (False, True):
            us = [work.prefill_us(n, query_len, cached, is_graph=is_graph) for _ in range(ROUNDS)]
            kernel = "chunk" if is_graph else "eager"
            name = f"attention_prefill_{n}x{query_len}_after_{cached}_{kernel}"
            rows[f"{name}_us"] = row(us, "us")
            rows[f"{name}_tflop_s"] = row([work.flop(n, query_len, cached) / value / 1e6 for value in us], "TFLOP/s")
    write_rows(args, rows)


if __name__ == "__main__":
    main()
