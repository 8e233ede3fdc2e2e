"""Loading base checkpoints: every tensor accounted for, every configuration understood or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planning import Request, World, tiny_config
from safetensors.torch import load_file, save_file

from slora.errors import ConfigError, LoadError
from slora.models.config import ModelConfig
from slora.weights import load_weights

pytestmark = pytest.mark.cpu_only(reason="no engine")

INDEX = "model.safetensors.index.json"


def make_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with random content, named and shaped as transformers saves them."""
    h, q, kv, inner = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    for i in range(config.num_layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (size, h)
            if config.qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (size,)
            if config.qk_norm and name != "v":
                shapes[f"{p}self_attn.{name}_norm.weight"] = (config.head_dim,)
        shapes |= {p + "self_attn.o_proj.weight": (h, q), p + "mlp.down_proj.weight": (h, inner)}
        shapes |= {p + "mlp.gate_proj.weight": (inner, h), p + "mlp.up_proj.weight": (inner, h)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_sharded(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(tiny_config())


def load(config: ModelConfig, path: Path, dtype: str = "float32"):  # type: ignore[no-untyped-def]
    return load_weights(config, path, dtype=dtype, progress=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_reaches_its_place(tmp_path: Path, family: str, dtype: str) -> None:
    config = ModelConfig.from_dict(tiny_config(model_type=family, head_dim=16))
    tensors = make_tensors(config)
    save_sharded(tmp_path, tensors)
    weights = load(config, tmp_path, dtype)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    assert torch.equal(weights.embed, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])
    for i, layer in enumerate(weights.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        assert torch.equal(layer.qkv, torch.cat([tensors[f"{attention}{m}_proj.weight"] for m in "qkv"]))
        assert torch.equal(layer.gate_up, torch.cat([tensors[f"{mlp}{m}_proj.weight"] for m in ("gate", "up")]))
        assert torch.equal(layer.down, tensors[mlp + "down_proj.weight"])
        assert (layer.qkv_bias is not None) == (family == "qwen2")
        if layer.qkv_bias is not None:
            assert torch.equal(layer.qkv_bias, torch.cat([tensors[f"{attention}{m}_proj.bias"] for m in "qkv"]))
        assert (layer.qk_norm is not None) == (family == "qwen3")
        if layer.qk_norm is not None:
            assert torch.equal(layer.qk_norm[3], tensors[attention + "q_norm.weight"])
            assert torch.equal(layer.qk_norm[4], tensors[attention + "k_norm.weight"])


def test_useless_tensors_are_known(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(tiny_config(tie_word_embeddings=True))
    tensors = make_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load(config, tmp_path)
    assert weights.lm_head is weights.embed
    tensors["lm_head.weight"][3, 5] += 1  # a head of its own is used, as transformers does
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(config, tmp_path).lm_head, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing$"),
        (lambda t: [t.pop(k) for k in list(t) if "norm" in k], r"layernorm\.weight is missing \(and 4 more\)"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is not part of this architecture"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), r"layers\.2.* is not part"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has the shape \[31\]; .* \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is of type int8",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, config: ModelConfig, change, message: str) -> None:  # type: ignore[no-untyped-def]
    tensors = make_tensors(config)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        load(config, tmp_path)


def test_wrong_files_are_named(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor"):
        load(config, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin.*hint: save as safetensors"):
        load(config, tmp_path)
    save_sharded(tmp_path, make_tensors(config))
    shard = tmp_path / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(LoadError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        load(config, tmp_path)
    save_file(load_file(tmp_path / "model-00001-of-00003.safetensors"), shard)
    with pytest.raises(LoadError, match=r"the index and model-00002-of-00003\.safetensors disagree"):
        load(config, tmp_path)
    shard.unlink()
    with pytest.raises(LoadError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        load(config, tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_wrong_index_is_refused(tmp_path: Path, config: ModelConfig, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(LoadError, match="weight_map"):
        load(config, tmp_path)


def test_dummy_weights_come_from_the_configuration_alone(config: ModelConfig) -> None:
    first, second = (load_weights(config, "nowhere", dtype="float32", load_format="dummy") for _ in range(2))
    assert torch.equal(first.layers[1].down, second.layers[1].down)
    assert first.layers[0].gate_up.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first.layers[0].down, first.layers[1].down)
    assert (first.norm == 1).all()
    with pytest.raises(ConfigError, match="load_format = 'pickle'"):
        load_weights(config, "nowhere", dtype="float32", load_format="pickle")


def test_a_closed_runner_lets_go_of_the_pool(config: ModelConfig) -> None:
    world = World(config, load_weights(config, "", dtype="float32", load_format="dummy"))
    world.generate([Request([1, 2, 3])])
    world.runner.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = world.pool.flat


OLD_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WITHOUT = {"rope_parameters": None}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_theta": 5e5, "rope_scaling": {**OLD_LLAMA3, "original_max_position_embeddings": 64}},
            {**OLD_LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
        ),
    ],
)
def test_both_spellings_of_rope_mean_the_same(old: dict, new: dict) -> None:
    assert ModelConfig.from_dict(tiny_config(**WITHOUT, **old)) == ModelConfig.from_dict(
        tiny_config(rope_parameters=new)
    )


def test_derived_numbers() -> None:
    changes = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"}
    config = ModelConfig.from_dict(tiny_config(**changes, **heads), {"eos_token_id": [7, 8, 7]})
    assert config.page_bytes(16, "bfloat16") == 2 << 20
    assert config.default_page_tokens("bfloat16") == 16
    assert config.module_dims == (
        (4096, 4096),
        (4096, 1024),
        (4096, 1024),
        (4096, 4096),
        (4096, 14336),
        (4096, 14336),
        (14336, 4096),
    )
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (7, 8))
    assert ModelConfig.from_dict(tiny_config(eos_token_id=2)).eos_token_ids == (2,)
    assert ModelConfig.from_dict(tiny_config()).default_page_tokens("float32") == 16
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert ModelConfig.from_dict(tiny_config(rope_parameters=yarn)).max_context == 2048
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert ModelConfig.from_dict(tiny_config(rope_parameters=dynamic)).max_context == 512


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 9}, (9, 9)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None)),
        ({"model_type": "mistral"}, (4096, 4096)),
        ({"model_type": "qwen2", "sliding_window": 9}, (None, None)),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, (None, None)),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, (None, 9)),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, None),
        ),
        ({"model_type": "llama", "sliding_window": 9}, (None, None)),
    ],
)
def test_windows(changes: dict, windows: tuple) -> None:
    assert ModelConfig.from_dict(tiny_config(**changes)).windows == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r'model_type = "gemma".*llama, mistral, qwen2, qwen3'),
        ({"rope_parameters": None}, "rope_parameters = null.*hint"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r'rope_parameters.rope_type = "longrope"'),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor = null"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, r"rope_parameters.mrope_section = \[1\]"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one RoPE for all layers"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3.*divide"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"hidden_size": None}, "hidden_size = null"),
        ({"vocab_size": 1.5}, "vocab_size = 1.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"eos_token_id": "x"}, r"^config.json: eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id = true"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000.*from 1 to 1024"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(tiny_config(**changes))


def test_end_tokens_of_the_other_file_are_said_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"^generation_config.json: eos_token_id = -1"):
        ModelConfig.from_dict(tiny_config(), {"eos_token_id": -1})


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.json: cannot be read"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(LoadError, match=r"config\.json: is not a JSON object"):
        ModelConfig.from_dir(tmp_path)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, importlib.util as u; import slora.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
