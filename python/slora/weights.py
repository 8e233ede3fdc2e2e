"""The base model's parameters, read from safetensors straight into the fused tensors that the decoder uses.

Every tensor of the checkpoint is accounted for: loaded, known to be of no use, or a reason to refuse.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slora.memory import DTYPES
from slora.models.config import ModelConfig

DUMMY_STD = 0.02
DUMMY_SEED = 0
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_USELESS_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers of old checkpoints, recomputed from the configuration
_PICKLES = (".bin", ".pt", ".pth")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class LayerWeights:
    """One decoder layer. Linear weights are [out, in]; q, k, v and gate, up lie below each other in one tensor."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [q + 2 kv, hidden]
    qkv_bias: Tensor | None  # [q + 2 kv]
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]: q_norm for every query head, then k_norm
    o: Tensor  # [hidden, q]
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


@dataclass
class Weights:
    """All parameters. `lm_head` is `embed` itself when they are tied."""

    embed: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]


def load_weights(
    config: ModelConfig,
    path: str | Path,
    *,
    dtype: str,
    device: str = "cpu",
    load_format: str = "auto",
    progress: bool | None = None,
) -> Weights:
    """Load the checkpoint in `path`, or draw `load_format="dummy"` weights from the configuration alone.

    `progress` shows a bar; None: when stderr is a terminal. Raises LoadError, naming file and tensor.
    """
    from slora.errors import ConfigError

    if load_format not in ("auto", "dummy"):
        raise ConfigError(f'load_format = {load_format!r}: must be "auto" or "dummy"')
    checkpoint = None if load_format == "dummy" else _Checkpoint(Path(path))
    weights = _allocate(config, DTYPES[dtype], torch.device(device))
    targets = dict(_targets(config, weights))
    if checkpoint is None:
        _fill_dummy(targets)
    else:
        checkpoint.read_into(weights, targets, config.tie_word_embeddings, progress)
    return weights


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    c = config
    qkv = c.q_size + 2 * c.kv_size
    layers = [
        LayerWeights(
            input_norm=new(c.hidden_size),
            qkv=new(qkv, c.hidden_size),
            qkv_bias=new(qkv) if c.qkv_bias else None,
            qk_norm=new(c.num_heads + c.num_kv_heads, c.head_dim) if c.qk_norm else None,
            o=new(c.hidden_size, c.q_size),
            post_norm=new(c.hidden_size),
            gate_up=new(2 * c.intermediate_size, c.hidden_size),
            down=new(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    ]
    embed = new(c.vocab_size, c.hidden_size)
    head = embed if c.tie_word_embeddings else new(c.vocab_size, c.hidden_size)
    return Weights(embed, layers, new(c.hidden_size), head)


def _targets(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, the place for it), in a fixed order. A head norm's place has a row for each head."""
    q, kv, inner = config.q_size, config.kv_size, config.intermediate_size
    yield _EMBED, weights.embed
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", layer.input_norm
        for name, start, end in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", layer.qkv[start:end]
            if layer.qkv_bias is not None:
                yield f"{prefix}self_attn.{name}_proj.bias", layer.qkv_bias[start:end]
        if layer.qk_norm is not None:
            yield prefix + "self_attn.q_norm.weight", layer.qk_norm[: config.num_heads]
            yield prefix + "self_attn.k_norm.weight", layer.qk_norm[config.num_heads :]
        yield prefix + "self_attn.o_proj.weight", layer.o
        yield prefix + "post_attention_layernorm.weight", layer.post_norm
        yield prefix + "mlp.gate_proj.weight", layer.gate_up[:inner]
        yield prefix + "mlp.up_proj.weight", layer.gate_up[inner:]
        yield prefix + "mlp.down_proj.weight", layer.down
    yield "model.norm.weight", weights.norm
    if weights.lm_head is not weights.embed:
        yield _HEAD, weights.lm_head


def _is_head_norm(name: str) -> bool:
    return name.endswith(("q_norm.weight", "k_norm.weight"))


def _fill_dummy(targets: dict[str, Tensor]) -> None:
    """N(0, 0.02) from a fixed seed, tensor after tensor; norms are 1."""
    generator = torch.Generator(next(iter(targets.values())).device).manual_seed(DUMMY_SEED)
    for name, target in targets.items():
        if "norm" in name:
            target.fill_(1.0)
        else:
            target.normal_(0.0, DUMMY_STD, generator=generator)


class _Checkpoint:
    """A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = self._files()

    def read_into(self, weights: Weights, targets: dict[str, Tensor], tied: bool, progress: bool | None) -> None:
        missing = set(targets)
        with _progress_bar(len(targets), progress) as advance:
            for file, expected in self.files.items():
                with self._open(file) as tensors:
                    names = set(tensors.keys())
                    if expected is not None and names != expected:
                        odd = min(names ^ expected)
                        self._fail(f"{odd}: the index and {file.name} disagree about it")
                    for name in sorted(names & missing):
                        self._copy(tensors, name, targets[name])
                        missing.remove(name)
                        advance()
                    for name in sorted(names - set(targets)):
                        self._account(name, tied)
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            self._fail(f"{min(missing)} is missing{others}")
        if tied:
            self._untie_if_different(weights)

    def _files(self) -> dict[Path, set[str] | None]:
        """Every file, with the names that the index gives it (None: there is no index)."""
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.exists():
            files: dict[Path, set[str] | None] = {}
            for name, file in self._weight_map(index).items():
                if not isinstance(file, str) or Path(file).name != file:
                    self._fail(f"{index.name}: weight_map.{name} = {file!r} is not a file beside it")
                names = files.setdefault(self.path / file, set())
                assert names is not None
                names.add(name)
            return files
        if single.exists():
            return {single: None}
        if pickles := sorted(path.name for path in self.path.glob("*") if path.suffix in _PICKLES):
            self._fail(f"only pickled weights ({pickles[0]}) are there; hint: save as safetensors")
        self._fail("neither model.safetensors nor model.safetensors.index.json is there; hint: download them")

    def _weight_map(self, index: Path) -> dict[str, Any]:
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._fail(f"{index.name}: no weight_map can be read: {error}")
        if not isinstance(weight_map, dict) or not weight_map:
            self._fail(f"{index.name}: weight_map is not an object with entries")
        return weight_map

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            self._fail(f"{file.name} cannot be read: {error}; hint: was it downloaded whole?")

    def _copy(self, tensors: Any, name: str, target: Tensor) -> None:
        source = tensors.get_tensor(name)
        shape = tuple(target.shape[1:] if _is_head_norm(name) else target.shape)
        if tuple(source.shape) != shape:
            self._fail(f"{name} has the shape {list(source.shape)}; the configuration asks for {list(shape)}")
        if source.dtype not in _FLOATS:
            self._fail(f"{name} is of type {str(source.dtype).removeprefix('torch.')}, which cannot be served")
        target.copy_(source)  # a head norm spreads over its heads

    def _account(self, name: str, tied: bool) -> None:
        if not (name.endswith(_USELESS_SUFFIXES) or (tied and name == _HEAD)):
            self._fail(f"{name} is not part of this architecture")

    def _untie_if_different(self, weights: Weights) -> None:
        """A file that says "tied" but holds a head of its own means that head, as in transformers."""
        for file in self.files:
            with self._open(file) as tensors:
                if _HEAD in tensors.keys():  # noqa: SIM118 (not a mapping)
                    head = torch.empty_like(weights.embed)
                    self._copy(tensors, _HEAD, head)
                    if not torch.equal(head, weights.embed):
                        weights.lm_head = head

    def _fail(self, why: str) -> NoReturn:
        from slora.errors import LoadError

        raise LoadError(f"{self.path}: {why}")


@contextmanager
def _progress_bar(total: int, progress: bool | None) -> Iterator[Callable[[], object]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    disable = None if progress is None else not progress  # None: tqdm shows nothing unless stderr is a terminal
    with tqdm(total=total, desc="loading weights", unit=" tensors", disable=disable, leave=False) as bar:
        yield bar.update
