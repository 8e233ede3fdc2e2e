"""The CUDA LoRA kernels on the CPU, lane by lane (`tests/emulator`): needs g++, no device."""

import ctypes
import random
import shutil
from collections.abc import Callable
from itertools import accumulate, product

import emulation
import numpy as np
import pytest
import torch
from planning import GROUPS, Modules, pack, tiny_config

from slora.kernels import lora, page_copy
from slora.memory import DTYPES
from slora.models.config import ModelConfig

MAX_SEGMENTS = 64
CLUSTERS = ((2, 2), (8, 2))
"""Blocks of a cluster, and how many clusters there are."""
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.cpu_only(reason="an emulated device; a real one is in tests/gpu"),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}
SHAPES = {
    "aligned": {"hidden_size": 640, "intermediate_size": 2240, "num_attention_heads": 10, "num_key_value_heads": 2},
    "odd": {"hidden_size": 36, "intermediate_size": 75, "num_attention_heads": 6, "num_key_value_heads": 2},
}
VARIANTS = {  # dtype, architecture, ALIGNED
    "cluster": ("bfloat16", 900, 1),
    "items": ("bfloat16", 800, 1),
    "unaligned": ("bfloat16", 900, 0),
    "fp32": ("float32", 900, 1),
}
MIXES = {
    "few": ([16, 8, 24, 64], [(0, 1), (1, 1), (-1, 2), (2, 3), (3, 1)]),
    "tiles": ([1, 3, 16], [(2, 9), (0, 1), (1, 2)]),
    "many": ([16, 40], [(0, 66), (1, 3)]),
    "many tiles": ([32, 70], [(0, 66), (-1, 1), (1, 65)]),
    "wide": ([100], [(0, 3)]),
    "rounds": ([80, 120], [(0, 3), (1, 9)]),
    "turns": ([40, 3], [(0, 20), (-1, 3), (1, 30)]),
    "one": ([64], [(0, 1)]),
    "large": ([16, 270], [(1, 1), (0, 2), (-1, 1), (1, 9)]),
    "empty": ([4], [(-1, 3)]),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ctypes.CDLL]:
    dtype, arch, aligned = VARIANTS[request.param]
    macros = {"__CUDA_ARCH__": arch, "DTYPE": lora.DTYPE_MACRO[dtype], "ALIGNED": aligned}
    return request.param, emulation.library("lora", macros, tmp_path_factory.mktemp("emulator"))


