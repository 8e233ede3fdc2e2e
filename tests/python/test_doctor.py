"""What `slora doctor` says of CUDA devices that are not there: it asks what an engine asks, of faked answers."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slora import doctor
from slora.errors import DeviceError
from slora.kernels import cudnn, nvrtc, page_copy

pytestmark = pytest.mark.cpu_only(reason="devices that are not there")

SHARED_KB = {(8, 0): 164, (8, 9): 100, (9, 0): 228, (12, 0): 100}
"""Of a multiprocessor; a block may have 1 less."""
H100, A100, L4, RTX = (9, 0), (8, 0), (8, 9), (12, 0)
CLUSTERS = "clusters, but for fp32 and sizes that are no multiples of 8"
ITEMS = "items of warps: only 9.x, 10.x, 11.x have clusters with enough shared memory"
PROGRAMMATIC = "programmatic: kernels start before those before them have ended"
TENSOR_CORES = "tensor cores, for head dimensions that are multiples of 16 up to "
TOO_LITTLE = " with 1, 4, 8, 16 heads a KV head; else the simple kernel, which needs less shared memory"
PROMPTS = "prompts in steps of more than 512 rows"


class Driver:
    """As much of the NVIDIA driver as the doctor asks."""

    def __init__(self, *, has_batch_copy: bool, can_write_values: bool, error: int = 0) -> None:
        self._can_write_values, self._error = can_write_values, error
        if has_batch_copy:
            self.cuMemcpyBatchAsync_v2 = None

    def cuModuleLoadData(self, module: Any, binary: bytes) -> int:  # noqa: N802
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:  # noqa: N802
        return self._error

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: Any) -> int:  # noqa: N802
        assert attribute == 122, "cuda.h: CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS"
        found._obj.value = int(self._can_write_values)
        return 0

    def cuGetErrorString(self, error: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"invalid device context"
        return 0


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    caches = (nvrtc._load, page_copy._batch_copy, cudnn.is_available)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Machine:
    """With one CUDA device, of a compute capability."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.archs: list[str] = []

    def plug_in(
        self,
        capability: tuple[int, int],
        *,
        has_cudnn: bool = True,
        has_batch_copy: bool = True,
        can_write_values: bool = True,
        error: int = 0,
    ) -> None:
        most = SHARED_KB[capability] << 10
        properties = SimpleNamespace(
            name="a card",
            major=capability[0],
            minor=capability[1],
            shared_memory_per_multiprocessor=most,
            shared_memory_per_block_optin=most - 1024,
        )
        answers = {
            "device_count": lambda: 1,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device": lambda index: nullcontext(),
            "synchronize": lambda: None,
            "get_device_properties": lambda index: properties,
            "get_device_capability": lambda index: capability,
            "mem_get_info": lambda index: (70 << 30, 80 << 30),
        }
        for name, answer in answers.items():
            self._patch.setattr(torch.cuda, name, answer)
        driver = Driver(has_batch_copy=has_batch_copy, can_write_values=can_write_values, error=error)
        self._patch.setattr(nvrtc, "_driver", lambda: driver)
        self._patch.setattr(page_copy, "driver", lambda: driver)
        self._patch.setattr(nvrtc, "_cached", lambda name, macros, arch: self.archs.append(arch) or b"")
        self._patch.setattr(nvrtc, "nvrtc_version", lambda: "13.2")
        self._patch.setitem(sys.modules, "cudnn", ModuleType("cudnn") if has_cudnn else None)

    def lines(self) -> dict[str, str]:
        """What the doctor says of the device."""
        assert doctor.run() == 0
        output = self._capsys.readouterr().out
        _, _, rest = output.partition("device cuda")
        lines = ("device cuda" + rest).splitlines()
        assert lines.pop() == 'an engine with device="auto" would run on cuda'
        return dict(line.strip().split(": ", 1) for line in lines)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(monkeypatch, capsys)


def test_a_device_with_everything(machine: Machine) -> None:
    machine.plug_in(H100)
    assert machine.lines() == {
        "device cuda:0": "a card, compute capability 9.0, 70.0 of 80.0 GiB free",
        "kernels": "by NVRTC 13.2; those of LoRA are compiled and loaded, others will be at first use",
        "launches": PROGRAMMATIC,
        "LoRA of few rows": CLUSTERS,
        "attention in bf16, fp16": TENSOR_CORES + "256; else the simple kernel",
        PROMPTS: "cuDNN, or chunk_attention for a model that it refuses",
        "swap-ins": "many pages a call, cuMemcpyBatchAsync_v2",
        "waiting for swap-ins": "kernels wait, each for its layer's pages",
        "fp32": "simple attention, items of warps for LoRA of few rows, no TF32; hint: bfloat16 is faster",
    }
    assert machine.archs == ["sm_90"]


@pytest.mark.parametrize(
    ("capability", "launches", "attention"),
    [
        (A100, "each waits for the one before: 8.0 has no programmatic launch", "256, 256, 240, 208"),
        (L4, "each waits for the one before: 8.9 has no programmatic launch", "176, 160, 144, 112"),
        (RTX, PROGRAMMATIC, "176, 160, 144, 112"),
    ],
)
def test_a_device_that_lacks_something(
    machine: Machine, capability: tuple[int, int], launches: str, attention: str
) -> None:
    machine.plug_in(capability)
    lines = machine.lines()
    assert lines["launches"] == launches
    assert lines["LoRA of few rows"] == ITEMS
    assert lines["attention in bf16, fp16"] == TENSOR_CORES + attention + TOO_LITTLE


@pytest.mark.parametrize("capability", [H100, L4, RTX])
def test_what_is_not_installed_has_a_hint(machine: Machine, capability: tuple[int, int]) -> None:
    machine.plug_in(capability, has_cudnn=False, has_batch_copy=False, can_write_values=False)
    lines = machine.lines()
    prompts = "chunk_attention: nvidia-cudnn-frontend cannot be imported; hint: pip install 'slora[cuda]'"
    assert lines[PROMPTS] == prompts
    copies = "a call for each page: the driver has no cuMemcpyBatchAsync; hint: a driver for CUDA 12.8 or later"
    assert lines["swap-ins"] == copies
    assert lines["waiting for swap-ins"].startswith("a step waits for all of its pages before it starts")


def test_kernels_that_do_not_compile_leave_the_other_lines(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, macros: object, arch: str) -> bytes:
        raise DeviceError(f"cuda/{name}.cu does not compile with -arch={arch}:\nno cuda_bf16.h\nmore\n")

    machine.plug_in(H100)
    expected = machine.lines()
    monkeypatch.setattr(nvrtc, "_cached", fail)
    nvrtc._load.cache_clear()
    lines = machine.lines()
    error = "cuda/lora.cu does not compile with -arch=sm_90: no cuda_bf16.h"
    assert lines.pop("kernels") == f"cannot be compiled and loaded: {error}"
    for asked_of_them in ("kernels", "launches", "LoRA of few rows"):
        del expected[asked_of_them]
    assert lines == expected


def test_a_query_that_fails_leaves_the_other_lines(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    machine.plug_in(H100, error=201)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    lines = machine.lines()
    failed = "cannot be found out: "
    assert lines["waiting for swap-ins"] == failed + "cannot find the current device: invalid device context"
    assert f"compute capability 9.0, {failed}CUDA error: out of memory" in lines["device cuda:0"]
    assert lines["LoRA of few rows"] == CLUSTERS


def test_a_device_that_does_not_answer_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("device is lost")

    machine.plug_in(H100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert machine.lines() == {"device cuda:0": "cannot be used: device is lost"}
