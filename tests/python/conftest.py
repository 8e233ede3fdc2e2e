"""The device that tests run on; the embedded example, an engine on it, and PEFT beside it."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import device
import pytest
import torch
from oracle import Oracle

import slora

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
BASE, ADAPTERS = EXAMPLE / "base", EXAMPLE / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=device.NAMES, default="cpu", help="where engines run; default: cpu")


def pytest_configure(config: pytest.Config) -> None:
    # A background job ignores ctrl-C, and what tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    device.choose(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not device.is_cuda():
        return
    if not (torch.cuda.is_available() or config.option.collectonly):
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cpu_only")])
    items[:] = [item for item in items if not item.get_closest_marker("cpu_only")]
    for item in items:
        item.add_marker("gpu")


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(BASE, {name: ADAPTERS / name for name in NAMES})


@pytest.fixture(scope="module")
def llm() -> Iterator[slora.LLM]:
    with slora.LLM(BASE, adapters=ADAPTERS, **device.engine_options()) as llm:
        yield llm


@pytest.fixture
def settled() -> Callable[[slora.LLM], slora.outputs.Stats]:
    """Statistics once nothing runs or waits; fails if pages of requests are left."""

    def settle(llm: slora.LLM) -> slora.outputs.Stats:
        deadline = time.monotonic() + 30
        while (stats := llm.stats()).running or stats.waiting or stats.kv_pages or stats.loading_adapters:
            assert time.monotonic() < deadline, f"something is left: {stats}"
            time.sleep(0.005)
        assert stats.free_pages + stats.adapter_pages == stats.num_pages
        assert stats.submitted == stats.ended
        return stats

    return settle
