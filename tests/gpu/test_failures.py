"""What breaks on the device ends requests with a DeviceError and the process with an error, and hangs nothing."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny"
BASE, ADAPTERS = EXAMPLE / "base", EXAMPLE / "adapters"
TIMEOUT_S = 120
DEVICE = "cuda"

IMPORTS = """
import sys
import slora

DEVICE = sys.argv[1]
"""
BREAK = """
import sys
import numpy as np
import slora
import torch
from slora.kernels import nvrtc
from slora.runner import Runner
from slora.cuda_runner import CudaRunner


def illegal_access():
    kernel = nvrtc.load("silu_mul", {"ELEMENT": "float", "IS_VECTOR": 0}).kernel("silu_mul")
    address = np.uint64(4096)
    kernel(1, 256, (address, None, address, 1, 256))


def illegal_access_waited_for():
    illegal_access()
    torch.cuda.synchronize()


def out_of_memory():
    torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)


def exception():
    raise ValueError("a bug")


DEVICE, kind = sys.argv[1], globals()[sys.argv[2]]
owner = CudaRunner if DEVICE == "cuda" else Runner
launch = owner.launch


def break_after(num_steps):
    left = [num_steps]

    def broken(runner, plan):
        pending = launch(runner, plan)
        left[0] -= 1
        if left[0] < 0:
            kind()
        return pending

    owner.launch = broken

"""
OFFLINE = """
with slora.LLM(sys.argv[3], adapters=sys.argv[4], device=DEVICE, dtype="float32", pool_bytes=64 << 20) as llm:
    assert llm.generate("abc", adapter="reverse", temperature=0).text == "cba"
    break_after(5)
    try:
        llm.generate(["abc"] * 9, adapter=["reverse", "upper", None] * 3, max_tokens=100, ignore_eos=True)
    except slora.DeviceError as error:
        print("DeviceError:", error, flush=True)
    try:
        llm.generate("abc")
    except slora.DeviceError as error:
        print("again", flush=True)
        raise
"""
NEVER_ARRIVES = """
from slora.kernels import page_copy

page_copy._write_value = lambda word, value, stream: None
with slora.LLM(sys.argv[3], adapters=sys.argv[4], device=DEVICE, dtype=sys.argv[2], pool_bytes=64 << 20) as llm:
    assert len(llm.generate("abc").token_ids) > 0
    try:
        llm.generate("abc", adapter="reverse")
    except slora.DeviceError as error:
        print("DeviceError:", error, flush=True)
"""
SERVED = """
from slora.cli import main

break_after(30)
sys.exit(main(["serve", sys.argv[3], "--adapter-dir", sys.argv[4], "--port", "0", "--device", DEVICE]))
"""
MESSAGES = {
    "illegal_access": "illegal|CUDA error",
    "illegal_access_waited_for": "illegal|CUDA error",
    "out_of_memory": "memory",
    "exception": "ValueError: a bug",
}


def start(code: str, kind: str, prelude: str = BREAK) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", prelude + code, DEVICE, kind, str(BASE), str(ADAPTERS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the process hangs: {process.communicate()[0]}")
    return output


@pytest.mark.parametrize("kind", MESSAGES)
def test_requests_end_with_a_device_error_and_the_process_with_it(kind: str) -> None:
    process = start(OFFLINE, kind)
    output = finish(process)
    reported = [line for line in output.splitlines() if line.startswith("DeviceError: ")]
    assert len(reported) == 1, output
    assert re.search(MESSAGES[kind], reported[0])
    assert "again" in output.splitlines(), output
    assert process.returncode != 0, output


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_swap_in_that_never_arrives_is_a_device_error(dtype: str) -> None:
    """After ten seconds, by a trap: the context is lost."""
    output = finish(start(NEVER_ARRIVES, dtype, prelude=IMPORTS))
    assert "DeviceError: " in output, output


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_server_ends_its_requests_and_itself(kind: str) -> None:
    process = start(SERVED, kind)
    assert process.stdout is not None
    found = (re.search(r"serving .* on (http://[\w.]+:\d+)", line) for line in process.stdout)
    url = next(match for match in found if match)[1]
    body = json.dumps({"model": "reverse", "prompt": "abc", "max_tokens": 200, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=TIMEOUT_S)
    assert refused.value.code >= 500
    output = finish(process)
    assert process.returncode != 0, output
    assert "the engine has failed" in output, output
