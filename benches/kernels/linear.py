"""Linears of few rows, slora's kernel beside cuBLAS, each in a graph of LAYERS layers with weights of their own, bf16.

    python benches/kernels/linear.py [--quick] [--layouts] [--out FILE.json]

    ours       its launches programmatic: a layer's weights are on their way while the layer before ends
    alone      each launch waits for the one before, as cuBLAS's do
    cublas     torch's linear
    4x5x16+0 … with --layouts: ours with other layouts (warps, stages, group, far)

What each computes is compared with fp32, once launched alone and in all layers of the graph that was timed; a wrong
result is told, and the bench goes on and fails in the end. Times are of one linear, medians of replays. `of it`: its
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
LAYERS, REPEATS = 32, 20
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
LAYOUTS = [
    (8, 3, 4, False, 3),
    (4, 5, 16, True, 0),
    (4, 5, 16, True, 5),
    (8, 2, 8, False, 0),
    (8, 2, 8, False, 4),
    (8, 5, 8, False, 0),
    (4, 10, 16, True, 0),
]


def with_layouts() -> dict[str, Linear]:
    layouts = [few_rows.Layout(*layout) for layout in LAYOUTS]
    return {f"{at.warps}x{at.stages}x{at.group}+{at.far}": partial(few_rows.linear, layout=at) for at in layouts}


class Bench:
    def __init__(self, ways: dict[str, Linear]) -> None:
        self._ways, self._clock = ways, Clock(torch.device("cuda"))
        self.sweep_tb_s = self._sweep_rate()
        self.rows: dict[str, Row] = {}
        self.wrong: list[str] = []
        print(f"a read-only sweep runs at {self.sweep_tb_s:.2f} TB/s")
        print(f"{'':12} rows " + " ".join(f"{way + ' us':>9} {'TB/s':>5} of it" for way in ways))

    def measure(self, name: str, weights: Tensor, num_rows: int) -> None:
        """Of one linear, by way; `weights` [LAYERS, out, in]."""
        _, out_size, in_size = weights.shape
        x = torch.randn(num_rows, in_size, dtype=weights.dtype, device=weights.device)
        assert few_rows.serves(x, weights[0]), "no device that the kernel serves"
        wanted = [x.float() @ weight.float().t() for weight in weights]
        num_bytes = weights[0].nbytes + 2 * num_rows * (in_size + out_size)
        line = f"{name:12} {num_rows:4}"
        for way, linear in self._ways.items():
            key = f"{name}_{num_rows}_{way}"
            self._check(f"{key}, launched alone", [linear(x, weights[0])], wanted)
            outs: list[Tensor] = []

            def run(outs: list[Tensor] = outs, linear: Linear = linear) -> None:
                outs[:] = [linear(x, weight) for weight in weights]

            us = [time / LAYERS for time in self._clock.replays_us(run, 1, REPEATS)]
            self._check(f"{key}, in a graph", outs, wanted)
            self.rows |= {f"{key}_us": row(us, "us"), f"{key}_tb_s": row([num_bytes / t / 1e6 for t in us], "TB/s")}
            tb_s = self.rows[f"{key}_tb_s"]["value"]
            line += f" {self.rows[f'{key}_us']['value']:9.1f} {tb_s:5.2f} {tb_s / self.sweep_tb_s:5.0%}"
        print(line, flush=True)

    def _check(self, what: str, outs: list[Tensor], wanted: list[Tensor]) -> None:
        pairs = zip(outs, wanted, strict=False)
        errors = [float((out.float() - want).norm() / want.norm()) for out, want in pairs]
        if not max(errors) < TOLERANCE:  # NaN, too
            self.wrong.append(what)
            print(f"WRONG: {what}: relative errors {', '.join(f'{error:.2g}' for error in errors)}", flush=True)

    def _sweep_rate(self) -> float:
        """TB/s of a read-only sweep."""
        numbers = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
        return numbers.nbytes / self._clock.median_us(numbers.sum, 4, 5) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "linear")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--layouts", action="store_true", help="other layouts, too")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.manual_seed(0)
    bench = Bench(WAYS | (with_layouts() if args.layouts else {}))
    for name in QUICK if args.quick else SHAPES:
        in_size, out_size = SHAPES[name]
        weights = torch.randn(LAYERS, out_size, in_size, dtype=torch.bfloat16, device="cuda") / in_size**0.5
        for num_rows in ROWS:
            bench.measure(name, weights, num_rows)
        del weights
    write_rows(args, bench.rows, is_shown=False, sweep_tb_s=bench.sweep_tb_s, wrong=bench.wrong)
    if bench.wrong:
        sys.exit(f"wrong results: {'; '.join(bench.wrong)}")


if __name__ == "__main__":
    main()
