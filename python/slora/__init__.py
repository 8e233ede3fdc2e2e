"""One base LLM and thousands of LoRA adapters from one pool of memory.

    import slora

    with slora.LLM("path/to/base", adapters="path/to/adapters") as llm:
        for result in llm.generate(["hello", "world"], adapter=["formal", None], max_tokens=32):
            print(result.text)

`import slora` is cheap: torch is imported when the first engine is made.
"""

from typing import TYPE_CHECKING, Any

from slora._core import __version__
from slora.errors import (
    AdapterError,
    ConfigError,
    DeviceError,
    LoadError,
    RequestError,
    SloraError,
    UnknownAdapterError,
)

if TYPE_CHECKING:
    from slora.async_llm import AsyncLLM
    from slora.llm import LLM

__all__ = [
    "LLM",
    "AdapterError",
    "AsyncLLM",
    "ConfigError",
    "DeviceError",
    "LoadError",
    "RequestError",
    "SloraError",
    "UnknownAdapterError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from slora.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from slora.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
