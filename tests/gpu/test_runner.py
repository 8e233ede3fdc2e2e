"""The same plans on the CPU and on the device: tokens, log-probabilities, overlap, swap-ins."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from planning import Request, World
from test_kernels import make_modules

from slora.graphs import RECORDED_RUN
from slora.host import PinnedSlabs
from slora.memory import HostTier
from slora.models.config import ModelConfig
from slora.plan import Counts, StepPlan
from slora.runner import Pending, StepOutput
from slora.weights import load_weights

page_copy = pytest.importorskip("slora.kernels.page_copy")
PageCopies, DevicePinning = page_copy.PageCopies, page_copy.DevicePinning
Staging = pytest.importorskip("slora.kernels.upload").Staging
pytestmark = pytest.mark.gpu
BASE = Path(__file__).parents[2] / "examples" / "tiny" / "base"
SAMPLING = {"temperature": 0.9, "top_p": 0.9}
PENALTIES = {"repetition": 1.3, "presence": 0.4, "frequency": 0.7}


def make_world(device: str, dtype: str = "float32", *, with_adapters: bool = False) -> World:
    config = ModelConfig.from_dir(BASE)
    weights = load_weights(config, BASE, dtype=dtype, device=device, progress=False)
    adapters = {f"r{rank}": make_modules(config, rank) for rank in (1, 7, 16, 58)} if with_adapters else {}
    adapters |= {"mlp": make_modules(config, 5, (4, 6))} if with_adapters else {}
    return World(config, weights, adapters, dtype=dtype, device=device, num_pages=1600, page_tokens=32)


def make_requests(**changes: object) -> list[Request]:
    kinds = [{}, {"sampling": SAMPLING, "uniforms": [0.1, 0.5, 0.93, 0.2, 0.7, 0.4]}, {"sampling": PENALTIES}]
    kinds += [{"bias": {11: 3.0, 12: -torch.inf}}, {"logprobs": 4}, {"prompt_logprobs": 2}]
    lens = (5, 1, 40, 133, 300, 17, 64, 2)
    return [
        Request([(7 * i + 3 * j) % 97 for j in range(n)], max_tokens=6, **kinds[i % len(kinds)], **changes)
        for i, n in enumerate(lens * 2)
    ]


@pytest.mark.parametrize("chunk", [1000, 48])
def test_the_device_gives_the_tokens_of_the_cpu(chunk: int) -> None:
    worlds = [make_world(device) for device in ("cpu", "cuda")]
    results = []
    for world in worlds:
        for _ in range(RECORDED_RUN + 1):  # at last from recorded graphs
            requests = make_requests()
            world.generate(requests, chunk, by_reference=True)
        results.append(requests)
    for cpu, gpu in zip(*results, strict=True):
        assert cpu.output == gpu.output
        for got, expected in ((gpu.chosen, cpu.chosen), (gpu.prompt_chosen, cpu.prompt_chosen)):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-4, rtol=1e-4)
        for a, b in zip(cpu.best, gpu.best, strict=True):
            assert list(a) == list(b)


def test_adapters_give_the_tokens_of_the_cpu() -> None:
    """Swapped in by the plan that first uses them, at ranks that differ by module; two adapters trade places."""
    results = []
    for device in ("cpu", "cuda"):
        world = make_world(device, with_adapters=True)
        for _ in range(RECORDED_RUN + 1):  # at last from recorded graphs
            requests = make_requests()
            for i, request in enumerate(requests):
                request.adapter = (*world.images, None)[i % 6]
            world.generate(requests, 100, by_reference=True)
            for name in ("r1", "r58"):
                world.evict(name)
        results.append(requests)
    for cpu, gpu in zip(*results, strict=True):
        assert cpu.output == gpu.output
        torch.testing.assert_close(torch.tensor(gpu.chosen), torch.tensor(cpu.chosen), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str) -> None:
    cpu, gpu = make_world("cpu"), make_world("cuda", dtype)
    vocab = cpu.config.vocab_size
    found = []
    for world in (cpu, gpu):
        requests = [dataclasses.replace(r, sampling={}, bias={}, max_tokens=1, logprobs=vocab) for r in make_requests()]
        world.generate(requests, 100)
        found.append(torch.stack([torch.tensor([best[i] for i in range(vocab)]) for r in requests for best in r.best]))
    centred = [logits - logits.mean(-1, keepdim=True) for logits in found]
    assert (centred[0] - centred[1]).norm() / centred[0].norm() < 2e-2
    assert (found[0].argmax(-1) == found[1].argmax(-1)).float().mean() >= 0.9


def test_sequences_that_outgrow_their_first_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs without a merge serve them before, others after, as if all had one."""
    cuda_runner = pytest.importorskip("slora.cuda_runner")
    shapes, of = [], cuda_runner.StepShape.of
    found = []
    for always in (False, True):

        def shape_of(counts: Counts, always: bool = always) -> object:
            shape = of(counts)
            shapes.append((counts.max_seq_len, shape))
            return shape._replace(has_splits=shape.has_decode) if always else shape

        monkeypatch.setattr(cuda_runner.StepShape, "of", shape_of)
        world = make_world("cuda", "bfloat16")
        requests = [
            Request([(7 * i + 3 * j) % 97 for j in range(n)], max_tokens=40) for i, n in enumerate((480, 3, 490))
        ]
        world.generate(requests, by_reference=True)
        found.append([(request.output, request.chosen) for request in requests])
    assert found[0] == found[1]
    assert {shape.has_splits for seq_len, shape in shapes if seq_len <= 512} == {False}
    assert {shape.has_splits for seq_len, shape in shapes if seq_len > 512} == {True}


