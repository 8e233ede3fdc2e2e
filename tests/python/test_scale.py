"""Two thousand adapters, of which the pool holds twenty."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASE, EXAMPLE
from device import engine_options

import slora

COUNT = 2000
SOURCES = ("reverse", "upper", "stars", "spell")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hard links to a few real adapters."""
    folder = tmp_path_factory.mktemp("many")
    paths = {}
    for i in range(COUNT):
        source, path = ADAPTERS / SOURCES[i % len(SOURCES)], folder / f"a{i}"
        path.mkdir()
        for file in source.iterdir():
            os.link(file, path / file.name)
        paths[path.name] = path
    return paths


@pytest.mark.timeout(900)
def test_two_thousand_adapters_in_a_pool_for_twenty(many: dict[str, Path], settled: Any) -> None:
    cases = json.loads((EXAMPLE / "heldout.json").read_text())["adapters"]
    start = time.process_time()
    with slora.LLM(BASE, **engine_options()) as llm:
        seconds_without = time.process_time() - start
        llm.adapters.add("one", ADAPTERS / "spell")
        page_bytes, largest = llm.stats().page_bytes, llm.adapters["one"].num_pages
    options = engine_options(pool_bytes=20 * largest * page_bytes, max_context=64)
    start = time.process_time()
    with slora.LLM(BASE, adapters=many, **options) as llm:
        seconds = time.process_time() - start - seconds_without
        assert seconds < 2, f"registering {COUNT} adapters took {seconds:.1f} s"
        assert len(llm.adapters) == COUNT
        assert llm.stats().loads == 0  # no weights were read
        prompts, answers = [], []
        for i in range(COUNT):
            case = cases[SOURCES[i % len(SOURCES)]][i // len(SOURCES) % 32]
            prompts.append(case["prompt"])
            answers.append(case["answer"])
        results = llm.generate(prompts, adapter=list(many), max_tokens=40, temperature=0)
        assert [result.text for result in results] == answers
        stats = settled(llm)
        assert stats.adapter_evictions > COUNT / 2
        assert stats.loads >= COUNT
