"""Generation under asyncio: streams of text, and answers to await."""

import asyncio
import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias, overload

from slora import _core
from slora.adapters import AsyncAdapters
from slora.client import AdapterNames, Client, Conversation, PromptLike
from slora.feed import Prompt, make_sampling
from slora.outputs import Delta, Result

Turn: TypeAlias = asyncio.Future[None]
"""Done when a stream, and all that its task asked for before, is submitted or given up."""
SUBMITS_AT_ONCE = 64
"""Then other tasks have their turn."""
LONG_PROMPT = 4 << 10
"""Characters, or ids, above which a thread makes the ids: shorter ones are done sooner than a thread has begun."""


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

    def __init__(
        self, start: _core.Output | asyncio.Task[_core.Output], adapter: str | None, waker: Waker, has_logprobs: bool
    ) -> None:
        self.adapter = adapter
        self.prompt_token_ids: list[int] | None = None
        """None while a long prompt is not turned into ids yet; known with the first delta."""
        self._waker, self._has_logprobs = waker, has_logprobs
        self._output: _core.Output | None = None
        self._start: asyncio.Task[_core.Output] | None = None
        self._is_new = asyncio.Event()
        if isinstance(start, asyncio.Task):
            self._start = start
        else:
            self._begin(start)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            if self._start is not None:
                self._begin(await self._start)
            while self._output is not None:
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
        if self._output is not None:
            self._waker.forget(self._output.id)

    def _begin(self, output: _core.Output) -> None:
        self._start, self._output = None, output
        self.prompt_token_ids = output.prompt_token_ids
        # Not a method of the stream's: the waker must not keep a stream alive that its reader has left.
        self._waker.call(output.id, self._is_new.set)

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
        if self._start is not None:
            self._start.cancel()
            self._start = None
        if self._output is not None:
            self._output.cancel()
            self._waker.forget(self._output.id)
            self._output = None


class AsyncLLM(Client):
    """One base model and its adapters, for asyncio.

        async with slora.AsyncLLM("path/to/base", adapters="path/to/adapters") as llm:
            async for delta in llm.stream("hello", adapter="formal", max_tokens=32):
                print(delta.text, end="")

    The engine works on threads of its own; the event loop wakes once for all requests that have something new by then.
    Long prompts are turned into ids on threads too. What one task asks for, requests and changes of adapters, reaches
    the engine in its order.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """The arguments are those of `LLM`. No event loop is needed yet."""
        super().__init__(*args, **options)
        self._wakers: dict[asyncio.AbstractEventLoop, Waker] = {}
        # By task: that of the last stream that a thread makes the ids for.
        self._turns = weakref.WeakKeyDictionary[asyncio.Task[Any], Turn]()

    @property
    def adapters(self) -> AsyncAdapters:
        """The adapters by name, to look at, and to change with `await`."""
        return AsyncAdapters(self._engine, self._reach_turn)

    def stream(self, prompt: PromptLike, *, adapter: str | None = None, **sampling: Any) -> Stream:
        """The answer as it is generated. Leaving the loop, or cancelling the task, cancels the request."""
        # Its caller may go on to change it while a thread reads it.
        (one,), _ = self._batch([copy.copy(prompt)], adapter)
        return self._stream(one, sampling)

    def chat_stream(self, messages: Conversation, *, adapter: str | None = None, **options: Any) -> Stream:
        """The answer to a conversation as it is generated; `options` as in `LLM.chat`."""
        messages, options = copy.deepcopy((messages, options))
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
        waker, caller, before = self._waker(), asyncio.current_task(), self._last_turn()
        params = make_sampling(sampling)

        def submit(ids: list[int]) -> _core.Output:
            return self._submit(ids, prompt.adapter, params, waker.mailbox, True)

        async def start() -> _core.Output:
            ids = await asyncio.to_thread(prompt.ids)
            await _reached(before)
            return submit(ids)

        found: _core.Output | asyncio.Task[_core.Output]
        if before is None and prompt.length <= LONG_PROMPT:
            found = submit(prompt.ids())
        else:
            found = asyncio.create_task(start())
            turn: Turn = waker.loop.create_future()
            found.add_done_callback(partial(_pass_on, turn, before))
            found.add_done_callback(_leave_to_reader)
            if caller is not None:
                self._turns[caller] = turn
        return Stream(found, prompt.adapter, waker, sampling.get("logprobs") is not None)

    def _last_turn(self) -> Turn | None:
        """Of what the calling task asked for before, if it is not reached yet."""
        caller = asyncio.current_task()
        turn = self._turns.get(caller) if caller is not None else None
        return turn if turn is not None and not turn.done() else None

    async def _reach_turn(self) -> None:
        """Wait until all that the calling task asked for before is submitted or given up."""
        await _reached(self._last_turn())

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
            await self._reach_turn()
            while feed.num_left:
                while feed.fill(SUBMITS_AT_ONCE, LONG_PROMPT):
                    if feed.long_prompt is not None:
                        feed.put_ids(await asyncio.to_thread(feed.long_prompt.ids))
                    await asyncio.sleep(0)
                await is_new.wait()
                is_new.clear()
                feed.collect(ended)
                ended.clear()
        finally:
            for request in feed.cancel():
                waker.forget(request)
        return feed.results


async def _reached(turn: Turn | None) -> None:
    """Wait for a turn; to be cancelled here is not to cancel it."""
    if turn is not None:
        await asyncio.wait([turn])


def _leave_to_reader(start: asyncio.Task[_core.Output]) -> None:
    """Whoever reads a stream gets its error; where nobody does, asyncio is not to log it as never retrieved."""
    if not start.cancelled():
        start.exception()


def _pass_on(turn: Turn, before: Turn | None, _: object) -> None:
    """A stream is submitted or given up: its turn is reached, once the one before it is."""
    if before is not None and not before.done():
        before.add_done_callback(partial(_pass_on, turn, None))
    else:
        turn.set_result(None)
