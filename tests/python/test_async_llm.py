"""Streams and answers under asyncio."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import ADAPTERS, BASE
from device import engine_options, tolerance

import slora

LONG: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}


def run(body: Callable[[slora.AsyncLLM], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with slora.AsyncLLM(BASE, adapters=ADAPTERS, **engine_options(**options)) as llm:
            await body(llm)

    asyncio.run(main())


async def settle(llm: slora.AsyncLLM) -> None:
    async with asyncio.timeout(30):
        while (stats := llm.stats()).running or stats.waiting or stats.kv_pages:
            await asyncio.sleep(0.005)


def test_a_stream_brings_what_generate_brings() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        whole = await llm.generate("window water", adapter="reverse", temperature=0, max_tokens=30, logprobs=1)
        for _ in range(20):
            stream = llm.stream("window water", adapter="reverse", temperature=0, max_tokens=30, logprobs=1)
            deltas = [delta async for delta in stream]
            if len(deltas) > 5:  # a loop that is held up gets several tokens at once
                break
        else:
            pytest.fail(f"an answer came in {len(deltas)} pieces")
        assert "".join(delta.text for delta in deltas) == whole.text == "retaw wodniw"
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        assert whole.logprobs is not None
        expected = [pytest.approx(found, rel=0, abs=tolerance(0)) for found in whole.logprobs]
        assert [found for delta in deltas for found in delta.logprobs or []] == expected
        assert [delta.finish_reason for delta in deltas][-2:] == [None, "stop"]
        assert (stream.prompt_token_ids, stream.adapter) == (whole.prompt_token_ids, "reverse")

    run(body)


def test_many_tasks_share_the_engine() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        words = [f"ab{chr(97 + i % 26)}" for i in range(60)]

        async def ask(i: int) -> str:
            text = ""
            adapter = ("reverse", "upper", None)[i % 3]
            async for delta in llm.stream(words[i], adapter=adapter, temperature=0, max_tokens=16):
                text += delta.text
            return text

        answers = await asyncio.gather(*(ask(i) for i in range(60)))
        assert answers == [(word[::-1], word.upper(), word)[i % 3] for i, word in enumerate(words)]
        results = await llm.generate(["abc", "def"] * 100, adapter=["upper", "reverse"] * 100, temperature=0)
        assert [result.text for result in results] == ["ABC", "fed"] * 100

    run(body, max_running=8, max_waiting=100)


def test_a_loop_that_was_held_up_wakes_once_for_all_streams_and_steps() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        streams = [llm.stream("abc", **LONG | {"max_tokens": 100}) for _ in range(20)]
        wakes, waker = 0, llm._waker()
        dispatch = waker._dispatch

        def count() -> None:
            nonlocal wakes
            wakes += 1
            dispatch()

        async def drain(stream: slora.async_llm.Stream) -> int:
            return sum([len(delta.token_ids) async for delta in stream])

        waker._dispatch = count  # type: ignore[method-assign]
        while llm.stats().generated_tokens < 20 * 100:
            time.sleep(0.01)  # the loop's thread: nobody reads
        time.sleep(0.1)  # the last tokens are delivered
        assert await asyncio.gather(*map(drain, streams)) == [100] * 20
        assert wakes < 5

    run(body)


@pytest.mark.parametrize(("queue", "is_early"), [("fair", True), ("fcfs", False)])
def test_with_a_fair_queue_one_request_does_not_wait_for_another_adapters_flood(queue: str, is_early: bool) -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        ended: list[str] = []

        async def ask(name: str) -> None:
            await llm.generate("abc", adapter=name, temperature=0, max_tokens=16, ignore_eos=True)
            ended.append(name)

        # Submitted in this order in one turn of the loop.
        await asyncio.gather(*(ask("reverse") for _ in range(60)), ask("upper"))
        assert (ended.index("upper") < 30) == is_early, ended

    run(body, queue=queue, max_running=2)


def test_leaving_the_loop_cancels_the_request() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        async for _ in llm.stream("abc", **LONG):
            break
        await settle(llm)
        assert llm.stats().generated_tokens < 900
        stream = llm.stream("abc", **LONG)
        await anext(stream)
        await stream.aclose()
        await settle(llm)
        assert [delta async for delta in stream] == []

    run(body)


def test_cancelling_the_task_cancels_its_requests() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        async def drain() -> None:
            async for _ in llm.stream("abc", **LONG):
                pass

        tasks = [asyncio.create_task(drain()), asyncio.create_task(llm.generate(["abc"] * 9, **LONG))]
        while llm.stats().running < 10:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        await settle(llm)
        assert not llm._waker()._calls

    run(body)


def test_errors_are_raised_where_the_stream_is_read() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        with pytest.raises(slora.UnknownAdapterError, match="nobody"):
            await anext(llm.stream("abc", adapter="nobody"))
        with pytest.raises(slora.RequestError, match="temperature is -1"):
            llm.stream("abc", temperature=-1.0)
        with pytest.raises(slora.UnknownAdapterError, match="nobody"):
            await llm.generate(["abc"] * 3, adapter=["upper", "nobody", None])
        await settle(llm)
        assert (await llm.generate("abc", adapter="upper", temperature=0)).text == "ABC"

    run(body)


def test_chats_can_be_awaited_and_streamed() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        messages = [{"role": "user", "content": "hello"}]
        assert (await llm.chat(messages, adapter="upper", temperature=0)).text == "HELLO"
        deltas = [delta.text async for delta in llm.chat_stream(messages, adapter="spell", temperature=0)]
        assert "".join(deltas) == "h-e-l-l-o"

    run(body)


class Turns:
    """Ten turns of a task. Whatever is `held` waits for them, on whichever thread it is called."""

    def __init__(self) -> None:
        self._are_over = threading.Event()

    def held(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_call(*arguments: Any, **options: Any) -> Any:
            assert self._are_over.wait(20), "no other task had a turn"
            return call(*arguments, **options)

        return wait_and_call

    async def beside(self, awaited: Awaitable[object]) -> None:
        """Have them while something is awaited that is held."""
        self._are_over.clear()
        turns = asyncio.create_task(self._take())
        await awaited
        assert turns.done(), "nothing was held"

    async def _take(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0.001)
        self._are_over.set()


def test_a_long_prompt_is_turned_into_ids_while_other_tasks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        text, turns = "window water " * 1_000, Turns()
        for name in ("_ids", "_chat_ids"):
            monkeypatch.setattr(llm, name, turns.held(getattr(llm, name)))

        async def refused(awaited: Awaitable[object]) -> None:
            with pytest.raises(slora.RequestError, match="maximum context length"):
                await awaited

        await turns.beside(refused(llm.generate(text)))
        await turns.beside(refused(anext(llm.stream(text))))
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        await turns.beside(refused(anext(llm.chat_stream(messages))))

    run(body)


@pytest.fixture
def long_from_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slora.async_llm, "LONG_PROMPT", 4)


@pytest.mark.usefixtures("long_from_5")
def test_what_one_task_asks_for_is_submitted_in_its_order() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        asked: list[int] = []
        submit = llm._submit

        def note(ids: list[int], *rest: Any) -> Any:
            asked.append(len(ids))
            return submit(ids, *rest)

        llm._submit = note  # type: ignore[method-assign]
        prompts = ["abc" * 200, "abc" * 5, "ab", "abc" * 50, "a"]
        streams = [llm.stream(prompt, **LONG | {"max_tokens": 1}) for prompt in prompts]
        await llm.generate(["abcd" * 100, "abc"], n=2, max_tokens=1)
        assert asked == [601, 16, 3, 151, 2, 401, 401, 4, 4]
        for stream, prompt in zip(streams, prompts, strict=True):
            assert len([delta async for delta in stream]) == 1
            assert len(stream.prompt_token_ids or []) == len(prompt) + 1
        short = llm.stream("a", max_tokens=1)
        assert short.prompt_token_ids is not None, "nothing is waited for any more"

    run(body)


@pytest.mark.usefixtures("long_from_5")
@pytest.mark.parametrize("has_begun", [True, False])
def test_what_is_cancelled_while_it_waits_lets_nobody_overtake(has_begun: bool) -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        asked: list[list[int]] = []
        submit, make_ids, is_waiting, may_go_on = llm._submit, llm._ids, threading.Event(), threading.Event()

        def note(ids: list[int], *rest: Any) -> Any:
            asked.append(ids)
            return submit(ids, *rest)

        def ids(prompt: str) -> list[int]:
            if prompt == "window":
                is_waiting.set()
                assert may_go_on.wait(20)
            return make_ids(prompt)

        llm._submit, llm._ids = note, ids  # type: ignore[method-assign, assignment]
        prompts = ["window", "water", "kitten", "hello", "ladder"]
        streams = [llm.stream(prompt, max_tokens=1) for prompt in prompts]
        await asyncio.sleep(0)
        while has_begun and not is_waiting.is_set():
            await asyncio.sleep(0.001)
        for left in streams[1:4]:
            await left.aclose()
        await asyncio.sleep(0.1)
        assert asked == []
        may_go_on.set()
        await anext(streams[4])
        assert asked == [make_ids("window"), make_ids("ladder")]

    run(body)


@pytest.mark.usefixtures("long_from_5")
def test_a_stream_that_is_left_before_its_prompt_is_turned_into_ids_is_cancelled() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        left, dropped = llm.stream("window", **LONG), llm.stream("water ladder", **LONG)
        await left.aclose()
        del dropped
        assert [delta async for delta in left] == []
        waiting = asyncio.create_task(anext(llm.stream("kitten", **LONG)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await llm.generate("window", adapter="upper", temperature=0)).text == "WINDOW"
        await settle(llm)
        assert llm.stats().generated_tokens < 900

    run(body)


@pytest.mark.usefixtures("long_from_5")
def test_adapters_change_behind_what_their_task_asked_for() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        make_ids, may_go_on = llm._ids, threading.Event()

        def ids(prompt: str) -> list[int]:
            assert prompt != "ladder" or may_go_on.wait(20)
            time.sleep(0.2)
            return make_ids(prompt)

        async def read(stream: slora.async_llm.Stream) -> str:
            return "".join([delta.text async for delta in stream])

        llm._ids = ids  # type: ignore[method-assign, assignment]
        replaced = llm.stream("window", adapter="upper", temperature=0)
        await llm.adapters.add("upper", ADAPTERS / "reverse", replace=True)
        removed = llm.stream("window", adapter="upper", temperature=0)
        await llm.adapters.remove("upper")
        assert [await read(replaced), await read(removed)] == ["WINDOW", "wodniw"]
        with pytest.raises(slora.UnknownAdapterError, match="upper"):
            await read(llm.stream("window", adapter="upper"))
        held = llm.stream("ladder", adapter="sort", temperature=0)
        await asyncio.create_task(llm.adapters.pin("sort"))  # another task's turn is its own
        may_go_on.set()
        assert await read(held) == "addelr"

    run(body)


@pytest.mark.usefixtures("long_from_5")
@pytest.mark.parametrize("step", ["_ids", "_submit"])
def test_an_error_before_the_engine_is_the_readers_and_nobody_elses(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))

        def refuse(*_: Any) -> None:
            raise slora.RequestError("refused")

        with monkeypatch.context() as patched:
            patched.setattr(llm, step, refuse)
            dropped, left, read = (llm.stream("window") for _ in range(3))
            with pytest.raises(slora.RequestError, match="refused"):
                await anext(read)
        del dropped
        await left.aclose()
        gc.collect()
        assert told == []
        assert (await llm.generate("window", adapter="upper", temperature=0)).text == "WINDOW"

    run(body)


@pytest.mark.usefixtures("long_from_5")
def test_a_prompt_is_what_it_was_when_it_was_asked_for() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        messages = [{"role": "user", "content": "hello"}]
        stream = llm.chat_stream(messages, adapter="upper", temperature=0)
        messages[0]["content"] = "window"
        messages.append({"role": "assistant", "content": "water"})
        assert "".join([delta.text async for delta in stream]) == "HELLO"

    run(body)


def test_adapters_are_changed_while_other_tasks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    monkeypatch.setattr(slora.adapters.AsyncAdapters, "_register", turns.held(slora.adapters.AsyncAdapters._register))

    async def body(llm: slora.AsyncLLM) -> None:
        stream = llm.stream("abc", adapter="reverse", **LONG)
        await anext(stream)
        await turns.beside(llm.adapters.add("reverse", ADAPTERS / "upper", replace=True))
        assert llm.adapters["reverse"].version == 2
        assert (await llm.generate("abc", adapter="reverse", temperature=0)).text == "ABC", "the very next request"
        await llm.adapters.pin("sort")
        assert llm.adapters["sort"].pinned
        await llm.adapters.remove("sort")
        with pytest.raises(slora.UnknownAdapterError, match="sort"):
            await llm.adapters.remove("sort")
        await stream.aclose()

    run(body)


def test_closing_ends_streams_with_an_error() -> None:
    async def body(llm: slora.AsyncLLM) -> None:
        stream = llm.stream("abc", **LONG)
        waiting = asyncio.create_task(llm.generate("abc", **LONG))
        await anext(stream)
        await llm.close()
        with pytest.raises(slora.RequestError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(slora.RequestError, match="closed"):
            await waiting
        with pytest.raises(slora.RequestError, match="closed"):
            llm.stream("abc")

    run(body)


def test_one_engine_serves_several_event_loops_in_turn() -> None:
    llm = slora.AsyncLLM(BASE, adapters=ADAPTERS, **engine_options())
    for _ in range(2):
        assert asyncio.run(llm.generate("abc", adapter="upper", temperature=0)).text == "ABC"  # type: ignore[arg-type]
    asyncio.run(llm.close())
