"""The CUDA backend: kernels from `cuda/`, GEMMs by cuBLAS. `batch` is the `Step` that runs.

Everything is launched on torch's current stream, and nothing waits for the device.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from slora.kernels import nvrtc
from slora.kernels.attention import ELEMENTS
from slora.kernels.lora import Shrunk
from slora.kernels.nvrtc import Argument, Kernel
from slora.kernels.step import Step

Delta = Tensor | Shrunk | None
MAX_THREADS = 1024
ROPE_WARPS = 8
FEW_ROWS = 512
"""Up to this many rows, a head of a row gets its own warp in the whole grid; beyond, a row's heads share a block."""


def pack_linear(weight: Tensor) -> Tensor:
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in], weight [out, in] -> [rows, out]."""
    return F.linear(x, weight, bias)


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: Step, layer: int, group: int
) -> tuple[Tensor, Delta]:
    """x [rows, in] -> (linear, delta), both [rows, out]. In a recorded graph the GEMM is a branch beside the delta."""
    if not batch.has_branches:
        return linear(x, weight, bias), lora(x, batch, layer, group)
    main, side = torch.cuda.current_stream(), batch.side_stream
    side.wait_stream(main)
    delta = batch.lora(x, layer, group)  # begins to read weights before x is there
    with torch.cuda.stream(side):
        out = linear(x, weight, bias)
    main.wait_stream(side)
    return out, delta


def head(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, hidden], weight [vocab, hidden] -> fp32 [rows, vocab], not rounded in between."""
    if x.dtype == torch.float32:
        return torch.mm(x, weight.t())
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def rms_norm(
    x: Tensor, residual: Tensor | None, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual, delta [rows, hidden] -> (normed, residual), both [rows, hidden]; x becomes the residual."""
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    kernel, threads = _rms_norm(x.dtype, hidden)
    kernel(rows, threads, (x, residual, delta, weight, normed, eps), programmatic=True)
    return normed, x


def rope_kv(qkv: Tensor, delta: Tensor | None, batch: Step, layer: int, qk_norm: Tensor | None, eps: float) -> Tensor:
    """qkv [rows, (heads + 2 kv_heads) * head_dim] -> q [rows, heads, head_dim]; K and V go to their slots."""
    pool, config, rows = batch.pool, batch.pool.config, qkv.shape[0]
    q = qkv.new_empty(rows, config.num_heads, config.head_dim)
    shape = (config.num_heads, config.num_kv_heads, config.head_dim, pool.page_tokens)
    blocks = -(-(config.num_heads + 2 * config.num_kv_heads) // ROPE_WARPS) if rows <= FEW_ROWS else 1
    tensors = (qkv, delta, q, pool.keys[layer], pool.values[layer], batch.rotation)
    args = (*tensors, batch.plan["slots"], batch.plan["counts"], qk_norm, eps, pool.page_rows)
    kernel = _rope_kv(qkv.dtype, *shape, qk_norm is not None)
    kernel((rows, blocks), ROPE_WARPS * 32, args, programmatic=True)
    return q


def paged_attention(q: Tensor, batch: Step, layer: int) -> Tensor:
    """q [rows, heads, head_dim] -> [rows, heads * head_dim]."""
    return batch.attention.run(
        q,
        layer,
        has_decode=batch.has_decode,
        has_prefill=batch.has_prefill,
        has_splits=batch.has_splits,
        is_graph=batch.is_graph,
    )


def silu_mul(gate_up: Tensor, delta: Delta) -> Tensor:
    """gate_up, delta [rows, 2 intermediate] -> [rows, intermediate]."""
    if isinstance(delta, Shrunk):
        return delta.lora.silu_mul(gate_up, delta)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    width = 16 // gate_up.element_size()
    is_vector = inner % width == 0
    pieces = rows * (inner // width if is_vector else inner)
    kernel, blocks = _silu_mul(gate_up.dtype, is_vector), min(-(-pieces // 256), 1 << 16)
    kernel(blocks, 256, (gate_up, delta, out, rows, inner), programmatic=True)
    return out


def lora(x: Tensor, batch: Step, layer: int, group: int) -> Delta:
    """x [rows, in] -> delta [rows, out of the group's modules], zero where a row's adapter has no such module."""
    if not batch.has_lora:
        return None
    return batch.lora(x, layer, group)


def sample_rows(raw: Tensor, logits: Tensor, batch: Step, ids: Tensor) -> None:
    """One token per sampled row of the plan: raw, logits fp32 [rows, vocab], at least as many rows; ids int32 [rows].

    `raw` are the model's logits, `logits` the same after penalties and bias. Greedy where the temperature is 0; -1
    where the row's raw logits are not finite, or every token is forbidden. Rows beyond the plan's are left alone.
    """
    names = ("counts", "temperature", "top_k", "top_p", "min_p", "uniform")
    args: tuple[Argument, ...] = (raw, logits, *(batch.plan[name] for name in names), raw.shape[1], ids)
    _sample()(raw.shape[0], MAX_THREADS, args)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """logits [rows, vocab] fp32; the other arguments [rows] -> token ids int64 [rows]."""
    rows, vocab = logits.shape
    counts = torch.zeros(8, dtype=torch.int32, device=logits.device).fill_(rows)
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _sample()(rows, MAX_THREADS, (logits, logits, counts, temperature, top_k, top_p, min_p, uniform, vocab, ids))
    return ids.long()


@nvrtc.cached_by_device
def _rms_norm(dtype: torch.dtype, hidden: int) -> tuple[Kernel, int]:
    width = 16 // dtype.itemsize
    pieces = hidden // width if hidden % width == 0 else hidden
    threads = min(MAX_THREADS, -(-pieces // 32) * 32)
    macros: dict[str, int | str] = {"ELEMENT": ELEMENTS[dtype], "HIDDEN": hidden, "THREADS": threads}
    return nvrtc.load("rms_norm", macros).kernel("rms_norm"), threads


@nvrtc.cached_by_device
def _rope_kv(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_tokens: int, has_qk_norm: bool
) -> Kernel:
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE_TOKENS": page_tokens}
    return nvrtc.load("rope_kv", {"ELEMENT": ELEMENTS[dtype], "QK_NORM": int(has_qk_norm), **shape}).kernel("rope_kv")


@nvrtc.cached_by_device
def _silu_mul(dtype: torch.dtype, is_vector: bool) -> Kernel:
    return nvrtc.load("silu_mul", {"ELEMENT": ELEMENTS[dtype], "IS_VECTOR": int(is_vector)}).kernel("silu_mul")


@nvrtc.cached_by_device
def _sample() -> Kernel:
    return nvrtc.load("sample").kernel("sample")
