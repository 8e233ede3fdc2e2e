"""What a base checkpoint's `config.json` says, checked: everything that would change a result is understood or refused.

Defaults of keys that a file leaves out are transformers' for the family.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_INTEGER, MAX_LAYERS = 2**31 - 1, 1024
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
    | {"mscale_all_dim", "truncate"},
}
_ROPE_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True)
class Rope:
    """RoPE parameters in one spelling. `values` holds what the kind needs beyond `theta`."""

    kind: str
    theta: float
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a base model."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    max_context: int
    windows: tuple[int | None, ...]
    """Per layer: how many tokens, itself included, a row sees; None: all."""
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`, and `generation_config.json` if there is one."""
        path = Path(path)
        _check_folder(path)
        return cls.from_dict(_read_json(path / "config.json"), _read_json(path / "generation_config.json", {}))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "ModelConfig":
        """From config.json's and generation_config.json's content; the latter's end tokens win, as in transformers."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            refuse("model_type", family, f"must be one of {', '.join(FAMILIES)}")
        _refuse_variants(raw)
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        kv_heads = _positive(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            refuse("num_key_value_heads", kv_heads, f"must divide num_attention_heads ({heads})")
        head_dim = _positive(raw, "head_dim", 128 if family == "qwen3" and "head_dim" not in raw else hidden // heads)
        if head_dim % 2:
            refuse("head_dim", head_dim, "RoPE needs an even one")
        num_layers = _positive(raw, "num_hidden_layers", most=MAX_LAYERS)
        rope = _rope(raw)
        return cls(
            family=family,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(raw, "rms_norm_eps"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope=rope,
            max_context=_max_context(rope, _positive(raw, "max_position_embeddings")),
            windows=_windows(raw, family, num_layers),
            dtype=_dtype(raw),
            eos_token_ids=_eos_token_ids(raw, generation or {}),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def module_dims(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven modules of a layer, in the order of `MODULES`."""
        hidden, q, kv, inner = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        return ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden))

    def page_bytes(self, page_tokens: int, dtype: str) -> int:
        """KV bytes of `page_tokens` tokens over all layers."""
        return page_tokens * 2 * self.num_layers * self.kv_size * DTYPE_BYTES[dtype]

    def longest_row_bytes(self, dtype: str) -> int:
        """The longest row of an adapter's image: it must fit a page."""
        return max(self.hidden_size, self.intermediate_size, self.q_size) * DTYPE_BYTES[dtype]

    def default_page_tokens(self, dtype: str) -> int:
        """The smallest power of two ≥ 16 for which the longest adapter row is at most a tenth of a page."""
        page_tokens = 16
        while self.page_bytes(page_tokens, dtype) < 10 * self.longest_row_bytes(dtype):
            page_tokens *= 2
        return page_tokens


def refuse(key: str, value: object, why: str, file: str = "config.json") -> NoReturn:
    from slora.errors import ConfigError

    raise ConfigError(f"{file}: {key} = {json.dumps(value, default=str)} is not supported: {why}")


def _check_folder(path: Path) -> None:
    from slora.errors import LoadError

    if not path.is_dir():
        raise LoadError(f"model = {str(path)!r}: no such folder; hint: download the checkpoint first")
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        raise LoadError(f"model = {str(path)!r}: an adapter, not a base; hint: give the folder of its base model")


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    from slora.errors import LoadError

    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise LoadError(
            f"{path}: cannot be read: {error.strerror}; hint: a base is a folder with config.json and safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path}: is not a JSON object")
    return content


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        refuse(key, value, "must be a positive number")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_INTEGER) -> int:
    value = _number(raw, key, default)
    if not isinstance(value, int) or value > most:
        refuse(key, value, f"must be an integer from 1 to {most}")
    return value