def test_a_broken_row_is_reported_alone() -> None:
    world = make_world("cuda")
    world.runner._decoder.weights.embed[5] = torch.nan
    broken, fine = Request([7, 5, 9], max_tokens=3), Request([7, 6, 9], max_tokens=3)
    world.generate([broken, fine], by_reference=True)
    assert broken.output == [-1, -1, -1]
    alone = Request([7, 6, 9], max_tokens=3)
    world.generate([alone])
    assert fine.output == alone.output


def test_steps_may_be_launched_before_the_one_before_has_ended() -> None:
    """Recorded plans, whose tokens refer to the step before, from a ring of three buffers with two in flight."""
    world = make_world("cuda")
    recorded: list[tuple[torch.Tensor, list[int]]] = []
    run = world.runner.run

    def record(plan: StepPlan) -> StepOutput:
        output = run(plan)
        recorded.append((plan.buffer.clone(), output.ids.tolist()))
        return output

    world.runner.run = record
    requests = make_requests()
    for request in requests:
        request.max_tokens = 20
        request.uniforms *= 4
    world.generate(requests, 100, by_reference=True)
    buffers = [torch.zeros_like(world.buffer).pin_memory() for _ in range(3)]
    plans = [StepPlan(buffer, world.layout) for buffer in buffers]
    pending: list[tuple[Pending, list[int]]] = []
    for i, (words, expected) in enumerate(recorded):
        buffers[i % 3].copy_(words)
        plans[i % 3].refresh()
        pending.append((world.runner.launch(plans[i % 3]), expected))
        if len(pending) == 2:
            launched, ids = pending.pop(0)
            assert launched.result().ids.tolist() == ids
    assert pending[0][0].result().ids.tolist() == pending[0][1]


def test_swap_ins_bring_the_pages_and_say_so() -> None:
    world = make_world("cuda")
    pool = world.pool
    slabs = PinnedSlabs(300 * pool.page_bytes, pool.page_bytes, DevicePinning(pool.device), 64 * pool.page_bytes)
    host = HostTier(slabs.slabs, pool.page_bytes)
    host.page(299).fill_(299 % 251)  # before it is pinned
    ready: list[int] = []
    failures: list[str] = []
    slabs.prepare(ready.append, failures.append)
    deadline = time.monotonic() + 30
    while len(ready) < 4:
        assert not failures
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for i in range(299):
        host.page(i).fill_(i % 251)
    copies = PageCopies(pool, host)
    num_layers = world.config.num_layers
    done: list[int] = []
    expected = {}
    for step in range(1, 4):
        sources = torch.randperm(300)[:100].tolist()
        targets = list(range(step * 100, step * 100 + 100))
        expected |= dict(zip(targets, sources, strict=True))
        scalars = {"step": step, "num_copies": 100}
        layers = [i * num_layers // 100 for i in range(100)]
        world.write({"copy_host_pages": sources, "copy_pages": targets, "copy_layers": layers}, scalars)
        busy = torch.cuda.Event()
        torch.cuda._sleep(1_000_000)
        busy.record()
        copies.issue(world.plan, busy)
    while int(copies.arrived) < 3 << 32 | num_layers:
        assert time.monotonic() < deadline
    for page, source in expected.items():
        assert pool.pages[page].unique().tolist() == [source % 251]
    done += copies.done()
    assert done == [1, 2, 3]
    copies.close()
    slabs.close()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 133])
def test_batch_sizes_of_all_buckets(n: int) -> None:
    """Padding rows of a bucket change nothing: each request gets what it gets alone."""
    world = make_world("cuda")
    prompts = [[(5 * i + j) % 97 for j in range(1 + i % 7)] for i in range(n)]
    requests = [Request(prompt, max_tokens=3) for prompt in prompts]
    world.generate(requests, by_reference=True)
    for prompt, request in list(zip(prompts, requests, strict=True))[:: max(1, n // 5)]:
        alone = Request(prompt, max_tokens=3)
        world.generate([alone])
        assert alone.output == request.output
        torch.testing.assert_close(torch.tensor(alone.chosen), torch.tensor(request.chosen), atol=1e-4, rtol=1e-4)


def test_close_returns_the_memory() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    world = make_world("cuda")
    world.generate(make_requests(), 100)
    world.runner.close()
    del world
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20


def test_plans_wait_on_the_device_for_their_turn() -> None:
    """Uploads run far ahead of a stream that is busy, no further than there are slots."""
    sizes = [1, 5, 1023, 1024, 1025, 70_000, 300_000]
    staging = Staging(max(sizes), torch.device("cuda"))
    sources = [torch.randint(1 << 30, (size,), dtype=torch.int32).pin_memory() for size in sizes * 4]
    mirror, seen = torch.zeros(max(sizes), dtype=torch.int32, device="cuda"), []
    for source in sources:
        torch.cuda._sleep(1_000_000)
        staging.copy(mirror[: len(source)], source)
        seen.append(mirror[: len(source)].clone())
    for got, source in zip(seen, sources, strict=True):
        assert torch.equal(got.cpu(), source)
