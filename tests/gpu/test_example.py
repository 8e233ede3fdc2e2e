"""The example on the device in half precision: logits near those of the CPU in fp32, the same tokens and scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from planning import Request, World
from test_kernels import make_modules

import slora
from slora.models.config import ModelConfig
from slora.weights import load_weights

pytestmark = pytest.mark.gpu
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny"
BASE, ADAPTERS = EXAMPLE / "base", EXAMPLE / "adapters"
MOST_ERROR, LEAST_AGREEMENT = 2e-2, 0.99
HELD_OUT = json.loads((EXAMPLE / "heldout.json").read_text())
DEVICE = "cuda"


class Case(NamedTuple):
    adapter: str
    prompt: str
    answer: str


CASES = [Case(name, **pair) for name, pairs in HELD_OUT["adapters"].items() for pair in pairs]


@pytest.fixture(scope="module")
def cpu() -> Iterator[slora.LLM]:
    with slora.LLM(BASE, adapters=ADAPTERS, device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def device() -> Iterator[slora.LLM]:
    with slora.LLM(BASE, adapters=ADAPTERS, device=DEVICE, dtype="bfloat16", pool_bytes=64 << 20) as llm:
        yield llm


def test_logits_are_within_two_percent(cpu: slora.LLM) -> None:
    """All logits of prompts cut off anywhere, with and without adapters of random weights."""
    prompts = [cpu.generate(case.prompt, max_tokens=1).prompt_token_ids for case in CASES[::10]]
    found = []
    for name, dtype in (("cpu", "float32"), (DEVICE, "bfloat16")):
        config = ModelConfig.from_dir(BASE)
        weights = load_weights(config, BASE, dtype=dtype, device=name, progress=False)
        adapters = {f"r{rank}": make_modules(config, rank) for rank in (3, 16)}
        world = World(config, weights, adapters, dtype=dtype, device=name, num_pages=1600, page_tokens=32)
        rows = []
        for adapter in (None, *adapters):
            requests = [
                Request(ids[:n], adapter, max_tokens=1, logprobs=config.vocab_size)
                for ids in prompts
                for n in range(1, len(ids) + 1, 3)
            ]
            for start in range(0, len(requests), 60):
                world.generate(requests[start : start + 60])
            rows += [[best[i] for i in range(config.vocab_size)] for request in requests for best in request.best]
        found.append(torch.tensor(rows))
        world.runner.close()
    wanted, got = (logits - logits.mean(-1, keepdim=True) for logits in found)
    assert len(wanted) > 300
    assert (got - wanted).norm() / wanted.norm() <= MOST_ERROR
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.max() <= 4 * MOST_ERROR


def test_the_best_token_is_the_same(cpu: slora.LLM, device: slora.LLM) -> None:
    """At every position of prompt and answer, of all adapters and the base: at 99 of 100."""
    names = [None if i % 4 == 0 else case.adapter for i, case in enumerate(CASES)]
    texts = cpu.generate([case.prompt for case in CASES], adapter=names, max_tokens=40, temperature=0)
    ids = [text.prompt_token_ids + text.token_ids for text in texts]
    best = []
    for llm in (cpu, device):
        results = llm.generate(ids, adapter=names, max_tokens=1, temperature=0, prompt_logprobs=1)
        scored = [position for result in results for position in (result.prompt_logprobs or [])[1:]]
        best.append([max(position, key=position.__getitem__) for position in scored if position])
    assert len(best[0]) == len(best[1]) > 5000
    agreement = sum(a == b for a, b in zip(*best, strict=True)) / len(best[0])
    assert agreement >= LEAST_AGREEMENT, agreement


def test_scores_equal_the_cpus(cpu: slora.LLM, device: slora.LLM) -> None:
    scores = []
    for llm in (cpu, device):
        options = {"max_tokens": HELD_OUT["max_tokens"], "temperature": 0}
        results = llm.generate([case.prompt for case in CASES], adapter=[case.adapter for case in CASES], **options)
        right = [case.adapter for case, result in zip(CASES, results, strict=True) if result.text == case.answer]
        scores.append({name: right.count(name) for name in HELD_OUT["adapters"]})
    assert scores[0] == scores[1]
    assert min(scores[1].values()) >= 29
