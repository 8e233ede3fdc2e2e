"""The LoRA kernels beside what torch offers for the same work, on the linears of Llama-3.1-8B's layers, bf16.

    python benches/kernels/alternatives.py [--quick] [--out FILE.json]
    python benches/kernels/alternatives.py --few --cluster 2 8 auto [--out FILE.json]
    python benches/kernels/alternatives.py --device cpu        # tiny shapes, torch's ways only: tries the script

    ours      slora's kernels, in a graph of LAYERS layers, the lists of a step's work included;
              ours_2 and ours_8 with clusters of that size
    gather    each row's A and B gathered, padded to the largest rank, and two batched products; up to 512 rows
    loop      two products for each adapter and linear

Every way's results are compared with fp32 before it is timed. Times are of one layer, medians of replays of a graph;
the cache is emptied before each. `of the bound`: the time that the bytes (the live adapters' weights once, x and delta
once) or the operations take at the rates measured in the same run, whichever is longer, over the time taken.
"""

import argparse
import faulthandler
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from clusters import FEW_RANKS, FEW_ROWS, SIZES, add_clusters
from shapes import LLAMA_8B, TINY
from torch import Tensor

from slora.kernels.adapters import GROUPS
from slora.models.config import ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Row, add_output, row, write_rows

LIMIT_S = 540
"""A run that takes longer is stuck: it ends with the stacks of all threads."""
LAYERS, STACKED_LAYERS = 8, 2
"""Of a graph of ours, and of torch's ways, which need a kernel for each adapter, or the weights once for each row."""
GATHER_ROWS = 512
REPEATS = 10
TOLERANCE = 1.2e-2
CHECKED_SEGMENTS = 8
FLUSH_BYTES = 256 << 20
RANKS = [(8,), (16,), (64,), (8, 16, 32, 64)]
DECODE = [(1, 1), *product((8,), (1, 8)), *product((64,), (1, 8, 64)), *product((256,), (1, 8, 64, 256))]
DECODE += product((512,), (1, 8, 64, 512))
PREFILL = [*product((2048, 8192), (1, 8, 32))]
QUICK = [(1, 1), (64, 1), (64, 64), (512, 512), (8192, 32)]
Group = list[Tensor]
"""Tensors of the four layer groups."""


@dataclass
class Work:
    """Rows spread evenly over adapters, whose ranks are taken in turn."""

    rows: int
    adapters: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.adapters}_rank_{'_'.join(map(str, self.ranks))}"

    @property
    def bounds(self) -> list[int]:
        return [i * self.rows // self.adapters for i in range(self.adapters + 1)]


class Stack:
    """All adapters' weights padded to the largest rank: A [adapters, rank, in] and scaled Bᵀ [adapters, rank, out]."""

    def __init__(
        self, config: ModelConfig, weights: Callable[[int, int, int], tuple[Tensor, Tensor]], num: int
    ) -> None:
        """`weights(adapter, layer, module)` are one's A and scaled Bᵀ, fp32, of its own rank."""
        self.config, self._weights = config, weights
        self.a: dict[tuple[int, int], Tensor] = {}
        self.b: dict[tuple[int, int], Tensor] = {}
        for layer, module in product(range(STACKED_LAYERS), range(len(config.module_dims))):
            each = [weights(adapter, layer, module) for adapter in range(num)]
            rank = max(len(a) for a, _ in each)
            self.a[layer, module] = _padded([a for a, _ in each], rank)
            self.b[layer, module] = _padded([b for _, b in each], rank)

    def gather(self, layer: int, xs: Group, outs: Group, owner: Tensor) -> None:
        for x, out, columns in self._columns(xs, outs):
            for module, place in columns:
                a, b = self.a[layer, module][owner], self.b[layer, module][owner]
                out[:, place] = torch.bmm(torch.bmm(x[:, None], a.transpose(1, 2)), b)[:, 0]

    def loop(self, layer: int, xs: Group, outs: Group, bounds: Sequence[int]) -> None:
        for x, out, columns in self._columns(xs, outs):
            for module, place in columns:
                a, b = self.a[layer, module], self.b[layer, module]
                for i, (start, end) in enumerate(pairwise(bounds)):
                    out[start:end, place] = (x[start:end] @ a[i].t()) @ b[i]

    def expected(self, adapter: int, layer: int, xs: Group, rows: slice) -> Group:
        """The definition, in fp32."""
        found = []
        for x, modules in zip(xs, GROUPS, strict=True):
            each = (self._weights(adapter, layer, module) for module in modules)
            found.append(torch.cat([x[rows].float() @ a.t() @ b for a, b in each], 1))
        return found

    def _columns(self, xs: Group, outs: Group) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, slice]]]]:
        for x, out, modules in zip(xs, outs, GROUPS, strict=True):
            columns, start = [], 0
            for module in modules:
                width = self.config.module_dims[module][1]
                columns.append((module, slice(start, start + width)))
                start += width
            yield x, out, columns


