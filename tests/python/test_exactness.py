"""Tokens and log-probabilities equal PEFT's, and do not depend on what else shares the machine."""

import random
from typing import Any

import pytest
from conftest import ADAPTERS, BASE, NAMES
from device import engine_options, tolerance
from oracle import Oracle

import slora
from slora.outputs import Result

TOLERANCE = tolerance(1e-4)
MOST_ROUNDS = 30
"""What happens in a round depends on when loads finish; a world is run until what it is about has happened."""
Request = tuple[list[int], str | None]


def draw_requests(seed: int, count: int, longest: int = 60) -> list[Request]:
    rng = random.Random(seed)
    names = [*NAMES, None]
    return [
        ([1, *(rng.randrange(5, 250) for _ in range(rng.randint(1, longest)))], names[i % len(names)])
        for i in range(count)
    ]


def run(llm: slora.LLM, requests: list[Request], **sampling: Any) -> list[Result]:
    options = {"max_tokens": 8, "temperature": 0, "logprobs": 2, "prompt_logprobs": 0, "ignore_eos": True} | sampling
    return llm.generate([ids for ids, _ in requests], adapter=[name for _, name in requests], **options)


def assert_same(results: list[Result], expected: list[Result]) -> None:
    """Equal, unless the two best tokens were closer than rounding."""
    for got, want in zip(results, expected, strict=True):
        assert got.prompt_logprobs is not None
        assert want.prompt_logprobs is not None
        for ours, theirs in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE)
        assert got.logprobs is not None
        assert want.logprobs is not None
        for i, token in enumerate(want.token_ids):
            best, second = sorted(want.logprobs[i].values(), reverse=True)[:2]
            if got.token_ids[i] != token:
                assert best - second < TOLERANCE, f"token {i} of {want}"
                break
            assert got.logprobs[i][token] == pytest.approx(want.logprobs[i][token], abs=TOLERANCE)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return draw_requests(seed=1, count=44)


@pytest.fixture(scope="module")
def alone(llm: slora.LLM, requests: list[Request]) -> list[Result]:
    """Each request with the engine to itself."""
    return [run(llm, [request])[0] for request in requests]


def test_every_log_probability_equals_pefts(alone: list[Result], oracle: Oracle) -> None:
    for result in alone:
        ids = result.prompt_token_ids
        expected = oracle.log_probs(ids + result.token_ids, result.adapter)
        assert result.prompt_logprobs is not None
        assert result.logprobs is not None
        assert result.prompt_logprobs[0] is None
        for i, found in enumerate(result.prompt_logprobs[1:]):
            assert found is not None
            assert found[ids[i + 1]] == pytest.approx(expected[i, ids[i + 1]].item(), abs=TOLERANCE)
        for i, found in enumerate(result.logprobs):
            row = expected[len(ids) + i - 1]
            assert row[result.token_ids[i]] >= row.max() - TOLERANCE
            assert found == pytest.approx({token: row[token].item() for token in found}, abs=TOLERANCE)


def test_every_adapter_changes_something(alone: list[Result], oracle: Oracle) -> None:
    differences = dict.fromkeys(NAMES, 0.0)
    for result in alone:
        if result.adapter is not None:
            ids, found = result.prompt_token_ids + result.token_ids, result.logprobs
            assert found is not None
            base = oracle.log_probs(ids, None)[len(result.prompt_token_ids) - 1 :]
            here = max(abs(base[i, token].item() - found[i][token]) for i, token in enumerate(result.token_ids))
            differences[result.adapter] = max(differences[result.adapter], here)
    assert min(differences.values()) > 100 * TOLERANCE, differences


def test_batched_is_as_alone(llm: slora.LLM, requests: list[Request], alone: list[Result]) -> None:
    assert_same(run(llm, requests), alone)


# What an engine is made like → the counters that must have moved for the test to mean anything.
WORLDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "chunked": ({"max_batch_tokens": 11, "max_running": 4}, ()),  # of so many rows there is no graph
    "few at once": ({"max_running": 3, "max_adapters": 1}, ()),
    "fair": ({"queue": "fair", "max_running": 4}, ()),
    "no prefetch": ({"prefetch": False}, ()),
    "prefetched": ({"max_running": 2, "max_adapters": 2}, ("prefetches",)),
    "large pages": ({"page_tokens": 128}, ()),
    "evicted and reloaded": ({"pool_bytes": 56 << 16, "max_running": 8}, ("adapter_evictions",)),
    "small host tier": ({"host_bytes": 48 << 16, "max_running": 4}, ("host_evictions",)),
    "preempted": ({"pool_bytes": 44 << 16, "max_running": 16}, ("adapter_evictions", "preemptions")),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.filterwarnings("ignore:max_context is lowered")
def test_a_result_does_not_depend_on_its_neighbours(
    world: str, requests: list[Request], alone: list[Result], settled: Any
) -> None:
    options, counters = WORLDS[world]
    with slora.LLM(BASE, adapters=ADAPTERS, **engine_options(**options)) as llm:
        for shuffled in range(MOST_ROUNDS):
            order = random.Random(shuffled).sample(range(len(requests)), len(requests))
            results = run(llm, [requests[i] for i in order])
            assert_same(results, [alone[i] for i in order])
            stats = settled(llm)
            if shuffled and all(getattr(stats, name) for name in counters):
                break
        assert [name for name in counters if not getattr(stats, name)] == []


def test_a_preempted_requests_penalties_and_seed_go_on(settled: Any) -> None:
    requests = draw_requests(seed=3, count=24, longest=12)
    sampling = {"temperature": 0.8, "seed": 5, "max_tokens": 60, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    with slora.LLM(BASE, adapters=ADAPTERS, **engine_options()) as llm:
        expected = run(llm, requests, **sampling)
    with pytest.warns(UserWarning, match="max_context is lowered"):
        llm = slora.LLM(BASE, adapters=ADAPTERS, **engine_options(pool_bytes=44 << 16, max_running=16))
    with llm:
        results = run(llm, requests, **sampling)
        assert settled(llm).preemptions
    same = sum(got.token_ids == want.token_ids for got, want in zip(results, expected, strict=True))
    assert same >= len(requests) - 1  # one may sit on the border between two tokens
