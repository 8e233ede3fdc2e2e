"""Offline generation: lists in, lists out."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, overload

from slora import _core
from slora.client import (
    AdapterNames,
    Client,
    Conversation,
    Message,
    PromptLike,
    as_list,
    is_one_conversation,
    is_one_prompt,
)
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

    @overload
    def generate(
        self,
        prompts: str,
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompts: Sequence[int],
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        adapter: AdapterNames = None,
        n: int = 1,
        progress: bool | None = None,
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
        """Answer prompts, each a text or a list of token ids: a list of results for a list, a result for a single prompt.

        `adapter`: one name for all prompts, or one for each; None is the base. `n` answers to each prompt, of different
        seeds. `progress`: a bar, by default on a terminal. `sampling`: the keywords of `slora._core.Sampling`, such as
        max_tokens, temperature, top_p, stop, seed, logprobs. The first error ends the call; other requests are cancelled.
        """
        prompts = as_list(prompts)
        if is_one_prompt(prompts):
            return self._run(self._prompts([prompts], adapter), n, sampling, False)[0]  # type: ignore[list-item]
        return self._run(self._prompts(prompts, adapter), n, sampling, progress)  # type: ignore[arg-type]

    @overload
    def chat(self, messages: Sequence[Message], **options: Any) -> Result: ...

    @overload
    def chat(self, messages: Sequence[Conversation], **options: Any) -> list[Result]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        adapter: AdapterNames = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        n: int = 1,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Answer a conversation, or each of several, through the model's chat template.

        `max_tokens` is by default what the context holds; all else is as in `generate`.
        """
        template = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "template_kwargs": template_kwargs,
        }
        sampling = {"max_tokens": None} | sampling
        if is_one_conversation(messages):
            one = self._conversations([messages], adapter, **template)  # type: ignore[list-item]
            return self._run(one, n, sampling, False)[0]
        return self._run(self._conversations(messages, adapter, **template), n, sampling, progress)  # type: ignore[arg-type]

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
        feed = self._feed(prompts, n, sampling, mailbox)
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
