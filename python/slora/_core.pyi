"""The Rust side: engine, adapter files, text. Thin wrappers; `slora.llm` is what users call."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, final

__all__ = [
    "Base",
    "Core",
    "Delta",
    "Load",
    "Mailbox",
    "Output",
    "Sampling",
    "Server",
    "Text",
    "__version__",
    "check_adapter",
    "set_exceptions",
]

__version__: str

def set_exceptions(exceptions: Mapping[str, type[Exception]]) -> None:
    """The classes that this module raises, by name: ConfigError, RequestError, UnknownAdapterError, AdapterError,
    LoadError, DeviceError."""

def check_adapter(path: str, base: Base) -> str:
    """The tensor accounting of a checkpoint as JSON. Raises AdapterError."""

@final
class Base:
    """The base model, as adapters see it."""

    def __new__(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocab_size: int,
        dtype: str,
        page_bytes: int,
        max_adapter_pages: int,
        max_rank: int | None = None,
        name: str | None = None,
    ) -> Self: ...

@final
class Text:
    """Tokenizer and chat template of a model folder."""

    def __new__(cls, path: str) -> Self:
        """Raises LoadError."""

    def encode(self, text: str, add_special_tokens: bool = True, *, max_context: int | None = None) -> list[int]:
        """`max_context`: text too long for so many tokens, whatever they are, is refused untokenized."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def encode_chat(
        self,
        messages: str,
        *,
        tools: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: str | None = None,
        now_unix_s: int = 0,
        utc_offset_s: int = 0,
        max_context: int | None = None,
    ) -> list[int]:
        """Messages, tools and template variables are JSON. Raises RequestError."""

    @property
    def stop_token_ids(self) -> list[int]: ...
    @property
    def vocab_size(self) -> int: ...

@final
class Sampling:
    """How tokens are chosen, and when a request ends."""

    def __new__(
        cls,
        *,
        max_tokens: int | None = ...,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop: str | Sequence[str] | None = None,
        include_stop: bool = False,
        stop_token_ids: Sequence[int] = ...,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool = True,
    ) -> Self:
        """`max_tokens`: 16; None: as many as the context holds. Raises RequestError, naming value and limit."""

    def for_choice(self, index: int) -> Sampling:
        """The same with `seed + index`; without a seed, itself."""

@final
class Mailbox:
    """The requests that have something new, for one reader of many."""

    def __new__(cls, with_pipe: bool = False) -> Self: ...
    def wait(self, timeout_s: float) -> list[int]:
        """Request ids, each once; empty after the timeout. At most 0.05 s pass before signals are looked at."""

    def take(self) -> list[int]: ...
    def fileno(self) -> int:
        """The pipe's reading end, which becomes readable when there is something new."""

    def clear_pipe(self) -> None: ...
    def close(self) -> None: ...

@final
class Delta:
    """What is new of a request."""

    @property
    def is_accepted(self) -> bool: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[dict[int, float]] | None: ...
    @property
    def prompt_logprobs(self) -> list[dict[int, float]] | None:
        """From the prompt's second token on; None: not asked for."""

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "cancelled"; None: not ended."""

    @property
    def stop_reason(self) -> int | str | None:
        """The stop token or the stop string's text."""

@final
class Output:
    """A request's reader. Dropping it cancels the request."""

    @property
    def id(self) -> int: ...
    @property
    def prompt_token_ids(self) -> list[int]: ...
    @property
    def adapter(self) -> str | None: ...
    def take(self) -> Delta:
        """What is new. Raises RequestError, UnknownAdapterError, AdapterError or DeviceError if that was its end."""

    def cancel(self) -> None: ...

