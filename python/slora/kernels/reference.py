"""Every op in plain torch: the CPU backend, and the oracle of the other backends.

Rows are tokens of the step; hidden, heads, kv_heads, head_dim are the model's. Norms and softmax are computed in fp32.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from slora.kernels.adapters import AdapterTables, TileGroup
from slora.kernels.batch import AttentionGroup, Batch, make_batch
from slora.memory import HostTier, PagePool
from slora.plan import StepPlan

FIRST_CANDIDATES = 256
"""Sampling looks at this many best tokens first, and at the whole vocabulary only where they do not decide."""


def copy_pages(pool: PagePool, host: HostTier | None, plan: StepPlan) -> None:
    if not plan.counts.num_copies:
        return
    assert host is not None, "a plan copies from a host tier that is not there"
    pages = pool.pages
    for source, page in zip(plan.array("copy_host_pages").tolist(), plan.array("copy_pages").tolist(), strict=True):
        pages[page].copy_(host.page(source))


def update_descriptors(tables: AdapterTables, plan: StepPlan) -> None:
    if plan.counts.num_changed:
        tables.update(plan)


def prepare(plan: StepPlan, pool: PagePool, tables: AdapterTables, frequencies: Tensor, scaling: float) -> Batch:
    return make_batch(plan, pool, tables, frequencies, scaling)


def pack_linear(weight: Tensor) -> Tensor:
    """oneDNN's own layout, where torch has it: about twice as fast for the few rows of a step."""
    if weight.device.type != "cpu" or weight.is_mkldnn or not torch._C._has_mkldnn:
        return weight
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except (AttributeError, RuntimeError):  # a type that this CPU's oneDNN does not compute with
        return weight
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in], weight from `pack_linear` [out, in] -> [rows, out]."""
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, layer: int, group: int
) -> tuple[Tensor, Tensor | None]:
    """x [rows, in] -> (linear, delta), both [rows, out]."""
    return linear(x, weight, bias), lora(x, batch, layer, group)


def head(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, hidden], weight as for `linear` [vocab, hidden] -> fp32 [rows, vocab]."""
    return linear(x, weight).float()


def rms_norm(
    x: Tensor, residual: Tensor | None, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual, delta [rows, hidden] -> (normed, residual), both [rows, hidden]."""
    if delta is not None:
        x += delta
    if residual is not None:
        x += residual
    return _norm(x, weight, eps), x


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape[-1:], eps=eps) * weight
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rope_kv(qkv: Tensor, delta: Tensor | None, batch: Batch, layer: int, qk_norm: Tensor | None, eps: float) -> Tensor:
    """qkv [rows, (heads + 2 kv_heads) * head_dim] -> q [rows, heads, head_dim]; K and V go to their slots."""
    config = batch.pool.config
    num_heads, head_dim = config.num_heads, config.head_dim
    if delta is not None:
        qkv += delta
    v = qkv[:, -config.kv_size :]
    qk = qkv[:, : -config.kv_size].view(-1, num_heads + config.num_kv_heads, head_dim)
    if qk_norm is not None:
        qk = _norm(qk, qk_norm, eps)
    # x·cos + rotate_half(x)·sin, the sign of rotate_half being in sin
    rotated = torch.addcmul(qk * batch.cos, qk.roll(head_dim // 2, -1), batch.sin)
    batch.pool.keys[layer].index_copy_(0, batch.slots, rotated[:, num_heads:].flatten(1))
    batch.pool.values[layer].index_copy_(0, batch.slots, v)
    return rotated[:, :num_heads]


def paged_attention(q: Tensor, batch: Batch, layer: int) -> Tensor:
    """q [rows, heads, head_dim] -> [rows, heads * head_dim]."""
    groups = batch.groups[layer]
    if len(groups) == 1:
        return _attend(q, batch.pool, layer, groups[0])
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    for group in groups:
        out[group.rows] = _attend(q[group.rows], batch.pool, layer, group)
    return out


def _attend(q: Tensor, pool: PagePool, layer: int, group: AttentionGroup) -> Tensor:
    """q [num_requests * query_len, heads, head_dim] -> [num_requests * query_len, heads * head_dim]."""
    num_heads, head_dim = q.shape[1:]
    n, kv_heads = group.num_requests, pool.config.num_kv_heads
    k = pool.key_heads[layer].index_select(0, group.kv_rows).view(n, kv_heads, group.kv_len, head_dim)
    v = pool.value_heads[layer].index_select(0, group.kv_rows).view(n, kv_heads, group.kv_len, head_dim)
    if group.query_len == 1:
        # the query heads that share a KV head are that head's query rows
        q = q.reshape(n, kv_heads, num_heads // kv_heads, head_dim)
        return _attend_rows(q, k, v, group.mask).view(n, num_heads * head_dim)
    q = q.reshape(n, group.query_len, num_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, group.mask, is_causal=group.is_causal, enable_gqa=kv_heads != num_heads
    )
    return out.transpose(1, 2).reshape(n * group.query_len, num_heads * head_dim)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Few query rows: q [n, kv_heads, few, head_dim], k and v [n, kv_heads, kv_len, head_dim] -> contiguous, as q.

    In fp32 two batched products take half the time of the fused call; below, the fused call keeps the scores in fp32.
    """
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, mask).contiguous()
    q3, k3, v3 = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    scores = torch.bmm(q3, k3) if mask is None else torch.baddbmm(mask.flatten(0, 1), q3, k3)
    return torch.bmm(scores.softmax(-1), v3)


