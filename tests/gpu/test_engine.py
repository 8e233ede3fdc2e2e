"""A whole engine on the device: nothing outside the pool is written, swapped-in pages are right, memory comes back."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import widen
from planning import World
from test_runner import make_requests, make_world

import slora
from slora import cuda_runner, memory
from slora.kernels import cudnn, page_copy
from slora.memory import DTYPES
from slora.outputs import Result

pytestmark = pytest.mark.gpu
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny"
BASE, ADAPTERS = EXAMPLE / "base", EXAMPLE / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())
TOLERANCE, BF16_TOLERANCE = 1e-4, 0.5
GUARD_BYTES, GUARD = 1 << 20, 0xA5
MOST_LEFT_BYTES = 64 << 20
OTHERS_BYTES = 256 << 20
"""Host memory that others on the machine may take meanwhile."""
DEVICE = "cuda"
Ask = tuple[list[int], str | None]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every pool that is made lies between two guards: whole buffers, filled."""
    whole: list[torch.Tensor] = []
    allocate = memory._allocate

    def between_guards(num_bytes: int, device: torch.device) -> torch.Tensor:
        buffer = allocate(num_bytes + 2 * GUARD_BYTES, device).fill_(GUARD)
        whole.append(buffer)
        return buffer[GUARD_BYTES:-GUARD_BYTES]

    monkeypatch.setattr(memory, "_allocate", between_guards)
    yield whole
    assert whole, "no pool was made"
    for buffer in whole:
        assert (buffer[:GUARD_BYTES] == GUARD).all(), "bytes before the pool were written"
        assert (buffer[-GUARD_BYTES:] == GUARD).all(), "bytes behind the pool were written"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_steps_write_nothing_outside_the_pool(guarded: list[torch.Tensor], dtype: str) -> None:
    rng = random.Random(7)
    world: World = make_world(DEVICE, dtype, with_adapters=True)
    for _ in range(4):
        requests = make_requests()
        for request in requests:
            request.adapter = rng.choice([*world.images, None])
        rng.shuffle(requests)
        world.generate(requests, rng.choice([30, 100, 700]), by_reference=True)
        for name in list(world.rows):
            world.evict(name)


def draw(seed: int, count: int) -> list[Ask]:
    rng, names = random.Random(seed), [*NAMES, None]
    return [
        ([1, *(rng.randrange(5, 250) for _ in range(rng.randint(1, 60)))], names[i % len(names)]) for i in range(count)
    ]


def run(llm: slora.LLM, asks: list[Ask], **sampling: Any) -> list[Result]:
    options = {"max_tokens": 12, "temperature": 0, "logprobs": 2, "ignore_eos": True} | sampling
    return llm.generate([ids for ids, _ in asks], adapter=[name for _, name in asks], **options)


def assert_same(got: list[Result], wanted: list[Result], tolerance: float = TOLERANCE) -> None:
    """Equal up to the first token whose two best were closer than rounding."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        for i, token in enumerate(theirs.token_ids):
            best, second = sorted(theirs.logprobs[i].values(), reverse=True)[:2]
            if ours.token_ids[i] != token:
                assert best - second < tolerance, f"token {i} of {theirs.adapter}: {ours.token_ids}, {theirs.token_ids}"
                break
            assert ours.logprobs[i][token] == pytest.approx(theirs.logprobs[i][token], abs=tolerance)


def make_copies_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a swap-in takes 0.6 ms more, with NaN in its pages meanwhile.

    By copies: a kernel might find no room beside those that wait for the pages.
    """
    copy = page_copy._copy
    host = torch.full((32 << 20,), 255, dtype=torch.uint8).pin_memory()
    device = torch.empty_like(host, device=DEVICE)

    def copy_late(targets: list[int], sources: list[int], num_bytes: int, stream: int) -> None:
        assert num_bytes <= len(host)
        copy(targets, [host.data_ptr()] * len(targets), num_bytes, stream)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            device.copy_(host, non_blocking=True)
        copy(targets, sources, num_bytes, stream)

    monkeypatch.setattr(page_copy, "_copy", copy_late)