@final
class Core:
    """An engine: its step thread calls `schedule`, `commit`, `copies_done`, `wait`; other calls come from anywhere."""

    def __new__(
        cls,
        base: Base,
        text: Text | None,
        *,
        slabs: Sequence[tuple[int, int]],
        keep_alive: Any,
        num_pages: int,
        page_tokens: int,
        max_batch_tokens: int,
        max_running: int,
        max_waiting: int,
        max_adapters: int,
        max_context: int,
        eos_token_ids: Sequence[int],
        queue: str = "fcfs",
        prefetch: bool = True,
        eviction: str = "cost",
        max_copy_pages: int | None = None,
        max_step: int | None = None,
        num_loaders: int = 2,
        num_ready_slabs: int | None = None,
        seed: int = 0,
    ) -> Self:
        """`slabs`: (address, bytes) of the host tier's memory, which `keep_alive` owns. `num_ready_slabs`: the first so
        many may be copied from; None: all. `max_step`: behind it steps are numbered from 1 again; None: what a plan's
        words hold. Raises ConfigError."""

    @property
    def config(self) -> dict[str, int]:
        """Limits as they are in force: max_context, max_running, max_adapters, max_adapter_pages, num_host_pages."""

    @property
    def layout(self) -> list[tuple[str, int, int, bool]]:
        """(name, offset in words, capacity in words, whether the words are f32) of a plan's arrays."""

    @property
    def num_words(self) -> int: ...
    def schedule(self, buffer: Any) -> int:
        """Plan the next step into an int32 buffer: its number, from 1; 0: nothing to run now."""

    def commit(
        self,
        step: int,
        ids: Any,
        chosen_logprobs: Any | None = None,
        best_ids: Any | None = None,
        best_logprobs: Any | None = None,
        prompt_logprobs: Any | None = None,
        prompt_best_ids: Any | None = None,
        prompt_best_logprobs: Any | None = None,
    ) -> None:
        """A launched step's output: contiguous int32 and float32 buffers."""

    def copies_done(self, step: int) -> None: ...
    def slabs_ready(self, num_slabs: int) -> None:
        """The first so many slabs may be copied from: adapters that were loaded into them may now be swapped in."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until there may be something to plan; False: the engine is stopping, and no step is to be run."""

    def fail(self, reason: str) -> None:
        """End every request with DeviceError(reason)."""

    def submit(
        self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, mailbox: Mailbox, wake_on_token: bool
    ) -> Output:
        """Raises RequestError, DeviceError."""

    def register(self, name: str, path: str, replace: bool = False, pinned: bool = False) -> dict[str, Any]:
        """Raises AdapterError. The dict is that of `adapter`."""

    def unload(self, name: str) -> None: ...
    def pin(self, name: str, pinned: bool) -> None: ...
    def adapter(self, name: str) -> dict[str, Any] | None:
        """name, version, state, reason, num_pages, bytes, pins, unfinished, pinned, replacing; while the checkpoint is
        known also ranks (module -> smallest and largest), path and warnings (each a code and a message)."""

    def adapters(self) -> list[dict[str, Any]]: ...
    def adapter_names(self) -> list[str]: ...
    def stats(self) -> dict[str, int]: ...
    @property
    def failure(self) -> str | None:
        """Why the engine has stopped by itself; None: it has not."""

    def begin_close(self) -> None:
        """Take nothing more and end every request; the step thread then sees `wait` return False."""

    def close(self) -> None:
        """After the step thread has ended: wait for loaders and delivery. Nothing touches the slabs afterwards."""

@final
class Server:
    """A running HTTP server beside the engine. It needs no interpreter."""

    def __new__(cls, core: Core, config: str) -> Self:
        """`config`: the server's configuration as JSON (docs/http.md). Raises ConfigError; else it listens."""

    @staticmethod
    def check(config: str, queue: str) -> None:
        """What needs no engine to be found wrong; `queue`: the order that it will have. Raises ConfigError."""

    @staticmethod
    def default_config() -> str: ...
    @property
    def address(self) -> str: ...
    def exit_after_failure(self, grace_s: float) -> None:
        """End the process, whatever hangs in it, if it is still there so long after the engine has failed."""

    def begin_drain(self) -> None:
        """Refuse new work; running requests may finish."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until all requests have ended after `begin_drain`, or until the timeout."""

    def stop(self) -> None:
        """End every connection."""

@final
class Load:
    """A load on a server, from a thread of its own. It needs no interpreter."""

    def __new__(cls, config: str) -> Self:
        """`config`: what is sent, as JSON. Raises ConfigError; else it runs."""

    def progress(self) -> tuple[float, int, int]:
        """Seconds since the start, requests sent, requests ended."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; whether it came."""

    def stop(self) -> None:
        """Send nothing more and leave what has not ended."""

    def finish(self) -> str:
        """Wait for the end: the report as JSON. Raises RuntimeError when it is called again."""
