"""The `openai` package against a real server: its own types, checked strictly, its errors and its retries."""

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import ADAPTERS, BASE
from serving import ADMIN, EXAMPLE, Served

pytest.importorskip("openai", reason="openai is not installed")
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

USER, NARROW = "the-users-key", "the-key-of-one-request"
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
"""More than a test waits for."""


class Client:
    """openai's client, and how often it has asked."""

    def __init__(self, served: Served, key: str = USER, strict: bool = True, max_retries: int = 2) -> None:
        self.num_asked = 0
        self.when_refused: Callable[[], None] | None = None
        http = openai.DefaultHttpxClient(event_hooks={"request": [self._count], "response": [self._look]})
        self.openai = openai.OpenAI(
            base_url=f"{served.url}/v1",
            api_key=key,
            max_retries=max_retries,
            http_client=http,
            _strict_response_validation=strict,
        )

    def _count(self, _request: object) -> None:
        self.num_asked += 1

    def _look(self, response: Any) -> None:
        if self.when_refused is not None and response.status_code in (429, 503):
            self.when_refused()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai")
    rules = [{"tenant": "a", "sha256": _sha256(USER)}, {"tenant": "b", "sha256": _sha256(NARROW), "concurrency": 1}]
    (folder / "keys.json").write_text(json.dumps({"keys": rules}))
    broken = folder / "adapters" / "broken"
    broken.parent.mkdir()
    shutil.copytree(ADAPTERS / "upper", broken)
    weights = bytearray((broken / "adapter_model.safetensors").read_bytes())
    weights[-4:] = b"\xff\xff\xff\xff"  # Not a number, in any precision: found when the weights are read.
    (broken / "adapter_model.safetensors").write_bytes(weights)
    files = ["--api-keys-file", str(folder / "keys.json"), "--adapter", f"broken={broken}"]
    with Served(*EXAMPLE, *files) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Client:
    return Client(served)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_chats_are_its_own_types(client: Client) -> None:
    answer = client.openai.chat.completions.create(
        model="upper", messages=HELLO, temperature=0, n=2, logprobs=True, top_logprobs=3, max_completion_tokens=9
    )
    assert isinstance(answer, ChatCompletion)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "HELLO"), (1, "HELLO")]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.model) == (12, "upper")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == "HELLO<|end|>"
    for token in logprobs.content:
        assert bytes(token.bytes or []).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0