def _refuse_variants(raw: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            refuse(key, raw[key], "quantised checkpoints cannot be served")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            refuse(key, raw[key], "mixtures of experts cannot be served")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            refuse(key, raw[key], "only the q, k and v biases of qwen2 are known")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", raw["hidden_act"], "the activation must be silu")


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters = raw.get(key) or {}
    if not (parameters or "rope_theta" in raw or "rope_scaling" in raw):
        refuse("rope_parameters", None, "the family needs RoPE; hint: give rope_theta or rope_parameters")
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        refuse(key, parameters, "one RoPE for all layers is expected")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_KEYS:
        refuse(f"{key}.rope_type", kind, f"must be one of {', '.join(_ROPE_KEYS)}")
    for name, value in parameters.items():
        if value is not None and name not in _ROPE_KEYS[kind] | _ROPE_COMMON_KEYS:
            refuse(f"{key}.{name}", value, f"unknown for RoPE of kind {kind}")
    for where in (raw, parameters):
        if where.get("partial_rotary_factor") not in (None, 1):
            refuse("partial_rotary_factor", where["partial_rotary_factor"], "the whole head must be rotated")
    theta = _number(parameters, "rope_theta", _number(raw, "rope_theta", 10000.0))
    return Rope(kind, float(theta), _rope_values(raw, parameters, kind))


def _rope_values(raw: Mapping[str, Any], parameters: Mapping[str, Any], kind: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    max_position = _positive(raw, "max_position_embeddings")
    if "original_max_position_embeddings" in _ROPE_KEYS[kind]:
        outer = raw.get("original_max_position_embeddings")  # wins over the inner one, as in transformers
        default = _number({"original_max_position_embeddings": outer}, "original_max_position_embeddings", max_position)
        inner = parameters if outer is None else {}
        values["original_max_position_embeddings"] = _number(inner, "original_max_position_embeddings", default)
    if kind == "yarn":
        original = values["original_max_position_embeddings"]
        assert original is not None
        values["factor"] = _number(parameters, "factor", max_position / original)
        values["truncate"] = float(parameters.get("truncate", True))
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            values[name] = _number(parameters, name) if parameters.get(name) else None
        if parameters.get("attention_factor") == 0:
            refuse("attention_factor", 0, "must be a positive number")
    else:
        for name in _ROPE_KEYS[kind] - {"original_max_position_embeddings"}:
            values[name] = _number(parameters, name)
    return values


def _max_context(rope: Rope, max_position: int) -> int:
    """Yarn reaches `factor` times its original length, whatever max_position_embeddings says. Dynamic RoPE changes its
    frequencies beyond the length it was made for, under KV that is already cached: longer contexts are refused."""
    if rope.kind == "yarn":
        factor, original = rope.values["factor"], rope.values["original_max_position_embeddings"]
        assert factor is not None
        assert original is not None
        return min(max(max_position, int(factor * original)), MAX_INTEGER)
    return max_position


def _windows(raw: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    full: tuple[int | None, ...] = (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        refuse("layer_types", kinds, f"expected full_attention or sliding_attention for each of {num_layers} layers")
    slides = kinds is not None and "sliding_attention" in kinds
    if family == "llama" or (family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False)):
        if slides:
            refuse("layer_types", kinds, "sliding attention is not in use in this model")
        return full
    window = _positive(raw, "sliding_window", 4096) if raw.get("sliding_window", 4096) is not None else None
    if family == "mistral":
        if kinds is not None and len(set(kinds)) > 1:
            refuse("layer_types", kinds, "a Mistral model has one kind of attention in all layers")
        return (window,) * num_layers
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if slides and window is None:
        refuse("sliding_window", None, "layer_types asks for sliding attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if value not in DTYPE_BYTES:
        refuse("dtype", value, f"must be one of {', '.join(DTYPE_BYTES)}")
    return str(value)


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    value, file = generation.get("eos_token_id"), "generation_config.json"
    if value is None:
        value, file = raw.get("eos_token_id"), "config.json"
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        refuse("eos_token_id", value, "token ids are expected", file)
    return tuple(dict.fromkeys(ids))
