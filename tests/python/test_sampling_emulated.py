"""The CUDA kernel that samples on the CPU, lane by lane: needs g++, no device."""

import ctypes
import shutil

import emulation
import pytest
import torch
from filters import is_border, random_filters
from torch import Tensor

from slora.kernels import reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.cpu_only(reason="an emulated device; a real one is in tests/gpu"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation.library("sample", {}, tmp_path_factory.mktemp("emulator"))


def sample(library: ctypes.CDLL, raw: Tensor, logits: Tensor, filters: tuple[Tensor, ...]) -> Tensor:
    ids, counts = torch.full((len(logits),), -7, dtype=torch.int32), torch.full((8,), len(logits), dtype=torch.int32)
    inputs, outputs = (raw, logits, counts, *filters), (ctypes.c_int(logits.shape[1]), ctypes.c_void_p(ids.data_ptr()))
    library.run(len(logits), *(ctypes.c_void_p(t.data_ptr()) for t in inputs), *outputs)
    return ids


@pytest.mark.parametrize("vocab", [5, 301, 3000, 5000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_sampled_tokens_are_those_of_the_reference(library: ctypes.CDLL, vocab: int, spread: float) -> None:
    n, generator = 12, torch.Generator().manual_seed(vocab)
    logits = torch.randn(n, vocab, generator=generator) * spread
    logits[::3] = logits[::3].bfloat16().float()  # many equal ones
    filters = random_filters(n, generator)
    expected, got = reference.sample(logits, *filters), sample(library, logits, logits, filters)
    for row in (got != expected).nonzero()[:, 0].tolist():
        assert is_border(logits[row], tuple(p[row] for p in filters), got[row])
    assert (got != expected).sum() <= 1


def test_forbidden_tokens_are_never_sampled(library: ctypes.CDLL) -> None:
    """Whole threads may have none that is allowed."""
    generator = torch.Generator().manual_seed(0)
    raw, n = torch.randn(6, 5000, generator=generator), 6
    logits = raw.clone()
    logits[:, : 5000 - 40] = -torch.inf
    filters = random_filters(n, generator)
    got, expected = sample(library, raw, logits, filters), reference.sample(logits, *filters)
    assert torch.equal(got.long(), expected)
    assert got.min() >= 5000 - 40


@pytest.mark.parametrize("temperature", [1e-30, 1e-7, 2e-6, 0.05, 100.0])
def test_any_temperature_will_do(library: ctypes.CDLL, temperature: float) -> None:
    n, generator = 8, torch.Generator().manual_seed(1)
    logits = torch.randn(n, 20_000, generator=generator) * 4
    filters = (torch.full((n,), temperature), *random_filters(n, generator)[1:])
    expected, got = reference.sample(logits, *filters), sample(library, logits, logits, filters)
    for row in (got != expected).nonzero()[:, 0].tolist():
        assert is_border(logits[row], tuple(p[row] for p in filters), got[row])
    assert (got != expected).sum() <= 1
