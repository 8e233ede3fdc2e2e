"""Where the tests' engines run, which `pytest --device` chooses, and what they are told there."""

from typing import Any

from slora.memory import DEFAULT_POOL_BYTES

NAMES = ("cpu", "cuda")
CUDA_TOLERANCE = 2e-4
"""Of log-probabilities in fp32, without TF32: PEFT sums on the CPU, and how cuBLAS's GEMMs sum depends on the number of
rows, so that a request's numbers alone and in company differ in their last bits (docs/kernels.md)."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    # As on the CPU by default, but for what takes time at the start: memory to be pinned, graphs to be recorded.
    "cuda": {
        "device": "cuda",
        "dtype": "float32",
        "pool_bytes": DEFAULT_POOL_BYTES,
        "host_bytes": 256 << 20,
        "max_running": 64,
    },
}
_chosen = "cpu"


def choose(name: str) -> None:
    """Called once, before any test is imported."""
    global _chosen
    _chosen = name


def device_name() -> str:
    return _chosen


def is_cuda() -> bool:
    return _chosen == "cuda"


def engine_options(**options: Any) -> dict[str, Any]:
    """An engine's keywords; `options` go before what is chosen here."""
    return _OPTIONS[_chosen] | options


def flags(*names: str) -> list[str]:
    """The same for a `slora` command; `names`: those that it has, if not all."""
    options = {name: value for name, value in _OPTIONS[_chosen].items() if not names or name in names}
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def tolerance(on_cpu: float) -> float:
    """Of log-probabilities; 0: the CPU must give the same bits."""
    return CUDA_TOLERANCE if is_cuda() else on_cpu
