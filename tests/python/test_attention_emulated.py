"""The CUDA kernel for decode attention on the CPU, lane by lane, all blocks at once: needs g++, no device."""

import ctypes
import random
import shutil

import emulation
import pytest
import torch

from slora.kernels.attention import SPLIT_TOKENS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.cpu_only(reason="an emulated device; a real one is in tests/gpu"),
]
PAGE_TOKENS, NUM_PAGES, MAX_REQUESTS = 16, 1100, 8
SHAPES = {  # head dimension, heads, KV heads, window
    "grouped": (128, 8, 2, 0),
    "alone": (64, 2, 2, 0),
    "windowed": (32, 8, 1, 700),
    "wide": (256, 8, 1, 0),
    "two tiles": (16, 20, 1, 0),
    "many units": (16, 8, 8, 0),
}
TOLERANCE = 8e-3


class Decode:
    """Decode attention of one shape over one pool. Its counters stay as its launches leave them."""

    def __init__(self, shape: str, library: ctypes.CDLL) -> None:
        self.head_dim, self.heads, self.kv_heads, self.window = SHAPES[shape]
        self.library, self.group = library, self.heads // self.kv_heads
        self.units = self.kv_heads * -(-self.group // 16)
        torch.manual_seed(0)
        self.kv = torch.randn(2, NUM_PAGES * PAGE_TOKENS, self.kv_heads, self.head_dim).bfloat16()
        self.pages = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
        self.counters = torch.zeros(MAX_REQUESTS * self.units, dtype=torch.int32)

    def items(self, seq_lens: list[int]) -> torch.Tensor:
        found, page = [], 0
        for request, seq_len in enumerate(seq_lens):
            first = max(seq_len - self.window, 0) // SPLIT_TOKENS if self.window else 0
            splits = (seq_len - 1) // SPLIT_TOKENS - first + 1
            pages = [page + (first + j) * SPLIT_TOKENS // PAGE_TOKENS for j in range(splits)]
            found += [(request, j | splits << 16, pages[j], seq_len) for j in range(splits)]
            page += -(-seq_len // PAGE_TOKENS)
        return torch.tensor(found, dtype=torch.int32)

    def run(self, q: torch.Tensor, seq_lens: list[int], num_blocks: int, first_page: int = 0) -> torch.Tensor:
        items, out = self.items(seq_lens), torch.full_like(q, torch.nan)
        rows = min(self.group, 16)
        partial = rows * self.head_dim + -(-2 * rows // 4) * 4
        partials = torch.full((len(items) * self.units * partial,), torch.nan)
        count = torch.tensor([len(items)], dtype=torch.int32)
        pages = torch.tensor(self.pages[first_page:], dtype=torch.int32)
        tensors = (q, out, *self.kv, count, items, pages, partials, self.counters)
        scale = ctypes.c_float(self.head_dim**-0.5 * 1.4426950408889634)
        self.library.run(num_blocks, *(ctypes.c_void_p(t.data_ptr()) for t in tensors), PAGE_TOKENS, self.window, scale)
        return out

    def expected(self, q: torch.Tensor, seq_lens: list[int]) -> torch.Tensor:
        outs, page = [], 0
        for row, seq_len in zip(q.float(), seq_lens, strict=True):
            pages = torch.tensor(self.pages[page : page + -(-seq_len // PAGE_TOKENS)])
            page += len(pages)
            tokens = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[:seq_len]
            seen = tokens[-self.window :] if self.window else tokens
            k, v = self.kv[:, seen].float().repeat_interleave(self.group, 2)
            scores = torch.einsum("hd,thd->ht", row, k) * self.head_dim**-0.5
            outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
        return torch.stack(outs)


@pytest.fixture(scope="module", params=SHAPES)
def decode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decode:
    head_dim, heads, kv_heads, _ = SHAPES[request.param]
    shape = {"HEAD_DIM": head_dim, "HEADS": heads, "KV_HEADS": kv_heads, "PAGE_TOKENS": PAGE_TOKENS}
    macros = {"__CUDA_ARCH__": 900, "DTYPE": 1, "STAGES": 2, **shape}
    return Decode(request.param, emulation.library("paged_attention", macros, tmp_path_factory.mktemp("emulator")))


MIXES = {
    "one split": [1, 77, 512],
    "several splits": [513, 1100],
    "mixed": [30, 700, 512, 1537, 1],
}


@pytest.mark.parametrize("mix", MIXES)
def test_out_is_the_definition_whichever_block_comes_last(decode: Decode, mix: str) -> None:
    seq_lens = MIXES[mix]
    q = torch.randn(len(seq_lens), decode.heads, decode.head_dim).bfloat16()
    expected, outs = decode.expected(q, seq_lens), []
    for seed, num_blocks in enumerate((1, 3, 7, 7)):
        decode.library.seed(seed)
        outs.append(decode.run(q, seq_lens, num_blocks))
        assert not decode.counters.any()
    for got, wanted in zip(outs[0].float(), expected, strict=True):
        assert (got - wanted).norm() <= TOLERANCE * wanted.norm()
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_request_does_not_depend_on_its_neighbours(decode: Decode) -> None:
    seq_lens = [600, 1100]
    q = torch.randn(2, decode.heads, decode.head_dim).bfloat16()
    together = decode.run(q, seq_lens, 4)
    alone = decode.run(q[1:], seq_lens[1:], 2, first_page=-(-600 // PAGE_TOKENS))
    assert torch.equal(alone[0], together[1])


def test_more_splits_than_a_warp_has_lanes_and_more_units_than_a_block_has_threads(decode: Decode) -> None:
    seq_lens = [33 * SPLIT_TOKENS + 5]
    q = torch.randn(1, decode.heads, decode.head_dim).bfloat16()
    got, wanted = decode.run(q, seq_lens, 2).float(), decode.expected(q, seq_lens)
    assert (got - wanted).norm() <= TOLERANCE * wanted.norm()