class World:
    """Adapters in pages of random order, NaN where nobody wrote."""

    def __init__(self, shape: str, dtype: str, ranks: list[int], page_tokens: int, num_layers: int = 1) -> None:
        self.rng = random.Random(repr((shape, ranks)))
        torch.manual_seed(0)
        self.config = ModelConfig.from_dict(tiny_config(num_hidden_layers=num_layers, **SHAPES[shape]))
        self.dtype = DTYPES[dtype]
        page_bytes = self.config.page_bytes(page_tokens, dtype)
        self.adapters = [self.make_modules(rank) for rank in ranks]
        images = [pack(self.config, modules, page_bytes, dtype) for modules in self.adapters]
        order = list(range(sum(len(image) for image, _ in images)))
        self.rng.shuffle(order)
        self.pages = torch.full((len(order), page_bytes), 255, dtype=torch.uint8)
        self.modules = np.stack([descriptor for _, descriptor in images])
        self.num_pages = [len(image) for image, _ in images]
        self.page_lists = np.zeros((len(ranks), max(len(image) for image, _ in images)), np.int32)
        for row, (image, _) in enumerate(images):
            mine, order = order[: len(image)], order[len(image) :]
            self.pages[mine] = image
            self.page_lists[row, : len(mine)] = mine
        self.source, self.step = self.pages.clone(), 0
        self.groups = [lora._group(self.config.module_dims, group) for group in GROUPS]
        self.max_ranks = 3 * max(ranks)
        self.arrived, self.needed_step = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)

    def make_modules(self, rank: int) -> Modules:
        modules: Modules = {}
        for layer, (m, (in_size, out_size)) in product(
            range(self.config.num_layers), enumerate(self.config.module_dims)
        ):
            if self.rng.random() < 0.85:
                r = self.rng.choice([rank, rank, max(1, rank // 2)])
                modules[layer, m] = (torch.randn(r, in_size) / in_size**0.5, torch.randn(out_size, r) / r**0.5, 2.0)
        return modules

    def first_layers(self, row: int) -> list[int]:
        """Which layer is the first to need each page of an adapter."""
        layers = self.modules[row].reshape(self.config.num_layers, 7, -1)
        starts = [min(((w[2], w[3]) for w in layer if w[0]), default=(1 << 30, 0)) for layer in layers.tolist()]
        return [max(i for i, start in enumerate(starts) if start <= (page, 0)) for page in range(self.num_pages[row])]

    def swap_in(self, library: ctypes.CDLL, rounds: int) -> list[int]:
        """Have all pages lose what they hold, and get it back while kernels run, as PageCopies would copy them.

        How many layers are complete with each of its calls.
        """
        self.step += 1
        self.needed_step[0] = self.step
        library.forget_swap_ins()
        self.pages.fill_(255)
        copies = [
            (layer, page)
            for row in range(len(self.adapters))
            for layer, page in zip(self.first_layers(row), self.page_lists[row].tolist(), strict=False)
        ]
        copies.sort()
        groups = page_copy._groups([layer for layer, _ in copies], self.config.num_layers)
        for num_layers, start, end in groups:
            for i in range(start, end):
                to, source = (ctypes.c_void_p(pages[copies[i][1]].data_ptr()) for pages in (self.pages, self.source))
                word = ctypes.c_void_p(self.arrived.data_ptr() if i == end - 1 else None)
                value = ctypes.c_uint64(self.step << 32 | num_layers)
                library.swap_in(to, source, ctypes.c_long(self.pages.shape[1]), word, value, rounds)
        return [num_layers for num_layers, _, _ in groups]

    def run(
        self,
        library: ctypes.CDLL,
        segments: list[tuple[int, int]],
        xs: list[torch.Tensor],
        clusters: tuple[int, int] = CLUSTERS[0],
        team_size: int | None = None,
        gate_up: torch.Tensor | None = None,
        sum_chunks: int = 4,
        num_layers: int | None = None,
        before_each: Callable[[], object] = lambda: None,
    ) -> list[torch.Tensor]:
        """The deltas of the groups of the first layers. With `gate_up`, its silu_mul in place of its group's delta."""
        cluster, num_clusters = clusters
        num_lists = 4 * self.config.num_layers
        rows = sum(n for _, n in segments)
        stride = max(lora._sums_stride(group.in_size, self.max_ranks) for group in self.groups)
        max_units = 3 * (rows // 8 + MAX_SEGMENTS)
        words = [
            torch.zeros(n, dtype=torch.int32)
            for n in (num_lists * lora._TOTALS, num_lists * lora._LISTS * MAX_SEGMENTS, num_lists * MAX_SEGMENTS * 36)
        ]
        units = torch.zeros(num_lists * (2 + max_units), dtype=torch.int32)
        starts = torch.zeros(num_lists, lora._MAX_BLOCKS, 40, dtype=torch.int32)
        sums = torch.full((4 * rows * stride,), float("nan"))
        pool = lora._Pool(
            self.pages.data_ptr(),
            self.pages.shape[1],
            self.modules.ctypes.data,
            self.page_lists.ctypes.data,
            self.page_lists.shape[1],
            self.config.num_layers,
            self.arrived.data_ptr(),
            self.needed_step.data_ptr(),
        )
        work = lora._Work(*(t.data_ptr() for t in (*words, sums, units, starts)), MAX_SEGMENTS, stride, max_units)
        groups = lora._Groups((lora._Group * 4)(*self.groups))
        indptr = torch.tensor([0, *accumulate(n for _, n in segments)], dtype=torch.int32)
        plan = (torch.tensor([len(segments)]), indptr, torch.tensor([a for a, _ in segments]))
        plan = tuple(t.int() for t in plan)
        by_ref = ctypes.byref
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in plan]
        expanding = -1 if gate_up is None else lora._GATE_UP
        numbers = (rows, num_clusters, cluster)
        chosen = (lora.MANY_ROWS, sum_chunks, *numbers, expanding)
        library.run_work(by_ref(pool), by_ref(groups), by_ref(work), *pointers, *chosen)
        if team_size is not None:
            num_blocks = num_clusters * cluster
            self.share(
                units.view(num_lists, -1), starts, words[2].view(num_lists, MAX_SEGMENTS, -1), num_blocks, team_size
            )
        outs = []
        for i in range(4 * (num_layers or self.config.num_layers)):
            x, group = xs[i % 4], self.groups[i % 4]
            out = x.new_full((rows, group.out_stride), float("nan"))
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
            where = (by_ref(pool), by_ref(group), by_ref(work), i)
            if hasattr(library, "run_cluster_kernel"):
                before_each()
                library.run_cluster_kernel(*where, *pointers, *numbers)
            before_each()
            library.run_shrink(*where, pointers[0])
            before_each()
            library.run_expand(*where, pointers[1])
            if i % 4 == expanding:
                mixed = x.new_full((rows, group.out_stride // 2), float("nan"))
                pointers = [ctypes.c_void_p(t.data_ptr()) for t in (gate_up, out, mixed)]
                before_each()
                library.run_silu_mul(*where, *pointers)
                out = mixed
            outs.append(out)
        return outs

    def share(
        self, units: torch.Tensor, starts: torch.Tensor, segments: torch.Tensor, num_blocks: int, team_size: int
    ) -> None:
        """Have teams of another size than was chosen."""
        units[:, 1] = team_size
        num_teams = num_blocks // team_size
        for one, start, described in zip(units, starts, segments, strict=True):
            ids = torch.cat([one[2 : 2 + one[0]], torch.full((2 * num_teams,), -1)])
            for block in range(num_blocks):
                team = block // team_size
                places = (team, 2 * num_teams - 1 - team)
                first, second = (int(ids[i]) if i < one[0] else -1 for i in places)
                start[block, :4] = torch.tensor([first, second, team_size, one[0]])
                if first >= 0:
                    start[block, 4:] = described[first % lora.MAX_SEGMENTS]

    def expected(self, segments: list[tuple[int, int]], group: int, x: torch.Tensor) -> list[torch.Tensor]:
        """By segment."""
        found = []
        for (adapter, n), part in zip(segments, x.float().split([n for _, n in segments]), strict=True):
            columns = []
            for m in GROUPS[group]:
                columns.append(torch.zeros(n, self.config.module_dims[m][1]))
                if adapter >= 0 and (0, m) in self.adapters[adapter]:
                    a, b, scale = self.adapters[adapter][0, m]
                    columns[-1] = part @ a.to(self.dtype).float().t() * scale @ b.to(self.dtype).float().t()
            found.append(torch.cat(columns, 1))
        return found


@pytest.mark.parametrize("mix", MIXES)
def test_delta_is_the_definition(variant: tuple[str, ctypes.CDLL], mix: str) -> None:
    name, library = variant
    dtype = VARIANTS[name][0]
    ranks, segments = MIXES[mix]
    for page_tokens, clusters in product((16, 64), CLUSTERS if name == "cluster" else CLUSTERS[:1]):
        world = World("odd" if name in ("unaligned", "fp32") else "aligned", dtype, ranks, page_tokens)
        rows = sum(n for _, n in segments)
        xs = [torch.randn(rows, group.in_size).to(world.dtype) for group in world.groups]
        for group, out in enumerate(world.run(library, segments, xs, clusters)):
            wanted = world.expected(segments, group, xs[group])
            for got, want in zip(out.float().split([n for _, n in segments]), wanted, strict=True):
                assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("mix", MIXES)
def test_the_consumer_expands_as_it_would_read(variant: tuple[str, ctypes.CDLL], mix: str) -> None:
    name, library = variant
    if name not in ("cluster", "items"):
        return
    ranks, segments = MIXES[mix]
    world = World("aligned", "bfloat16", ranks, 16)
    rows = sum(n for _, n in segments)
    xs = [torch.randn(rows, group.in_size).to(world.dtype) for group in world.groups]
    gate_up = torch.randn(rows, world.groups[lora._GATE_UP].out_stride).to(world.dtype)
    delta = world.run(library, segments, xs)[lora._GATE_UP]
    gate, up = (gate_up.float() + delta.float()).chunk(2, 1)
    want = (torch.nn.functional.silu(gate) * up).to(world.dtype)
    got = world.run(library, segments, xs, gate_up=gate_up)[lora._GATE_UP]
    assert torch.allclose(got.float(), want.float(), rtol=2**-7, atol=0), "more than a rounding apart"
    assert (got != want).float().mean() < 0.01


def test_a_row_does_not_depend_on_its_neighbours(variant: tuple[str, ctypes.CDLL]) -> None:
    name, _ = variant
    for rank in (16, lora.UNIT_RANKS + 4) if name == "cluster" else (16,):
        check_neighbours(variant, rank)


def check_neighbours(variant: tuple[str, ctypes.CDLL], rank: int) -> None:
    name, library = variant
    world = World("odd" if name in ("unaligned", "fp32") else "aligned", VARIANTS[name][0], [rank], 64)
    xs = [torch.randn(70, group.in_size).to(world.dtype) for group in world.groups]
    together = world.run(library, [(0, 70)], xs)
    for clusters in CLUSTERS if name == "cluster" else CLUSTERS[:1]:
        alone = world.run(library, [(0, 2)], [x[5:7].contiguous() for x in xs], clusters)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[5:7], b)
    for sum_chunks in (1, 2) if name == "cluster" else ():
        finer = world.run(library, [(0, 70)], xs, sum_chunks=sum_chunks)
        assert all(torch.equal(a, b) for a, b in zip(together, finer, strict=True))


@pytest.mark.parametrize(("cluster", "team_size"), [(2, 1), (2, 2), (8, 1), (8, 2), (8, 4), (8, 8)])
@pytest.mark.parametrize("variant", ["cluster"], indirect=True)
def test_a_row_does_not_depend_on_the_size_of_teams(
    variant: tuple[str, ctypes.CDLL], cluster: int, team_size: int
) -> None:
    """Nor on who is ahead of whom: one cluster has all units, so that blocks of a team may be several turns apart."""
    _, library = variant
    for rank, rows in ((16, 40), (80, 30)):
        world = World("aligned", "bfloat16", [rank], 64)
        xs = [torch.randn(rows + 65, group.in_size).to(world.dtype) for group in world.groups]
        together = world.run(library, [(0, rows + 65)], xs)
        for number in range(2):
            library.seed(number)
            few = [x[:rows].contiguous() for x in xs]
            for a, b in zip(together, world.run(library, [(0, rows)], few, (cluster, 1), team_size), strict=True):
                assert torch.equal(a[:rows], b), f"seed {number}"


@pytest.mark.parametrize("mix", ["few", "many"])
def test_kernels_wait_for_weights_that_are_swapped_in_meanwhile(variant: tuple[str, ctypes.CDLL], mix: str) -> None:
    """Each by itself: it may start before the one before it has waited."""
    name, library = variant
    has_consumer = name in ("cluster", "items")
    ranks, segments = MIXES[mix]
    world = World("aligned" if has_consumer else "odd", VARIANTS[name][0], ranks, 16, num_layers=2)
    rows = sum(n for _, n in segments)
    xs = [torch.randn(rows, group.in_size).to(world.dtype) for group in world.groups]
    gate_up = torch.randn(rows, world.groups[lora._GATE_UP].out_stride).to(world.dtype) if has_consumer else None
    wanted = world.run(library, segments, xs, gate_up=gate_up)
    assert all(torch.isfinite(delta).all() for delta in wanted)
    for number, rounds in enumerate((0, 50)):
        library.seed(number)
        outs = world.run(library, segments, xs, gate_up=gate_up, before_each=lambda n=rounds: world.swap_in(library, n))
        library.forget_swap_ins()
        for i, (got, want) in enumerate(zip(outs, wanted, strict=True)):
            assert torch.equal(got, want), f"layer {i // 4}, group {i % 4}, seed {number}"


def test_a_layer_waits_for_its_own_weights_only(variant: tuple[str, ctypes.CDLL]) -> None:
    name, library = variant
    world = World("aligned" if name in ("cluster", "items") else "odd", VARIANTS[name][0], [40], 16, num_layers=3)
    xs = [torch.randn(3, group.in_size).to(world.dtype) for group in world.groups]
    complete = world.swap_in(library, 0)
    assert complete[0] == 1, "the first call has the first layer's pages"
    assert len(complete) > 1
    for num_layers in range(1, 4):
        world.run(library, [(0, 3)], xs, num_layers=num_layers)
        assert int(world.arrived) == 1 << 32 | next(n for n in complete if n >= num_layers)


def test_the_host_knows_the_sizes(variant: tuple[str, ctypes.CDLL]) -> None:
    name, library = variant
    sizes = (ctypes.c_int * 8)()
    library.sizes(sizes)
    assert tuple(sizes)[:3] == (lora._SEGMENT_WORDS, lora._THREADS, lora.MAX_SEGMENTS)
    if name != "fp32":
        assert tuple(sizes)[4:7] == (lora._SHRINK_BYTES, lora._EXPAND_BYTES, 2 * lora._EXPAND_BYTES)
    if name == "cluster":
        assert (sizes[3], sizes[7]) == (lora._CLUSTER_BYTES, lora.UNIT_RANKS)
