"""The reference ops against formulas written out plainly, on scattered pages."""

import math

import pytest
import torch
from planning import Modules, Request, World, pack, tiny_config

from slora.errors import ConfigError
from slora.kernels import DOWN, GATE_UP, QKV, O, backend, reference
from slora.memory import HostTier, PagePool
from slora.models.config import ModelConfig
from slora.models.rope import inverse_frequencies
from slora.weights import load_weights

pytestmark = pytest.mark.cpu_only(reason="the reference ops; tests/gpu compares the device's with them")

SIZES = [1, 3, 7, 133]
GROUP_MODULES = {QKV: (0, 1, 2), O: (3,), GATE_UP: (4, 5), DOWN: (6,)}


def make_world(adapters: dict[str, Modules] | None = None, dtype: str = "float32", **changes: object) -> World:
    config = ModelConfig.from_dict(tiny_config(**changes))
    return World(config, load_weights(config, "", dtype=dtype, load_format="dummy"), adapters, dtype=dtype)


def make_modules(config: ModelConfig, rank: int, modules: tuple[int, ...] = tuple(range(7))) -> Modules:
    """Random weights; every module has another rank, from `rank` on."""
    generator = torch.Generator().manual_seed(rank)
    found: Modules = {}
    for layer in range(config.num_layers):
        for i, module in enumerate(modules):
            n_in, n_out = config.module_dims[module]
            r = rank + i
            a = torch.randn(r, n_in, generator=generator) / math.sqrt(n_in)
            b = torch.randn(n_out, r, generator=generator) / math.sqrt(r)
            found[layer, module] = (a, b, 0.5 + rank / 64)
    return found


def prepare(world: World) -> reference.Batch:
    runner = world.runner
    return reference.prepare(world.plan, world.pool, runner._tables, runner._frequencies, runner._rope_scaling)


@pytest.mark.parametrize("rows", SIZES)
def test_rms_norm_adds_residual_and_delta(rows: int) -> None:
    x, residual, delta = torch.randn(3, rows, 32)
    weight = torch.randn(32)
    total = (x + residual + delta).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    normed, new_residual = reference.rms_norm(x, residual, delta, weight, 1e-5)
    torch.testing.assert_close(normed, expected.float())
    torch.testing.assert_close(new_residual, total.float())


