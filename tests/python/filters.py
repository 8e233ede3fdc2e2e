"""Sampling parameters of all kinds, and what may differ between two ways to sample by them."""

import torch
from torch import Tensor

from slora.kernels import reference


def random_filters(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, uniform of n rows: narrow, wide and none."""

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

    return (
        torch.rand(n, generator=generator) * 1.7 + 0.3,
        pick(0, 0, 1, 3, 280, 10_000).int(),
        pick(1.0, 1.0, 0.95, 0.3, 1e-6),
        pick(0.0, 0.0, 0.05, 0.9),
        torch.rand(n, generator=generator),
    )


def is_border(logits: Tensor, filters: tuple[Tensor, ...], got: Tensor) -> bool:
    """Whether a uniform number next to a row's own gives the token `got`."""
    *others, uniform = filters
    for offset in (-3e-7, 3e-7, -1e-5, 1e-5):
        moved = (uniform + offset).clamp(0, 1 - 2**-24)
        if int(reference.sample(logits[None], *(p[None] for p in (*others, moved)))[0]) == int(got):
            return True
    return False
