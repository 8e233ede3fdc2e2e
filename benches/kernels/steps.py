"""What an engine's step loop launches, seen from inside: when each step's work on the device began and ended."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import torch
from clock import Clock, Mark

from slora.plan import Counts, StepPlan


@dataclass
class Step:
    """One launched step, while a phase was recorded."""

    phase: str
    counts: Counts
    end: Mark
    busy: list[tuple[Mark, Mark]] = field(default_factory=list)
    """Launched graphs; on the CPU, the run of the plan."""
    copies: list[tuple[int, Mark, Mark]] = field(default_factory=list)
    """(pages, start, end) of swap-ins."""
    was_ahead: bool = False
    """Whether all of it was launched while the step before still ran."""


class Recorder:
    """Wraps the executor's methods while it is entered; notes down the steps that are launched while `phase` is set."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.phase: str | None = None
        self.steps: list[Step] = []
        self._open: Step | None = None
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        if self.clock.is_cuda:
            from slora.cuda_runner import CudaRunner
            from slora.graphs import Graphs
            from slora.kernels import page_copy

            self._wrap(CudaRunner, "launch", self._launch)
            self._wrap(Graphs, "run", self._busy)
            self._wrap(page_copy, "_copy", self._copy_batch)
        else:
            from slora.kernels import reference
            from slora.runner import Runner

            self._wrap(Runner, "launch", self._launch)
            self._wrap(Runner, "run", self._busy)
            self._wrap(reference, "copy_pages", self._copy_plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patches.close()

    def of(self, phase: str) -> list[Step]:
        return [step for step in self.steps if step.phase == phase]

    def periods_ms(self, phase: str, has_shape: Callable[[Counts], bool]) -> list[tuple[float, Step]]:
        """(from the end of the step before to its own, the step), for each step of the shape that follows another."""
        found, steps = [], self.of(phase)
        for before, step in pairwise(steps):
            is_next = step.counts.step == before.counts.step + 1
            if is_next and has_shape(before.counts) and has_shape(step.counts):
                found.append((self.clock.ms(before.end, step.end), step))
        return found

    def busy_ms(self, step: Step) -> float:
        return sum(self.clock.ms(start, end) for start, end in step.busy)

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(owner, name)
        self._patches.enter_context(patch.object(owner, name, lambda *args, **kwargs: around(inner, *args, **kwargs)))

    def _launch(self, inner: Callable[..., Any], runner: object, plan: StepPlan) -> Any:
        phase = self.phase
        if phase is None:
            return inner(runner, plan)
        step = self._open = Step(phase, plan.counts, 0.0)
        pending = inner(runner, plan)
        step.was_ahead = bool(self.steps) and not self.clock.is_over(self.steps[-1].end)
        step.end, self._open = self.clock.mark(), None
        self.steps.append(step)
        return pending

    def _busy(self, inner: Callable[..., Any], *args: object) -> Any:
        step = self._open
        if step is None:
            return inner(*args)
        start = self.clock.mark()
        result = inner(*args)
        step.busy.append((start, self.clock.mark()))
        return result

    def _copy_batch(
        self, inner: Callable[..., Any], targets: list[int], sources: list[int], size: int, stream: int
    ) -> None:
        step, on = self._open, torch.cuda.ExternalStream(stream) if self._open else None
        start = self.clock.mark(on) if step else 0.0
        inner(targets, sources, size, stream)
        if step:
            step.copies.append((len(targets), start, self.clock.mark(on)))

    def _copy_plan(self, inner: Callable[..., Any], pool: object, host: object, plan: StepPlan) -> None:
        start = self.clock.mark()
        inner(pool, host, plan)
        if self._open and plan.counts.num_copies:
            self._open.copies.append((plan.counts.num_copies, start, self.clock.mark()))
