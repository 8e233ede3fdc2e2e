"""Sampling with fixed numbers, against plain Python."""

import math

import numpy as np
import pytest
import torch
import transformers
from device import device_name, tolerance
from planning import Request, World, tiny_config

from slora.kernels.reference import best, sample
from slora.models.config import ModelConfig
from slora.sampling import log_probs
from slora.weights import load_weights

reference_op = pytest.mark.cpu_only(reason="the device's own op: tests/gpu/test_ops.py")


def plain_sample(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """One row, in the words of the documentation."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    if top_k:
        weights = weights[:top_k]
    total, kept, mass = sum(weights), [], 0.0
    for weight in weights:
        if (mass < top_p * total or top_p >= 1) and weight >= min_p * weights[0]:
            kept.append(weight)
        mass += weight
    target, mass = u * sum(kept), 0.0
    for i, weight in enumerate(kept):
        mass += weight
        if mass > target:
            return order[i]
    return order[len(kept) - 1]


def run(logits: torch.Tensor, **params: object) -> list[int]:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.0}
    columns = {name: torch.as_tensor(params.get(name, value)).expand(len(logits)) for name, value in neutral.items()}
    return sample(logits, *columns.values()).tolist()


@reference_op
@pytest.mark.parametrize("vocab", [5, 300, 3000])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_sample_equals_plain_python(vocab: int, spread: float) -> None:
    """With flat distributions the best tokens do not decide, and the whole vocabulary is looked at."""
    rng = np.random.default_rng(vocab)
    n = 60
    logits = torch.tensor(rng.normal(0, spread, (n, vocab)), dtype=torch.float32)
    params = {
        "temperature": torch.tensor(rng.uniform(0.3, 2, n), dtype=torch.float32),
        "top_k": torch.tensor(rng.choice([0, 1, 3, 280, 10_000], n), dtype=torch.int32),
        "top_p": torch.tensor(rng.choice([1.0, 0.95, 0.3, 1e-6], n), dtype=torch.float32),
        "min_p": torch.tensor(rng.choice([0.0, 0.05, 0.9], n), dtype=torch.float32),
        "uniform": torch.tensor(rng.random(n), dtype=torch.float32),
    }
    got = run(logits, **params)
    rows = zip(logits.tolist(), *(params[name].tolist() for name in params), strict=True)
    assert got == [plain_sample(*row) for row in rows]
    alone = [run(logits[i : i + 1], **{k: v[i : i + 1] for k, v in params.items()})[0] for i in range(n)]
    assert got == alone


@reference_op
def test_uniform_numbers_give_the_distribution() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    n = 4000
    uniform = (torch.arange(n) + 0.5) / n
    counts = torch.bincount(torch.tensor(run(logits.expand(n, -1), uniform=uniform)), minlength=40)
    assert (counts / n - logits.softmax(-1)).abs().max() <= 1 / n + 1e-6
    few = torch.bincount(torch.tensor(run(logits.expand(n, -1), uniform=uniform, top_k=3)), minlength=40)
    assert few.nonzero()[:, 0].tolist() == sorted(logits.topk(3).indices.tolist())


@reference_op
def test_extreme_parameters_stay_defined() -> None:
    logits = torch.tensor([[3e38, -3e38, -torch.inf, 1.0]])
    assert run(logits, temperature=1e-30, uniform=0.999) == [0]
    assert run(logits[:, 2:], temperature=1e30, uniform=0.9999999) == [1]
    assert run(torch.zeros(1, 7), top_k=1, uniform=0.99) == [0]
    assert run(torch.zeros(1, 7), uniform=0.99) == [6]


@reference_op
def test_best_orders_equal_values_by_id() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    for k in range(1, 9):
        values, ids = best(x, k)
        for row in range(2):
            order = sorted(range(7), key=lambda i, row=row: (-x[row, i].item(), i))[:k]
            assert ids[row].tolist() == order
            assert values[row].tolist() == x[row, order].tolist()


@reference_op
def test_log_probs() -> None:
    logits = torch.randn(3, 50)
    found = log_probs(logits, torch.tensor([4, 0, 49]), 2)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.chosen, expected[[0, 1, 2], [4, 0, 49]])
    torch.testing.assert_close(found.best, expected.topk(2).values)
    assert log_probs(logits, torch.tensor([4, 0, 49]), 0).best is None


@pytest.fixture
def world() -> World:
    config = ModelConfig.from_dict(tiny_config())
    weights = load_weights(config, "", dtype="float32", device=device_name(), load_format="dummy")
    weights.embed.mul_(20)
    weights.lm_head.mul_(20)
    return World(config, weights, device=device_name())


def step_logits(world: World, tokens: list[int]) -> torch.Tensor:
    """The raw model's log-probabilities after `tokens`."""
    request = Request(tokens, max_tokens=1, logprobs=world.config.vocab_size)
    world.generate([request])
    out = torch.empty(world.config.vocab_size)
    out[list(request.best[0])] = torch.tensor(list(request.best[0].values()))
    return out


def test_penalties_equal_transformers_and_openai(world: World) -> None:
    """Mixed with a request without penalties; the second half of the output is made after a preemption."""
    penalties = {"repetition": 1.3, "presence": 0.4, "frequency": 0.7}
    request, other = Request([5, 6, 7, 5], max_tokens=6, sampling=penalties), Request([9, 8], max_tokens=6)
    world.generate([request, other])
    request.cached, request.state_row, request.max_tokens = 0, -1, 12
    world.generate([request], by_reference=True)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    for i, token in enumerate(request.output):
        output = request.output[:i]
        # log-probabilities are logits up to a constant, which the repetition penalty does not forgive: undo it
        logits = raw_logits(world, request.prompt + output)
        scores = processor(torch.tensor([request.prompt + output]), logits[None])[0]
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(scores))
        scores = scores - 0.4 * (counts > 0) - 0.7 * counts
        assert int(scores.argmax()) == token
        assert request.chosen[i] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=tolerance(1e-5))
    assert other.output != request.output[:6]
    plain = Request([9, 8], max_tokens=6)
    world.generate([plain])
    assert other.output == plain.output