def _padded(rows: list[Tensor], rank: int) -> Tensor:
    out = torch.zeros(len(rows), rank, rows[0].shape[1], device=rows[0].device, dtype=torch.bfloat16)
    for i, each in enumerate(rows):
        out[i, : len(each)] = each
    return out


class Bench:
    """Adapters of the same ranks, inputs for all works with them, and the ways to run those."""

    def __init__(
        self, ranks: tuple[int, ...], works: Sequence[Work], *, clusters: Sequence[str], is_tiny: bool
    ) -> None:
        self.ours = {"ours" if name == "auto" else f"ours_{name}": SIZES[name] for name in clusters}
        """Our ways, and the size of their clusters."""
        most = max(work.adapters for work in works)
        device = torch.device("cpu" if is_tiny else "cuda")
        self.clock, self._flushed = Clock(device), torch.empty(1 if is_tiny else FLUSH_BYTES, dtype=torch.uint8)
        self._flushed = self._flushed.to(device)
        owners = [ranks[i % len(ranks)] for i in range(most)]
        max_rows = max(work.rows for work in works)
        self._world = None if is_tiny else _make_world(owners, max_rows)
        self.config = ModelConfig.from_dict(TINY) if is_tiny else self._world.config
        sizes = [(self.config.module_dims[g[0]][0], sum(self.config.module_dims[m][1] for m in g)) for g in GROUPS]
        if self._world is not None:
            self._xs, self._outs = self._world.xs, self._world.deltas
        else:
            self._xs = [torch.randn(max_rows, size, device=device).bfloat16() for size, _ in sizes]
            self._outs = [torch.empty(max_rows, size, device=device).bfloat16() for _, size in sizes]
        self._row_bytes = 2 * sum(a + b for a, b in sizes)
        self._rank_size = sum(a + b for a, b in self.config.module_dims)
        self._owners = owners
        self._stack = Stack(self.config, self._weights, most)

    def measure(self, work: Work) -> dict[str, list[float]]:
        """Microseconds of a layer, by way."""
        xs, outs = ([tensor[: work.rows] for tensor in group] for group in (self._xs, self._outs))
        owner = torch.repeat_interleave(torch.arange(work.adapters), torch.tensor(work.bounds).diff())
        owner = owner.to(self._flushed.device)
        ways: dict[str, tuple[int, Callable[[int], None]]] = {}
        if self._world is not None:
            self._select(work)
            ways |= dict.fromkeys(self.ours, (LAYERS, self._ours))
        ways["loop"] = (STACKED_LAYERS, lambda layer: self._stack.loop(layer, xs, outs, work.bounds))
        if work.rows <= GATHER_ROWS:
            ways["gather"] = (STACKED_LAYERS, lambda layer: self._stack.gather(layer, xs, outs, owner))
        found = {}
        for name, (num_layers, run) in ways.items():
            if name in self.ours:
                self._world.cluster = self.ours[name]
            self._check(name, work, xs, outs, run)

            step = partial(self._step, run, num_layers, has_lists=name in self.ours)
            times = self.clock.replays_us(step, 1, REPEATS, before=self._flushed.zero_)
            found[name] = [us / num_layers for us in times]
        return found

    def _step(self, run: Callable[[int], None], num_layers: int, *, has_lists: bool) -> None:
        if has_lists:
            self._prepare()
        for layer in range(num_layers):
            run(layer)

    def bytes_of(self, work: Work) -> int:
        """Of a layer."""
        ranks = sum(self._owners[: work.adapters])
        return 2 * ranks * self._rank_size + work.rows * self._row_bytes

    def flop_of(self, work: Work) -> int:
        ranks = sum(self._owners[i] * (b - a) for i, (a, b) in enumerate(pairwise(work.bounds)))
        return 2 * ranks * self._rank_size

    def _check(self, name: str, work: Work, xs: Group, outs: Group, run: Callable[[int], None]) -> None:
        if name in self.ours:
            self._prepare()
        for layer in (0, STACKED_LAYERS - 1):
            for out in outs:
                out.fill_(torch.nan)
            run(layer)
            stride = max(1, work.adapters // CHECKED_SEGMENTS)
            for i in range(work.adapters - 1, -1, -stride):
                rows = slice(work.bounds[i], work.bounds[i + 1])
                for group, want in enumerate(self._stack.expected(i, layer, xs, rows)):
                    error = float((outs[group][rows].float() - want).norm() / want.norm())
                    assert error < TOLERANCE, f"{name}, {work.name}, adapter {i}, group {group}: relative error {error}"
            assert all(torch.isfinite(out).all() for out in outs), f"{name}, {work.name}: rows were left out"

    def _select(self, work: Work) -> None:
        from lora import Scenario

        self._world.set_segments(Scenario(work.rows, work.adapters, work.ranks))
        assert self._world.adapters == list(range(work.adapters)), "weights are taken in the adapters' order"

    def _prepare(self) -> None:
        from slora.kernels import nvrtc

        self._world.prepare(nvrtc.current_stream())

    def _ours(self, layer: int) -> None:
        from slora.kernels import nvrtc

        for group in range(len(GROUPS)):
            self._world.one(layer, group, nvrtc.current_stream())

    def _weights(self, adapter: int, layer: int, module: int) -> tuple[Tensor, Tensor]:
        if self._world is not None:
            a, b, scale = self._world.rows_of(adapter, layer, module)
            return a, b * scale
        generator = torch.Generator().manual_seed(adapter * 1000 + layer * 10 + module)
        rank = self._owners[adapter]
        sizes = self.config.module_dims[module]
        a, b = ((torch.randn(rank, size, generator=generator) * 0.1).bfloat16().float() for size in sizes)
        return a, b


def _make_world(owners: list[int], max_rows: int) -> Any:
    from lora import World

    return World(ModelConfig.from_dict(LLAMA_8B | {"num_hidden_layers": LAYERS}), owners, max_rows)


def ceilings(clock: Clock) -> tuple[float, float]:
    """(bytes that a sum or a negation reads and writes per second, operations per second of a square bf16 product)."""
    device = "cuda" if clock.is_cuda else "cpu"
    size, width = (1 << 30, 8192) if clock.is_cuda else (1 << 20, 128)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    memory = max(
        size / clock.median_us(lambda: source.sum(), 4, 5),
        2 * size / clock.median_us(lambda: torch.neg(source, out=target), 4, 5),
    )
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    product_us = clock.median_us(lambda: a @ b, 4, 5)
    return memory * 1e6, 2 * width**3 / product_us * 1e6


def tell(bench: Bench, work: Work, found: dict[str, list[float]], rates: tuple[float, float]) -> dict[str, Row]:
    """Print a line; the rows of the file."""
    num_bytes, flop = bench.bytes_of(work), bench.flop_of(work)
    rows = {f"{work.name}_{way}_us": row(times, "us") for way, times in found.items()}
    bound_us = max(num_bytes / rates[0], flop / rates[1]) * 1e6
    line = f"{work.name:28}"
    for way in (*bench.ours, "gather", "loop"):
        us = rows[f"{work.name}_{way}_us"]["value"] if way in found else None
        line += f" {us:11.1f}" if us is not None else f" {'-':>11}"
    for way in bench.ours:
        if way not in found:
            continue
        us = rows[f"{work.name}_{way}_us"]["value"]
        rows[f"{work.name}_{way}_gb_s"] = row([num_bytes / us / 1e3 for us in found[way]], "GB/s")
        rows[f"{work.name}_{way}_tflop_s"] = row([flop / us / 1e6 for us in found[way]], "TFLOP/s")
        line += f" {num_bytes / us / 1e3:8.0f} {flop / us / 1e6:8.1f} {bound_us / us:8.0%}"
    print(line, flush=True)
    return rows


def select(pairs: Iterable[tuple[int, int]], ranks: tuple[int, ...], *, is_tiny: bool) -> list[Work]:
    works = [Work(rows, adapters, ranks) for rows, adapters in pairs]
    return [work for work in works if not is_tiny or work.rows <= 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "alternatives")
    parser.add_argument("--quick", action="store_true", help="fewer works")
    add_clusters(parser)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.manual_seed(0)
    is_tiny = args.device == "cpu"
    rates = ceilings(Clock(torch.device(args.device)))
    print(f"memory runs at {rates[0] / 1e12:.2f} TB/s, products at {rates[1] / 1e12:.0f} TFLOP/s")
    rows: dict[str, Row] = {}
    for ranks in [(rank,) for rank in FEW_RANKS] if args.few else RANKS:
        pairs = FEW_ROWS if args.few else QUICK if args.quick else DECODE + PREFILL
        works = select(pairs, ranks, is_tiny=is_tiny)
        bench = Bench(ranks, works, clusters=args.clusters, is_tiny=is_tiny)
        ways = " ".join(f"{way:>11}" for way in (*bench.ours, "gather", "loop"))
        print(f"{'us of a layer':28} {ways} {'GB/s':>8} {'TFLOP/s':>8} of the bound")
        for work in works:
            rows |= tell(bench, work, bench.measure(work), rates)
        del bench
        gc.collect()
        torch.cuda.empty_cache()  # the next adapters may need most of the memory
    write_rows(args, rows, is_shown=False, memory_tb_s=rates[0] / 1e12, product_tflop_s=rates[1] / 1e12)


if __name__ == "__main__":
    main()
