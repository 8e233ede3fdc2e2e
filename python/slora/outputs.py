"""What requests bring."""

from dataclasses import dataclass, field

LogProbs = list[dict[int, float]]
"""For each token, {token id: log-probability} of the raw model: the token itself and the best ones asked for."""


@dataclass(frozen=True)
class Usage:
    """Tokens that were computed."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Choice:
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    """ "stop": an end-of-sequence or stop token, the last of `token_ids`, or a stop string; "length"; "cancelled". """
    stop_reason: int | str | None
    """The stop token or the stop string; None: neither ended it."""
    logprobs: LogProbs | None


@dataclass
class Result:
    """A prompt and its answers; the attributes of the first answer are the result's own, too."""

    prompt_token_ids: list[int]
    adapter: str | None
    prompt_logprobs: list[dict[int, float] | None] | None
    """For each prompt token, None for the first; None: not asked for."""
    choices: list[Choice]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> LogProbs | None:
        return self.choices[0].logprobs

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), sum(len(choice.token_ids) for choice in self.choices))


@dataclass
class Delta:
    """What is new of a streamed request."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: LogProbs | None = None
    prompt_logprobs: LogProbs | None = None
    """New ones, from the prompt's second token on."""
    finish_reason: str | None = None
    """With the last delta; see `Choice`."""
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Stats:
    """Counters and gauges, as of the last step. Counters grow for ever, gauges ("now") go up and down."""

    pool_bytes: int
    """Of all pages together."""
    page_bytes: int
    num_pages: int
    free_pages: int
    """Now: pages that hold nothing."""
    kv_pages: int
    """Now: pages with KV cache."""
    adapter_pages: int
    """Now: pages with adapters."""
    idle_adapter_pages: int
    """Of these, pages of adapters that no running request uses."""
    num_host_pages: int
    free_host_pages: int
    running: int
    """Now: requests."""
    waiting: int
    waiting_for_adapter: int
    adapters: int
    """Now: registered, with retired versions that requests still use."""
    resident_adapters: int
    host_adapters: int
    loading_adapters: int
    steps: int
    rows: int
    """Token rows computed."""
    submitted: int
    ended: int
    generated_tokens: int
    preemptions: int
    adapter_evictions: int
    """Adapters that gave their device pages back."""
    host_evictions: int
    swap_ins: int
    swap_in_pages: int
    prefetches: int
    """Swap-ins before any running request asked."""
    loads: int
    load_failures: int
    load_us: int
    """Time that loads from disk took, summed up."""
