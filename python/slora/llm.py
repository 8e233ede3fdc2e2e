"""Offline generation: lists in, lists out."""

import sys
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, overload

from slora import _core
from slora.adapters import Adapters
from slora.client import AdapterNames, Client, Conversation, PromptLike
from slora.feed import Prompt
from slora.outputs import Result

WAIT_S = 60.0
"""Of one call; signals are looked at far more often."""


class LLM(Client):
    """One base model and its adapters.

        with slora.LLM("path/to/base", adapters={"formal": "path/to/adapter"}) as llm:
            print(llm.generate("hello", adapter="formal", max_tokens=32).text)

    Calls may come from several threads. `close`, leaving `with`, garbage collection and the interpreter's exit free all
    memory; unfinished requests then end with an error.
    """

    @property
    def adapters(self) -> Adapters:
        """The adapters by name, to look at and to change."""
        return Adapters(self._engine)

    @overload
    def generate(
        self,
        prompts: PromptLike,
        *,
        adapter: str | None = ...,
        n: int = ...,
        progress: bool | None = ...,
        **sampling: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        adapter: AdapterNames = ...,
        n: int = ...,
        progress: bool | None = ...,
        **sampling: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Answer prompts, each a text or a list of token ids: a list of results for a list, else a result.

        `adapter`: one name for all prompts, or one for each; None is the base. `n` answers to each prompt, of different
        seeds. `progress`: a bar, by default on a terminal. `sampling`: the keywords of `slora._core.Sampling`, such as
        max_tokens, temperature, top_p, stop, seed, logprobs. The first error ends the call and cancels the others.
        """
        batch, is_one = self._batch(prompts, adapter)
        results = self._run(batch, n, sampling, progress)
        return results[0] if is_one else results

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        adapter: str | None = ...,
        n: int = ...,
        progress: bool | None = ...,
        **options: Any,
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        *,
        adapter: AdapterNames = ...,
        n: int = ...,
        progress: bool | None = ...,
        **options: Any,
    ) -> list[Result]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        progress: bool | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Answer a conversation, or each of several, through the model's chat template.

        `options`: tools, add_generation_prompt, continue_final_message and template_kwargs for the template, all others
        as in `generate`; max_tokens is by default what the context holds.
        """
        batch, is_one, sampling = self._chat_batch(messages, adapter, options)
        results = self._run(batch, n, sampling, progress)
        return results[0] if is_one else results

    def close(self) -> None:
        """End every request, wait for all threads and free all memory."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, prompts: list[Prompt], n: int, sampling: dict[str, Any], progress: bool | None) -> list[Result]:
        mailbox = _core.Mailbox()
        feed = self._feed(prompts, n, sampling, partial(self._submit, mailbox=mailbox, wake_on_token=False))
        with _progress_bar(len(prompts), progress) as bar:
            try:
                while feed.num_left:
                    feed.fill()
                    bar.update(feed.collect(mailbox.wait(WAIT_S)))
            except BaseException:  # ctrl-C, too
                feed.cancel()
                raise
        return feed.results


def _progress_bar(total: int, progress: bool | None) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    is_shown = progress if progress is not None else total > 1 and sys.stderr.isatty()
    return tqdm(total=total, desc="generating", unit=" prompts", disable=not is_shown, leave=False)
