"""RoPE frequencies, computed as transformers computes them, to the last bit of fp32."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from slora.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] in fp32, and the factor by which cos and sin are scaled."""
    rope, dim = config.rope, config.head_dim
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    values = {name: value for name, value in rope.values.items() if value is not None}
    match rope.kind:
        case "linear":
            return frequencies / values["factor"], 1.0
        case "llama3":
            return _llama3(frequencies, values), 1.0
        case "yarn":
            return _yarn(rope.theta, dim, values), _attention_factor(values)
    return frequencies, 1.0  # default, and dynamic up to its original length


def _llama3(frequencies: Tensor, values: Mapping[str, float]) -> Tensor:
    factor, low, high = values["factor"], values["low_freq_factor"], values["high_freq_factor"]
    length = values["original_max_position_embeddings"]
    wavelen = 2 * math.pi / frequencies
    scaled = torch.where(wavelen > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = (wavelen >= length / high) & (wavelen <= length / low)
    return torch.where(is_medium, smoothed, scaled)


def _yarn(theta: float, dim: int, values: Mapping[str, float]) -> Tensor:
    """Interpolate low frequencies, keep high ones, ramp between those that turn beta_slow and beta_fast times."""
    length = values["original_max_position_embeddings"]

    def dimension(num_rotations: float) -> float:
        return (dim * math.log(length / (num_rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(values.get("beta_fast", 32)), dimension(values.get("beta_slow", 1))
    if values["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    keep = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    positions = theta ** (torch.arange(0, dim, 2).to(dtype=torch.float) / dim)
    return 1.0 / (values["factor"] * positions) * (1 - keep) + 1.0 / positions * keep


def _attention_factor(values: Mapping[str, float]) -> float:
    factor, explicit = values["factor"], values.get("attention_factor")
    if explicit is not None:
        return explicit

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in values and "mscale_all_dim" in values:
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)
