"""What LoRA costs in a step of Llama-3.1-8B's shapes: the kernels alone, beside the base's GEMMs, and torch's ways.

    python benches/kernels/lora.py [--quick] [--out lora.json]
    python benches/kernels/lora.py --few --cluster 2 8 auto [--out lora.json]

Checks two layers of every scenario against fp32 before timing it. Times are medians of replays of a CUDA graph of all
layers, in ms; `gb_per_s` counts the live adapters' weights and, for x and delta, one read and one write; `added` is
what a step with LoRA takes longer: the op before its GEMM, after it, or beside it, the GEMM on a branch of the graph.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from clusters import FEW_RANKS, FEW_ROWS, SIZES, add_clusters
from torch import Tensor

from slora.kernels import nvrtc
from slora.kernels.adapters import GROUPS, _starts
from slora.kernels.lora import Lora
from slora.memory import MAX_GRAPH_ROWS, PagePool
from slora.models.config import ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import add_output, write_rows

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
MIXED = (8, 16, 32, 64)
NUM_REPLAYS = 20


@dataclass
class Scenario:
    rows: int
    adapters: int
    ranks: tuple[int, ...] = (16,)

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.adapters}, rank {'/'.join(map(str, self.ranks))}"


SCENARIOS = [
    Scenario(1, 1),
    Scenario(16, 16),
    Scenario(64, 1),
    Scenario(64, 64),
    Scenario(64, 64, MIXED),
    Scenario(64, 64, (8,)),
    Scenario(64, 64, (64,)),
    Scenario(256, 64),
    Scenario(256, 256),
    Scenario(512, 16),
    Scenario(8192, 32),
    Scenario(8192, 8, (64,)),
]
FEW = [Scenario(rows, adapters, (rank,)) for rank, (rows, adapters) in product(FEW_RANKS, FEW_ROWS)]
QUICK = {(1, 1), (64, 1), (64, 64), (256, 64), (8192, 32)}


class World:
    """A pool of adapters with random weights, the base's weights, and inputs."""

    cluster: int | None = None
    """Blocks of a cluster; None: as the op chooses."""

    def __init__(self, config: ModelConfig, ranks: list[int], max_rows: int) -> None:
        self.config, self.ranks = config, ranks
        page_bytes = config.page_bytes(16, "bfloat16")
        layouts = {rank: layout(config, rank, page_bytes) for rank in set(ranks)}
        num_pages = sum(layouts[rank][1] for rank in ranks)
        self.pool = PagePool(config, dtype="bfloat16", device="cuda", pool_bytes=num_pages * page_bytes, page_tokens=16)
        for part in self.pool.flat.split(1 << 30):
            part.normal_(std=0.02)
        order = np.random.default_rng(0).permutation(num_pages)
        self.words = np.stack([layouts[rank][0] for rank in ranks])
        self.page_lists = np.zeros((len(ranks), max(n for _, n in layouts.values())), np.int32)
        place = 0
        for row, rank in enumerate(ranks):
            n = layouts[rank][1]
            self.page_lists[row, :n] = order[place : place + n]
            place += n
        modules, pages = torch.from_numpy(self.words).cuda(), torch.from_numpy(self.page_lists).cuda()
        self.lora = Lora(self.pool, modules, pages, max_rows=max_rows, max_rank=64)
        self.plan = torch.zeros(2048, dtype=torch.int32, device="cuda")
        sizes = [(config.module_dims[g[0]][0], sum(config.module_dims[m][1] for m in g)) for g in GROUPS]
        self.base = [
            [torch.randn(out, in_, device="cuda", dtype=torch.bfloat16) * 0.02 for in_, out in sizes]
            for _ in range(config.num_layers)
        ]
        self.xs = [torch.randn(max_rows, in_, device="cuda", dtype=torch.bfloat16) for in_, _ in sizes]
        self.ys = [torch.empty(max_rows, out, device="cuda", dtype=torch.bfloat16) for _, out in sizes]
        self.deltas = [torch.empty_like(y) for y in self.ys]

    def set_segments(self, scenario: Scenario) -> None:
        """Rows spread evenly over adapters of the scenario's ranks, taken round robin."""
        by_rank = {rank: [row for row, r in enumerate(self.ranks) if r == rank] for rank in scenario.ranks}
        ranks = [scenario.ranks[i % len(scenario.ranks)] for i in range(scenario.adapters)]
        self.adapters = [by_rank[rank].pop(0) for rank in ranks]
        self.bounds = [i * scenario.rows // scenario.adapters for i in range(scenario.adapters + 1)]
        words = torch.zeros(2048, dtype=torch.int32)
        words[0] = scenario.adapters
        words[1 : 2 + scenario.adapters] = torch.tensor(self.bounds)
        words[1024 : 1024 + scenario.adapters] = torch.tensor(self.adapters)
        self.plan.copy_(words)
        self.live_bytes = sum(self.words[a, :, 0] @ self.row_bytes() for a in self.adapters)
        self.rows = scenario.rows

    def row_bytes(self) -> np.ndarray:
        """Bytes of a rank of each module: a row of A and one of B."""
        return np.array([2 * (i + o) for i, o in self.config.module_dims] * self.config.num_layers)

    def prepare(self, stream: int) -> None:
        has_prefill = self.rows > MAX_GRAPH_ROWS
        arrays = (self.plan[:1], self.plan[1:], self.plan[1024:])
        self.lora.prepare(*arrays, stream, num_rows=self.rows, has_prefill=has_prefill, cluster=self.cluster)

    def run_lora(self) -> None:
        stream = nvrtc.current_stream()
        self.prepare(stream)
        for layer in range(self.config.num_layers):
            for group in range(4):
                self.one(layer, group, stream)

    def one(self, layer: int, group: int, stream: int) -> None:
        self.lora(self.xs[group][: self.rows], layer, group, stream, self.deltas[group][: self.rows])

    def gemm(self, layer: int, group: int) -> None:
        torch.mm(self.xs[group][: self.rows], self.base[layer][group].t(), out=self.ys[group][: self.rows])

    def run_base(self) -> None:
        for layer in range(self.config.num_layers):
            for group in range(4):
                self.gemm(layer, group)

    def run_in_line(self, before: bool) -> None:
        stream = nvrtc.current_stream()
        self.prepare(stream)
        for layer in range(self.config.num_layers):
            for group in range(4):
                if before:
                    self.one(layer, group, stream)
                self.gemm(layer, group)
                if not before:
                    self.one(layer, group, stream)

    def run_branch(self) -> None:
        main, side = torch.cuda.current_stream(), self.side
        self.prepare(main.cuda_stream)
        for layer in range(self.config.num_layers):
            for group in range(4):
                side.wait_stream(main)
                self.one(layer, group, main.cuda_stream)
                with torch.cuda.stream(side):
                    self.gemm(layer, group)
                main.wait_stream(side)

    side = torch.cuda.Stream()

    def rows_of(self, adapter: int, layer: int, module: int) -> tuple[Tensor, Tensor, float]:
        """A [rank, in] and B^T [rank, out] in fp32, read by the layout's definition."""
        words = self.words[adapter, layer * 7 + module]
        found = []
        for at, width in zip((2, 7), self.config.module_dims[module], strict=True):
            starts = _starts(
                int(words[0]),
                words[at : at + 5].tolist(),
                self.page_lists[adapter].astype(np.int64),
                self.pool.page_bytes,
            )
            found.append(self.pool.adapter_rows(width)[torch.from_numpy(starts).cuda()].float())
        return found[0], found[1], float(words[1:2].view(np.float32)[0])

    def check(self, layer: int) -> None:
        for group, modules in enumerate(GROUPS):
            self.deltas[group].fill_(float("nan"))
            self.one(layer, group, nvrtc.current_stream())
            for i, adapter in enumerate(self.adapters):
                rows = slice(self.bounds[i], self.bounds[i + 1])
                parts = []
                for module in modules:
                    a, b, scale = self.rows_of(adapter, layer, module)
                    parts.append(self.xs[group][rows].float() @ a.t() * scale @ b)
                want = torch.cat(parts, 1)
                error = (self.deltas[group][rows].float() - want).norm() / want.norm()
                assert error < 4e-3, f"layer {layer} group {group} segment {i}: relative error {error}"


def layout(config: ModelConfig, rank: int, page_bytes: int) -> tuple[np.ndarray, int]:
    """(descriptor, pages) of an adapter with one rank everywhere: docs/architecture.md."""
    words = np.zeros((config.num_layers * 7, 12), np.int32)
    page = offset = 0

    def put(row_bytes: int) -> list[int]:
        nonlocal page, offset
        if offset + row_bytes > page_bytes:
            page, offset = page + 1, 0
        per_page, first = page_bytes // row_bytes, min(rank, (page_bytes - offset) // row_bytes)
        placed = [page, offset, row_bytes, first, per_page]
        offset += first * row_bytes
        if rank > first:
            page += -(-(rank - first) // per_page)
            offset = ((rank - first - 1) % per_page + 1) * row_bytes
        return placed

    for layer in range(config.num_layers):
        for group in GROUPS:
            for which in (0, 1):
                for module in group:
                    at = words[layer * 7 + module]
                    at[0], at[1] = rank, np.array(2.0, np.float32).view(np.int32)
                    at[2 + 5 * which : 7 + 5 * which] = put(config.module_dims[module][which] * 2)
    return words, page + 1


def time_graph(run: Callable[[], None]) -> float:
    """Median ms of replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for i in range(NUM_REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def alternatives(world: World, scenario: Scenario, num_layers: int = 2) -> dict[str, float]:
    """Torch's ways, scaled up from a few layers: gathered and padded weights through bmm, and a loop over adapters."""
    top, n = max(scenario.ranks), scenario.adapters
    stacked = {}
    for layer in range(num_layers):
        for module, (in_size, out_size) in enumerate(world.config.module_dims):
            a = torch.zeros(n, top, in_size, device="cuda", dtype=torch.bfloat16)
            b = torch.zeros(n, top, out_size, device="cuda", dtype=torch.bfloat16)
            for i, adapter in enumerate(world.adapters):
                rows = world.rows_of(adapter, layer, module)
                a[i, : len(rows[0])], b[i, : len(rows[1])] = rows[0], rows[1]
            stacked[layer, module] = a, b
    lens = torch.tensor(world.bounds).diff()
    owner = torch.repeat_interleave(torch.arange(n), lens).cuda()

    def gather_bmm() -> None:
        for layer in range(num_layers):
            for group, modules in enumerate(GROUPS):
                x, column = world.xs[group][: scenario.rows, None], 0
                for module in modules:
                    a, b = (w[owner] for w in stacked[layer, module])
                    out = torch.bmm(torch.bmm(x, a.transpose(1, 2)), b)[:, 0]
                    world.deltas[group][: scenario.rows, column : column + out.shape[1]] = out
                    column += out.shape[1]

    def loop() -> None:
        for layer in range(num_layers):
            for group, modules in enumerate(GROUPS):
                column = 0
                for module in modules:
                    a, b = stacked[layer, module]
                    for i in range(n):
                        rows = slice(world.bounds[i], world.bounds[i + 1])
                        out = world.deltas[group][rows, column : column + b.shape[2]]
                        out.copy_(world.xs[group][rows] @ a[i].t() @ b[i])
                    column += b.shape[2]

    scale = world.config.num_layers / num_layers
    found = {"loop_ms": time_graph(loop) * scale}
    if scenario.rows <= 512:
        found["gather_bmm_ms"] = time_graph(gather_bmm) * scale
    return found


def measure(world: World, scenario: Scenario, cluster: int | None, with_alternatives: bool) -> dict[str, object]:
    world.set_segments(scenario)
    world.cluster = cluster
    world.prepare(nvrtc.current_stream())
    for layer in (0, world.config.num_layers - 1):
        world.check(layer)
    base, alone = time_graph(world.run_base), time_graph(world.run_lora)
    activation = sum(x.shape[1] + y.shape[1] for x, y in zip(world.xs, world.ys, strict=True)) * 2
    moved = world.live_bytes + scenario.rows * activation * world.config.num_layers
    result = {
        "scenario": asdict(scenario),
        "cluster": world.cluster,
        "bytes": int(moved),
        "base_ms": base,
        "lora_ms": alone,
        "gb_per_s": moved / alone / 1e6,
        "added_before_ms": time_graph(lambda: world.run_in_line(True)) - base,
        "added_after_ms": time_graph(lambda: world.run_in_line(False)) - base,
        "added_branch_ms": time_graph(world.run_branch) - base,
    }
    if with_alternatives:
        result |= alternatives(world, scenario)
    numbers = " ".join(f"{key} {value:.3f}" for key, value in result.items() if isinstance(value, float))
    print(f"{scenario.name:30} cluster {world.cluster or 'auto'} {numbers}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer scenarios, no alternatives")
    add_clusters(parser)
    add_output(parser, "gpu-lora")
    args = parser.parse_args()
    torch.manual_seed(0)
    scenarios = [s for s in SCENARIOS if not args.quick or ((s.rows, s.adapters) in QUICK and len(s.ranks) in (1, 4))]
    scenarios = FEW if args.few else scenarios
    needed = {}
    for s in scenarios:
        for rank in s.ranks:
            needed[rank] = max(needed.get(rank, 0), -(-s.adapters // len(s.ranks)))
    ranks = [rank for rank, n in needed.items() for _ in range(n)]
    world = World(ModelConfig.from_dict(LLAMA_8B), ranks, max(s.rows for s in scenarios))
    print(torch.cuda.get_device_name(), torch.__version__, "nvrtc", nvrtc.nvrtc_version())
    print("clusters that the device holds, by size:", world.lora.num_clusters)
    with_torch = not args.quick and not args.few
    pairs = product(scenarios, args.clusters)
    results = [measure(world, s, SIZES[name], with_torch and s.adapters > 1) for s, name in pairs]
    write_rows(args, {}, results=results)


if __name__ == "__main__":
    main()
