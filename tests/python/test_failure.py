"""A step that fails or hangs, in a real process: everybody is told, and the process ends."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import pytest
from conftest import BASE
from device import engine_options

STEP_TIMEOUT_S = 2.0
SERVE = """
import ctypes, json, sys, time
from slora.engine import StepLoop
from slora.options import Options
from slora import serve as served

options = Options(**json.loads(sys.argv[4]))
if options.device == "cuda":
    from slora.cuda_runner import CudaRunner as Runner
else:
    from slora.runner import Runner

launch, num_steps = Runner.launch, 0

def fail():
    how = sys.argv[2]
    print("it fails", flush=True)
    if how == "hangs":
        time.sleep(1000)
    if how == "hangs and holds the interpreter":
        ctypes.PyDLL(None).sleep(1000)
    if how == "raises":
        raise MemoryError("no bytes left")

def patched_launch(self, plan):
    global num_steps
    num_steps += 1
    if num_steps >= 20:
        fail()
    return launch(self, plan)

def patched_commit(self):
    if num_steps >= 20 and self._launched and sys.argv[2] == "panics in the core":
        self._core.commit(123456, self._launched[1].result().ids)
    return commit(self)

commit, StepLoop._commit = StepLoop._commit, patched_commit
Runner.launch = patched_launch
config = {"port": 0, "model": sys.argv[1], "step_timeout_s": float(sys.argv[3])}
served.CLOSE_TIMEOUT_S = 2
sys.exit(served.serve(sys.argv[1], options, config, 0.5))
"""
REASONS = {
    "raises": "MemoryError: no bytes left",
    "panics in the core": "PanicException",
    "hangs": "a step took longer than 2 s",
    "hangs and holds the interpreter": "a step took longer than 2 s",
}
"""What goes wrong, and what clients are told."""


@contextlib.contextmanager
def served(how: str, step_timeout_s: float) -> Iterator[tuple[subprocess.Popen[str], int, threading.Event]]:
    """A process that fails so in its 20th step, its port, and whether that step has begun."""
    command = [sys.executable, "-c", SERVE, str(BASE), how, str(step_timeout_s), json.dumps(engine_options())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    fails = threading.Event()
    try:
        address = next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
        threading.Thread(target=_drain, args=(process.stdout, fails), daemon=True).start()
        yield process, int(address.rsplit(":", 1)[1]), fails
    finally:
        process.kill()
        process.wait()


def _drain(lines: IO[str], fails: threading.Event) -> None:
    for line in lines:
        if line == "it fails\n":
            fails.set()


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[float, Any]]:
    """When each event came, and what it holds."""
    for line in answer:
        if line.startswith(b"data: "):
            yield time.monotonic(), json.loads(line.removeprefix(b"data: "))


def _ask(port: int) -> http.client.HTTPResponse:
    """A stream of many tokens."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}
    client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return client.getresponse()


@pytest.mark.parametrize("how", REASONS)
def test_clients_are_told_and_the_process_ends(how: str) -> None:
    with served(how, STEP_TIMEOUT_S) as (process, port, _):
        *tokens, (told_at, last) = _events(_ask(port))
        assert len(tokens) >= 10, "it began well"
        assert all("error" not in event for _, event in tokens)
        assert (last["error"]["code"], REASONS[how] in last["error"]["message"]) == ("service_unavailable", True), last
        limit = STEP_TIMEOUT_S if "hangs" in how else 0
        assert told_at - tokens[-1][0] < limit + 2
        assert _readiness(port) in (503, None)
        assert process.wait(30) != 0
        assert process.stderr is not None
        assert REASONS[how] in process.stderr.read()


def test_a_signal_ends_a_process_whose_step_hangs() -> None:
    with served("hangs", 0) as (process, port, hangs):
        _answer = _ask(port)
        assert hangs.wait(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert "Timeout" in process.stderr.read(), "where it hung"


def _readiness(port: int) -> int | None:
    """None: the process has ended already."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        client.request("GET", "/health/ready")
        return client.getresponse().status
    except OSError:
        return None
