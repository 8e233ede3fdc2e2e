"""The decoder of all families: Llama, Mistral, Qwen2 and Qwen3 differ only in what their configuration says."""

from typing import Any

import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from slora.kernels import DOWN, GATE_UP, QKV, Backend, O
from slora.models.config import ModelConfig
from slora.weights import Weights


class Decoder:
    """A pre-norm transformer over the rows of a step.

    Each linear has a base part and a LoRA delta, which meet where the linear's output is used.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Backend) -> None:
        """Takes `weights` over: linears are repacked in place, one at a time, so that none exists twice."""
        self.config, self.weights, self.ops = config, weights, ops
        for layer in weights.layers:
            layer.qkv, layer.o = ops.pack_linear(layer.qkv), ops.pack_linear(layer.o)
            layer.gate_up, layer.down = ops.pack_linear(layer.gate_up), ops.pack_linear(layer.down)
        if weights.lm_head is not weights.embed:
            weights.lm_head = ops.pack_linear(weights.lm_head)

    def forward(self, token_ids: Tensor, batch: object) -> Tensor:
        """token_ids [rows] -> the normed hidden state [rows, hidden], ready for `logits`."""
        ops, eps = self.ops, self.config.rms_norm_eps
        x = F.embedding(token_ids, self.weights.embed)
        residual: Tensor | None = None
        delta: Any = None
        for i, w in enumerate(self.weights.layers):
            h, residual = ops.rms_norm(x, residual, delta, w.input_norm, eps)
            q = ops.rope_kv(*ops.project(h, w.qkv, w.qkv_bias, batch, i, QKV), batch, i, w.qk_norm, eps)
            h = ops.paged_attention(q, batch, i)
            x, delta = ops.project(h, w.o, None, batch, i, O)
            h, residual = ops.rms_norm(x, residual, delta, w.post_norm, eps)
            h = ops.silu_mul(*ops.project(h, w.gate_up, None, batch, i, GATE_UP))
            x, delta = ops.project(h, w.down, None, batch, i, DOWN)
        h, _ = ops.rms_norm(x, residual, delta, self.weights.norm, eps)
        return h

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """fp32 [len(rows), vocab] of what `forward` returned."""
        return self.ops.head(hidden.index_select(0, rows), self.weights.lm_head)
