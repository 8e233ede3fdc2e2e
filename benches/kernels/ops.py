"""The small kernels of a step, Llama-3.1-8B shapes, bf16: microseconds of a call, and bytes per second of the larger.

    python benches/kernels/ops.py [--out FILE.json]
    python benches/kernels/ops.py --device cpu        # tiny shapes, the reference's ops: tries the script

Ops are compared with the fp32 reference before they are timed. Times are of replays of a graph whose calls have data of
their own, the cache being emptied before each; GB/s count every input and output once. What a step does once
(`step_prepare`, `update_descriptors`, `upload`, `lora_work`) is bound by launches: it has only a time, and that of
`upload`, which no graph can hold, is how long the host takes to launch it.
"""

import argparse
import faulthandler
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from attention import AttentionWork
from clock import Clock
from planner import Planner, make_layout
from shapes import LLAMA_8B, TINY
from torch import Tensor

from slora.kernels import backend, reference
from slora.kernels.adapters import MODULE_WORDS, AdapterTables
from slora.kernels.batch import Batch
from slora.memory import PagePool
from slora.models.config import ModelConfig
from slora.models.rope import inverse_frequencies
from slora.plan import HAS_PENALTIES, Counts, DevicePlan, StepPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Row, add_output, row, write_rows

LIMIT_S = 540
"""A run that takes longer is stuck: it ends with the stacks of all threads."""
ROWS, TINY_ROWS, SAMPLED_ROWS = [1, 64, 512, 8192], [1, 64, 1024], [1, 64, 256]
SAMPLING = {"greedy": (0.0, 15.0), "random": (1.0, 15.0), "random_flat": (1.0, 0.0)}
"""Temperature, and how far 64 tokens are above all others: without such, no few candidates decide."""
REPEATS, ROUNDS, CALLS = 9, 3, 16
TOLERANCE = 8e-3
WRONG_SHARE = 1 / 32
"""Of sampled rows: uniform numbers on the border of two tokens."""
FLUSH_BYTES = 256 << 20
NUM_PAGES, MAX_ADAPTERS, ADAPTER_PAGES, RANK = 2048, 64, 64, 16
STEPS = {"decode_64": [(1, 512)] * 64, "prefill_8192": [(1024, 1024)] * 8}
Rows = dict[str, Row]


class World:
    """A pool and plans over it; on a device, what a step has there."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.device, self.pool = device, make_pool(config, "bfloat16", device)
        layout, words = make_layout(NUM_PAGES), config.num_layers * len(config.module_dims) * MODULE_WORDS
        sizes = {"changed_rows": 1, "changed_pages_indptr": 2, "changed_pages": ADAPTER_PAGES, "changed_modules": words}
        for name, capacity in sizes.items():
            layout.append((name, layout[-1][1] + layout[-1][2], capacity, False))
        self.planner = Planner(self.pool, layout)
        self.frequencies, self.scaling = inverse_frequencies(config)
        if device.type == "cuda":
            from slora.kernels.descriptors import DeviceTables
            from slora.kernels.step import Step

            self.tables = DeviceTables(self.pool, MAX_ADAPTERS, ADAPTER_PAGES)
            self.plan = DevicePlan(layout, words, device)
            arrived = torch.zeros(1, dtype=torch.int64, device=device)
            frequencies = self.frequencies.to(device)
            self.step = Step(self.pool, self.tables, self.plan, arrived, frequencies, self.scaling, RANK)

    def write(
        self,
        requests: list[tuple[int, int]],
        changes: Mapping[str, Tensor | int] | None = None,
        adapters: list[int] | None = None,
    ) -> StepPlan:
        """A plan for the planner's requests, uploaded; `changes` of its arrays (on the CPU) and counts."""
        plan, words = self.planner.write(requests, adapters=adapters), self.planner.buffer
        for name, value in (changes or {}).items():
            if isinstance(value, int):
                words[self.planner.offsets["counts"][0] + Counts._fields.index(name)] = value
            else:
                start = self.planner.offsets[name][0]
                words[start : start + len(value)] = value.view(torch.int32)
        plan.refresh()
        if self.device.type == "cuda":
            self.plan.upload(plan, torch.Tensor.copy_)
        return plan

    def prepare(self, plan: StepPlan) -> None:
        from slora.cuda_runner import StepShape

        shape = StepShape.of(plan.counts)
        self.step.prepare(**shape._asdict(), is_graph=shape.is_recordable)

    def batch(self, plan: StepPlan, pool: PagePool) -> Batch:
        """What the reference's `rope_kv` takes, on the pool's device."""
        batch = reference.prepare(plan, pool, AdapterTables(pool, 1, 1), self.frequencies, self.scaling)
        return replace(batch, **{name: getattr(batch, name).to(self.device) for name in ("slots", "cos", "sin")})


