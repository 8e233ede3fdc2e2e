"""LiteLLM against a real server. It takes 260 MB, so CI goes without: `pip install litellm`, and this runs."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from serving import ADMIN, EXAMPLE, Served

# Else it asks the network for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm = pytest.importorskip("litellm", reason="litellm is not installed")
HELLO = [{"role": "user", "content": "hello"}]
PROVIDERS = ["openai", "hosted_vllm"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


@pytest.fixture
def api(served: Served) -> dict[str, Any]:
    return {"api_base": f"{served.url}/v1", "api_key": ADMIN, "temperature": 0}


def num_answers(served: Served) -> int:
    """Completions that the server answered, with whatever status."""
    lines = served.call("/metrics")[1].splitlines()
    return sum(int(line.split()[-1]) for line in lines if line.startswith("http_requests_total") and "completi" in line)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_chats_and_streams(api: dict[str, Any], provider: str) -> None:
    model = f"{provider}/upper"
    whole = litellm.completion(model=model, messages=HELLO, n=2, logprobs=True, top_logprobs=2, **api)
    assert [choice.message.content for choice in whole.choices] == ["HELLO", "HELLO"]
    assert [token.token for token in whole.choices[0].logprobs.content[:5]] == list("HELLO")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 12)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(model=model, messages=HELLO, **options, **api))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "HELLO"
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_completions(api: dict[str, Any], provider: str) -> None:
    answer = litellm.text_completion(model=f"{provider}/reverse", prompt=["abc"], **api)
    assert answer.choices[0].text == "cba"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"max_tokens": 5000}, "ContextWindowExceededError"),
        ({"model": "nobody"}, "NotFoundError"),
        ({"temperature": -1}, "BadRequestError"),
        ({"api_key": "wrong"}, "AuthenticationError"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "BadRequestError"),
    ],
)
def test_mistakes_are_its_own_errors_and_its_router_does_not_retry_them(
    served: Served, api: dict[str, Any], provider: str, fields: dict[str, Any], kind: str
) -> None:
    parameters = api | {"model": f"{provider}/{fields.get('model', 'upper')}", "max_retries": 0}
    parameters |= {key: fields[key] for key in fields if key == "api_key"}
    router = litellm.Router([{"model_name": "it", "litellm_params": parameters}], num_retries=2)
    asked = num_answers(served)
    others = {key: value for key, value in fields.items() if key not in ("model", "api_key")}
    with pytest.raises(getattr(litellm, kind)):
        router.completion("it", HELLO, **others)
    assert num_answers(served) == asked + 1
