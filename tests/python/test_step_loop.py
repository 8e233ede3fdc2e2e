"""The step thread's rounds, with a core and an executor of which only the answers matter."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slora.engine import COPY_WAIT_S, IDLE_WAIT_S, StepLoop
from slora.plan import Counts
from slora.runner import StepOutput

pytestmark = pytest.mark.cpu_only(reason="what the host decides")


def test_whoever_waits_for_a_copy_is_planned_as_soon_as_it_has_arrived() -> None:
    log: list[object] = []
    is_open = iter([True] * 5 + [False])
    planned, arrived = iter([5, 0, 0, 0, 0]), iter([[], [], [5], [], []])

    def wait(timeout_s: float) -> bool:
        log.append(timeout_s)
        return next(is_open)

    def schedule(buffer: np.ndarray) -> int:
        buffer[Counts._fields.index("num_copies")] = 1
        return next(planned)

    core: Any = SimpleNamespace(
        num_words=len(Counts._fields),
        layout=[("counts", 0, len(Counts._fields), False)],
        wait=wait,
        schedule=schedule,
        commit=lambda step, *output: None,
        copies_done=lambda step: log.append(f"copies of {step}"),
        fail=log.append,
    )
    done = SimpleNamespace(is_done=True, result=lambda: StepOutput(np.empty(0, np.int32)))
    runner: Any = SimpleNamespace(launch=lambda plan: done, copies_done=lambda: next(arrived))
    StepLoop(core, runner, torch.device("cpu")).run()
    assert log == [0.0, 0.0, COPY_WAIT_S, "copies of 5", 0.0, IDLE_WAIT_S, IDLE_WAIT_S]
