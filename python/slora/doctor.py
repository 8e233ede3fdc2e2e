"""`slora doctor`: versions, devices, what would run, and why nothing better."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from slora import __version__

PACKAGES = ("torch", "numpy", "safetensors", "pyyaml", "tqdm", "cupy-cuda13x", "nvidia-cudnn-frontend")
GROUPS = (1, 4, 8, 16)
"""Query heads of a KV head that models have: the more, the more shared memory the tensor-core kernels need."""


def run() -> int:
    """Print the findings; 0 if an engine can run."""
    print(f"slora {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs")
    for package in PACKAGES:
        print(f"  {package:22}{_version(package)}")
    try:
        import torch
    except ImportError as error:
        print(f"nothing can run: torch cannot be imported: {error}")
        return 1
    print(
        f"device cpu: torch's own kernels, {torch.get_num_threads()} threads, float32 unless another dtype is asked for"
    )
    for index in range(torch.cuda.device_count()):
        print("\n".join(_cuda_lines(index)))
    if not torch.cuda.device_count():
        print("device cuda: torch sees none")
    print(f'an engine with device="auto" would run on {"cuda" if torch.cuda.is_available() else "cpu"}')
    return 0


def _cuda_lines(index: int) -> list[str]:
    """What runs on a device. Each line is asked of what an engine asks; one that fails leaves the others be."""
    import torch

    from slora import graphs

    try:
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines = [f"device cuda:{index}: {properties.name}, compute capability {capability}, {_ask(_memory, index)}"]
        with torch.cuda.device(index):
            found = {
                **_kernels(capability),
                "attention in bf16, fp16": _ask(_attention, properties),
                f"prompts in steps of more than {graphs.MAX_ROWS} rows": _ask(_prompts),
                "swap-ins": _ask(_copies),
                "waiting for swap-ins": _ask(_waiting),
                "fp32": "simple attention, items of warps for LoRA of few rows, no TF32; hint: bfloat16 is faster",
            }
        return lines + [f"  {what}: {how}" for what, how in found.items()]
    except Exception as error:  # torch's, for instance of a device that fell off the bus
        return [f"device cuda:{index}: cannot be used: {_reason(error)}"]


def _ask(find: Callable[..., str], *args: object) -> str:
    try:
        return find(*args)
    except Exception as error:  # of torch, the driver or a package
        return f"cannot be found out: {_reason(error)}"


def _memory(index: int) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _kernels(capability: str) -> dict[str, str]:
    """Loads the kernels of LoRA, compiled unless they are in the cache, to see that it can be done."""
    from slora.kernels import lora, nvrtc

    try:
        compiler = nvrtc.nvrtc_version()
        module = nvrtc.load("lora", {"DTYPE": lora.DTYPE_MACRO["bfloat16"], "ALIGNED": 1})
    except Exception as error:
        return {"kernels": f"cannot be compiled and loaded: {_reason(error)}"}
    with_clusters = ", ".join(f"{major}.x" for major in nvrtc.CLUSTER_MAJORS)
    return {
        "kernels": f"by NVRTC {compiler}; those of LoRA are compiled and loaded, others will be at first use",
        "launches": (
            "programmatic: kernels start before those before them have ended"
            if module.has_programmatic_launch
            else f"each waits for the one before: {capability} has no programmatic launch"
        ),
        "LoRA of few rows": (
            "clusters, but for fp32 and sizes that are no multiples of 8"
            if module.has_clusters
            else f"items of warps: only {with_clusters} have clusters with enough shared memory"
        ),
    }


def _attention(properties: object) -> str:
    from slora.kernels.attention import MAX_HEAD_DIM

    reach = [_most_head_dim(properties, group) for group in GROUPS]
    if min(reach) == MAX_HEAD_DIM:
        return (
            f"tensor cores, for head dimensions that are multiples of 16 up to {MAX_HEAD_DIM}; else the simple kernel"
        )
    dims, groups = (", ".join(map(str, numbers)) for numbers in (reach, GROUPS))
    return (
        f"tensor cores, for head dimensions that are multiples of 16 up to {dims} with {groups} heads a KV head; "
        "else the simple kernel, which needs less shared memory"
    )


def _most_head_dim(properties: object, group: int) -> int:
    """The largest head dimension that the tensor-core kernels serve; 0 if there is none."""
    import torch

    from slora.kernels.attention import MAX_HEAD_DIM, Attention

    def is_served(head_dim: int) -> bool:
        attention: Any = Attention.__new__(Attention)  # as much of it as decides: no pool, no plan
        attention.dtype, attention.group, attention._properties = torch.bfloat16, group, properties
        attention.config = SimpleNamespace(head_dim=head_dim)
        return bool(attention.is_tensor_core)

    return max(filter(is_served, range(16, MAX_HEAD_DIM + 1, 16)), default=0)


def _prompts() -> str:
    from slora.kernels import cudnn

    if cudnn.is_available():
        return "cuDNN, or chunk_attention for a model that it refuses"
    return "chunk_attention: nvidia-cudnn-frontend cannot be imported; hint: pip install 'slora[cuda]'"


def _copies() -> str:
    from slora.kernels import page_copy

    batch = page_copy._batch_copy()
    if batch is not None:
        return f"many pages a call, {batch[0]}"
    return "a call for each page: the driver has no cuMemcpyBatchAsync; hint: a driver for CUDA 12.8 or later"


def _waiting() -> str:
    from slora.kernels import page_copy

    if page_copy._can_write_values():
        return "kernels wait, each for its layer's pages"
    return "a step waits for all of its pages before it starts: the device's streams cannot write 64-bit values"


def _reason(error: Exception) -> str:
    """What it says first: a compiler's log may be long."""
    return " ".join(str(error).splitlines()[:2]) or type(error).__name__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
