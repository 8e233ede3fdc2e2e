"""A good adapter's parts, to be written back broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Write = Callable[[Path], None]
"""Fills an empty folder."""
Group = tuple[str, str, list[Write]]
"""Kind, its reasons, its cases."""


class Checkpoint:
    """A good adapter's parts, to be broken."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        self.raw = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", self.raw[:8])[0]
        self.header: dict[str, Any] = json.loads(self.raw[8:end])
        self.data = self.raw[end:]
        self.tensors = [name for name in self.header if name != "__metadata__"]

    def with_config(self, **changes: Any) -> Write:
        return self.files(config=json.dumps(self.config | changes).encode())

    def with_header(self, header: dict[str, Any] | bytes, data: bytes | None = None) -> Write:
        return self.files(weights=safetensors(header, self.data if data is None else data))

    def with_tensor(self, name: str, **changes: Any) -> Write:
        return self.with_header(self.header | {name: self.header[name] | changes})

    def renamed(self, name: str, to: str) -> Write:
        return self.with_header({to if key == name else key: value for key, value in self.header.items()})

    def files(self, config: bytes | None = None, weights: bytes | None = None) -> Write:
        def write(folder: Path) -> None:
            (folder / CONFIG).write_bytes(json.dumps(self.config).encode() if config is None else config)
            (folder / WEIGHTS).write_bytes(self.raw if weights is None else weights)

        return write


def safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def widen(source: Path, target: Path, copies: int) -> None:
    """Write an adapter that computes the same with `copies` times the rank: exactly, where that is a power of two."""
    target.mkdir()
    config = json.loads((source / CONFIG).read_text())
    tensors = load_file(source / WEIGHTS)
    for name, weight in tensors.items():
        is_a = ".lora_A." in name
        tensors[name] = weight.repeat(copies, 1) if is_a else weight.repeat(1, copies) / copies
    save_file(tensors, target / WEIGHTS)
    assert not config["use_rslora"]
    scaled = {key: config[key] * copies for key in ("r", "lora_alpha")}
    (target / CONFIG).write_text(json.dumps(config | scaled))
