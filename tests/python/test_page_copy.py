"""Swap-ins as the host orders them: which calls copy what, and what they say has arrived. Needs no device."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slora.kernels import page_copy
from slora.kernels.page_copy import PageCopies
from slora.plan import Counts

pytestmark = pytest.mark.cpu_only(reason="what the host orders, of a device that is not there")
NOTHING = Counts(*[0] * len(Counts._fields))


class FakeEvent:
    def __init__(self) -> None:
        self.has_happened = False

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.has_happened


class Device:
    """What was enqueued, in order: ("copy", pages), ("value", number), or ("wait", the number so far)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_layers: int, *, kernels_wait: bool = True) -> None:
        self.enqueued: list[tuple[str, Any]] = []
        self.waited_for: list[FakeEvent] = []
        monkeypatch.setattr(page_copy, "_copy", lambda to, _from, _size, _on: self.enqueued.append(("copy", to)))
        monkeypatch.setattr(page_copy, "_write_value", lambda _word, value, _on: self.enqueued.append(("value", value)))
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        stream = SimpleNamespace(cuda_stream=0, wait_event=self.waited_for.append, wait_stream=self.wait)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        self.copies: Any = PageCopies.__new__(PageCopies)
        self.copies.__dict__ |= {
            "_stream": stream,
            "_pending": page_copy.deque(),
            "_host": SimpleNamespace(addresses=range(1 << 20)),
            "_pool": SimpleNamespace(pages=torch.zeros(0), page_bytes=1, config=SimpleNamespace(num_layers=num_layers)),
            "_kernels_wait": kernels_wait,
            "_last_step": 0,
            "arrived": torch.tensor([-1]),
        }

    def wait(self, stream: object) -> None:
        assert stream is torch.cuda.current_stream()
        self.enqueued.append(("wait", self.copies.arrived.item()))

    def issue(self, step: int, layers: list[int]) -> None:
        arrays = {"copy_host_pages": range(len(layers)), "copy_pages": range(len(layers)), "copy_layers": layers}
        counts = NOTHING._replace(step=step, num_copies=len(layers))
        plan: Any = SimpleNamespace(counts=counts, array=lambda name: np.array(arrays[name]))
        self.copies.issue(plan, None)

    def calls(self) -> list[list[int]]:
        return [what for kind, what in self.enqueued if kind == "copy"]


def test_a_layer_may_run_as_soon_as_all_its_pages_are_there_and_no_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for step in range(1, 300):
        num_layers = rng.choice([1, 2, 32, 80])
        layers = sorted(rng.randrange(num_layers) for _ in range(rng.choice([1, 2, 7, 40, 300])))
        device = Device(monkeypatch, num_layers)
        device.issue(step, layers)
        arrived, reached = 0, 0
        for kind, what in device.enqueued:
            if kind == "copy":
                assert what == list(range(arrived, arrived + len(what))), "pages are copied once, in their order"
                arrived += len(what)
                continue
            assert what > reached
            reached = what
            for layer in range(num_layers):  # what a kernel asks
                is_complete = all(first > layer for first in layers[arrived:])
                assert (reached >= step << 32 | layer + 1) == is_complete, f"layer {layer} of {layers}"
        assert arrived == len(layers)


def test_the_first_layers_pages_are_a_call_of_their_own_and_the_others_few_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The image of a rank-16 adapter of Llama-3.1-8B, and of rank 64: 1.25 and 5 pages a layer."""
    for pages_per_layer, expected in ((1.25, [2, 5, 16, 17]), (5, [5, 5, *[20] * 6, 30])):
        layers = [int(page / pages_per_layer) for page in range(int(32 * pages_per_layer))]
        device = Device(monkeypatch, 32)
        device.issue(1, layers)
        sizes = [len(call) for call in device.calls()]
        assert sizes == expected


def test_a_step_is_not_content_with_what_an_earlier_one_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 4)
    device.issue(8, [0, 1, 2, 3])
    before = device.enqueued[-1][1]
    device.issue(9, [0, 1, 2, 3])
    assert before < 9 << 32 | 1, "complete for step 8, nothing for step 9"
    assert device.enqueued[-1][1] >= 9 << 32 | 4
    assert device.enqueued[5][1] > 8 << 32 | 4, "whoever needs step 8 waits no more"


@pytest.mark.parametrize(("last", "next_one"), [(2**31 - 1, 2), (5, 5)])
def test_when_step_numbers_begin_again_nothing_of_before_has_arrived(
    monkeypatch: pytest.MonkeyPatch, last: int, next_one: int
) -> None:
    """Kernels of the new steps would read pages that are not there, if the number of before still stood."""
    device = Device(monkeypatch, 2)
    device.issue(last, [0])
    assert not any(kind == "wait" for kind, _ in device.enqueued)
    device.enqueued.clear()
    device.issue(next_one, [0])
    assert device.enqueued[0] == ("wait", 0), "zero, behind the steps of before and ahead of the first copy"
    assert [kind for kind, _ in device.enqueued[1:]] == ["copy", "value"]
    device.issue(next_one + 1, [0])
    assert sum(kind == "wait" for kind, _ in device.enqueued) == 1


def test_when_step_numbers_begin_again_kernels_that_do_not_wait_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 2, kernels_wait=False)
    device.issue(7, [0])
    device.issue(1, [0])
    assert device.copies.arrived.item() == -1, "the highest number"


def test_events_are_waited_for_where_streams_write_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 2, kernels_wait=False)
    for step in (3, 4, 5):
        device.issue(step, [0, 0, 1])
    assert all(kind == "copy" for kind, _ in device.enqueued)
    events = [event for _, event in device.copies._pending]
    device.copies.wait(4)
    assert device.waited_for == events[:2]
    device = Device(monkeypatch, 2)
    device.issue(3, [0, 1])
    device.copies.wait(3)
    assert not device.waited_for


def test_steps_are_done_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 2)
    for step in (3, 4, 7):
        device.issue(step, [0])
    events = [event for _, event in device.copies._pending]
    events[1].has_happened = True
    assert device.copies.done() == []
    events[0].has_happened = True
    assert device.copies.done() == [3, 4]
    assert device.copies.done() == []
