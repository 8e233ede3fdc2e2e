"""Paged attention alone, Llama-3.1-8B shapes, bf16: bytes of K and V per second in decode, TFLOP/s in prefill.

python benches/kernels/attention.py [--out FILE.json]
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch

from slora.kernels import cuda
from slora.kernels.descriptors import DeviceTables
from slora.kernels.step import Step
from slora.memory import PagePool
from slora.models.config import ModelConfig, Rope
from slora.plan import Counts, DevicePlan, StepPlan

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope=Rope("default", 500000.0, {}),
    max_context=131072,
    windows=(None,) * 32,
    dtype="bfloat16",
    eos_token_ids=(128001,),
)
ROWS, REQUESTS = 8192, 512
DECODE = [(1, 2048), (1, 8192), (8, 32768), (64, 128), (64, 2048), (256, 256), (256, 1024)]
PREFILL = [(8, 1024, 0), (1, 8192, 0), (1, 1024, 7168), (1, 256, 2048), (4, 100, 1000)]


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
        self.buffer = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self.plan = StepPlan(self.buffer, layout)
        self.free = list(range(pool.num_pages))
        random.Random(0).shuffle(self.free)

    def write(self, requests: list[tuple[int, int]], step: int = 1, adapters: list[int] | None = None) -> StepPlan:
        """`requests`: (rows, sequence length after the step); the last row of each is sampled, greedily."""
        a: dict[str, list[float]] = {"query_indptr": [0], "page_indptr": [0], "page_indices": [], "seg_indptr": [0]}
        a |= {"positions": [], "slots": [], "seq_lens": [], "sample_rows": []}
        start = 0
        for rows, seq_len in requests:
            num_pages = -(-seq_len // self.pool.page_tokens)
            pages = self.free[start : start + num_pages]
            assert len(pages) == num_pages, "the pool is too small"
            start += num_pages
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


def time_us(body, repeats: int = 20) -> float:  # type: ignore[no-untyped-def]
    """Median of replays of a graph of one call per layer, divided by the layers: the cache holds none of it."""
    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            body()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 4)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = LLAMA_8B
    page_bytes = config.page_bytes(16, "bfloat16")
    pool = PagePool(config, dtype="bfloat16", device="cuda", pool_bytes=17000 * page_bytes, page_tokens=16)
    pool.flat.normal_()
    layout = make_layout(pool.num_pages)
    device_plan = DevicePlan(layout, 0, pool.device)
    frequencies = torch.ones(config.head_dim // 2, device="cuda")
    step = Step(pool, DeviceTables(pool, 1, 1), device_plan, frequencies, 1.0)
    planner = Planner(pool, layout)
    results = []
    for n, seq_len in DECODE:
        device_plan.upload(planner.write([(1, seq_len)] * n))
        step.prepare(n, has_decode=True, has_prefill=False, has_lora=False)
        q = torch.randn(n, config.num_heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
        layers = iter(range(10**9))
        us = time_us(lambda q=q, layers=layers: cuda.paged_attention(q, step, next(layers) % 32))
        rate = n * seq_len * 2 * config.kv_size * 2 / us / 1e6
        results.append({"decode": [n, seq_len], "us": us, "TB/s": rate})
        print(f"decode {n} x {seq_len}: {us:.1f} us, {rate:.2f} TB/s", flush=True)
    for n, query_len, cached in PREFILL:
        for is_graph in (False, True):
            device_plan.upload(planner.write([(query_len, cached + query_len)] * n))
            rows = n * query_len
            step.prepare(rows, has_decode=False, has_prefill=True, has_lora=False, is_graph=is_graph)
            q = torch.randn(rows, config.num_heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
            us = time_us(lambda q=q: cuda.paged_attention(q, step, 3), 10)
            rate = 4 * config.q_size * n * (query_len * cached + query_len * (query_len + 1) / 2) / us / 1e6
            name = "our kernel" if is_graph else "cudnn"
            results.append({"prefill": [n, query_len, cached], "kernel": name, "us": us, "TFLOP/s": rate})
            print(f"prefill {n} x {query_len} after {cached}, {name}: {us:.1f} us, {rate:.0f} TFLOP/s", flush=True)
    if args.out:
        meta = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**meta, "results": results}, indent=1))


if __name__ == "__main__":
    main()
