"""The LoRA kernels against the definition in fp32: mixes of adapters, ranks and sizes, graph replay, guard pages."""

import random
from itertools import product

import pytest
import torch
from planning import GROUPS, Modules, pack

from slora.memory import DTYPES, PagePool
from slora.models.config import ModelConfig

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from slora.kernels import cuda
from slora.kernels.lora import _GATE_UP, CLUSTERS, UNIT_RANKS, Lora, Shrunk
from slora.kernels.page_copy import _write_value

pytestmark = pytest.mark.gpu
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 6e-4}
SMALL = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {"hidden_size": 36, "intermediate_size": 75, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {"small": SMALL, "odd": ODD, "llama": LLAMA}
RANKS = [1, 3, 8, 16, 24, 64]


def make_config(shape: str) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "num_hidden_layers": 1 if shape == "llama" else 2,
            **SHAPES[shape],
        }
    )


class World:
    """A pool with some adapters of random ranks and targets, pages in random order, NaN where nobody wrote."""

    has_prefill, has_large = True, False
    cluster: int | None = None
    """One of CLUSTERS, or what is chosen for `num_rows`."""
    num_rows: int | None = None

    def __init__(
        self, shape: str, dtype: str, ranks: list[int], *, page_tokens: int | None = None, max_rows: int = 600
    ):
        self.config, self.dtype, self.rng = make_config(shape), dtype, random.Random(repr((shape, dtype, ranks)))
        torch.manual_seed(0)
        tokens = page_tokens or self.config.default_page_tokens(dtype)
        page_bytes = self.config.page_bytes(tokens, dtype)
        self.adapters = [self.make_modules(rank) for rank in ranks]
        images = [pack(self.config, modules, page_bytes, dtype) for modules in self.adapters]
        num_pages = sum(len(image) for image, _ in images)
        self.whole = torch.full(((num_pages + 4) * page_bytes,), 255, dtype=torch.uint8, device="cuda")
        self.pool = PagePool(self.config, dtype=dtype, device="cuda", pool_bytes=2 * page_bytes, page_tokens=tokens)
        self.pool._pages = self.whole[2 * page_bytes : -2 * page_bytes]  # guard pages before and behind
        self.pool.num_pages = num_pages
        pages = list(range(num_pages))
        self.rng.shuffle(pages)
        self.modules = torch.zeros((len(ranks), self.config.num_layers * 7, 12), dtype=torch.int32, device="cuda")
        self.pages = torch.zeros((len(ranks), max(len(image) for image, _ in images)), dtype=torch.int32, device="cuda")
        for row, (image, descriptor) in enumerate(images):
            mine, pages = pages[: len(image)], pages[len(image) :]
            self.pool.pages[mine] = image.cuda()
            self.modules[row] = torch.from_numpy(descriptor).cuda()
            self.pages[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        self.before = self.whole.clone()
        self.arrived = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.needed_step = torch.zeros(1, dtype=torch.int32, device="cuda")
        limits, words = {"max_rows": max_rows, "max_segments": max_rows}, (self.arrived, self.needed_step)
        self.lora = Lora(self.pool, self.modules, self.pages, max_rank=max(256, *ranks), swap_ins=words, **limits)
        self.plan = torch.zeros(2 * max_rows + 2, dtype=torch.int32, device="cuda")
        self.max_rows = max_rows

    def make_modules(self, rank: int) -> Modules:
        modules: Modules = {}
        for layer in range(self.config.num_layers):
            for m, (in_size, out_size) in enumerate(self.config.module_dims):
                r = self.rng.choice([rank, rank, rank, max(1, rank // 2)])
                if self.rng.random() < 0.85:
                    a, b = torch.randn(r, in_size) / in_size**0.5, torch.randn(out_size, r) / r**0.5
                    modules[layer, m] = (a, b, self.rng.choice([0.5, 2.0]))
        return modules

    def set_segments(self, segments: list[tuple[int, int]]) -> None:
        """(adapter or -1, rows) pairs: written where the op looks for them."""
        bounds = [0]
        for _, rows in segments:
            bounds.append(bounds[-1] + rows)
        words = torch.full_like(self.plan, -7, device="cpu")
        words[0] = len(segments)
        words[1 : 2 + len(segments)] = torch.tensor(bounds)
        words[self.max_rows + 2 : self.max_rows + 2 + len(segments)] = torch.tensor([a for a, _ in segments])
        self.plan.copy_(words)

    def prepare(self, leaves_expand: bool = False) -> None:
        arrays = (self.plan[:1], self.plan[1:], self.plan[self.max_rows + 2 :])
        flags = {"has_prefill": self.has_prefill, "has_large": self.has_large, "leaves_expand": leaves_expand}
        cluster = self.cluster if self.lora.num_clusters else None
        self.lora.prepare(*arrays, num_rows=self.num_rows, cluster=cluster, **flags)

    def inputs(self, rows: int) -> list[torch.Tensor]:
        """x of each group."""
        sizes = [self.config.module_dims[group[0]][0] for group in GROUPS]
        return [torch.randn(rows, size, device="cuda", dtype=DTYPES[self.dtype]) for size in sizes]

    def run(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """delta of each layer and group."""
        self.prepare()
        outs = []
        for layer in range(self.config.num_layers):
            for group, x in enumerate(xs):
                out = x.new_full((len(x), self.lora._groups[group].out_stride), float("nan"))
                outs.append(self.lora(x, layer, group, out=out))
        return outs

    def expected(self, segments: list[tuple[int, int]], xs: list[torch.Tensor]) -> list[torch.Tensor]:
        outs = []
        for layer in range(self.config.num_layers):
            for group, x in zip(GROUPS, xs, strict=True):
                rows = []
                for (adapter, n), part in zip(segments, x.split([n for _, n in segments]), strict=True):
                    columns = []
                    for m in group:
                        found = self.adapters[adapter].get((layer, m)) if adapter >= 0 else None
                        if found is None:
                            columns.append(torch.zeros(n, self.config.module_dims[m][1], device="cuda"))
                            continue
                        a, b = (w.cuda().to(DTYPES[self.dtype]).double() for w in found[:2])
                        columns.append((part.double() @ a.t() * found[2] @ b.t()).float())
                    rows.append(torch.cat(columns, 1))
                outs.append(torch.cat(rows))
        return outs

    def check(self, segments: list[tuple[int, int]]) -> None:
        self.set_segments(segments)
        xs = self.inputs(sum(n for _, n in segments))
        compare(self.run(xs), self.expected(segments, xs), self.dtype)
        assert torch.equal(self.whole, self.before), "the op wrote into the pool"


def compare(outs: list[torch.Tensor], expected: list[torch.Tensor], dtype: str) -> None:
    for out, want in zip(outs, expected, strict=True):
        assert torch.isfinite(out).all()
        is_zero = ~want.any(1)
        assert not out[is_zero].any(), "rows without LoRA must be zero"
        for got, wanted in zip(out.float().split(64), want.split(64), strict=True):
            assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm() + 1e-30


def distribution(name: str, rows: int, num_adapters: int, rng: random.Random) -> list[tuple[int, int]]:
    """Segments of `rows` rows: (adapter, rows), some without adapter."""
    match name:
        case "distinct":
            return [(i % num_adapters, 1) for i in range(rows)]
        case "identical":
            return [(num_adapters - 1, rows)]
        case "uniform":
            owners = [rng.randrange(-1, num_adapters) for _ in range(rows)]
        case "zipf":
            owners = rng.choices(range(num_adapters), [1 / (i + 1) for i in range(num_adapters)], k=rows)
        case "skewed":
            owners = [0 if rng.random() < 0.8 else rng.randrange(num_adapters) for _ in range(rows)]
        case _:
            return [(-1, rows)]
    return [(a, owners.count(a)) for a in sorted(set(owners))]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", ["small", "odd"])
def test_mixes_of_adapters_ranks_and_sizes(shape: str, dtype: str, cluster: int) -> None:
    world = World(shape, dtype, RANKS)
    if not world.lora.num_clusters and cluster > min(CLUSTERS):
        pytest.skip("no clusters for this shape and type")
    world.cluster = cluster
    for world.has_prefill, name in product(
        (False, True), ("distinct", "identical", "uniform", "zipf", "skewed", "empty")
    ):
        for rows in (1, 3, 7, 64, 133, 512):
            world.check(distribution(name, rows, len(RANKS), world.rng))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_shapes_of_a_large_model(dtype: str, cluster: int) -> None:
    world = World("llama", dtype, [16, 64, 3])
    world.cluster = cluster
    for segments in ([(0, 1)], [(0, 64), (1, 5), (-1, 2), (2, 300)], [(1, 1), (0, 1), (2, 1)]):
        world.check(segments)


@pytest.mark.parametrize("rank", [64, 128, 256])
def test_one_row_of_a_large_rank_in_wide_clusters(rank: int) -> None:
    world = World("llama", "bfloat16", [rank, 8], max_rows=CLUSTERS[8])
    for world.num_rows in (1, CLUSTERS[8]):
        world.check([(0, 1)])
    world.check([(0, 1), (1, 3), (0, 10), (-1, 1), (0, 1)])
    xs = world.inputs(9)
    world.set_segments([(0, 9)])
    wide = world.run(xs)
    world.cluster = min(CLUSTERS)
    assert all(torch.equal(a, b) for a, b in zip(wide, world.run(xs), strict=True))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_large_ranks_and_pages_of_a_few_rows(cluster: int) -> None:
    world = World("small", "bfloat16", [256, 100, 2], page_tokens=16)
    world.cluster = cluster
    assert world.pool.page_bytes // 1280 < 32, "ranks should cross pages"
    for rows in (3, 70, 512):
        world.check(distribution("uniform", rows, 3, world.rng))


@pytest.mark.parametrize("has_prefill", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ranks_beyond_a_clusters_room(dtype: str, has_prefill: bool) -> None:
    world = World("small", dtype, [UNIT_RANKS + 1, 600, 16])
    world.has_large, world.has_prefill = True, has_prefill
    for segments in ([(0, 1)], [(1, 1), (2, 1), (-1, 2), (0, 3), (1, 70)]):
        world.check(segments)
    xs = world.inputs(200)
    world.set_segments([(1, 200)])
    together = world.run(xs)
    world.set_segments([(1, 2)])
    alone = world.run([x[7:9].contiguous() for x in xs])
    assert all(torch.equal(a[7:9], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_does_not_depend_on_its_neighbours(dtype: str) -> None:
    world = World("small", dtype, RANKS)
    xs = world.inputs(200)
    world.set_segments([(3, 200)])
    together = world.run(xs)
    parts = ((0, 1), (7, 20), (40, 64), (100, 64), (50, 100))
    for world.has_prefill, world.cluster, (first, rows) in product((True, False), CLUSTERS, parts):
        world.set_segments([(3, rows)])
        alone = world.run([x[first : first + rows].contiguous() for x in xs])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[first : first + rows], b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["small", "llama"])
def test_the_consumer_expands_as_it_would_read(shape: str, dtype: str) -> None:
    world = World(shape, dtype, [*RANKS, 100])
    segments = [(0, 100), (1, 1), (-1, 70), (2, 65), (-1, 2), (3, 129), (5, 64), (6, 80)]
    world.set_segments(segments)
    x = world.inputs(sum(n for _, n in segments))[_GATE_UP]
    gate_up = torch.randn(len(x), world.lora._groups[_GATE_UP].out_stride, device="cuda", dtype=x.dtype)
    for world.num_rows in (512, 2048, 8192):  # parts of 1, 2 and 4 chunks
        world.prepare()
        want = cuda.silu_mul(gate_up, world.lora(x, 0, _GATE_UP))
        world.prepare(leaves_expand=True)
        delta = world.lora(x, 0, _GATE_UP)
        assert isinstance(delta, Shrunk)
        assert torch.equal(cuda.silu_mul(gate_up, delta), want)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_graph_replays_with_other_segments_and_adapters(cluster: int) -> None:
    world = World("small", "bfloat16", RANKS)
    world.cluster = cluster
    xs = world.inputs(512)
    world.set_segments([(-1, 512)])
    world.run(xs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = world.run(xs)
    for name in ("uniform", "distinct", "zipf", "identical", "empty"):
        segments = distribution(name, 512, len(RANKS), world.rng)
        world.set_segments(segments)
        graph.replay()
        compare(outs, world.expected(segments, xs), "bfloat16")
    world.modules[0], world.adapters[0] = (
        world.modules[5].clone(),
        world.adapters[5],
    )  # the descriptor row's next adapter
    world.pages[0] = world.pages[5].clone()
    world.set_segments([(0, 100), (1, 412)])
    graph.replay()
    compare(outs, world.expected([(0, 100), (1, 412)], xs), "bfloat16")


@pytest.mark.parametrize("has_prefill", [False, True])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_graph_waits_for_weights_that_arrive_late(dtype: str, cluster: int, has_prefill: bool) -> None:
    """All layers' together, by the copy engine alone: kernels that wait may have all multiprocessors."""
    world = World("small", dtype, RANKS)
    world.cluster, world.has_prefill = cluster, has_prefill
    xs = world.inputs(300)
    segments = distribution("uniform", 100, len(RANKS), world.rng)
    world.set_segments([*segments, (0, 200)])
    wanted = world.run(xs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = world.run(xs)
    weights = world.whole.cpu().pin_memory()
    slack, slack_host = (
        torch.empty(16 << 20, dtype=torch.uint8, **kind) for kind in ({"device": "cuda"}, {"pin_memory": True})
    )
    copies = torch.cuda.Stream()
    for step in range(1, 6):
        world.needed_step.fill_(step)
        world.whole.fill_(255)
        torch.cuda.synchronize()
        with torch.cuda.stream(copies):
            slack.copy_(slack_host, non_blocking=True)
            world.whole.copy_(weights, non_blocking=True)
            _write_value(world.arrived, step << 32 | world.config.num_layers, copies.cuda_stream)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out, want in zip(outs, wanted, strict=True)), f"step {step}"


def test_non_finite_rows_stay_alone() -> None:
    world = World("small", "bfloat16", [16, 16])
    xs = world.inputs(40)
    segments = [(0, 20), (1, 20)]
    world.set_segments(segments)
    want = world.run(xs)
    for x in xs:
        x[3] = float("nan")
    for a, b in zip(want, world.run(xs), strict=True):
        keep = [i for i in range(40) if i != 3]
        assert torch.equal(a[keep], b[keep])
