"""The host tier is pinned while requests are served: by a pinning that only keeps books, so no device is needed."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ADAPTERS, BASE, EXAMPLE, NAMES

import slora
from slora import engine
from slora.errors import DeviceError
from slora.host import PinnedSlabs
from slora.memory import HostTier

pytestmark = pytest.mark.cpu_only(reason="a pinning that only keeps books; real ones are in tests/gpu")

PAGE_BYTES = 1 << 16
WAIT_S = 60.0
CASES = {name: pairs[0] for name, pairs in json.loads((EXAMPLE / "heldout.json").read_text())["adapters"].items()}


class FakePinning:
    """Pins in its books. From slab number `first_held` on it waits for `release`; slab number `broken` fails."""

    def __init__(self, first_held: int | None = None, broken: int | None = None) -> None:
        self.pinned: list[int] = []
        self.num_pinned = 0
        self.release = threading.Event()
        self.is_waiting = threading.Event()
        self._first_held, self._broken = first_held, broken

    def pin(self, address: int, num_bytes: int) -> None:
        if self.num_pinned == self._broken:
            raise DeviceError("out of memory")
        if self._first_held is not None and self.num_pinned >= self._first_held:
            self.is_waiting.set()
            assert self.release.wait(WAIT_S)
        assert address not in self.pinned
        self.pinned.append(address)
        self.num_pinned += 1

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., slora.LLM]]:
    """An engine over a tier of 64 slabs of four pages each."""
    opened: list[slora.LLM] = []

    def make(pinning: FakePinning, **options: Any) -> slora.LLM:
        def allocate(host_bytes: int, page_bytes: int, device: torch.device) -> PinnedSlabs:
            return PinnedSlabs(256 * page_bytes, page_bytes, pinning, 4 * page_bytes)

        monkeypatch.setattr(engine, "allocate_host", allocate)
        opened.append(slora.LLM(BASE, adapters=ADAPTERS, device="cpu", **options))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def test_slabs_are_pinned_in_order_and_all_are_unpinned() -> None:
    pinning, ready = FakePinning(), list[int]()
    slabs = PinnedSlabs(10 * PAGE_BYTES + 5, PAGE_BYTES, pinning, 3 * PAGE_BYTES)
    assert [num_bytes // PAGE_BYTES for _, num_bytes in slabs.slabs] == [3, 3, 3, 1]
    assert pinning.pinned == [slabs.slabs[0][0]]
    assert slabs.num_ready == 1
    tier = HostTier(slabs.slabs, PAGE_BYTES)
    assert tier.num_pages == 10
    for page in range(10):
        tier.page(page).fill_(page + 1)  # most of them before they are pinned
    addresses = [address for address, _ in slabs.slabs]
    slabs.prepare(ready.append, pytest.fail)
    until(lambda: len(ready) == 3)
    assert ready == [2, 3, 4]
    assert pinning.pinned == addresses
    assert all((tier.page(page) == page + 1).all() for page in range(10)), "pinning changed what was written"
    slabs.close()
    assert pinning.pinned == []
    slabs.close()


def test_closing_waits_for_the_slab_that_is_being_pinned() -> None:
    pinning, ready = FakePinning(first_held=2), list[int]()
    slabs = PinnedSlabs(8 * PAGE_BYTES, PAGE_BYTES, pinning, PAGE_BYTES)
    slabs.prepare(ready.append, pytest.fail)
    assert pinning.is_waiting.wait(WAIT_S)
    closing = threading.Thread(target=slabs.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "memory was freed while it was being pinned"
    pinning.release.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert pinning.num_pinned == 3
    assert pinning.pinned == []


def ask(llm: slora.LLM, name: str | None) -> str:
    prompt = CASES[name]["prompt"] if name else "abc"
    return llm.generate(prompt, adapter=name, temperature=0, max_tokens=64).text


def test_an_adapter_in_a_slab_that_is_not_pinned_holds_nobody_up(open_llm: Callable[..., slora.LLM]) -> None:
    pinning = FakePinning(first_held=2)
    llm = open_llm(pinning)  # which does not wait for pinning
    answers: dict[str, str] = {}
    threads = [threading.Thread(target=lambda name=name: answers.update({name: ask(llm, name)})) for name in NAMES]
    for thread in threads:
        thread.start()
    assert pinning.is_waiting.wait(WAIT_S)
    for _ in range(5):
        assert ask(llm, None) == "abc"  # steps go on

    def waiting() -> set[str]:
        return {name for name in NAMES if llm.adapters[name].state == "loading"}

    until(lambda: len(waiting()) >= 6)  # ten adapters do not fit eight pages
    time.sleep(0.2)
    answered = set(answers)
    assert len(waiting()) >= 6
    assert not waiting() & answered
    pinning.release.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == {name: CASES[name]["answer"] for name in NAMES}
    until(lambda: pinning.num_pinned == 64)


def test_requests_for_waiting_adapters_can_be_cancelled_by_closing(open_llm: Callable[..., slora.LLM]) -> None:
    pinning = FakePinning(first_held=1)
    llm = open_llm(pinning)
    errors: list[str] = []

    def fail() -> None:
        try:
            llm.generate(["abc"] * 10, adapter=NAMES)
        except slora.RequestError as error:
            errors.append(str(error))

    asking, closing = threading.Thread(target=fail), threading.Thread(target=llm.close)
    asking.start()
    until(lambda: llm.stats().loading_adapters)
    closing.start()
    asking.join(WAIT_S)
    assert errors == ["the engine is closed"]
    pinning.release.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert pinning.pinned == []


def test_a_slab_that_cannot_be_pinned_ends_the_engine_with_the_reason(open_llm: Callable[..., slora.LLM]) -> None:
    pinning = FakePinning(first_held=2, broken=5)
    llm = open_llm(pinning)
    pinning.release.set()
    until(lambda: llm._engine.core.failure)
    with pytest.raises(slora.DeviceError, match=r"cannot pin \d+ bytes of host memory: out of memory; hint"):
        llm.generate("abc")
    llm.close()
    assert pinning.pinned == []


def test_no_pinning_at_all_is_an_error_at_the_start(open_llm: Callable[..., slora.LLM]) -> None:
    with pytest.raises(slora.DeviceError, match="cannot pin"):
        open_llm(FakePinning(broken=0))
