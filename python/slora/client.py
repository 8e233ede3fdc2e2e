"""What `LLM` and `AsyncLLM` have in common: the engine, its adapters, and the way from prompts to requests."""

import json
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from slora import _core
from slora.engine import Engine
from slora.errors import RequestError
from slora.feed import Feed, Prompt, Submit
from slora.options import Options
from slora.outputs import Stats

PromptLike = str | Sequence[int]
Message = Mapping[str, Any]
Conversation = Sequence[Message]
AdapterNames = str | None | Sequence[str | None]
MAX_CHOICES = 256
TEMPLATE_OPTIONS = ("tools", "add_generation_prompt", "continue_final_message", "template_kwargs")
"""Keywords of `chat` that go to the template; the others are of `slora._core.Sampling`."""


class Client:
    """An engine and its clients' side; use `LLM` or `AsyncLLM`."""

    def __init__(
        self,
        model: str | Path,
        *,
        adapters: Mapping[str, str | Path] | str | Path | None = None,
        device: str = Options.device,
        dtype: str = Options.dtype,
        load_format: str = Options.load_format,
        pool_bytes: int | None = None,
        pool_fraction: float | None = None,
        host_bytes: int | None = None,
        page_tokens: int | None = None,
        max_batch_tokens: int = Options.max_batch_tokens,
        max_running: int = Options.max_running,
        max_waiting: int = Options.max_waiting,
        max_adapters: int = Options.max_adapters,
        max_rank: int | None = None,
        max_context: int | None = None,
        queue: str = Options.queue,
        prefetch: bool = Options.prefetch,
        seed: int = Options.seed,
    ) -> None:
        """Load the base in the folder `model` and register adapters; no adapter's weights are read yet.

        What each keyword means, and its default, is said in `slora.options.Options`. Raises ConfigError, LoadError,
        AdapterError, DeviceError.
        """
        options = Options(
            adapters=adapters,
            device=device,
            dtype=dtype,
            load_format=load_format,
            pool_bytes=pool_bytes,
            pool_fraction=pool_fraction,
            host_bytes=host_bytes,
            page_tokens=page_tokens,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            max_adapters=max_adapters,
            max_rank=max_rank,
            max_context=max_context,
            queue=queue,
            prefetch=prefetch,
            seed=seed,
        )
        self._engine = Engine(model, options)

    def stats(self) -> Stats:
        """Counters and gauges, as of the last step."""
        self._engine.check_open()
        found = self._engine.core.stats()
        sizes = {"pool_bytes": self._engine.pool_bytes, "page_bytes": self._engine.page_bytes}
        return Stats(**sizes, **{name: found[name] for name in _COUNTERS})

    @property
    def limits(self) -> dict[str, int]:
        """Limits in force: max_context, max_running, max_adapters, max_adapter_pages, …"""
        return self._engine.core.config

    def _submit(
        self, ids: list[int], adapter: str | None, sampling: _core.Sampling, mailbox: _core.Mailbox, wake_on_token: bool
    ) -> _core.Output:
        self._engine.check_open()
        return self._engine.core.submit(ids, adapter, sampling, mailbox, wake_on_token)

    def _feed(self, prompts: list[Prompt], n: int, sampling: Mapping[str, Any], submit: Submit) -> Feed:
        self._engine.check_open()
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
            raise RequestError(f"n is {n!r}, it must be between 1 and {MAX_CHOICES}")
        limits = self.limits
        # Enough for every step to find work and for prefetching to look ahead, within what the engine's queue takes.
        return Feed(prompts, sampling, n, submit, min(limits["max_waiting"], 4 * limits["max_running"] + 64))

    def _batch(self, prompts: Any, adapter: AdapterNames) -> tuple[list[Prompt], bool]:
        """The prompts, and whether it is a single one, not a list."""
        prompts = _as_list(prompts)
        if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
            raise RequestError(f"prompts are {_shown(prompts)}; hint: a text, token ids, or a list of either")
        is_one = isinstance(prompts, str) or _is_list_of(prompts, Integral)
        each: Sequence[PromptLike] = [prompts] if is_one else prompts
        names = _names(adapter, len(each))
        batch = [
            Prompt(partial(self._ids, prompt), name, len(prompt) if isinstance(prompt, Sized) else 0)
            for prompt, name in zip(each, names, strict=True)
        ]
        return batch, is_one

    def _chat_batch(
        self, messages: Any, adapter: AdapterNames, options: Mapping[str, Any]
    ) -> tuple[list[Prompt], bool, dict[str, Any]]:
        """The conversations, whether it is a single one, and the sampling options among the options."""
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            raise RequestError(f'messages are {_shown(messages)}; hint: a list of {{"role": …, "content": …}}')
        is_one = _is_list_of(messages, Mapping)
        each: Sequence[Conversation] = [messages] if is_one else messages
        names = _names(adapter, len(each))
        template = {name: value for name, value in options.items() if name in TEMPLATE_OPTIONS}
        sampling = {"max_tokens": None} | {name: value for name, value in options.items() if name not in template}
        prompts = [
            Prompt(partial(self._chat_ids, conversation, **template), name, _text_len([conversation, template]))
            for conversation, name in zip(each, names, strict=True)
        ]
        return prompts, is_one, sampling

    def _ids(self, prompt: PromptLike) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self._text().encode(prompt, max_context=self.limits["max_context"])
            except UnicodeEncodeError as error:
                raise RequestError(f"the prompt is no Unicode text: {error}") from None
        found: Any = _as_list(prompt)
        if isinstance(found, bytes) or not isinstance(found, Sequence):
            raise RequestError(f"a prompt is {_shown(found)}; hint: a text, or a list of token ids")
        ids: list[Any] = list(found)
        if not all(type(i) is int for i in ids):
            ids = [int(i) if isinstance(i, Integral) else i for i in ids]
        largest = self._engine.model_config.vocab_size - 1
        odd = [i for i in ids if not isinstance(i, int) or not 0 <= i <= largest]
        if odd:
            raise RequestError(f"the prompt holds {odd[0]!r}, its token ids must be from 0 to {largest}")
        return ids

    def _chat_ids(
        self,
        messages: Conversation,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        now = time.localtime()
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        return self._text().encode_chat(
            json.dumps(messages),
            tools=json.dumps(tools) if tools is not None else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=json.dumps(template_kwargs) if template_kwargs is not None else None,
            now_unix_s=int(time.mktime(now)),
            utc_offset_s=now.tm_gmtoff,
            max_context=self.limits["max_context"],
        )

    def _text(self) -> _core.Text:
        if self._engine.text is None:
            raise RequestError(
                f"{self._engine.path} has no tokenizer.json, so text is not served; hint: send token ids"
            )
        return self._engine.text


def _text_len(value: object) -> int:
    """Characters in a nest of messages; what is no text counts as one."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_text_len, value)) if isinstance(value, (list, tuple)) else 1


def _is_list_of(values: object, kind: type) -> bool:
    return isinstance(values, Sequence) and bool(values) and isinstance(values[0], kind)


def _as_list(prompts: Any) -> Any:
    """Arrays as the lists that they stand for."""
    return prompts.tolist() if hasattr(prompts, "tolist") else prompts


def _shown(value: object) -> str:
    return f"of type {type(value).__name__}: {value!r:.60}"


def _names(adapter: AdapterNames, count: int) -> Sequence[str | None]:
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if not isinstance(adapter, Sequence):
        raise RequestError(f"adapter is {_shown(adapter)}; hint: a name, None, or a list of these")
    if odd := [name for name in adapter if not isinstance(name, str | None)]:
        raise RequestError(f"adapter holds one {_shown(odd[0])}; hint: a name, None, or a list of these")
    if len(adapter) != count:
        raise RequestError(
            f"adapter has {len(adapter)} names for {count} prompts; hint: one name, or one for each prompt"
        )
    return adapter


_COUNTERS = [field.name for field in fields(Stats) if field.name not in ("pool_bytes", "page_bytes")]
