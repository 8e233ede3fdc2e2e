"""Which way a step takes to the device, and what its errors become: decided on the host, so no device is needed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slora.cuda_runner import CudaRunner, StepShape
from slora.errors import DeviceError
from slora.kernels.cudnn import usual_sizes
from slora.plan import HAS_LORA, Counts

pytestmark = pytest.mark.cpu_only(reason="what the host decides, on a device that is not there")

NOTHING = Counts(*[0] * len(Counts._fields))


def fake_runner(log: list[str]) -> Any:
    """A runner that notes down what it enqueues."""
    runner: Any = CudaRunner.__new__(CudaRunner)
    note = log.append
    runner._copies = SimpleNamespace(
        issue=lambda plan, wait_for: note(f"copies behind {wait_for}"), wait=lambda step: note(f"wait for {step}")
    )
    runner._step = SimpleNamespace(ids=torch.zeros(0), prepare=lambda num_rows, **_: note(f"prepare {num_rows}"))
    runner._plan = SimpleNamespace(upload=lambda plan, how: note("upload"))
    runner._tables = SimpleNamespace(update=lambda plan: None)
    runner._sampler = SimpleNamespace(reset=lambda plan: None)
    runner._decoder = SimpleNamespace(forward=lambda ids, step: note("layers"))
    runner._graphs = SimpleNamespace(run=lambda key, body: note(f"replay {key.num_rows}"))
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


@pytest.mark.parametrize("most_rows", [520, 2048, 8192])
def test_attention_of_prompts_of_one_length_is_built_at_the_start(most_rows: int) -> None:
    built = [*usual_sizes(range(513, most_rows + 1), max_requests=256)]
    assert len(set(built)) == len(built) < 50
    for requests in range(1, 257):
        for query_len in range(max(1, 513 // requests), most_rows // requests + 1):
            sizes = [1 << (n - 1).bit_length() for n in (requests, query_len)]
            assert (sizes[0], max(64, sizes[1])) in built, f"{requests} prompts of {query_len} tokens"


def test_copies_are_enqueued_before_the_kernels_that_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    log: list[str] = []
    runner = fake_runner(log)
    runner._ends = {6: "step 6"}
    runner.launch(fake_plan(step=7, num_rows=500, num_copies=3, copies_wait_step=6, copies_needed_step=7))
    assert log == ["copies behind step 6", "wait for 7", "upload", "replay 504"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no bytes left"), RuntimeError("no bytes left")])
def test_what_the_device_reports_is_a_device_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runner: CudaRunner, plan: object) -> None:
        raise error

    monkeypatch.setattr(CudaRunner, "_launch", fail)
    with pytest.raises(DeviceError, match="a step failed on the device: no bytes left"):
        CudaRunner.__new__(CudaRunner).launch(None)  # type: ignore[arg-type]


def test_a_bug_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runner: CudaRunner, plan: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(CudaRunner, "_launch", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        CudaRunner.__new__(CudaRunner).launch(None)  # type: ignore[arg-type]