def silu_mul(gate_up: Tensor, delta: Tensor | None) -> Tensor:
    """gate_up, delta [rows, 2 intermediate] -> [rows, intermediate]."""
    if delta is not None:
        gate_up += delta
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def lora(x: Tensor, batch: Batch, layer: int, group: int) -> Tensor | None:
    """x [rows, in] -> delta [rows, out of the group's modules], zero where a row's adapter has no such module."""
    delta = None
    for tile in batch.tiles:
        weights = tile.groups[layer * 4 + group]
        if weights is not None:
            if delta is None:
                delta = x.new_zeros(x.shape[0], weights.out_size)
            _lora_tile(x[tile.rows], weights, delta[tile.rows])
    return delta


def _lora_tile(x: Tensor, group: TileGroup, delta: Tensor) -> None:
    """x [tile rows, in], delta [tile rows, out]. The intermediate [tile rows, ranks] is fp32."""
    shrunk = torch.mm(x.float(), group.a.read().float().t()).mul_(group.scale)
    if group.foreign is not None:
        shrunk.masked_fill_(group.foreign, 0.0)
    for expand in group.expands:
        out = delta[:, expand.out]
        if delta.dtype == torch.float32:
            torch.mm(shrunk[:, expand.ranks], expand.b.read(), out=out)
        else:
            out.copy_(torch.mm(shrunk[:, expand.ranks], expand.b.read().float()))


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """logits [rows, vocab] fp32; the other arguments [rows] -> token ids int64 [rows].

    Tokens are ordered by descending probability, equal ones by id. Each filter keeps a prefix of that order: top-k the
    first k, top-p the shortest with at least that share of what top-k left, min-p those with at least that share of the
    best one's probability. `uniform` then picks by the inverse of the kept prefix's cumulative distribution.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    ids, decided = _sample_from(scaled, FIRST_CANDIDATES, top_k, top_p, min_p, uniform)
    if not bool(decided.all()):
        rest = torch.nonzero(~decided)[:, 0]
        args = (top_k[rest], top_p[rest], min_p[rest], uniform[rest])
        ids[rest] = _sample_from(scaled[rest], logits.shape[1], *args)[0]
    return ids


def _sample_from(
    scaled: Tensor, num_candidates: int, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(ids, whether the best `num_candidates` tokens decide): scaled [rows, vocab] has its maximum at 0."""
    vocab = scaled.shape[1]
    size = min(num_candidates, vocab)
    values, indices = best(scaled, size)
    weights = values.double().exp()  # up to a factor the probabilities, in descending order
    cumulative = weights.cumsum(-1)
    k = torch.where(top_k > 0, top_k, vocab).long().clamp(max=vocab)
    total = scaled.double().exp().sum(-1)
    total = torch.where(k < vocab, _at(cumulative, k.clamp(max=size) - 1), total)  # what top-k leaves, if k <= size
    in_prefix = (cumulative - weights < (top_p * total)[:, None]) | (top_p >= 1)[:, None]
    in_prefix &= weights >= min_p[:, None]
    kept = in_prefix.sum(-1).clamp(min=1).minimum(k)
    is_unfiltered = (k == vocab) & (top_p >= 1) & (min_p <= 0)
    mass = torch.where(is_unfiltered, total, _at(cumulative, kept - 1))
    place = (cumulative <= (uniform * mass)[:, None]).sum(-1)
    ids = _at(indices, torch.where(is_unfiltered, place.clamp(max=size - 1), place.minimum(kept - 1)))
    if size == vocab:
        return ids, torch.ones_like(is_unfiltered)
    ends = (k <= size) | ((k == vocab) & (kept < size))
    return ids, torch.where(is_unfiltered, place < size, ends)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x [rows, n], index [rows] -> [rows]."""
    return x.gather(1, index[:, None])[:, 0]


def best(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row, descending, equal ones by index (topk leaves that open)."""
    if k >= x.shape[1]:
        return _sorted(x)
    if x.is_cuda:
        return _best_by_key(x, k)
    top = x.topk(k + 1)
    indices = top.indices[:, :k].sort(-1).values
    values, order = _sorted(x.gather(1, indices))
    indices = indices.gather(1, order)
    is_torn = top.values[:, k] == top.values[:, k - 1]  # equal ones on both sides of the cut: topk may have taken any
    if bool(is_torn.any()):
        all_values, all_indices = _sorted(x[is_torn])
        values[is_torn], indices[is_torn] = all_values[:, :k], all_indices[:, :k]
    return values, indices


def _best_by_key(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same without waiting for the device: value and id in one number, of which no two are equal. x is fp32."""
    bits = x.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(x.shape[1], device=x.device)
    indices = 0xFFFFFFFF - (((order << 32) | (0xFFFFFFFF - ids)).topk(k).values & 0xFFFFFFFF)
    return x.gather(1, indices), indices


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values, indices
