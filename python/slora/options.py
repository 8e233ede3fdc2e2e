"""What an engine is told once: the keywords of `LLM` and `AsyncLLM`, with defaults and limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slora.errors import ConfigError, LoadError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
QUEUES = ("fcfs", "fair")
GIB = 1 << 30
DEFAULT_MAX_RANK = 256
"""On CUDA, where workspace is made for it."""
_COUNTS = ("page_tokens", "max_batch_tokens", "max_running", "max_waiting", "max_adapters", "max_rank", "max_context")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked when made, so that a mistake is found before anything is loaded. None: chosen by the engine."""

    adapters: Mapping[str, str | Path] | str | Path | None = None
    """Name → folder, or a folder whose sub-folders are adapters."""
    device: str = "auto"
    """ "cpu", "cuda", "cuda:1", …; "auto": CUDA if there is a device, else the CPU. """
    dtype: str = "auto"
    """ "auto": float32 on the CPU, else the checkpoint's. """
    load_format: str = "auto"
    """ "dummy": weights drawn from N(0, 0.02) with a fixed seed, from config.json alone. """
    pool_bytes: int | None = None
    """Of KV cache and adapters together; CPU: 512 MiB."""
    pool_fraction: float | None = None
    """The same as a share of the memory that is free once the base is loaded; CUDA: 0.9."""
    host_bytes: int | None = None
    """Of the host tier, where adapters wait for the device; CPU: 1 GiB, CUDA: 8 GiB."""
    page_tokens: int | None = None
    max_batch_tokens: int = 2048
    """Token rows of one step: what a prefill chunk may have at most."""
    max_running: int = 256
    """CUDA: at most 1,024."""
    max_waiting: int = 10_000
    max_adapters: int = 256
    """Distinct adapters among the running requests; any number may be registered."""
    max_rank: int | None = None
    """Of the linears of an adapter, at most; None: 256 on CUDA, whose workspace grows with it, any on the CPU."""
    max_context: int | None = None
    """Tokens of one sequence; None: the model's limit. Lowered, with a warning, to what the pool holds."""
    queue: str = "fcfs"
    """ "fcfs": first come, first served; "fair": next is whose adapter was given the fewest tokens. """
    prefetch: bool = True
    seed: int = 0
    """Of the random numbers of requests that bring no seed."""

    def __post_init__(self) -> None:
        if not isinstance(self.adapters, Mapping | str | Path | None):
            shown = f"adapters is of type {type(self.adapters).__name__}: {self.adapters!r:.60}"
            raise ConfigError(f"{shown}; hint: a mapping from names to folders, or a folder of adapters")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("queue", self.queue, QUEUES)
        for name in _COUNTS:
            _check_integer(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("pool_bytes", "host_bytes"):
            _check_integer(name, getattr(self, name), 1, 2**62)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        fraction = self.pool_fraction
        if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction <= 1):
            raise ConfigError(f"pool_fraction = {fraction!r}: must be above 0 and at most 1")
        if fraction is not None and self.pool_bytes is not None:
            raise ConfigError(f"pool_bytes = {self.pool_bytes} and pool_fraction = {fraction}: give one of them")

    def adapter_paths(self) -> dict[str, Path]:
        """Name → folder. Raises LoadError for a folder of adapters that is not there."""
        if self.adapters is None:
            return {}
        if isinstance(self.adapters, Mapping):
            return {name: Path(path) for name, path in self.adapters.items()}
        folder = Path(self.adapters)
        if not folder.is_dir():
            raise LoadError(
                f"adapters = {str(folder)!r}: no such folder; hint: a folder whose sub-folders are adapters"
            )
        refuse_adapter("adapters", folder)
        return {path.name: path for path in sorted(folder.iterdir()) if is_adapter(path)}


def is_adapter(path: Path) -> bool:
    """Whether the folder holds a PEFT adapter, as far as its files' names say (PEFT nests some a folder deeper)."""
    return (path / "adapter_config.json").exists() or any(path.glob("*/adapter_config.json"))


def refuse_adapter(option: str, folder: Path) -> None:
    """Raises LoadError for an adapter where the folder that it lies in is meant. (PEFT may save some beside others.)"""
    if (folder / "adapter_config.json").exists() and not any(map(is_adapter, folder.iterdir())):
        raise LoadError(f"{option} = {str(folder)!r}: is itself an adapter; hint: give the folder that it lies in")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(choices)}")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r}: must be an integer")
    if not least <= value <= most:
        raise ConfigError(f"{name} = {value}: must be between {least} and {most}")
