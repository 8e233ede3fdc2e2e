"""Which way a step takes to the device, and what its errors become: decided on the host, so no device is needed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slora.cuda_runner import CudaRunner, StepShape
from slora.errors import DeviceError
from slora.plan import HAS_LORA, Counts

pytestmark = pytest.mark.cpu_only(reason="what the host decides, on a device that is not there")

NUM_LAYERS = 3
NOTHING = Counts(*[0] * len(Counts._fields))


class FakeStep:
    """Notes down what is prepared and waited for."""

    def __init__(self, log: list[str], arrivals: list[int]) -> None:
        self.log, self.arrivals, self.ids = log, list(arrivals), torch.zeros(0)

    def prepare(self, num_rows: int, *, is_graph: bool = False, **_: bool) -> None:
        self.log.append(f"prepare {num_rows}{' as in a graph' if is_graph else ''}")

    def wait_for_adapters(self, layer: int) -> None:
        while self.arrivals and self.arrivals[0] <= layer:
            self.log.append(f"wait {self.arrivals.pop(0)}")


def run(counts: Counts, arrivals: list[int]) -> list[str]:
    """What `_forward` does for a plan with such counts, while these layers' weights are on their way."""
    log: list[str] = []
    runner: Any = CudaRunner.__new__(CudaRunner)
    runner._step = step = FakeStep(log, arrivals)
    runner.pool = SimpleNamespace(config=SimpleNamespace(num_layers=NUM_LAYERS))
    runner._hidden = torch.zeros(512, 1)

    def forward(ids: torch.Tensor, batch: object) -> torch.Tensor:
        for layer in range(NUM_LAYERS):
            step.wait_for_adapters(layer)
            log.append(f"layer {layer}")
        return torch.zeros(int(log[0].split()[1]) if log[0].startswith("prepare") else 0, 1)

    runner._decoder = SimpleNamespace(forward=forward)
    runner._graphs = SimpleNamespace(run=lambda key, body: log.append(f"replay {key.num_rows}"))
    plan: Any = SimpleNamespace(array=lambda name: np.array([0, counts.num_rows]))
    runner._forward(StepShape.of(counts), plan)
    return log


def cold(num_rows: int) -> Counts:
    return NOTHING._replace(num_rows=num_rows, num_requests=1, num_segments=1, flags=HAS_LORA)


def test_a_step_that_waits_for_nothing_is_a_graph() -> None:
    assert run(cold(500), []) == ["replay 504"]
    assert run(cold(1), []) == ["replay 1"]


def test_a_graph_waits_for_the_whole_swap_in() -> None:
    waits = ["wait 0", "wait 1", "wait 2"]
    assert run(cold(500), [0, 1, 2]) == [*waits, "replay 504"]


def test_a_large_step_is_launched_for_itself_each_layer_behind_its_own_part_of_a_swap_in() -> None:
    layers = ["layer 0", "wait 1", "layer 1", "layer 2"]
    assert run(cold(513), [1]) == ["prepare 513", *layers]
    assert run(cold(8000), []) == ["prepare 8000", "layer 0", "layer 1", "layer 2"]


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
