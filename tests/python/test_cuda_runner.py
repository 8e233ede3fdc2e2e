"""Which way a step takes to the device, and what its errors become: decided on the host, so no device is needed."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE

from slora import engine
from slora.cuda_runner import CudaRunner, StepShape
from slora.engine import choose_device
from slora.errors import ConfigError, DeviceError
from slora.graphs import RECORDED_RUN, Graphs
from slora.kernels import upload
from slora.kernels.attention import SPLIT_TOKENS, Attention
from slora.kernels.cudnn import PrefillAttention, UnsupportedError, usual_sizes
from slora.kernels.descriptors import DeviceTables
from slora.kernels.lora import MAX_SEGMENTS, UNIT_RANKS
from slora.kernels.nvrtc import cached_by_device
from slora.kernels.streams import RECORDING
from slora.options import Options
from slora.plan import HAS_LORA, Counts

pytestmark = pytest.mark.cpu_only(reason="what the host decides, on a device that is not there")

SHARED_MEMORY = {
    name: SimpleNamespace(shared_memory_per_multiprocessor=most << 10, shared_memory_per_block_optin=most - 1 << 10)
    for name, most in {"sm_89": 100, "sm_80": 164, "sm_90": 228}.items()
}
NOTHING = Counts(*[0] * len(Counts._fields))


def fake_runner(log: list[str]) -> Any:
    """A runner that notes down what it enqueues."""
    runner: Any = CudaRunner.__new__(CudaRunner)
    note = log.append
    runner._copies = SimpleNamespace(
        issue=lambda plan, wait_for: note(f"copies behind {wait_for}"), wait=lambda step: note(f"wait for {step}")
    )
    runner._step = SimpleNamespace(
        ids=torch.zeros(0),
        prepare=lambda num_rows, **_: note(f"prepare {num_rows}"),
        attention=SimpleNamespace(is_tensor_core=True),
        lora=SimpleNamespace(has_clusters=True),
    )
    runner._plan, runner._staging = (
        SimpleNamespace(upload=lambda plan, how: how()),
        SimpleNamespace(copy=lambda: note("upload")),
    )
    runner._tables = SimpleNamespace(update=lambda plan, mirror: None, has_large=lambda plan: False)
    runner._sampler = SimpleNamespace(reset=lambda plan: None)
    runner._decoder = SimpleNamespace(forward=lambda ids, step: note("layers"))
    runner._graphs = SimpleNamespace(run=lambda key, body: note(f"replay {key.num_rows}"))
    runner._returning = SimpleNamespace(wait_stream=lambda stream: note(f"return behind {stream}"))
    runner._hidden, runner._num_launched, runner._ends = torch.zeros(512, 1), 0, {}
    return runner


def fake_plan(**counts: int) -> Any:
    return SimpleNamespace(
        counts=NOTHING._replace(num_requests=1, num_segments=1, flags=HAS_LORA, **counts),
        array=lambda name: np.array([0, counts["num_rows"]]),
    )


@pytest.mark.parametrize(("num_rows", "expected"), [(1, "replay 1"), (500, "replay 504"), (513, "prepare 513")])
def test_steps_are_graphs_up_to_512_rows(num_rows: int, expected: str) -> None:
    log: list[str] = []
    plan = fake_plan(num_rows=num_rows)
    fake_runner(log)._forward(StepShape.of(plan.counts), plan)
    assert log[0] == expected


@pytest.mark.parametrize(
    ("num_decode", "max_seq_len", "has_splits"), [(1, 512, False), (1, 513, True), (0, 513, False)]
)
def test_decode_rows_of_several_splits_have_a_shape_of_their_own(
    num_decode: int, max_seq_len: int, has_splits: bool
) -> None:
    """A graph without a merge must never run for them."""
    counts = NOTHING._replace(num_rows=3, num_requests=1, num_decode=num_decode, max_seq_len=max_seq_len)
    assert StepShape.of(counts).has_splits == has_splits


@pytest.mark.parametrize("is_tensor_core", [True, False])
def test_only_kernels_that_split_have_graphs_for_splits(is_tensor_core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner = fake_runner([])
    runner._step.attention.is_tensor_core = is_tensor_core
    recorded: list[Any] = []
    runner._graphs = SimpleNamespace(
        record=lambda key, body: recorded.append(key), run=lambda key, body: used.append(key)
    )
    runner._plan = SimpleNamespace(clear=lambda: None, capacity={"sample_rows": 8})
    runner.record_graphs(most_rows=8, show=False)
    used: list[Any] = []
    for max_seq_len in (512, 513):
        counts = fake_plan(num_rows=3, num_decode=1, max_seq_len=max_seq_len).counts
        runner._forward(StepShape.of(counts), None)
    assert set(used) <= set(recorded)
    assert len(set(used)) == (2 if is_tensor_core else 1)
    assert len(recorded) == 4 * (4 if is_tensor_core else 2) + 4


def test_host_and_kernels_cut_sequences_alike() -> None:
    source = (Path(__file__).parents[2] / "cuda" / "splits.cuh").read_text()
    assert f"constexpr int SPLIT_TOKENS = {SPLIT_TOKENS};" in source
    assert "split_of(int position) { return position / SPLIT_TOKENS; }" in source


def test_a_shape_that_comes_often_is_recorded() -> None:
    log: list[str] = []
    graphs: Any = Graphs.__new__(Graphs)
    graphs._graphs, graphs._num_runs = {}, {}

    def record(key: str, body: Callable[[], object]) -> None:
        log.append(f"record {key}")
        graphs._graphs[key] = SimpleNamespace(replay=lambda: log.append(f"replay {key}"))

    graphs.record = record
    for key in ("often", "seldom", "often", "seldom", "often", "often"):
        graphs.run(key, lambda key=key: log.append(key))
    assert log == ["often", "seldom", "often", "seldom", "record often", "replay often"]


def test_no_graph_is_recorded_into_the_last_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spare = 1 << 20
    free = [spare]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: pytest.fail("recorded"))
    log: list[str] = []
    graphs: Any = Graphs.__new__(Graphs)
    graphs._device, graphs._graphs, graphs._num_runs, graphs._has_room = None, {"old": None}, {}, True
    graphs._spare_bytes = spare
    assert graphs._check_room()
    free[0] -= 1
    graphs.record("start", lambda: log.append("start"))
    for _ in range(RECORDED_RUN + 2):
        graphs.run("often", lambda: log.append("often"))
    assert log == ["start", *["often"] * (RECORDED_RUN + 2)]
    assert ["more graphs: there are 1, and" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("rank", [UNIT_RANKS, UNIT_RANKS + 1])
def test_the_tables_know_whose_ranks_are_large(rank: int) -> None:
    tables: Any = DeviceTables.__new__(DeviceTables)
    tables.num_modules, tables._large_rows, tables.modules, tables.pages = 14, set(), None, torch.zeros(8, 4)
    tables._kernel = lambda *launch: None

    def bring(*rows: int) -> None:
        """A plan that brings descriptors for these rows, with `rank` in one linear."""
        modules = np.full((32, 14, 12), 99999, np.int32)  # beyond what changed lies anything
        modules[: len(rows), :, 0] = 3
        modules[: len(rows), 13, 0] = rank
        arrays = {"changed_rows": np.array(rows, np.int32), "changed_modules": modules.reshape(-1)}
        plan: Any = SimpleNamespace(counts=NOTHING._replace(num_changed=len(rows)), array=arrays.__getitem__)
        tables.update(plan, dict.fromkeys(("changed_rows", "changed_pages_indptr", "changed_pages", "changed_modules")))

    def has_large(*segments: int) -> bool:
        return bool(tables.has_large(SimpleNamespace(array=lambda name: np.array(segments, np.int32))))

    is_large = rank > UNIT_RANKS
    bring(2, 7)
    assert [has_large(0, 2, -1), has_large(7), has_large(0, -1)] == [is_large, is_large, False]
    rank = 8  # another adapter takes the place
    bring(7)
    assert [has_large(7, 0), has_large(2)] == [False, is_large]


@pytest.mark.parametrize(("has_prefill", "has_clusters"), [(False, True), (True, True), (False, False)])
def test_large_ranks_have_graphs_of_their_own_where_other_kernels_serve_them(
    has_prefill: bool, has_clusters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    keys: list[StepShape] = []
    runner = fake_runner([])
    runner._graphs.run = lambda key, body: keys.append(key)
    runner._step.lora.has_clusters = has_clusters
    for is_large in (False, True):
        runner._tables.has_large = lambda plan, is_large=is_large: is_large
        runner.launch(fake_plan(num_rows=3, num_decode=0 if has_prefill else 1))
    assert [key.has_large for key in keys] == [False, has_clusters and not has_prefill]


def test_no_two_engines_use_the_streams_for_recording_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies have branches on them, recorded or not. A collection might wait for a step thread that waits for them."""
    is_alone: list[bool] = []
    graphs: Any = Graphs.__new__(Graphs)
    graphs._graphs, graphs._num_runs, graphs._memory, graphs._check_room = {}, {}, None, lambda: True
    graphs._stream = SimpleNamespace(wait_stream=lambda stream: None)
    recorded = SimpleNamespace(capture_begin=lambda **_: None, capture_end=lambda: None, replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for _ in range(RECORDED_RUN + 1):
        graphs.run("key", lambda: is_alone.append(RECORDING.locked() and not gc.isenabled()))
    assert is_alone == [True] * (RECORDED_RUN + 1), "the last but one is run and recorded, the last replayed"
    assert gc.isenabled()
    assert not RECORDING.locked()


@pytest.mark.parametrize("most_rows", [520, 2048, 8192])
def test_attention_of_prompts_of_one_length_is_built_at_the_start(most_rows: int) -> None:
    built = [*usual_sizes(range(513, most_rows + 1), max_requests=256)]
    assert len(set(built)) == len(built) < 50
    for requests in range(1, 257):
        for query_len in range(max(1, 513 // requests), most_rows // requests + 1):
            sizes = [1 << (n - 1).bit_length() for n in (requests, query_len)]
            assert (sizes[0], max(64, sizes[1])) in built, f"{requests} prompts of {query_len} tokens"


class NotSupportedError(Exception):
    """As cuDNN's own: no RuntimeError."""


@pytest.mark.parametrize(
    ("head_dim", "group", "served"),
    [
        (128, 8, {"sm_80", "sm_89", "sm_90"}),
        (128, 16, {"sm_80", "sm_90"}),
        (256, 8, {"sm_90"}),
        (96, 70, set()),
    ],
)
def test_attention_on_tensor_cores_needs_room_for_its_ring(head_dim: int, group: int, served: set[str]) -> None:
    found = set()
    for name, properties in SHARED_MEMORY.items():
        attention: Any = Attention.__new__(Attention)
        attention.dtype, attention.group, attention.config = torch.bfloat16, group, SimpleNamespace(head_dim=head_dim)
        attention._properties = properties
        if attention.is_tensor_core:
            found.add(name)
    assert found == served


@pytest.fixture(params=[NotSupportedError("hidden_dim should be at most 128"), RuntimeError("no engine")], ids=repr)
def refusing(request: pytest.FixtureRequest) -> Any:
    """Attention by a cuDNN that refuses all sizes."""

    def refuse(*size: object) -> None:
        raise request.param

    attention: Any = Attention.__new__(Attention)
    prompts: Any = PrefillAttention.__new__(PrefillAttention)
    prompts._cudnn = SimpleNamespace(cudnnGraphNotSupportedError=NotSupportedError)
    prompts.pool, prompts.config = SimpleNamespace(page_tokens=16), SimpleNamespace(windows=[None, 4096])
    prompts.plan = SimpleNamespace(capacity={"seq_lens": 64})
    prompts._graphs, prompts._width, prompts._build = {}, 1, refuse
    attention._cudnn = prompts
    return attention


def test_where_cudnn_refuses_our_own_kernel_attends_prompts(refusing: Any, caplog: pytest.LogCaptureFixture) -> None:
    refusing.warm_up(4096, range(513, 513))  # no step is so large that it needs cuDNN
    assert refusing._cudnn is not None
    assert not caplog.records
    refusing.warm_up(4096, range(513, 2049))
    assert "a kernel of our own" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    launched = []
    refusing.dtype, refusing.group, refusing.config = torch.bfloat16, 1, SimpleNamespace(head_dim=256, q_size=256)
    refusing._properties = SHARED_MEMORY["sm_90"]
    refusing._run_chunks = lambda q, out, layer, is_beside_decode: launched.append(is_beside_decode)
    refusing.run(torch.zeros(600, 1, 256), 0, has_decode=False, has_prefill=True, has_splits=False, is_graph=False)
    assert launched == [False]


def test_a_size_that_cudnn_refuses_later_ends_nothing(refusing: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompts = refusing._cudnn
    with pytest.raises(UnsupportedError, match=r"cuDNN does not attend 2 prompts of 512 rows.*hint: "):
        prompts._graph(2, 512, 64, None)
    counts = NOTHING._replace(num_requests=2, max_query_len=512)
    prompts.plan = refusing.plan = SimpleNamespace(counts=counts)
    prompts.pool, refusing.pool = SimpleNamespace(page_tokens=16, device=None), None
    refusing.is_tensor_core, refusing._windows = True, []
    refusing.prepare(is_graph=True)
    assert refusing._cudnn is prompts
    refusing.prepare(is_graph=False)
    assert refusing._cudnn is None
    assert "a kernel of our own: cuDNN does not attend 2 prompts of 512 rows" in caplog.text


def test_copies_are_enqueued_before_the_kernels_that_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: log.append("end")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    log: list[str] = []
    runner = fake_runner(log)
    runner._ends = {6: "step 6"}
    runner.launch(fake_plan(step=7, num_rows=500, num_copies=3, copies_wait_step=6, copies_needed_step=7))
    assert log == ["copies behind step 6", "wait for 7", "upload", "replay 504", "return behind main", "end"]


def test_a_plan_is_staged_beside_the_steps_and_never_over_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are numbered in the order in which they are recorded; 0: never."""
    log: list[tuple[object, ...]] = []
    recorded = iter(range(1, 100))

    class Event:
        number = 0

        def record(self, stream: object) -> None:
            self.number = next(recorded)
            log.append((stream, "record", self.number))

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = self.cuda_stream = name

        def __repr__(self) -> str:
            return self.name

        def wait_event(self, event: Event) -> None:
            log.append((self, "wait", event.number))

        def wait_stream(self, stream: object) -> None:
            pass

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)

    def launch(grid: int, block: int, args: tuple[torch.Tensor, torch.Tensor, int], stream: str) -> None:
        source, target, n = args
        target[:n] = source[:n]
        log.append((side if stream == "side" else main, "copy", target.data_ptr()))

    monkeypatch.setattr(upload, "_kernel", lambda: launch)
    staging, mirror = upload.Staging(1000, torch.device("cpu")), torch.zeros(1000, dtype=torch.int32)
    for i in range(1, 2 * upload.SLOTS + 1):
        log.clear()
        staging.copy(mirror[10 : 10 + i], torch.arange(i, dtype=torch.int32) + 100 * i)
        assert mirror[10 : 10 + i].tolist() == list(range(100 * i, 101 * i))
        filled, emptied_before = 2 * i - 1, max(0, 2 * (i - upload.SLOTS))
        slot = staging._slots[(i - 1) % upload.SLOTS].words.data_ptr()
        assert log == [
            (side, "wait", emptied_before),
            (side, "copy", slot),
            (side, "record", filled),
            (main, "wait", filled),
            (main, "copy", mirror[10:].data_ptr()),
            (main, "record", filled + 1),
        ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no bytes left"), RuntimeError("no bytes left")])
def test_what_the_device_reports_is_a_device_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runner: CudaRunner, plan: object) -> None:
        raise error

    monkeypatch.setattr(CudaRunner, "_launch", fail)
    with pytest.raises(DeviceError, match="a step failed on the device: no bytes left"):
        CudaRunner.__new__(CudaRunner).launch(None)  # type: ignore[arg-type]


def test_a_start_without_memory_is_a_device_error_with_a_hint() -> None:
    def fail(*sizes: object) -> None:
        raise torch.OutOfMemoryError("no bytes left")

    runner = fake_runner([])
    runner._plan = SimpleNamespace(capacity={"token_ids": 1024})
    runner._step.attention.warm_up = fail
    with pytest.raises(DeviceError, match=r"first steps failed.*no bytes left; hint: .*max_rank"):
        runner.warm_up(64)


def test_no_more_requests_run_than_a_step_has_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "choose_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="max_running = 1025: at most 1024 on a CUDA device"):
        engine.Engine(BASE, Options(max_running=MAX_SEGMENTS + 1))


def test_a_bug_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runner: CudaRunner, plan: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(CudaRunner, "_launch", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        CudaRunner.__new__(CudaRunner).launch(None)  # type: ignore[arg-type]


def test_the_device_is_the_threads_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    chosen = [choose_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")]
    assert [str(device) for device in chosen] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    with pytest.raises(ConfigError, match="torch sees 2"):
        choose_device("cuda:2")


def test_kernels_are_kept_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])

    @cached_by_device
    def make(name: str) -> list[str]:
        return [name]

    first = make("a")
    assert make("a") is first
    assert make("b") is not first
    current[0] = 1
    assert make("a") is not first
