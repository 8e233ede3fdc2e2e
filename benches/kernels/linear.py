"""Linears of few rows, slora's kernel beside cuBLAS, each in a graph of LAYERS layers with weights of their own, bf16.

    python benches/kernels/linear.py [--quick] [--out FILE.json]

    ours       its launches programmatic: a layer's weights are on their way while the layer before ends
    alone      each launch waits for the one before, as cuBLAS's do
    cublas     torch's linear

Results are compared with fp32 before they are timed. Times are of one linear, medians of replays. `of the sweep`: its
bytes in that time, over the rate of a read-only sweep of memory measured in the same run.
"""

import argparse
import faulthandler
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from clock import Clock
from torch import Tensor

from slora.kernels import few_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Row, add_output, row, write_rows

LIMIT_S = 540
"""A run that takes longer is stuck: it ends with the stacks of all threads."""
LAYERS, REPEATS, CHECKED_LAYERS = 32, 20, 2
ROWS = [1, 4, 8, 16]
SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "2048_8192": (2048, 8192),
    "5120_5120": (5120, 5120),
    "8192_10240": (8192, 10240),
}
QUICK = ["qkv", "o", "gate_up", "down"]
TOLERANCE = 4e-3
Linear = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, Linear] = {
    "ours": few_rows.linear,
    "alone": partial(few_rows.linear, programmatic=False),
    "cublas": F.linear,
}


def measure(name: str, rows: int, weights: Tensor, clock: Clock, sweep_tb_s: float) -> dict[str, Row]:
    """Of one linear, by way; `weights` [LAYERS, out, in]."""
    _, out_size, in_size = weights.shape
    x = torch.randn(rows, in_size, dtype=weights.dtype, device=weights.device)
    num_bytes = weights[0].nbytes + 2 * rows * (in_size + out_size)
    assert few_rows.serves(x, weights[0]), "no device that the kernel serves"
    found: dict[str, Row] = {}
    line = f"{name:12} {rows:4}"
    for way, linear in WAYS.items():
        check(f"{way}, {name}, {rows} rows", linear, x, weights)
        times = clock.replays_us(partial(run, linear, x, weights), 1, REPEATS)
        us = [time / LAYERS for time in times]
        rates = [num_bytes / time / 1e6 for time in us]
        key = f"{name}_{rows}_{way}"
        found |= {f"{key}_us": row(us, "us"), f"{key}_tb_s": row(rates, "TB/s")}
        tb_s = found[f"{key}_tb_s"]["value"]
        line += f" {found[f'{key}_us']['value']:8.1f} {tb_s:6.2f} {tb_s / sweep_tb_s:5.0%}"
    print(line, flush=True)
    return found


def run(linear: Linear, x: Tensor, weights: Tensor) -> None:
    for weight in weights:
        linear(x, weight)


def check(what: str, linear: Linear, x: Tensor, weights: Tensor) -> None:
    for weight in weights[:CHECKED_LAYERS]:
        want = x.float() @ weight.float().t()
        error = float((linear(x, weight).float() - want).norm() / want.norm())
        assert error < TOLERANCE, f"{what}: relative error {error}"


def sweep_rate(clock: Clock) -> float:
    """TB/s of a read-only sweep."""
    numbers = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    return numbers.nbytes / clock.median_us(numbers.sum, 4, 5) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "linear")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.manual_seed(0)
    clock = Clock(torch.device("cuda"))
    sweep_tb_s = sweep_rate(clock)
    print(f"a read-only sweep runs at {sweep_tb_s:.2f} TB/s")
    ways = " ".join(f"{way + ' us':>8} {'TB/s':>6} {'of it':>5}" for way in WAYS)
    print(f"{'':12} rows {ways}")
    found: dict[str, Row] = {}
    for name in QUICK if args.quick else SHAPES:
        in_size, out_size = SHAPES[name]
        weights = torch.randn(LAYERS, out_size, in_size, dtype=torch.bfloat16, device="cuda") / in_size**0.5
        for rows in ROWS:
            found |= measure(name, rows, weights, clock, sweep_tb_s)
        del weights
    write_rows(args, found, is_shown=False, sweep_tb_s=sweep_tb_s)


if __name__ == "__main__":
    main()