class Ops:
    """Sections: each yields rows of the file, and needs no other."""

    def __init__(self, *, is_tiny: bool) -> None:
        self.is_tiny, self.device = is_tiny, torch.device("cpu" if is_tiny else "cuda")
        self.shape, self.clock = TINY if is_tiny else LLAMA_8B, Clock(self.device)
        self.config, self.rows = ModelConfig.from_dict(self.shape), TINY_ROWS if is_tiny else ROWS
        self.ops: Any = backend(self.device.type)
        self._flushed = torch.zeros(1 if is_tiny else FLUSH_BYTES // 4, device=self.device)

    @cached_property
    def world(self) -> World:
        return World(self.config, self.device)

    def rms_norm(self) -> Iterator[Rows]:
        def run(ops: Any, tensors: list[Tensor | None], i: int) -> Any:
            return ops.rms_norm(*tensors, self.config.rms_norm_eps)

        for rows in self.rows:
            x, residual, delta = (self._random(rows, self.config.hidden_size) for _ in range(3))
            weight = self._random(rows, self.config.hidden_size)[:, 0]
            for name, added in (("rms_norm", None), ("rms_norm_delta", delta)):
                yield self._measure(f"{name}_{rows}", run, [x, residual, added, weight], 2 * x[0].nbytes)

    def silu_mul(self) -> Iterator[Rows]:
        for rows in self.rows:
            gate_up, delta = (self._random(rows, 2 * self.config.intermediate_size) for _ in range(2))
            for name, added in (("silu_mul", None), ("silu_mul_delta", delta)):
                run = lambda ops, tensors, i: [ops.silu_mul(*tensors)]  # noqa: E731
                yield self._measure(f"{name}_{rows}", run, [gate_up, added], gate_up[0].nbytes // 2)

    def rope_kv(self) -> Iterator[Rows]:
        """In another layer each time; the fp32 pool has one layer."""
        c, world = self.config, self.world
        exact_pool = make_pool(ModelConfig.from_dict(self.shape | {"num_hidden_layers": 1}), "float32", self.device)
        for rows in self.rows:
            plan = world.write([(1, 16)] * rows if rows <= 512 else [(1024, 1024)] * (rows // 1024))
            batch, exact = world.batch(plan, world.pool), world.batch(plan, exact_pool)
            if not self.is_tiny:
                world.prepare(plan)
            here: Any = batch if self.is_tiny else world.step

            def run(ops: Any, tensors: list[Any], i: int, here: Any = here, exact: Any = exact) -> Any:
                place = (exact, 0) if tensors[0].dtype == torch.float32 else (here, i % c.num_layers)
                return [ops.rope_kv(*tensors, *place, None, c.rms_norm_eps)]

            qkv, delta = (self._random(rows, c.q_size + 2 * c.kv_size) for _ in range(2))
            for name, added in (("rope_kv", None), ("rope_kv_delta", delta)):
                self._compare(name, run, [qkv, added])
                check(name, world.pool.keys[0][batch.slots], exact_pool.keys[0][exact.slots])
                check(name, world.pool.values[0][batch.slots], exact_pool.values[0][exact.slots])
                others = qkv[0].nbytes + rows * (4 * c.head_dim + 4)  # q, K and V; rotations and slots
                yield self._measure(f"{name}_{rows}", run, [qkv, added], others)

    def sample(self) -> Iterator[Rows]:
        for rows, (name, (temperature, peak)) in product(SAMPLED_ROWS, SAMPLING.items()):
            yield self._sample(f"sample_{name}_{rows}", rows, temperature, peak)

    def _sample(self, name: str, rows: int, temperature: float, peak: float) -> Rows:
        raw, filters = self._logits(rows, peak), {"temperature": torch.full((rows,), temperature)}
        filters |= {"top_k": torch.zeros(rows).int(), "top_p": torch.full((rows,), 0.9), "min_p": torch.zeros(rows)}
        filters["uniform"] = torch.rand(rows)
        on_device = [values.to(self.device) for values in filters.values()]

        def expected(i: int) -> Tensor:
            return raw[i].argmax(-1) if temperature == 0 else reference.sample(raw[i], *on_device)

        if self.is_tiny:
            return self._timed(name, expected, len(raw), raw[0].nbytes)
        self.world.write([(1, 16)] * rows, filters)
        ids = torch.full((rows,), -7, dtype=torch.int32, device=self.device)
        run = lambda i: self.ops.sample_rows(raw[i], raw[i], self.world.step, ids)  # noqa: E731
        run(0)
        wrong = int((ids != expected(0)).sum())
        assert wrong <= rows * WRONG_SHARE, f"{name}: {wrong} rows differ"
        return self._timed(name, run, len(raw), raw[0].nbytes)

    def simple_attention(self) -> Iterator[Rows]:
        n, seq_len = (8, 64) if self.is_tiny else (64, 512)
        config = ModelConfig.from_dict(self.shape | {"num_hidden_layers": 4})
        work = AttentionWork(config, "float32", self.device.type, NUM_PAGES)
        us = [work.decode_us(n, seq_len) for _ in range(ROUNDS)]
        yield figures(f"simple_attention_decode_{n}x{seq_len}", us, work.kv_bytes(n, seq_len))

    def penalties(self, rows: int = 64) -> Iterator[Rows]:
        """Penalise, sample greedily, count: bytes of logits (read, written, read) and of both tables."""
        from slora.kernels.sampling import DeviceSampler
        from slora.sampling import Sampler

        half, vocab = torch.full((rows,), 0.5), self.config.vocab_size
        arrays = {"state_rows": torch.arange(rows).int(), "repetition": half + 0.7, "presence": half, "frequency": half}
        plan, raw = self.world.write([(1, 16)] * rows, {"flags": HAS_PENALTIES, **arrays}), self._logits(rows, 15.0)
        sampler, exact = DeviceSampler(self.world.step, rows, vocab), Sampler(rows, vocab, self.device)
        for _ in range(3):
            sampler.choose_with_penalties(raw[0])
            assert torch.equal(self.world.step.sampled[:rows].long(), exact.sample(raw[0], plan)), "ids differ"
        run = lambda i: sampler.choose_with_penalties(raw[i])  # noqa: E731
        yield self._timed(f"sample_penalised_{rows}", run, len(raw), rows * vocab * (3 * 4 + 4 + 1))

    def step_prepare(self) -> Iterator[Rows]:
        for name, requests in STEPS.items():
            world, plan = self.world, self.world.write(requests)
            world.prepare(plan)
            assert torch.equal(world.step.ids.cpu(), plan["token_ids"]), "ids differ"
            angles = plan["positions"].float()[:, None] * world.frequencies
            expected = torch.stack((angles.cos(), angles.sin()), -1) * world.scaling
            check(name, world.step.rotation[: len(angles)].cpu(), expected)
            yield self._timed(f"step_prepare_{name}", lambda i, plan=plan: self.world.prepare(plan), CALLS)

    def update_descriptors(self, row: int = 3, num_pages: int = 40) -> Iterator[Rows]:
        tables, numbers = self.world.tables, torch.tensor([row, 0, num_pages]).int()
        words, pages = torch.randint(1000, tables.modules[row].shape).int(), torch.randperm(NUM_PAGES)[:num_pages].int()
        arrays = {"changed_rows": numbers[:1], "changed_pages_indptr": numbers[1:], "changed_pages": pages}
        arrays["changed_modules"] = words.flatten()
        plan = self.world.write([(1, 16)], {"num_changed": 1, "num_changed_pages": num_pages, **arrays})
        tables.update(plan, self.world.plan)
        assert torch.equal(tables.modules[row].cpu(), words), "modules differ"
        assert torch.equal(tables.pages[row, :num_pages].cpu(), pages), "pages differ"
        yield self._timed("update_descriptors", lambda i: tables.update(plan, self.world.plan), CALLS)

    def upload(self) -> Iterator[Rows]:
        from slora.kernels.upload import Staging

        target, plan = self.world.plan, self.world.write(STEPS["decode_64"])
        staging = Staging(target.num_words, self.device)
        target.clear()
        target.upload(plan, staging.copy)
        assert torch.equal(target["slots"][: plan.counts.num_rows].cpu(), plan["slots"]), "slots differ"
        host = Clock(torch.device("cpu"))  # replays are calls, and nothing waits for the device
        yield figures("upload", host.replays_us(lambda: target.upload(plan, staging.copy), CALLS, REPEATS))
        self.clock.settle()

    def lora_work(self) -> Iterator[Rows]:
        """64 segments of a row and an adapter each. The lists are only timed: lora.py compares what comes of them."""
        from lora import layout  # needs a device

        world, n = self.world, MAX_ADAPTERS
        words, num_pages = layout(self.config, RANK, world.pool.page_bytes)
        world.tables.modules.copy_(torch.from_numpy(words))
        world.tables.pages[:, :num_pages].copy_(torch.randint(NUM_PAGES, (n, num_pages)))
        world.write([(1, 512)] * n, adapters=list(range(n)))
        num_segments = world.plan["counts"][Counts._fields.index("num_segments") :]
        arrays, lora = (num_segments, world.plan["seg_indptr"], world.plan["seg_adapter"]), world.step.lora
        yield self._timed("lora_work", lambda i: lora.prepare(*arrays, num_rows=n, has_prefill=False), CALLS)

    def _random(self, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[calls of a graph, rows, width]: fewer calls where one alone is larger than the cache."""
        calls = 2 * CALLS if rows <= 64 else 8 if rows <= 512 else 4
        return torch.randn((calls, rows, width), dtype=dtype, device=self.device)

    def _logits(self, rows: int, peak: float) -> Tensor:
        raw = self._random(rows, self.config.vocab_size, torch.float32)
        raw[..., :: self.config.vocab_size // 64] += peak
        return raw

    def _compare(self, name: str, run: Callable[..., Any], inputs: list[Tensor | None]) -> None:
        first = [None if tensor is None else tensor[0] for tensor in inputs]
        wanted = run(reference, [None if tensor is None else tensor.float() for tensor in first], 0)
        got = run(self.ops, [None if tensor is None else tensor.clone() for tensor in first], 0)
        for g, w in zip(got, wanted, strict=True):
            check(name, g, w)

    def _measure(self, name: str, run: Callable[..., Any], inputs: list[Tensor | None], other_bytes: int) -> Rows:
        """`run(ops, tensors, i)` on the i-th of each input; `other_bytes`: of outputs, and what else is read."""
        self._compare(name, run, inputs)
        given = [tensor for tensor in inputs if tensor is not None]
        on = lambda i: run(self.ops, [None if tensor is None else tensor[i] for tensor in inputs], i)  # noqa: E731
        return self._timed(name, on, len(given[0]), sum(tensor[0].nbytes for tensor in given) + other_bytes)

    def _timed(self, name: str, run: Callable[[int], object], calls: int, num_bytes: int = 0) -> Rows:
        """`run(i)` is a call on the i-th data. What it returns is kept, so that each call has outputs of its own."""
        outs, turns = list[object]([None] * calls), count()

        def body() -> None:
            i = next(turns) % calls
            outs[i] = run(i)

        return figures(name, self.clock.replays_us(body, calls, REPEATS, before=self._flushed.sum), num_bytes)


def make_pool(config: ModelConfig, dtype: str, device: torch.device) -> PagePool:
    pool_bytes = NUM_PAGES * config.page_bytes(16, dtype)
    return PagePool(config, dtype=dtype, device=device.type, pool_bytes=pool_bytes, page_tokens=16)


def check(name: str, got: Tensor, wanted: Tensor) -> None:
    error = float((got.float() - wanted).norm() / wanted.norm())
    assert error < TOLERANCE, f"{name}: relative error {error}"


def figures(name: str, us: list[float], num_bytes: int = 0) -> Rows:
    found = {f"{name}_us": row(us, "us")}
    return found | ({f"{name}_gb_s": row([num_bytes / value / 1e3 for value in us], "GB/s")} if num_bytes else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "gpu-ops")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.manual_seed(0)
    ops = Ops(is_tiny=args.device == "cpu")
    sections: list[Callable[[], Iterator[Rows]]] = [ops.rms_norm, ops.silu_mul, ops.rope_kv, ops.sample]
    sections.append(ops.simple_attention)
    if not ops.is_tiny:
        sections += [ops.penalties, ops.step_prepare, ops.update_descriptors, ops.upload, ops.lora_work]
    rows = Rows()
    for section in sections:
        for found in section():
            rows |= found
        gc.collect()
        torch.cuda.empty_cache()
    write_rows(args, rows)


if __name__ == "__main__":
    main()