@pytest.mark.filterwarnings("ignore:max_context is lowered")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cold_adapter_answers_like_a_resident_one(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """In a graph that waits for its pages, one request at a time: the same shapes, so the same bits."""
    asks = draw(3, 33)
    with slora.LLM(BASE, adapters=ADAPTERS, device=DEVICE, dtype=dtype, pool_bytes=1 << 28) as llm:
        wanted = [run(llm, [ask])[0] for _ in range(2) for ask in asks][len(asks) :]
    make_copies_late(monkeypatch)
    pool_bytes = 56 * (1 << 14) * DTYPES[dtype].itemsize  # for two or three of the ten
    with slora.LLM(BASE, adapters=ADAPTERS, device=DEVICE, dtype=dtype, pool_bytes=pool_bytes, max_running=8) as llm:
        for shuffled in range(4):
            order = random.Random(shuffled).sample(range(len(asks)), len(asks))
            assert_same([run(llm, [asks[i]])[0] for i in order], [wanted[i] for i in order])
        assert llm.stats().swap_ins > 20, llm.stats()


@pytest.mark.filterwarnings("ignore:max_context is lowered")
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"pool_bytes": 56 << 16, "max_running": 8},
        {"pool_bytes": 44 << 16, "max_running": 16},
        {"pool_bytes": 56 << 16, "host_bytes": 48 << 16, "max_running": 4},
        {"pool_bytes": 70 << 16, "max_batch_tokens": 40, "prefetch": False},
    ],
)
def test_swap_ins_into_pages_just_freed_under_load(
    guarded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_late: bool
) -> None:
    """A pool for two or three of ten adapters: every step frees pages of one and fills them with another's."""
    asks = draw(1, 44)
    with slora.LLM(BASE, adapters=ADAPTERS, device="cpu", dtype="float32") as llm:
        wanted = run(llm, asks)
    if is_late:
        make_copies_late(monkeypatch)
    with slora.LLM(BASE, adapters=ADAPTERS, device=DEVICE, dtype="float32", **options) as llm:
        deadline = time.monotonic() + 60
        for shuffled in range(12):
            order = random.Random(shuffled).sample(range(len(asks)), len(asks))
            assert_same(run(llm, [asks[i] for i in order]), [wanted[i] for i in order])
            assert time.monotonic() < deadline
        stats = llm.stats()
    assert stats.adapter_evictions > 20, stats
    assert stats.swap_ins > 20, stats


def free_bytes() -> tuple[int, int]:
    """(of the device, of the host)"""
    torch.cuda.synchronize()
    lines = Path("/proc/meminfo").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return torch.cuda.mem_get_info()[0], host


def test_close_returns_device_and_pinned_memory() -> None:
    """The first engine leaves what libraries loaded; another leaves nothing."""
    left = []
    for _ in range(3):
        before = free_bytes()
        with slora.LLM(
            BASE, adapters=ADAPTERS, device="cuda", dtype="bfloat16", pool_bytes=4 << 30, host_bytes=3 << 30
        ) as llm:
            run(llm, draw(2, 30))
            assert before[0] - free_bytes()[0] > 4 << 30
        after = free_bytes()
        left.append((before[0] - after[0], before[1] - after[1]))
    for device, host in left[1:]:
        assert device < MOST_LEFT_BYTES, f"device memory is left: {left}"
        assert host < MOST_LEFT_BYTES + OTHERS_BYTES, f"pinned memory is left: {left}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_an_engine_stays_on_its_device() -> None:
    """The second one's, while the first is this thread's, and beside an engine there."""
    before = torch.cuda.memory_allocated(0)
    options = {"dtype": "bfloat16", "pool_bytes": 64 << 20, "host_bytes": 64 << 20}
    prompts, names = ["hello", "abc"] * 4, [None, *NAMES][:8]
    results = []
    with slora.LLM(BASE, adapters=ADAPTERS, device="cuda:1", **options) as second:
        assert torch.cuda.current_device() == 0
        assert torch.cuda.memory_allocated(0) == before
        with slora.LLM(BASE, adapters=ADAPTERS, device="cuda:0", **options) as first:
            for llm in (second, first, second):
                found = llm.generate(prompts, adapter=names, max_tokens=16, temperature=0)
                results.append([result.token_ids for result in found])
    assert results[0] == results[1] == results[2]
    assert torch.cuda.current_device() == 0


