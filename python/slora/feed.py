"""Answers many prompts with a bounded number of requests on their way."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from slora import _core
from slora.errors import RequestError
from slora.outputs import Choice, Result

Submit = Callable[[list[int], str | None, _core.Sampling], _core.Output]


class Prompt(NamedTuple):
    """A prompt, whose text is turned into ids when its turn comes."""

    ids: Callable[[], list[int]]
    adapter: str | None
    length: int
    """Characters, or ids: how much there is to turn."""


class Feed:
    """Prompts on their way to results, in the order of the prompts.

    The caller alternates `fill` and `collect`; after an error it calls `cancel`. So a long list costs memory for its
    results only, and a short queue of the engine is no obstacle.
    """

    def __init__(
        self, prompts: Sequence[Prompt], sampling: Mapping[str, Any], n: int, submit: Submit, max_outstanding: int
    ) -> None:
        self._submit, self._max_outstanding = submit, max_outstanding
        self._has_logprobs = sampling.get("logprobs") is not None
        first = make_sampling(sampling)
        # The prompt's log-probabilities are the same for every choice.
        others = make_sampling({**sampling, "prompt_logprobs": None})
        self._samplings = [first, *(others.for_choice(i) for i in range(1, n))]
        self._waiting = iter((i, choice, prompt) for i, prompt in enumerate(prompts) for choice in range(n))
        self._next = next(self._waiting, None)
        self._open: dict[int, tuple[int, int, _core.Output]] = {}
        self._choices: list[list[Choice | None]] = [[None] * n for _ in prompts]
        self._results: list[Result | None] = [None] * len(prompts)
        self._ids: tuple[int, list[int]] = (-1, [])
        self.long_prompt: Prompt | None = None
        self.num_left = len(prompts)

    @property
    def results(self) -> list[Result]:
        """All of them; none may be left."""
        return [result for result in self._results if result is not None]

    def fill(self, most: int = sys.maxsize, longest: int = sys.maxsize) -> bool:
        """Submit what may be on its way, but no more than `most`; whether more may follow at once.

        Stops at a prompt longer than `longest` until `put_ids` brings its ids: it is `long_prompt` then.
        """
        for _ in range(min(most, self._max_outstanding - len(self._open))):
            if self._next is None:
                return False
            index, choice, prompt = self._next
            if self._ids[0] != index:
                if prompt.length > longest:
                    self.long_prompt = prompt
                    return True
                self._ids = (index, prompt.ids())
            output = self._submit(self._ids[1], prompt.adapter, self._samplings[choice])
            self._open[output.id] = (index, choice, output)
            self._next = next(self._waiting, None)
        return len(self._open) < self._max_outstanding

    def put_ids(self, ids: list[int]) -> None:
        """The ids of `long_prompt`."""
        assert self._next is not None
        self._ids, self.long_prompt = (self._next[0], ids), None

    def collect(self, ids: Iterable[int]) -> int:
        """Take what ended, by request id: how many prompts have all their answers now. Raises a request's error."""
        before = self.num_left
        for request in ids:
            index, choice, output = self._open[request]
            delta = output.take()
            if delta.finish_reason is not None:
                del self._open[request]
                self._finish(index, choice, output, delta)
        return before - self.num_left

    def cancel(self) -> list[int]:
        """End whatever is on its way: the ids of the requests."""
        ids = list(self._open)
        for _, _, output in self._open.values():
            output.cancel()
        self._open.clear()
        return ids

    def _finish(self, index: int, choice: int, output: _core.Output, delta: _core.Delta) -> None:
        choices = self._choices[index]
        assert delta.finish_reason is not None
        logprobs = delta.logprobs if self._has_logprobs else None
        choices[choice] = Choice(choice, delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason, logprobs)
        if choice == 0:
            scored = delta.prompt_logprobs
            prompt_logprobs = None if scored is None else [None, *scored]
            self._results[index] = Result(output.prompt_token_ids, output.adapter, prompt_logprobs, [])
        found = [done for done in choices if done is not None]
        result = self._results[index]
        if len(found) == len(choices):
            assert result is not None
            result.choices = found
            self.num_left -= 1


def make_sampling(options: Mapping[str, Any]) -> _core.Sampling:
    """Raises RequestError for a value outside its range, TypeError for an unknown keyword."""
    try:
        return _core.Sampling(**options)
    except OverflowError:
        odd = [
            f"{name} is {value}" for name, value in options.items() if isinstance(value, int) and abs(value) >= 2**63
        ]
        raise RequestError(f"{', '.join(odd) or 'a sampling option'}: integers must fit 64 bits") from None
