"""Adapters of ranks beyond what a device's kernels have room for at once: as any other, or refused from the start.

In fp32, which has no clusters; `tests/gpu` has the same in bf16.
"""

from pathlib import Path

import pytest
from checkpoint import widen
from conftest import ADAPTERS, BASE
from device import engine_options, is_cuda
from test_exactness import assert_same, draw_requests, run

import slora

NAMES = ("count", "reverse")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of two once as it is, and once at 16 times its rank."""
    folder = tmp_path_factory.mktemp("wide")
    for name in NAMES:
        widen(ADAPTERS / name, folder / name, 16)
    return {name: ADAPTERS / name for name in NAMES} | {f"wide-{name}": folder / name for name in NAMES}


def test_they_answer_as_their_equals_do(adapters: dict[str, Path]) -> None:
    """Alone and beside others, in prompts and behind them."""
    requests = [(ids, NAMES[i % 3] if i % 3 < 2 else None) for i, (ids, _) in enumerate(draw_requests(11, 24))]
    wide = [(ids, name and f"wide-{name}") for ids, name in requests]
    with slora.LLM(BASE, adapters=adapters, **engine_options(max_rank=512)) as llm:
        assert max(rank for _, rank in llm.adapters["wide-count"].ranks.values()) > 256
        wanted = run(llm, requests)
        for _ in range(4):  # on a device from recorded graphs at last
            assert_same(run(llm, wide), wanted)
            assert_same(run(llm, requests[::2] + wide[1::2]), wanted[::2] + wanted[1::2])
        assert_same([run(llm, [request])[0] for request in wide[:6]], wanted[:6])


def test_they_are_refused_beyond_max_rank(adapters: dict[str, Path]) -> None:
    with slora.LLM(BASE, **engine_options(max_rank=255 if is_cuda() else 24)) as llm:
        llm.adapters.add("count", adapters["count"])
        with pytest.raises(slora.AdapterError, match=r"rank 384, this engine serves.*hint: a larger max_rank"):
            llm.adapters.add("wide-count", adapters["wide-count"])
        assert len(run(llm, [([1, 5, 6], "count")])) == 1


def test_any_rank_is_served_by_default_on_the_cpu_and_256_on_a_device(adapters: dict[str, Path]) -> None:
    with slora.LLM(BASE, **engine_options()) as llm:
        llm.adapters.add("count", adapters["count"])
        if is_cuda():
            with pytest.raises(slora.AdapterError, match="ranks up to 256"):
                llm.adapters.add("wide-count", adapters["wide-count"])
        else:
            llm.adapters.add("wide-count", adapters["wide-count"])
            wide, usual = (run(llm, [([1, 50, 60, 70], name)]) for name in ("wide-count", "count"))
            assert_same(wide, usual)
