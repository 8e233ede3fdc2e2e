"""Generation under asyncio: streams of text, and answers to await."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, overload

from slora import _core
from slora.client import AdapterNames, Client, Conversation, PromptLike
from slora.feed import Prompt, make_sampling
from slora.outputs import Delta, Result

SUBMITS_AT_ONCE = 64
"""Then other tasks have their turn."""


class Waker:
    """One event loop's side of the mailbox: however many requests a step woke, the loop wakes once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.mailbox = loop, _core.Mailbox(with_pipe=True)
        self._calls: dict[int, Callable[[], object]] = {}
        loop.add_reader(self.mailbox.fileno(), self._on_readable)

    def call(self, request: int, call: Callable[[], object]) -> None:
        """Have `call()` made whenever the request has something new."""
        self._calls[request] = call

    def forget(self, request: int) -> None:
        self._calls.pop(request, None)

    def close(self) -> None:
        """Hand out what is there, and let go of the loop."""
        self._dispatch()
        self.loop.remove_reader(self.mailbox.fileno())
        self.mailbox.close()

    def _on_readable(self) -> None:
        self.mailbox.clear_pipe()
        self._dispatch()

    def _dispatch(self) -> None:
        for request in self.mailbox.take():
            call = self._calls.get(request)
            if call is not None:
                call()


class Stream:
    """The deltas of one request, to be read with `async for`. Dropping it, or `aclose`, cancels the request."""

    def __init__(self, output: _core.Output, waker: Waker, has_logprobs: bool) -> None:
        self.prompt_token_ids, self.adapter = output.prompt_token_ids, output.adapter
        self._output: _core.Output | None = output
        self._id, self._waker, self._has_logprobs = output.id, waker, has_logprobs
        self._is_new = asyncio.Event()
        # Not a method of the stream's: the waker must not keep a stream alive that its reader has left.
        waker.call(output.id, self._is_new.set)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while self._output is not None:
            try:
                delta = self._take(self._output)
                if delta is not None:
                    return delta
                await self._is_new.wait()
            except BaseException:
                self._end()
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request, unless it has ended."""
        self._end()

    def __del__(self) -> None:
        self._waker.forget(self._id)

    def _take(self, output: _core.Output) -> Delta | None:
        self._is_new.clear()
        found = output.take()
        delta = Delta(
            found.text,
            found.token_ids,
            found.logprobs if self._has_logprobs else None,
            found.prompt_logprobs,
            found.finish_reason,
            found.stop_reason,
        )
        if delta.finish_reason is not None:
            self._end()
        elif not (delta.token_ids or delta.prompt_logprobs):
            return None
        return delta

    def _end(self) -> None:
        if self._output is not None:
            self._output.cancel()
            self._output = None
            self._waker.forget(self._id)


class AsyncLLM(Client):
    """One base model and its adapters, for asyncio.

        async with slora.AsyncLLM("path/to/base", adapters="path/to/adapters") as llm:
            async for delta in llm.stream("hello", adapter="formal", max_tokens=32):
                print(delta.text, end="")

    The engine works on threads of its own; it wakes the event loop once a step.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """The arguments are those of `LLM`. No event loop is needed yet."""
        super().__init__(*args, **options)
        self._wakers: dict[asyncio.AbstractEventLoop, Waker] = {}

    def stream(self, prompt: PromptLike, *, adapter: str | None = None, **sampling: Any) -> Stream:
        """The answer as it is generated. Leaving the loop, or cancelling the task, cancels the request."""
        (one,), _ = self._batch([prompt], adapter)
        return self._stream(one, sampling)

    def chat_stream(self, messages: Conversation, *, adapter: str | None = None, **options: Any) -> Stream:
        """The answer to a conversation as it is generated; `options` as in `LLM.chat`."""
        (one,), _, sampling = self._chat_batch([messages], adapter, options)
        return self._stream(one, sampling)

    @overload
    async def generate(
        self, prompts: PromptLike, *, adapter: str | None = ..., n: int = ..., **sampling: Any
    ) -> Result: ...

    @overload
    async def generate(
        self, prompts: Sequence[PromptLike], *, adapter: AdapterNames = ..., n: int = ..., **sampling: Any
    ) -> list[Result]: ...

    async def generate(
        self, prompts: PromptLike | Sequence[PromptLike], *, adapter: AdapterNames = None, n: int = 1, **sampling: Any
    ) -> Result | list[Result]:
        """As `LLM.generate`: a list of results for a list of prompts, a result for a single one."""
        batch, is_one = self._batch(prompts, adapter)
        results = await self._run(batch, n, sampling)
        return results[0] if is_one else results

    @overload
    async def chat(
        self, messages: Conversation, *, adapter: str | None = ..., n: int = ..., **options: Any
    ) -> Result: ...

    @overload
    async def chat(
        self, messages: Sequence[Conversation], *, adapter: AdapterNames = ..., n: int = ..., **options: Any
    ) -> list[Result]: ...

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        **options: Any,
    ) -> Result | list[Result]:
        """As `LLM.chat`."""
        batch, is_one, sampling = self._chat_batch(messages, adapter, options)
        results = await self._run(batch, n, sampling)
        return results[0] if is_one else results

    async def close(self) -> None:
        """End every request, wait for all threads and free all memory."""
        await asyncio.to_thread(self._engine.close)
        waker = self._wakers.pop(asyncio.get_running_loop(), None)
        if waker is not None:
            waker.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _waker(self) -> Waker:
        self._engine.check_open()
        loop = asyncio.get_running_loop()
        if loop not in self._wakers:
            self._wakers = {loop: waker for loop, waker in self._wakers.items() if not loop.is_closed()}
            self._wakers[loop] = Waker(loop)
        return self._wakers[loop]

    def _stream(self, prompt: Prompt, sampling: Mapping[str, Any]) -> Stream:
        waker = self._waker()
        output = self._submit(prompt.ids(), prompt.adapter, make_sampling(sampling), waker.mailbox, True)
        return Stream(output, waker, sampling.get("logprobs") is not None)

    async def _run(self, prompts: list[Prompt], n: int, sampling: Mapping[str, Any]) -> list[Result]:
        waker, ended, is_new = self._waker(), list[int](), asyncio.Event()

        def submit(ids: list[int], adapter: str | None, sampling: _core.Sampling) -> _core.Output:
            output = self._submit(ids, adapter, sampling, waker.mailbox, False)
            waker.call(output.id, partial(note, output.id))
            return output

        def note(request: int) -> None:
            waker.forget(request)
            ended.append(request)
            is_new.set()

        feed = self._feed(prompts, n, sampling, submit)
        try:
            while feed.num_left:
                while feed.fill(SUBMITS_AT_ONCE):
                    await asyncio.sleep(0)
                await is_new.wait()
                is_new.clear()
                feed.collect(ended)
                ended.clear()
        finally:
            for request in feed.cancel():
                waker.forget(request)
        return feed.results