def test_adapters_of_large_ranks_answer_as_their_equals_do(tmp_path: Path) -> None:
    """In bf16, where clusters have no room for them."""
    widen(ADAPTERS / "count", tmp_path / "wide", 16)
    adapters = {"count": ADAPTERS / "count", "wide": tmp_path / "wide", "upper": ADAPTERS / "upper"}
    options = {"dtype": "bfloat16", "pool_bytes": 64 << 20, "host_bytes": 64 << 20, "max_rank": 384}
    asks = [(ids, (None, "count", "upper")[i % 3]) for i, (ids, _) in enumerate(draw(8, 30))]
    wide = [(ids, "wide" if name == "count" else name) for ids, name in asks]
    with slora.LLM(BASE, adapters=adapters, device=DEVICE, **options) as llm:
        wanted = run(llm, asks)
        for _ in range(4):  # from recorded graphs at last
            found = run(llm, wide)
            assert_same(found, wanted, BF16_TOLERANCE)
        assert_same([run(llm, [ask])[0] for ask in wide[:6]], wanted[:6], BF16_TOLERANCE)
    same = [got.token_ids == want.token_ids for got, want in zip(found, wanted, strict=True) if got.adapter == "wide"]
    assert sum(same) > len(same) / 2, "they may differ where two tokens were near, which is seldom"


def test_no_memory_for_graphs_changes_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asks = draw(9, 20)
    options = {"device": DEVICE, "dtype": "bfloat16", "pool_bytes": 64 << 20, "host_bytes": 64 << 20}
    with slora.LLM(BASE, adapters=ADAPTERS, **options) as llm:
        wanted = run(llm, asks)
    monkeypatch.setattr(cuda_runner, "spare_bytes", lambda *sizes: 1 << 60)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: pytest.fail("recorded"))
    with slora.LLM(BASE, adapters=ADAPTERS, **options) as llm:
        for _ in range(3):
            assert_same(run(llm, asks), wanted, BF16_TOLERANCE)
    assert ["there are 0, and" in record.getMessage() for record in caplog.records] == [True]


def test_engines_come_and_go_beside_one_that_works() -> None:
    """Its shapes come for the first time, and are recorded, while the others record theirs and free them."""
    options = {"device": DEVICE, "dtype": "bfloat16", "pool_bytes": 64 << 20, "host_bytes": 64 << 20}
    is_over = threading.Event()

    def work(llm: slora.LLM) -> int:
        rng, num_done = random.Random(5), 0
        while not is_over.is_set():
            some = rng.sample(range(len(asks)), rng.randint(1, len(asks)))
            assert_same(run(llm, [asks[i] for i in some]), [wanted[i] for i in some], BF16_TOLERANCE)
            num_done += 1
        return num_done

    asks = draw(4, 60)
    with slora.LLM(BASE, adapters=ADAPTERS, **options) as llm, ThreadPoolExecutor(1) as threads:
        wanted = run(llm, asks)
        working = threads.submit(work, llm)
        try:
            for _ in range(3):
                with slora.LLM(BASE, adapters=ADAPTERS, **options) as other:
                    assert_same(run(other, asks), wanted, BF16_TOLERANCE)
        finally:
            is_over.set()
        assert working.result() > 3


@pytest.mark.skipif(not cudnn.is_available(), reason="nvidia-cudnn-frontend is not installed")
def test_prompts_are_answered_where_cudnn_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 513 rows and more, which are cuDNN's otherwise."""
    rng = random.Random(6)
    asks: list[Ask] = [([1, *(rng.randrange(5, 250) for _ in range(n))], NAMES[n % 3]) for n in (300, 400, 250)]
    options = {"device": DEVICE, "dtype": "bfloat16", "pool_bytes": 64 << 20, "host_bytes": 64 << 20}
    with slora.LLM(BASE, adapters=ADAPTERS, **options) as llm:
        wanted = run(llm, asks)
    assert not caplog.records

    def refuse(self: cudnn.PrefillAttention, *size: object) -> None:
        raise self._cudnn.cudnnGraphNotSupportedError("no engine has such a head dimension")

    monkeypatch.setattr(cudnn.PrefillAttention, "_build", refuse)
    with slora.LLM(BASE, adapters=ADAPTERS, **options) as llm:
        assert_same(run(llm, asks), wanted, BF16_TOLERANCE)
    assert ["a kernel of our own" in record.getMessage() for record in caplog.records] == [True]
