"""Checkpoints for benches: a base that is only a configuration, and adapters of random weights."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file


class AdapterFiles(NamedTuple):
    paths: dict[str, Path]
    """By name."""
    image_bytes: int
    """Of one adapter's weights."""


def write_base(folder: Path, shape: dict[str, object]) -> Path:
    path = folder / "base"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape))
    return path


def write_adapters(
    folder: Path, shape: dict[str, object], rank: int, num_adapters: int, dtype: torch.dtype
) -> AdapterFiles:
    """Different adapters on all seven linears: links to one file of weights, each with a scale of its own."""
    tensors = weights(shape, rank, dtype)
    source = folder / "weights.safetensors"
    save_file(tensors, source)
    paths = {}
    for i in range(num_adapters):
        path = paths[f"a{i}"] = folder / f"a{i}"
        path.mkdir()
        os.link(source, path / "adapter_model.safetensors")
        targets = sorted({name.split(".")[-3] for name in tensors})
        alpha = rank * (1 + i / num_adapters)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return AdapterFiles(paths, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def weights(shape: dict[str, object], rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    hidden, inner, heads, kv_heads, head_dim = (int(str(shape[name])) for name in names)
    sizes = {
        "self_attn.q_proj": (hidden, heads * head_dim),
        "self_attn.k_proj": (hidden, kv_heads * head_dim),
        "self_attn.v_proj": (hidden, kv_heads * head_dim),
        "self_attn.o_proj": (heads * head_dim, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(int(str(shape["num_hidden_layers"]))):
        for module, (ins, outs) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}."
            for which, size in (("lora_A", (rank, ins)), ("lora_B", (outs, rank))):
                tensors[f"{prefix}{which}.weight"] = (torch.randn(size, generator=generator) * 0.03).to(dtype)
    return tensors
