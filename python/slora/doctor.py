"""`slora doctor`: versions, devices, what would run."""

import importlib.metadata
import os
import platform

from slora import __version__
from slora.errors import SloraError

PACKAGES = ("torch", "numpy", "safetensors", "pyyaml", "tqdm", "cupy-cuda13x", "nvidia-cudnn-frontend")


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
        _print_cuda(index)
    if not torch.cuda.device_count():
        print("device cuda: torch sees none")
    print(f'an engine with device="auto" would run on {"cuda" if torch.cuda.is_available() else "cpu"}')
    return 0


def _print_cuda(index: int) -> None:
    import torch

    from slora.kernels import cudnn, nvrtc

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    print(
        f"device cuda:{index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )
    try:
        print(f"  kernels: compiled at first use by NVRTC {nvrtc.nvrtc_version()}")
    except (SloraError, OSError, ImportError) as error:
        print(f"  kernels: cannot be compiled: {error}; hint: install torch with its CUDA libraries")
    prefill = "cuDNN" if cudnn.is_available() else "simple kernels; hint: pip install 'slora[cuda]'"
    print(f"  prefill attention: {prefill}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
