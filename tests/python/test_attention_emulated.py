"""The CUDA kernels for attention on the CPU, lane by lane: needs g++, no device."""

import ctypes
import random
import shutil
from itertools import accumulate
from pathlib import Path

import emulation
import pytest
import torch

from slora.kernels.attention import SPLIT_TOKENS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.cpu_only(reason="an emulated device; a real one is in tests/gpu"),
]
POOL_TOKENS = 17_600
SHAPES = {  # head dimension, heads, KV heads, window, tokens of a page
    "grouped": (128, 8, 2, 0, 16),
    "alone": (64, 2, 2, 0, 64),
    "windowed": (32, 8, 1, 700, 128),
    "wide": (256, 8, 1, 0, 32),
    "two tiles": (16, 20, 1, 0, 16),
}
TOLERANCE = 8e-3


class Pool:
    """Random keys and values of one shape, in pages of random order."""

    def __init__(self, shape: str) -> None:
        self.head_dim, self.heads, self.kv_heads, self.window, self.page_tokens = SHAPES[shape]
        self.group = self.heads // self.kv_heads
        self.scale = ctypes.c_float(self.head_dim**-0.5 * 1.4426950408889634)
        torch.manual_seed(0)
        pages = list(range(-(-POOL_TOKENS // self.page_tokens) + 8))  # requests leave some of theirs half empty
        self.kv = torch.randn(2, len(pages) * self.page_tokens, self.kv_heads, self.head_dim).bfloat16()
        random.Random(0).shuffle(pages)
        self.pages = torch.tensor(pages, dtype=torch.int32)

    def num_pages(self, seq_len: int) -> int:
        return -(-seq_len // self.page_tokens)

    def queries(self, num_rows: int) -> torch.Tensor:
        return torch.randn(num_rows, self.heads, self.head_dim).bfloat16()

    def attend(self, q: torch.Tensor, first_page: int, seq_len: int) -> torch.Tensor:
        """One row in fp32: q [heads, head_dim]."""
        pages = self.pages[first_page : first_page + self.num_pages(seq_len)].long()
        tokens = (pages[:, None] * self.page_tokens + torch.arange(self.page_tokens)).flatten()[:seq_len]
        seen = tokens[-self.window :] if self.window else tokens
        k, v = self.kv[:, seen].float().repeat_interleave(self.group, 2)
        scores = torch.einsum("hd,thd->ht", q.float(), k) * self.head_dim**-0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def build(shape: str, name: str, folder: Path) -> ctypes.CDLL:
    head_dim, heads, kv_heads, _, page_tokens = SHAPES[shape]
    macros = {"HEAD_DIM": head_dim, "HEADS": heads, "KV_HEADS": kv_heads, "PAGE_TOKENS": page_tokens}
    return emulation.library(name, {"__CUDA_ARCH__": 900, "DTYPE": 1, "STAGES": 2, **macros}, folder)


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


class Decode:
    """Decode attention over one pool."""

    def __init__(self, pool: Pool, library: ctypes.CDLL) -> None:
        self.pool, self.library = pool, library

    def items(self, seq_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The splits of all requests, and (first, how many) of each request."""
        items: list[tuple[int, int, int, int]] = []
        spans, page, window = [], 0, self.pool.window
        for request, seq_len in enumerate(seq_lens):
            first = max(seq_len - window, 0) // SPLIT_TOKENS if window else 0
            splits = (seq_len - 1) // SPLIT_TOKENS - first + 1
            pages = [page + (first + j) * SPLIT_TOKENS // self.pool.page_tokens for j in range(splits)]
            spans.append((len(items), splits))
            items += [(request, j | splits << 16, pages[j], seq_len) for j in range(splits)]
            page += self.pool.num_pages(seq_len)
        return torch.tensor(items, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32)

    def run(
        self, q: torch.Tensor, seq_lens: list[int], num_blocks: int, *, first_page: int = 0, has_merge: bool = True
    ) -> torch.Tensor:
        pool, (items, spans), out = self.pool, self.items(seq_lens), torch.full_like(q, torch.nan)
        rows, units = min(pool.group, 16), pool.kv_heads * -(-pool.group // 16)
        partial = rows * pool.head_dim + -(-2 * rows // 4) * 4
        partials = torch.full((len(items) * units * partial,), torch.nan)
        count, counts = (torch.tensor(n, dtype=torch.int32) for n in ([len(items)], [0, 0, len(seq_lens)]))
        tensors = (q, out, *pool.kv, count, items, pool.pages[first_page:], partials)
        self.library.attend(num_blocks, *pointers(*tensors), pool.page_tokens, pool.window, pool.scale)
        if has_merge:
            self.library.merge(num_blocks, *pointers(out, counts, spans, partials))
        return out

    def expected(self, q: torch.Tensor, seq_lens: list[int]) -> torch.Tensor:
        first_pages = accumulate((self.pool.num_pages(seq_len) for seq_len in seq_lens), initial=0)
        return torch.stack([self.pool.attend(*row) for row in zip(q, first_pages, seq_lens, strict=False)])


@pytest.fixture(scope="module", params=SHAPES)
def decode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decode:
    folder = tmp_path_factory.mktemp("emulator")
    return Decode(Pool(request.param), build(request.param, "paged_attention", folder))


MIXES = {
    "one split": [1, 77, 512],
    "several splits": [513, 1100],
    "mixed": [30, 700, 512, 1537, 1],
    "more splits than lanes": [33 * SPLIT_TOKENS + 5],
}


@pytest.mark.parametrize("mix", MIXES)
def test_decode_is_the_definition(decode: Decode, mix: str) -> None:
    seq_lens = MIXES[mix]
    q = decode.pool.queries(len(seq_lens))
    out = decode.run(q, seq_lens, 3)
    for got, wanted in zip(out.float(), decode.expected(q, seq_lens), strict=True):
        assert (got - wanted).norm() <= TOLERANCE * wanted.norm()
    if mix != "more splits than lanes":
        assert torch.equal(decode.run(q, seq_lens, 7), out)


def test_nothing_is_merged_where_every_request_has_one_split(decode: Decode) -> None:
    seq_lens = [1, 77, SPLIT_TOKENS]
    q = decode.pool.queries(len(seq_lens))
    assert torch.equal(decode.run(q, seq_lens, 3, has_merge=False), decode.run(q, seq_lens, 3))


def test_a_request_does_not_depend_on_its_neighbours(decode: Decode) -> None:
    seq_lens = [600, 1100]
    q = decode.pool.queries(2)
    together = decode.run(q, seq_lens, 4)
    alone = decode.run(q[1:], seq_lens[1:], 2, first_page=decode.pool.num_pages(600))
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_see_their_past_and_not_their_future(shape: str, tmp_path: Path) -> None:
    """Behind a decode row: whole prompts, and chunks with cached context."""
    pool, library = Pool(shape), build(shape, "chunk_attention", tmp_path)
    chunks = [(40, 1), (0, 37), (150, 20), (790, 2)]  # cached, rows
    seq_lens = [cached + rows for cached, rows in chunks]
    query_indptr = [0, *accumulate(rows for _, rows in chunks)]
    page_indptr = [0, *accumulate(pool.num_pages(seq_len) for seq_len in seq_lens)]
    tile = 64 // pool.group
    items = [(i, j, 0, 0) for i, (_, rows) in enumerate(chunks) if i for j in range(-(-rows // tile))]
    q = pool.queries(query_indptr[-1])
    out = torch.full_like(q, torch.nan)
    plan = [
        torch.tensor(values, dtype=torch.int32)
        for values in ((1, len(items)), items, query_indptr, seq_lens, page_indptr)
    ]
    library.attend(3, *pointers(q, out, *pool.kv, *plan, pool.pages), pool.page_tokens, pool.window, pool.scale)
    assert out[0].isnan().all()
    for i, (cached, rows) in enumerate(chunks[1:], 1):
        for row in {0, rows // 2, rows - 1}:
            got = out[query_indptr[i] + row].float()
            wanted = pool.attend(q[query_indptr[i] + row], page_indptr[i], cached + row + 1)
            assert (got - wanted).norm() <= TOLERANCE * wanted.norm()
