"""The adapters of an engine, as a mapping from names."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slora.engine import Engine
from slora.errors import AdapterError, UnknownAdapterError

REPLACE_POLL_S, REPLACE_TIMEOUT_S = 0.002, 60.0


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter as its name means it now."""

    name: str
    version: int
    """1, and one more with every replacement."""
    state: str
    """ "registered", "loading", "host" (in the host tier), "resident" (on the device) or "failed". """
    reason: str | None
    """Why it failed."""
    ranks: dict[str, tuple[int, int]]
    """Smallest and largest rank over the layers, by module."""
    bytes: int
    """Of its weights as they lie on the device."""
    num_pages: int
    pins: int
    """Running requests that use it."""
    unfinished: int
    """Requests that use it, waiting ones included."""
    pinned: bool
    """Whether it is kept on the device."""
    replacing: bool
    """Whether a newer version is being loaded."""
    path: str | None
    warnings: list[dict[str, str]]
    """What its operator should know although it is served: each a `code` and a `message`."""


_FIELDS = tuple(field.name for field in fields(AdapterInfo))


class AdapterMapping(Mapping[str, AdapterInfo]):
    """Names in alphabetical order, and what each means now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getitem__(self, name: str) -> AdapterInfo:
        self._engine.check_open()
        found = self._engine.core.adapter(name)
        if found is None:
            raise UnknownAdapterError(f'no adapter is named "{name}"')
        return _info(found)

    def __iter__(self) -> Iterator[str]:
        self._engine.check_open()
        return iter(self._engine.core.adapter_names())

    def __len__(self) -> int:
        self._engine.check_open()
        return len(self._engine.core.adapter_names())

    def __repr__(self) -> str:
        return f"<{len(self)} adapters>" if self._engine.is_open else "<adapters of a closed engine>"

    def _register(self, name: str, path: str | Path, replace: bool, pinned: bool) -> AdapterInfo:
        self._engine.check_open()
        return _info(self._engine.core.register(name, str(path), replace, pinned))

    def _remove(self, name: str) -> None:
        self._engine.check_open()
        self._engine.core.unload(name)

    def _pin(self, name: str, pinned: bool) -> None:
        self._engine.check_open()
        self._engine.core.pin(name, pinned)


class Adapters(AdapterMapping):
    """`LLM.adapters`."""

    def add(self, name: str, path: str | Path, *, replace: bool = False, pinned: bool = False) -> AdapterInfo:
        """Make the checkpoint in `path` known. Its weights are read when a request first needs them.

        `replace`: a taken name gets a new version; unfinished requests keep the old one. If that was in use, the call
        waits until the new one is loaded, so that every later request gets it. `pinned`: load it now and keep it on the
        device. Raises AdapterError, naming the key or tensor that cannot be served; the old version then stays.
        """
        found = before = self._register(name, path, replace, pinned)
        deadline = time.monotonic() + REPLACE_TIMEOUT_S
        while found.replacing:
            _check_in_time(name, deadline)
            time.sleep(REPLACE_POLL_S)
            found = self[name]
        return _in_force(before, found)

    def remove(self, name: str) -> None:
        """Forget a name; requests that use it still finish. Raises UnknownAdapterError."""
        self._remove(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, or no longer. Raises UnknownAdapterError."""
        self._pin(name, pinned)


class AsyncAdapters(AdapterMapping):
    """`AsyncLLM.adapters`: what reads files or waits for the engine is awaited, and holds up no other task.

    A change comes behind the requests that its task asked for before.
    """

    def __init__(self, engine: Engine, reach_turn: Callable[[], Awaitable[None]]) -> None:
        """`reach_turn`: waits until those requests are submitted."""
        super().__init__(engine)
        self._reach_turn = reach_turn

    async def add(self, name: str, path: str | Path, *, replace: bool = False, pinned: bool = False) -> AdapterInfo:
        """As `Adapters.add`."""
        await self._reach_turn()
        found = before = await asyncio.to_thread(self._register, name, path, replace, pinned)
        deadline = time.monotonic() + REPLACE_TIMEOUT_S
        while found.replacing:
            _check_in_time(name, deadline)
            await asyncio.sleep(REPLACE_POLL_S)
            found = self[name]
        return _in_force(before, found)

    async def remove(self, name: str) -> None:
        """As `Adapters.remove`."""
        await self._reach_turn()
        await asyncio.to_thread(self._remove, name)

    async def pin(self, name: str, pinned: bool = True) -> None:
        """As `Adapters.pin`."""
        await self._reach_turn()
        await asyncio.to_thread(self._pin, name, pinned)


def _check_in_time(name: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        why = f"its new version is not loaded after {REPLACE_TIMEOUT_S:g} s, and in force once it is"
        raise AdapterError(f"adapter {name!r}: {why}; hint: raise host_bytes")


def _in_force(before: AdapterInfo, found: AdapterInfo) -> AdapterInfo:
    """What a replacement led to: the new version, or why there is none."""
    if before.replacing and found.version == before.version and found.reason:
        raise AdapterError(found.reason)
    return found


def _info(found: dict[str, Any]) -> AdapterInfo:
    values: dict[str, Any] = {"ranks": {}, "path": None, "warnings": []} | found
    return AdapterInfo(**{name: values[name] for name in _FIELDS})
