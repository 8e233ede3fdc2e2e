"""Every op of the CUDA backend against the fp32 reference, which runs on the CPU over the same pages and plans."""

import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from filters import is_border, random_filters
from planning import Request, World, tiny_config

from slora.kernels import reference
from slora.kernels.step import Step
from slora.models.config import ModelConfig
from slora.plan import StepPlan
from slora.runner import StepOutput
from slora.weights import load_weights

pytestmark = pytest.mark.gpu
cuda = pytest.importorskip("slora.kernels.cuda")

SIZES = [1, 3, 7, 64, 133, 512]
TOLERANCES = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def replayed(body: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `body` returns when it is replayed, with its output scribbled over in between."""
    out = body()
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):  # under the sanitizer no graph can be recorded
        return out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = body()
    out.fill_(torch.nan)
    graph.replay()
    return out


def make_worlds(dtype: str, page_tokens: int = 16, **changes: object) -> tuple[World, World]:
    """The same world twice: fp32 on the CPU, `dtype` on the device."""
    config = ModelConfig.from_dict(tiny_config(**changes))
    weights = [load_weights(config, "", dtype=d, load_format="dummy") for d in ("float32", dtype)]
    for layer in weights[1].layers:
        for name, value in vars(layer).items():
            setattr(layer, name, None if value is None else value.cuda())
    for name in ("embed", "norm", "lm_head"):
        setattr(weights[1], name, getattr(weights[1], name).cuda())
    sizes = {"num_pages": 24_000 // page_tokens, "page_tokens": page_tokens}
    worlds = World(config, weights[0], **sizes), World(config, weights[1], dtype=dtype, device="cuda", **sizes)
    return plan_only(worlds[0]), plan_only(worlds[1])


def plan_only(world: World) -> World:
    """Its steps only bring their plans to where the ops read them."""

    def run(plan: StepPlan) -> StepOutput:
        if world.pool.device.type == "cuda":
            world.runner._plan.upload(plan, torch.Tensor.copy_)
            torch.cuda.synchronize()
        zeros = np.zeros(plan.counts.num_prompt_logprobs, np.float32)
        return StepOutput(np.zeros(plan.counts.num_sampled, np.int32), prompt_logprobs=zeros)

    world.runner.run = run  # type: ignore[method-assign]
    return world


def prepare(world: World, rows: int, *, is_graph: bool = False) -> Step:
    step = world.runner._step
    has_prefill = world.plan.counts.num_requests > world.plan.counts.num_decode
    has_decode = world.plan.counts.num_decode > 0
    step.prepare(rows, has_decode=has_decode, has_prefill=has_prefill, has_lora=False, is_graph=is_graph)
    return step


def reference_batch(world: World) -> reference.Batch:
    runner = world.runner
    return reference.prepare(world.plan, world.pool, runner._tables, runner._frequencies, runner._rope_scaling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [100, 4096])
def test_rms_norm(hidden: int, dtype: str) -> None:
    for rows in SIZES:
        for has_delta, has_residual in ((0, 0), (0, 1), (1, 1)):
            x, delta, residual = (torch.randn(rows, hidden).to(DTYPES[dtype]) for _ in range(3))
            weight = torch.randn(hidden).to(DTYPES[dtype])
            args = (residual if has_residual else None, delta if has_delta else None)
            expected = reference.rms_norm(
                x.clone().float(), *(None if a is None else a.float() for a in args), weight.float(), 1e-5
            )
            got = cuda.rms_norm(x.cuda(), *(None if a is None else a.cuda() for a in args), weight.cuda(), 1e-5)
            for g, e in zip(got, expected, strict=True):
                assert error(g, e) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [50, 1024])
def test_silu_mul(inner: int, dtype: str) -> None:
    for rows in SIZES:
        gate_up, delta = torch.randn(2, rows, 2 * inner).to(DTYPES[dtype])
        expected = reference.silu_mul(gate_up.clone().float(), delta.float())
        assert error(cuda.silu_mul(gate_up.cuda(), delta.cuda()), expected) < TOLERANCES[dtype]
        expected = reference.silu_mul(gate_up.clone().float(), None)
        assert error(cuda.silu_mul(gate_up.cuda(), None), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "family"), [(16, 4, 4, "qwen3"), (128, 8, 2, "llama"), (90, 4, 1, "qwen3")]
)
def test_rope_kv_writes_its_slots_and_nothing_else(
    head_dim: int, heads: int, kv_heads: int, family: str, dtype: str
) -> None:
    shape = {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "model_type": family}
    cpu, gpu = make_worlds(dtype, **shape, hidden_size=64)
    config = cpu.config
    for rows in (1, 3, 133):
        for world in (cpu, gpu):
            world.step([(Request([1] * rows, max_tokens=1), rows)])
        step = prepare(gpu, rows)
        for world in (cpu, gpu):
            world.pool.pages.fill_(255)
        width = config.q_size + 2 * config.kv_size
        qkv, delta = torch.randn(2, rows, width).to(DTYPES[dtype])
        norm = torch.randn(heads + kv_heads, head_dim).to(DTYPES[dtype]) if config.qk_norm else None
        expected = reference.rope_kv(
            qkv.clone().float(), delta.float(), reference_batch(cpu), 1, None if norm is None else norm.float(), 1e-6
        )
        got = cuda.rope_kv(qkv.cuda(), delta.cuda(), step, 1, None if norm is None else norm.cuda(), 1e-6)
        assert error(got, expected) < TOLERANCES[dtype]
        written = ~cpu.pool.kv.isnan()
        assert torch.equal(written, ~gpu.pool.kv.isnan().cpu())
        assert error(gpu.pool.kv.cpu()[written], cpu.pool.kv[written]) < TOLERANCES[dtype]


CASES = [
    (1, 1), (6, 1), (255, 1), (256, 1), (257, 1), (900, 1), (3000, 1), (0, 1),
    (0, 24), (0, 2), (37, 3), (133, 7), (0, 133), (511, 64), (0, 512), (2100, 130),
]  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window", "dtype", "page_tokens"),
    [
        (128, 32, 8, None, "bfloat16", 16),
        (128, 32, 8, 300, "bfloat16", 64),
        (128, 4, 4, None, "float16", 32),
        (16, 4, 2, 5, "bfloat16", 16),
        (64, 14, 2, None, "bfloat16", 128),
        (96, 3, 1, None, "float16", 16),
        (256, 8, 1, 1000, "bfloat16", 16),
        (256, 32, 1, None, "bfloat16", 32),
        (90, 4, 2, None, "bfloat16", 64),
        (16, 4, 2, None, "float32", 64),
        (128, 8, 2, 300, "float32", 16),
    ],
)
@pytest.mark.parametrize("is_graph", [False, True])
def test_paged_attention(
    head_dim: int, heads: int, kv_heads: int, window: int | None, dtype: str, page_tokens: int, is_graph: bool
) -> None:
    """Decode of very different lengths, whole prompts, chunks with cached context, in one step."""
    shape = {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    changes = {"model_type": "mistral", "sliding_window": window, "max_position_embeddings": 4096}
    cpu, gpu = make_worlds(dtype, page_tokens, **shape, **changes, hidden_size=32)
    for world in (cpu, gpu):
        requests = [Request([1] * (cached + rows), max_tokens=1) for cached, rows in CASES]
        for request, (cached, _) in zip(requests, CASES, strict=True):
            if cached:
                world.step([(request, cached)])
        world.step([(request, rows) for request, (_, rows) in zip(requests, CASES, strict=True)])
    cpu.pool.kv.nan_to_num_(0.0).normal_(generator=torch.Generator().manual_seed(0))
    for request in requests:  # beyond the end of a sequence lies what was there before
        page, token = divmod(len(request.prompt), cpu.pool.page_tokens)
        if token:
            cpu.pool.kv[request.pages[page], :, :, token:] = torch.nan
    gpu.pool.kv.copy_(cpu.pool.kv)
    cpu.pool.kv.copy_(gpu.pool.kv)  # as rounded
    rows = sum(rows for _, rows in CASES)
    q = torch.randn(rows, heads, head_dim).to(DTYPES[dtype])
    expected = reference.paged_attention(q.float(), reference_batch(cpu), 1)
    step = prepare(gpu, rows, is_graph=is_graph)
    before = gpu.pool.pages.clone()
    on_device = q.cuda()
    got = cuda.paged_attention(on_device, step, 1)
    decode = sum(rows == 1 for _, rows in CASES)
    tolerance = 2 * TOLERANCES[dtype]
    print(error(got[:decode], expected[:decode]), error(got[decode:], expected[decode:]))
    assert error(got[:decode], expected[:decode]) < tolerance
    assert error(got[decode:], expected[decode:]) < tolerance
    for row in range(rows):
        assert error(got[row], expected[row]) < 4 * tolerance, row
    if is_graph:
        assert torch.equal(replayed(lambda: cuda.paged_attention(on_device, step, 1)), got)
    assert torch.equal(gpu.pool.pages, before)


def test_decode_does_not_depend_on_the_batch() -> None:
    config = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    _, gpu = make_worlds("bfloat16", **config, hidden_size=32)
    requests = [Request([1] * n, max_tokens=1) for n in (2000, 1, 77, 600)]
    for request in requests:
        gpu.step([(request, len(request.prompt) - 1)] if len(request.prompt) > 1 else [(request, 1)])
    gpu.pool.kv.normal_()
    q = torch.randn(4, 8, 128, device="cuda", dtype=torch.bfloat16)
    for request in requests:
        request.cached = len(request.prompt) - 1
    gpu.step([(request, 1) for request in requests])
    together = cuda.paged_attention(q, prepare(gpu, 4), 0)
    for i, request in enumerate(requests):
        request.cached = len(request.prompt) - 1
        gpu.step([(request, 1)])
        assert torch.equal(cuda.paged_attention(q[i : i + 1], prepare(gpu, 1), 0)[0], together[i])


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [(128, 8, 2, None), (128, 8, 2, 700), (64, 4, 4, None), (256, 8, 1, None), (64, 20, 1, None), (16, 8, 8, None)],
)
def test_decode_in_one_graph_does_not_depend_on_the_steps_before(
    head_dim: int, heads: int, kv_heads: int, window: int | None
) -> None:
    """One split, several, more than a warp has lanes, of other requests each time."""
    shape = {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    changes = {"model_type": "mistral", "sliding_window": window, "max_position_embeddings": 20000}
    _, gpu = make_worlds("bfloat16", **shape, **changes, hidden_size=32)
    requests = [Request([1] * n, max_tokens=1) for n in (1, 77, 512, 513, 1100, 2000, 17500)]
    gpu.pool.kv.normal_()
    q = torch.randn(1, heads, head_dim, device="cuda", dtype=torch.bfloat16).repeat(4, 1, 1)

    def step(chosen: list[int]) -> Step:
        for i in chosen:
            requests[i].cached, requests[i].state_row = len(requests[i].prompt) - 1, 0
        gpu.step([(requests[i], 1) for i in chosen])
        return prepare(gpu, len(chosen))

    alone = [cuda.paged_attention(q[:1], step([i]), 0)[0] for i in range(len(requests))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.paged_attention(q, gpu.runner._step, 0)
    chance = random.Random(0)
    for _ in range(100):
        chosen = chance.sample(range(len(requests)), 4)
        step(chosen)
        out.fill_(torch.nan)
        graph.replay()
        for row, i in enumerate(chosen):
            assert torch.equal(out[row], alone[i]), (chosen, i)


def test_decode_and_chunks_side_by_side_read_what_this_step_wrote() -> None:
    """Both start before the kernels before them have ended."""
    shape = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    _, gpu = make_worlds("bfloat16", **shape, hidden_size=32)
    cases = [(i * 10, 1) for i in range(63)] + [(0, 100), (700, 28)]
    requests = [Request([1] * (cached + rows), max_tokens=1) for cached, rows in cases]
    for request, (cached, _) in zip(requests, cases, strict=True):
        request.cached, request.state_row = cached, 0
    gpu.pool.kv.normal_()
    gpu.step([(request, rows) for request, (_, rows) in zip(requests, cases, strict=True)])
    rows = sum(rows for _, rows in cases)
    step = prepare(gpu, rows, is_graph=True)
    qkv = torch.empty(rows, 48 * 128, device="cuda", dtype=torch.bfloat16)

    def run(between: Callable[[], object]) -> torch.Tensor:
        outs = []
        for layer in range(2):
            q = cuda.rope_kv(qkv, None, step, layer, None, 1e-6)
            between()
            outs.append(cuda.paged_attention(q, step, layer))
            between()
        return torch.stack(outs)

    run(lambda: None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(lambda: None)
    for _ in range(50):
        qkv.normal_()
        graph.replay()
        got = out.clone()
        assert torch.equal(got, run(torch.cuda.synchronize))


@pytest.mark.parametrize("vocab", [5, 301, 3000, 128256])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_sample_equals_the_reference(vocab: int, spread: float) -> None:
    """Flat distributions, ties and wide filters included: the best tokens do not always decide."""
    n = 133
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(n, vocab, generator=generator) * spread
    logits[::3] = logits[::3].bfloat16().float()  # many equal ones
    params = random_filters(n, generator)
    expected = reference.sample(logits, *params)
    got = cuda.sample(logits.cuda(), *(p.cuda() for p in params)).cpu()
    wrong = (got != expected).nonzero()[:, 0].tolist()
    for row in wrong:  # only where the uniform number lies on the border of two tokens
        assert is_border(logits[row], tuple(p[row] for p in params), got[row]), [p[row] for p in params]
    assert len(wrong) <= 2
    rows = [0, 50, 132]
    alone = [cuda.sample(logits[i : i + 1].cuda(), *(p[i : i + 1].cuda() for p in params)).item() for i in rows]
    assert alone == got[rows].tolist()


def test_greedy_takes_the_first_of_equals_and_reports_what_is_not_finite() -> None:
    logits = torch.zeros(6, 1000)
    logits[1, [500, 30, 999]] = 3.0
    logits[2, 7] = torch.nan
    logits[3, 7] = torch.inf
    logits[4, 7] = -torch.inf
    logits[5] = -5.0
    logits[5, 999] = -4.0
    zeros, ones = torch.zeros(6), torch.ones(6)
    params = (zeros, zeros.int(), ones, zeros, zeros)
    got = cuda.sample(logits.cuda(), *(p.cuda() for p in params))
    assert got.tolist() == [0, 30, -1, -1, -1, 999]


def test_random_rows_use_their_uniform_numbers() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    n = 4000
    uniform = (torch.arange(n) + 0.5) / n
    ones = torch.ones(n)
    params = (ones, torch.zeros(n).int(), ones, torch.zeros(n), uniform)
    ids = cuda.sample(logits.expand(n, -1).contiguous().cuda(), *(p.cuda() for p in params)).cpu()
    counts = torch.bincount(ids, minlength=40)
    assert (counts / n - logits.softmax(-1)).abs().max() <= 1 / n + 1e-6


@pytest.mark.parametrize("k", [1, 5, 20])
def test_best_without_waiting(k: int) -> None:
    x = torch.randn(7, 5000).bfloat16().float()
    values, ids = reference.best(x.cuda(), k)
    expected = reference.best(x, k)
    assert torch.equal(values.cpu(), expected[0])
    assert torch.equal(ids.cpu(), expected[1])
