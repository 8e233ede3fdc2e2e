"""The embedded example, an engine on it, and PEFT beside it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oracle import Oracle

import slora

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
BASE, ADAPTERS = EXAMPLE / "base", EXAMPLE / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(BASE, {name: ADAPTERS / name for name in NAMES})


@pytest.fixture(scope="module")
def llm() -> Iterator[slora.LLM]:
    with slora.LLM(BASE, adapters=ADAPTERS, device="cpu") as llm:
        yield llm


@pytest.fixture
def settled() -> Callable[[slora.LLM], slora.outputs.Stats]:
    """Statistics once nothing runs or waits; fails if pages of requests are left."""

    def settle(llm: slora.LLM) -> slora.outputs.Stats:
        deadline = time.monotonic() + 5
        while (stats := llm.stats()).running or stats.waiting or stats.kv_pages or stats.loading_adapters:
            assert time.monotonic() < deadline, f"something is left: {stats}"
            time.sleep(0.005)
        assert stats.free_pages + stats.adapter_pages == stats.num_pages
        assert stats.submitted == stats.ended
        return stats

    return settle
