"""lm-evaluation-harness asks a real server, by its own class, and gets what PEFT gives.

With what it needs it takes 600 MB, so CI goes without: `pip install 'lm_eval[api]'`, and this runs.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import BASE
from device import tolerance
from oracle import Oracle
from serving import ADMIN, EXAMPLE, Served
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

TOLERANCE = tolerance(1e-4)
PAIRS = [
    ("banana", "ananab"),
    ("hello world", "HELLO WORLD"),
    ("abrimsin", " noevzfva?"),
    ("Grüße, 世界", " → ünïcode 🙂"),
]
ADAPTERS = [None, "reverse", "upper", "piglatin"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


@pytest.fixture
def harness(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the harness's model of an adapter."""
    monkeypatch.setenv("OPENAI_API_KEY", ADMIN)

    def make(adapter: str | None, **options: Any) -> LocalCompletionsAPI:
        url = f"{served.url}/v1/completions"
        defaults = {"tokenizer": str(BASE), "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_length": 1024}
        return LocalCompletionsAPI(base_url=url, model=adapter or "base", **defaults | options)

    return make


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def expected(oracle: Oracle, adapter: str | None, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of the continuation, and whether each of its tokens is the likeliest."""
    log_probs = oracle.log_probs(context + continuation, adapter)[len(context) - 1 : -1]
    found = log_probs[torch.arange(len(continuation)), continuation]
    return found.sum().item(), bool((log_probs.argmax(-1) == torch.tensor(continuation)).all())


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loglikelihoods_are_pefts(harness: Any, oracle: Oracle, adapter: str | None, batch_size: int) -> None:
    model = harness(adapter, batch_size=batch_size)
    answers = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (log_prob, is_greedy) in zip(PAIRS, answers, strict=True):
        ids = model._encode_pair(context, continuation)
        log_prob_of_peft, is_greedy_in_peft = expected(oracle, adapter, *ids)
        assert log_prob == pytest.approx(log_prob_of_peft, abs=TOLERANCE * len(ids[1]))
        assert is_greedy == is_greedy_in_peft


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_rolling_loglikelihoods_are_pefts(harness: Any, oracle: Oracle, adapter: str | None) -> None:
    model = harness(adapter)
    texts = [context + continuation for context, continuation in PAIRS]
    answers = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for text, log_prob in zip(texts, answers, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert log_prob == pytest.approx(expected(oracle, adapter, [model.prefix_token_id], ids)[0], abs=1e-3)


def test_it_generates(harness: Any) -> None:
    # As text, which the server's tokenizer frames as the example was trained.
    model = harness("reverse", tokenizer_backend=None, tokenized_requests=False)
    arguments = [(prompt, {"until": ["\n"], "max_gen_toks": 32}) for prompt in ("banana", "kernel")]
    answers = model.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert answers == ["ananab", "lenrek"]


def test_it_finds_the_servers_own_tokenizer(harness: Any) -> None:
    remote, local = harness("upper", tokenizer_backend="auto", tokenizer=None, auth_token=ADMIN), harness("upper")
    assert remote.tokenizer_backend == "remote"
    assert (remote.eot_token_id, remote.prefix_token_id) == (local.eot_token_id, local.prefix_token_id)
    pairs = requests("loglikelihood", PAIRS)
    for mine, its_own in zip(*(model.loglikelihood(pairs) for model in (remote, local)), strict=True):
        assert mine == (pytest.approx(its_own[0], abs=TOLERANCE), its_own[1])