@pytest.mark.parametrize("rows", SIZES)
def test_silu_mul_adds_delta(rows: int) -> None:
    gate_up, delta = torch.randn(2, rows, 96)
    gate, up = (gate_up + delta).double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(reference.silu_mul(gate_up, delta), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", SIZES)
def test_linear_in_the_packed_layout(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(rows, 64).to(dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    packed = reference.pack_linear(weight)
    torch.testing.assert_close(
        reference.linear(x, packed), x @ weight.t(), atol=0.1 if dtype != torch.float32 else 1e-4, rtol=1e-2
    )
    expected = (x.double() @ weight.double().t() + bias.double()).to(dtype)
    torch.testing.assert_close(
        reference.linear(x, packed, bias), expected, atol=0.2 if dtype != torch.float32 else 1e-4, rtol=1e-2
    )
    assert reference.pack_linear(packed) is packed


@pytest.mark.parametrize("rows", SIZES)
def test_rope_kv_writes_its_slots_and_nothing_else(rows: int) -> None:
    world = make_world()
    config, pool = world.config, world.pool
    world.step([(Request([1] * rows, max_tokens=1), rows)])
    batch = prepare(world)
    pool.pages.fill_(255)
    qkv, delta = torch.randn(2, rows, config.q_size + 2 * config.kv_size)
    total = (qkv + delta).view(rows, -1, config.head_dim)
    q = reference.rope_kv(qkv, delta, batch, 1, None, 1e-6)

    angles = torch.arange(rows)[:, None, None] * inverse_frequencies(config)[0]
    half = config.head_dim // 2
    as_complex = torch.complex(total[..., :half], total[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    rotated = torch.cat((as_complex.real, as_complex.imag), -1)
    torch.testing.assert_close(q, rotated[:, : config.num_heads], atol=1e-5, rtol=1e-5)
    slots = world.plan["slots"].long()
    page, token = slots // pool.page_tokens, slots % pool.page_tokens
    k = rotated[:, config.num_heads : -config.num_kv_heads]
    torch.testing.assert_close(pool.kv[page, 1, 0, token], k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool.kv[page, 1, 1, token], total[:, -config.num_kv_heads :])
    pool.kv[page, 1, :, token] = torch.nan
    assert pool.kv.isnan().all()


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paged_attention_equals_dense_attention(window: int | None, dtype: str) -> None:
    """Decode of very different lengths, whole prompts, chunks with cached context, some of equal shape, in one step."""
    changes = {"model_type": "mistral", "sliding_window": window}
    world = make_world(dtype=dtype, **changes)
    config, pool = world.config, world.pool
    cached_and_rows = [(6, 1), (132, 1), (300, 1), (0, 1), (0, 24), (0, 24), (37, 3), (133, 7), (0, 133)]
    requests = [Request([1] * (cached + rows), max_tokens=1) for cached, rows in cached_and_rows]
    for request, (cached, _) in zip(requests, cached_and_rows, strict=True):
        if cached:
            world.step([(request, cached)])
    world.step([(request, rows) for request, (_, rows) in zip(requests, cached_and_rows, strict=True)])
    pool.kv.nan_to_num_(0.0).normal_(generator=torch.Generator().manual_seed(0))
    for request in requests:  # beyond the end of a sequence lies what was there before
        page, token = divmod(len(request.prompt), pool.page_tokens)
        if token:
            pool.kv[request.pages[page], :, :, token:] = torch.nan
    indptr = world.plan["query_indptr"].tolist()
    q = torch.randn(indptr[-1], config.num_heads, config.head_dim).to(pool.flat.dtype)
    got = reference.paged_attention(q, prepare(world), 1).float()
    ordered = sorted(requests, key=lambda r: cached_and_rows[requests.index(r)][1] > 1)
    for request, start, end in zip(ordered, indptr, indptr[1:], strict=False):
        expected = dense_attention(q[start:end].double(), request, world, window)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        torch.testing.assert_close(got[start:end], expected, atol=tolerance, rtol=tolerance)


def dense_attention(q: torch.Tensor, request: Request, world: World, window: int | None) -> torch.Tensor:
    seq_len, group = len(request.prompt), world.config.num_heads // world.config.num_kv_heads
    kv = world.pool.kv[request.pages, 1].double().transpose(0, 1).flatten(1, 2)[:, :seq_len]
    k, v = kv.repeat_interleave(group, 2)  # [seq_len, heads, head_dim]
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    rows, columns = torch.arange(seq_len - len(q), seq_len)[:, None], torch.arange(seq_len)
    visible = (columns <= rows) & (columns > rows - (window or seq_len + 1))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1).float()


def make_adapters(config: ModelConfig) -> dict[str, Modules]:
    adapters = {f"r{rank}": make_modules(config, rank) for rank in (1, 2, 7, 16, 58)}
    adapters["mlp"] = make_modules(config, 5, (4, 6))
    adapters["second"] = {key: value for key, value in make_modules(config, 9).items() if key[0] == 1}
    return adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", SIZES)
def test_lora_of_mixed_ranks_equals_dense_products(rows: int, dtype: str) -> None:
    """Adapters of all ranks and of several targets, and the base, `rows` rows each and once more as a decode row."""
    adapters = make_adapters(ModelConfig.from_dict(tiny_config()))
    world = make_world(adapters, dtype)
    names = [*adapters, None]
    sizes = [(name, size) for name in names for size in {1, rows}]
    world.step([(Request([1] * size, name, max_tokens=1), size) for name, size in sizes])
    batch, plan = prepare(world), world.plan
    owner = {row: name for name, row in world.rows.items()} | {-1: None}
    bounds = plan["seg_indptr"].tolist()
    for layer in range(world.config.num_layers):
        for group, modules in GROUP_MODULES.items():
            x = torch.randn(bounds[-1], world.config.module_dims[modules[0]][0]).to(world.pool.flat.dtype)
            delta = reference.lora(x, batch, layer, group)
            assert delta is not None
            for start, end, row in zip(bounds, bounds[1:], plan["seg_adapter"].tolist(), strict=False):
                expected = dense_lora(x[start:end], adapters.get(owner[row] or "", {}), world.config, layer, modules)
                tolerance = 1e-5 if dtype == "float32" else 3e-2
                torch.testing.assert_close(delta[start:end].float(), expected, atol=tolerance, rtol=tolerance)
                if owner[row] is None:
                    assert not delta[start:end].any()


def dense_lora(
    x: torch.Tensor, adapter: Modules, config: ModelConfig, layer: int, modules: tuple[int, ...]
) -> torch.Tensor:
    parts = []
    for module in modules:
        a, b, scale = adapter.get(
            (layer, module), (torch.zeros(1, x.shape[1]), torch.zeros(config.module_dims[module][1], 1), 1.0)
        )
        a, b = a.to(x.dtype).double(), b.to(x.dtype).double()
        parts.append(x.double() @ a.t() * scale @ b.t())
    return torch.cat(parts, -1).float()


def test_an_adapter_that_overflows_does_not_reach_its_neighbours() -> None:
    config = ModelConfig.from_dict(tiny_config())
    wild = {key: (a * 1e30, b * 1e30, scale) for key, (a, b, scale) in make_modules(config, 4).items()}
    tame = make_modules(config, 8)
    world = make_world({"wild": wild, "tame": tame})
    world.step([(Request([1], name, max_tokens=1), 1) for name in ("wild", "tame")])
    x = torch.full((2, config.hidden_size), 1e10)
    x[world.plan["seg_adapter"].tolist().index(world.rows["tame"])] = 1.0
    row = world.plan["seg_adapter"].tolist().index(world.rows["tame"])
    delta = reference.lora(x, prepare(world), 0, QKV)
    assert delta is not None
    torch.testing.assert_close(delta[row : row + 1], dense_lora(x[row : row + 1], tame, config, 0, (0, 1, 2)))


def test_rows_of_an_image_lie_in_one_page_each() -> None:
    config = ModelConfig.from_dict(tiny_config())
    image, descriptor = pack(config, make_modules(config, 7), 2048, "float32")
    assert descriptor.shape == (14, 12)
    assert image.shape[1] == 2048
    for words in descriptor.tolist():
        for _, offset, row_bytes, rows_first, rows_per_page in (words[2:7], words[7:12]):
            assert row_bytes % 16 == 0
            assert offset + rows_first * row_bytes <= 2048
            assert rows_per_page == 2048 // row_bytes


def test_copy_pages_moves_whole_pages_from_any_slab() -> None:
    config = ModelConfig.from_dict(tiny_config())
    pool = PagePool(config, dtype="float32", pool_bytes=10 * config.page_bytes(16, "float32"), page_tokens=16)
    pool.pages.fill_(255)
    slabs = [torch.full((n * pool.page_bytes + 100,), n, dtype=torch.uint8) for n in (2, 3)]
    host = HostTier([slabs[0], (slabs[1].data_ptr(), len(slabs[1]))], pool.page_bytes)
    assert host.num_pages == 5
    for source, page in ((4, 1), (0, 7)):
        pool.pages[page].copy_(host.page(source))
    assert [int(page.unique()) for page in pool.pages] == [255, 3, 255, 255, 255, 255, 255, 2, 255, 255]
    with pytest.raises(IndexError, match="5 of the tier"):
        host.page(5)


def test_a_pool_says_what_does_not_fit() -> None:
    config = ModelConfig.from_dict(tiny_config(intermediate_size=5000))
    page_bytes = config.page_bytes(16, "float32")
    with pytest.raises(ConfigError, match=r"page_tokens = 16 makes pages of 4096 bytes.* has 20000; hint: 1024"):
        PagePool(config, dtype="float32", page_tokens=16)
    with pytest.raises(ConfigError, match="page_tokens = 24"):
        PagePool(config, dtype="float32", page_tokens=24)
    with pytest.raises(ConfigError, match=r"pool_bytes = 300000 holds 1 pages of 262144 bytes"):
        PagePool(config, dtype="float32", pool_bytes=300_000)
    pool = PagePool(config, dtype="float32", pool_bytes=1 << 20, page_tokens=128)
    assert pool.pool_bytes == pool.num_pages * page_bytes * 8 <= 1 << 20
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = pool.pages


def test_an_unknown_device_is_refused() -> None:
    assert backend("cpu") is reference
    with pytest.raises(ConfigError, match="tpu"):
        backend("tpu")