def test_a_streamed_chat_is_the_whole_one(client: Client) -> None:
    with client.openai.chat.completions.stream(
        model="upper", messages=HELLO, temperature=0, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    whole = client.openai.chat.completions.create(model="upper", messages=HELLO, temperature=0, logprobs=True)
    assert streamed.choices[0].message.content == whole.choices[0].message.content == "HELLO"
    assert streamed.choices[0].logprobs is not None
    assert streamed.choices[0].logprobs.content == whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert streamed.usage == whole.usage


def test_the_choices_of_a_stream_are_told_apart(client: Client) -> None:
    stream = client.openai.chat.completions.create(
        model="upper", messages=HELLO, n=3, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    texts, chunks = ["", "", ""], list(stream)
    for chunk in chunks:
        assert isinstance(chunk, ChatCompletionChunk)
        assert (chunk.usage is not None) == (not chunk.choices)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["HELLO"] * 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 18


def test_completions_are_its_own_types(client: Client, served: Served) -> None:
    answer = client.openai.completions.create(model="reverse", prompt=["abc", "xyz"], n=2, temperature=0, logprobs=2)
    assert isinstance(answer, Completion)
    assert [choice.text for choice in answer.choices] == ["cba", "cba", "zyx", "zyx"]
    ids = json.loads(served.call("/tokenize", {"prompt": "abc"})[1])["tokens"]
    by_ids = client.openai.completions.create(model="reverse", prompt=[ids, ids], temperature=0)
    assert [choice.text for choice in by_ids.choices] == ["cba", "cba"]


def test_what_openai_itself_sends_as_null_is_null(served: Served) -> None:
    # OpenAI's own answers break its types here: the first token of an echo has no probability, a streamed completion
    # no finish_reason before its end.
    client = Client(served, strict=False)
    echoed = client.openai.completions.create(model="upper", prompt="abc", echo=True, logprobs=1, max_tokens=0)
    logprobs = echoed.choices[0].logprobs
    assert echoed.choices[0].text == "abc"
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    chunks = list(client.openai.completions.create(model="upper", prompt="abc", temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ABC"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_models_are_listed_and_retrieved(client: Client) -> None:
    models = client.openai.models.list()
    assert models.data[0].id == "base"
    assert {"upper", "reverse"} < {model.id for model in models}
    assert client.openai.models.retrieve("upper") in models.data
    with pytest.raises(openai.NotFoundError):
        client.openai.models.retrieve("acme/nobody")


def test_many_at_once_each_with_its_own_adapter(served: Served) -> None:
    words = {"upper": "ABCD", "reverse": "dcba", "twice": "abcd abcd", "stutter": "aabbccdd"}

    async def ask() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key=USER, _strict_response_validation=True
        ) as client:

            async def whole(adapter: str) -> str:
                messages = [{"role": "user", "content": "abcd"}]
                answer = await client.chat.completions.create(model=adapter, messages=messages, temperature=0)
                return answer.choices[0].message.content or ""

            async def streamed(adapter: str) -> str:
                messages = [{"role": "user", "content": "abcd"}]
                stream = await client.chat.completions.create(
                    model=f"base:{adapter}", messages=messages, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            adapters = list(words) * 8
            answers = await asyncio.gather(*map(whole, adapters), *map(streamed, adapters))
            assert answers == [words[adapter] for adapter in adapters] * 2

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "broken"}, openai.BadRequestError, "adapter_invalid", "model"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": "hello"}, openai.BadRequestError, "invalid_type", "messages"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter", "tools"),
        ({"messages": [{"role": "user", "content": "a" * (17 << 20)}]}, openai.APIStatusError, "body_too_large", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_its_own_errors_and_never_retried(
    client: Client, arguments: dict, kind: type[openai.APIStatusError], code: str, param: str | None, stream: bool
) -> None:
    with pytest.raises(kind) as refused:
        client.openai.chat.completions.create(**{"model": "upper", "messages": HELLO, "stream": stream} | arguments)
    error = refused.value
    assert (error.code, error.param) == (code, param)
    assert error.request_id
    assert client.num_asked == 1


def test_keys_are_told_apart(served: Served) -> None:
    body = {"lora_name": "upper", "lora_path": "/nowhere"}
    for key, kind, path in [
        ("wrong", openai.AuthenticationError, "/completions"),
        ("wrong", openai.AuthenticationError, "/load_lora_adapter"),
        (USER, openai.PermissionDeniedError, "/load_lora_adapter"),
        (ADMIN, openai.BadRequestError, "/load_lora_adapter"),
    ]:
        client = Client(served, key)
        with pytest.raises(kind):
            client.openai.post(path, body=body, cast_to=object)
        assert client.num_asked == 1


def test_a_route_that_is_not_there_is_not_found(client: Client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.openai.responses.create(model="upper", input="hello")
    assert client.num_asked == 1


def test_a_keys_limit_is_waited_for(served: Served) -> None:
    client, other = Client(served, NARROW), Client(served, NARROW, max_retries=0)
    running = client.openai.chat.completions.create(model="upper", messages=HELLO, stream=True, **LONG)
    with pytest.raises(openai.RateLimitError) as refused:
        other.openai.chat.completions.create(model="upper", messages=HELLO)
    assert refused.value.code == "rate_limit_exceeded"
    check_retry_ends(served, client, running, refused.value)


def test_a_saturated_server_is_waited_for() -> None:
    with Served(str(BASE), "--max-running", "1", "--max-queued-requests", "1") as served:
        client, other = Client(served), Client(served, max_retries=0)
        running = client.openai.chat.completions.create(model="base", messages=HELLO, n=2, stream=True, **LONG)
        with pytest.raises(openai.InternalServerError) as refused:
            other.openai.chat.completions.create(model="base", messages=HELLO, max_tokens=4)
        assert (refused.value.status_code, refused.value.code) == (503, "server_overloaded")
        check_retry_ends(served, client, running, refused.value)


def check_retry_ends(served: Served, client: Client, running: openai.Stream, refused: openai.APIStatusError) -> None:
    """What was refused succeeds at the second try, once `running` has made room, and not before the time told."""
    retry_after_s = int(refused.response.headers["retry-after"])
    assert 1 <= retry_after_s <= 120
    asked, start = client.num_asked, time.monotonic()

    def make_room() -> None:
        running.close()
        wait_for_nobody(served)

    client.when_refused = make_room
    model = client.openai.models.list().data[0].id
    answer = client.openai.chat.completions.create(model=model, messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.content is not None
    assert client.num_asked - asked == 3, "the models, a refusal, an answer"
    assert time.monotonic() - start >= retry_after_s


def test_a_stream_that_is_closed_ends_its_request(client: Client, served: Served) -> None:
    stream = client.openai.chat.completions.create(model="base", messages=HELLO, stream=True, **LONG)
    next(iter(stream))
    assert json.loads(served.call("/load")[1])["server_load"] >= 1
    stream.close()
    wait_for_nobody(served)


def wait_for_nobody(served: Served) -> None:
    deadline = time.monotonic() + 30
    while json.loads(served.call("/load")[1])["server_load"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
