"""What users see of one device: steps, prefill, many requests at once and cold adapters, through `slora.LLM`.

    python benches/kernels/generation.py [--parts steps,prompts,…] [--out FILE.json] [--commit HASH]
    python benches/kernels/generation.py --device cpu     # tiny shapes: tries the script, says nothing about speed

Llama-3.1-8B shapes, dummy bf16 weights, greedy, adapters of rank 16 on all seven linears.

    step_REQUESTS_x_ADAPTERS_ms   steps of so many decoding requests, so many adapters in turn; 0: base only
    prompts_ADAPTERS_tok_s        32 prompts of 1,024 tokens and one new token each
    rush_ADAPTERS_tok_s           256 requests at once, 256 tokens in and 128 out; 512 requests for 500 adapters
    start_s                       until `slora.LLM` is there, with graphs for 512 requests; the weights need no disk
    cold_ms, first_use_ms         what an adapter that is on the host, or was never used, adds to the first token of 512
                                  prompt tokens

A step's time is what answers of 200 tokens take longer than those of 72, over 128. Rates count new tokens, of prompts
those of the prompt. Every row is measured ROUNDS times after what does not count; the last two once for each adapter.
"""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_adapters, write_base
from shapes import LLAMA_8B, TINY

import slora
from slora.graphs import RECORDED_RUN

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Row, add_output, row, write_rows

LIMIT_S = 540
"""A run that takes longer is stuck: it ends with the stacks of all threads."""
ROUNDS = 3
RANK = 16
SHORT, LONG = 72, 200
"""New tokens whose steps are told apart by what the longer answers take more."""
STEPS = [(1, 0), (16, 0), (64, 0), (256, 0), (1, 1), (16, 16), (64, 1), (64, 64), (256, 64)]
RUSHES = [(256, 0), (256, 64), (512, 500)]
COLD, UNUSED = 24, 8


class Bench:
    """One engine, its adapters, and the time of answers."""

    def __init__(self, folder: Path, num_adapters: int, *, is_tiny: bool, **options: Any) -> None:
        folder.mkdir(parents=True)
        shape, device, dtype = (TINY, "cpu", torch.float32) if is_tiny else (LLAMA_8B, "cuda", torch.bfloat16)
        self.scale = 16 if is_tiny else 1
        self.files = write_adapters(folder, shape, RANK, num_adapters, dtype)
        self.names = list(self.files.paths)
        self.num_prompts = 0
        if "adapters_in_pool" in options:  # and 1 GiB of KV cache
            options["pool_bytes"] = options.pop("adapters_in_pool") * self.files.image_bytes + (
                1 << (20 if is_tiny else 30)
            )
        start = time.perf_counter()
        self.llm = slora.LLM(
            write_base(folder, shape),
            adapters=self.files.paths,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            load_format="dummy",
            max_context=4096,
            **{"max_running": 256, "max_batch_tokens": 8192, "host_bytes": (num_adapters + 2) * self.files.image_bytes}
            | options,
        )
        self.start_s = time.perf_counter() - start

    def seconds(self, adapters: list[str | None], prompt_tokens: int, new_tokens: int) -> float:
        """Of a request for each entry of `adapters`, all at once, whose prompts are new."""
        length = max(2, prompt_tokens // self.scale)
        prompts = [
            [(31 * (self.num_prompts + i) + 7 * j) % 499 + 3 for j in range(length)] for i in range(len(adapters))
        ]
        self.num_prompts += len(adapters)
        start = time.perf_counter()
        results = self.llm.generate(prompts, adapter=adapters, max_tokens=new_tokens, temperature=0, ignore_eos=True)
        seconds = time.perf_counter() - start
        assert all(len(result.token_ids) == new_tokens for result in results)
        return seconds

    def in_turn(self, num_requests: int, num_adapters: int) -> list[str | None]:
        return [self.names[i % num_adapters] if num_adapters else None for i in range(num_requests)]


def starts(folder: Path, *, is_tiny: bool) -> Iterator[tuple[str, Row]]:
    values = []
    for number in range(ROUNDS):
        bench = Bench(folder / str(number), 2, is_tiny=is_tiny, max_running=512)
        values.append(bench.start_s)
        bench.llm.close()
    yield "start_s", row(values, "s")


def steps(folder: Path, *, is_tiny: bool) -> Iterator[tuple[str, Row]]:
    bench = Bench(folder, 64, is_tiny=is_tiny)
    with bench.llm:
        for requests, adapters in STEPS:
            names = bench.in_turn(requests, adapters)
            for _ in range(RECORDED_RUN):  # so that no round records the prompts' step
                bench.seconds(names, 64, SHORT)
            values = [bench.seconds(names, 64, LONG) - bench.seconds(names, 64, SHORT) for _ in range(ROUNDS)]
            yield f"step_{requests}_x_{adapters}_ms", row([1e3 * value / (LONG - SHORT) for value in values], "ms")


def prompts(folder: Path, *, is_tiny: bool) -> Iterator[tuple[str, Row]]:
    bench = Bench(folder, 32, is_tiny=is_tiny)
    with bench.llm:
        for adapters in (0, 32):
            names = bench.in_turn(32, adapters)
            seconds = [bench.seconds(names, 1024, 1) for _ in range(1 + ROUNDS)]
            yield f"prompts_{adapters}_tok_s", row([32 * 1024 / bench.scale / s for s in seconds[1:]], "tok/s")


def rushes(folder: Path, *, is_tiny: bool) -> Iterator[tuple[str, Row]]:
    bench = Bench(folder, 500, is_tiny=is_tiny)
    with bench.llm:
        bench.seconds(bench.in_turn(500, 500), 8, 2)  # all are on the host from here on
        for requests, adapters in RUSHES:
            names = bench.in_turn(requests, adapters)
            seconds = [bench.seconds(names, 256, 128) for _ in range(1 + ROUNDS)]
            yield f"rush_{adapters}_tok_s", row([requests * 128 / s for s in seconds[1:]], "tok/s")


def cold(folder: Path, *, is_tiny: bool) -> Iterator[tuple[str, Row]]:
    bench = Bench(folder, COLD + UNUSED, is_tiny=is_tiny, adapters_in_pool=8, max_running=4)
    with bench.llm:

        def added(names: list[str], state: str) -> Row:
            values = []
            for name in names:
                assert bench.llm.adapters[name].state == state, (
                    f"{name} is {bench.llm.adapters[name].state}, not {state}"
                )
                first = bench.seconds([name], 512, 1)
                values.append(1e3 * (first - bench.seconds([name], 512, 1)))
            return row(values, "ms")

        used, unused = bench.names[:COLD], bench.names[COLD:]
        for name in used:  # the first of them give way again
            bench.seconds([name], 512, 1)
        yield "cold_ms", added(used[: COLD - 10], "host")
        yield "first_use_ms", added(unused, "registered")


PARTS = {part.__name__: part for part in (starts, steps, prompts, rushes, cold)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, by default all of %(default)s")
    add_output(parser, "gpu-generation")
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; hint: {', '.join(PARTS)}")
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts.split(","):
            rows |= PARTS[name](Path(folder) / name, is_tiny=args.device == "cpu")
    write_rows(args, rows)


if __name__ == "__main__":
    main()