def raw_logits(world: World, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities with the constant put back: the log of the sum of the exponentials of the logits."""
    seen: list[torch.Tensor] = []
    decoder = world.runner._decoder
    original = decoder.logits

    def spy(hidden, rows):  # type: ignore[no-untyped-def]
        seen.append(original(hidden, rows))
        return seen[-1]

    decoder.logits = spy
    world.generate([Request(tokens, max_tokens=1, prompt_logprobs=-1)])
    decoder.logits = original
    return seen[-1][0].cpu()


def test_bias_forbids_and_forces(world: World) -> None:
    free = Request([3, 4], max_tokens=3)
    world.generate([free])
    forced = Request([3, 4], max_tokens=3, bias={11: 1000.0})
    banned = Request([3, 4], max_tokens=1, bias={free.output[0]: -math.inf, 12: 0.5})
    nothing = Request([3, 4], max_tokens=1, bias=dict.fromkeys(range(97), -math.inf))
    again = Request([3, 4], max_tokens=3)
    world.generate([forced, banned, nothing, again])
    assert forced.output == [11] * 3
    assert banned.output[0] not in (free.output[0], -1)
    assert nothing.output == [-1]
    assert again.output == free.output
    assert forced.chosen[0] == pytest.approx(float(step_logits(world, [3, 4])[11]), abs=tolerance(1e-5))


def test_greedy_and_random_rows_share_a_step(world: World) -> None:
    uniforms = [0.1, 0.5, 0.93]
    sampling = {"temperature": 0.9, "top_p": 0.8}
    greedy, random = Request([3, 4], max_tokens=3), Request([3, 4], max_tokens=3, sampling=sampling, uniforms=uniforms)
    world.generate([greedy, random], by_reference=True)
    for i, token in enumerate(random.output):
        logits = step_logits(world, random.prompt + random.output[:i])
        assert token == plain_sample(logits.tolist(), 0.9, 0, 0.8, 0.0, uniforms[i])
    alone = Request([3, 4], max_tokens=3, sampling=sampling, uniforms=uniforms)
    world.generate([alone])
    assert alone.output == random.output
    assert greedy.output[0] == int(step_logits(world, [3, 4]).argmax())
