"""What single steps of a serving engine cost: Llama-3.1-8B shapes, dummy bf16 weights, one engine for all rows.

    python benches/kernels/serving.py [--rows NAME,NAME] [--out FILE.json] [--commit HASH]
    python benches/kernels/serving.py --device cpu        # tiny shapes: tries the script, says nothing about speed

    step_mixed_63_plus_128_ms        63 decoding requests and one prompt of 128 tokens in every step, base only
    swap_in_gb_s                     rank-16 adapters, host pages to device pages, while 64 requests decode
    swap_in_decode_slowdown          a 64-row step while swap-ins follow one another, over one without
    host_gap_b64_ms                  a 64-row step's time less that of its graphs
    attention_decode_b64_2k_share    bytes of K and V / time / 4.38 TB/s, an H200's read sweep; layers in turn
    attention_decode_b8_32k_share    likewise, 8 requests of 32,768 tokens
    attention_prefill_8k_tflop_s     one causal sequence of 8,192 tokens

A step's time is from the end of the step before to its own end, by events on the device: what the host adds is in it,
and a clock on the host's side, which looks late, is not. Rows are measured in turn, ROUNDS times.

Time of the GPU: events directly around each launch of a graph. Gaps between a graph's kernels are the graph's, not the
host's, so a profiler's sum of kernels would count them wrongly, and it slows graphs down; whatever lies outside graphs
(uploads of plans, results, waiting for the host) counts as gap.

Swap-ins are ordered by pinning adapters and letting go of them, so that no request and no row of LoRA is added. Their
rate is that of the copy stream while it copies; `sustained_gb_s` in the file is per second of the whole phase.
"""

import argparse
import faulthandler
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from attention import NUM_PAGES, AttentionWork
from checkpoints import write_adapters, write_base
from shapes import LLAMA_8B, TINY
from steps import Recorder
from storm import Storm

import slora
from slora.models.config import ModelConfig
from slora.plan import Counts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import add_output, row, write_rows

LIMIT_S = 240
"""A run that takes longer is stuck: it ends with the stacks of all threads."""
WAIT_S = 60.0
ROUNDS = 5
READ_SWEEP_TB_S = 4.38
NUM_ADAPTERS, RANK = 72, 16
SPARE_ADAPTERS = 16
"""What the pool holds beside the KV cache of 64 requests: far fewer than all, so that swap-ins go on."""
UNITS = {
    "step_mixed_63_plus_128_ms": "ms",
    "swap_in_gb_s": "GB/s",
    "swap_in_decode_slowdown": "",
    "host_gap_b64_ms": "ms",
    "attention_decode_b64_2k_share": "",
    "attention_decode_b8_32k_share": "",
    "attention_prefill_8k_tflop_s": "TFLOP/s",
}
DECODE_ROWS = ("swap_in_gb_s", "swap_in_decode_slowdown", "host_gap_b64_ms")
Values = dict[str, float]


class Engine:
    """An engine over a base with dummy weights, and the works that need one."""

    def __init__(self, folder: Path, *, is_tiny: bool) -> None:
        device, self.dtype = ("cpu", "float32") if is_tiny else ("cuda", "bfloat16")
        shape = TINY if is_tiny else LLAMA_8B
        self.num_steps = 16 if is_tiny else 40
        self.num_tokens = 8 * self.num_steps + 96
        base = write_base(folder, shape)
        adapters = write_adapters(folder, shape, RANK, NUM_ADAPTERS, torch.float32 if is_tiny else torch.bfloat16)
        self.vocab_size = ModelConfig.from_dir(base).vocab_size
        page_bytes = ModelConfig.from_dir(base).page_bytes(16, self.dtype)
        image_pages = -(-(adapters.image_bytes + 32 * page_bytes // 100) // page_bytes) + 1
        kv_pages = 64 * (64 + self.num_tokens) // 16 + 64
        start = time.perf_counter()
        self.llm = slora.LLM(
            base,
            adapters=adapters.paths,
            device=device,
            dtype=self.dtype,
            load_format="dummy",
            page_tokens=16,
            pool_bytes=(kv_pages + SPARE_ADAPTERS * image_pages) * page_bytes,
            host_bytes=NUM_ADAPTERS * image_pages * page_bytes,
            max_batch_tokens=63 + 128,
            max_running=72,
            max_context=4096,
        )
        print(f"start: {time.perf_counter() - start:.1f} s", flush=True)
        self.device = torch.device(device)
        self.names = list(adapters.paths)
        Storm(self.llm.adapters, self.names).once()  # into the host tier
        self._expected = self._answers()
        if not is_tiny:  # whose few tokens may be the same
            assert len({tuple(ids) for ids in self._expected}) == len(self._expected), "adapters answer alike"

    def check(self) -> None:
        """Adapters that were evicted and swapped in many times answer as they did at first."""
        assert self._answers() == self._expected, "an adapter's answer has changed"

    def mixed(self, recorder: Recorder) -> Values:
        """63 requests that decode for longer than prompts of 128 tokens keep coming, one a step."""
        num_fillers = 2 * self.num_steps
        decoding, coming = ([self._prompt(i, n) for i in range(count)] for n, count in ((64, 63), (128, num_fillers)))
        with ThreadPoolExecutor(1) as threads:
            run = threads.submit(self._generate, decoding, num_fillers + 100)
            try:
                # A prompt that came earlier would be cut in two, and so would all that follow it.
                self._until_all_decode(recorder, 63, run)
                recorder.phase = "mixed"
                self._generate(coming, 1)
            finally:
                recorder.phase = None
                run.result(WAIT_S)
        recorder.clock.settle()

        def is_mixed(counts: Counts) -> bool:
            return (counts.num_rows, counts.num_decode, counts.num_requests) == (191, 63, 64)

        return {"step_mixed_63_plus_128_ms": median_of(ms for ms, _ in recorder.periods_ms("mixed", is_mixed))}

    def decode(self, recorder: Recorder) -> Values:
        """64 requests decode while adapters stay where they are, and while they are swapped in without a pause."""
        prompts = [self._prompt(i, 64) for i in range(64)]
        storm = Storm(self.llm.adapters, self.names)
        with ThreadPoolExecutor(1) as threads:
            run = threads.submit(self._generate, prompts, self.num_tokens)
            try:
                self._until_all_decode(recorder, 64, run)
                for _ in range(2):
                    self._steps(recorder, "quiet", self.num_steps, run)
                    storm.start()
                    self._steps(recorder, "ramp", 8, run)
                    self._steps(recorder, "storm", self.num_steps, run)
                    storm.stop()
                    self._steps(recorder, "ramp", 8, run)
            finally:
                recorder.phase = None
                storm.stop()
                run.result(WAIT_S)
        recorder.clock.settle()
        return self._decode_values(recorder)

    def _decode_values(self, recorder: Recorder) -> Values:
        clock, page_bytes = recorder.clock, self.llm.stats().page_bytes

        def is_decode(counts: Counts) -> bool:
            return (counts.num_rows, counts.num_decode) == (64, 64)

        quiet, storm = (recorder.periods_ms(phase, is_decode) for phase in ("quiet", "storm"))
        copies = [copy for _, step in storm for copy in step.copies]
        num_bytes = sum(pages for pages, _, _ in copies) * page_bytes
        assert num_bytes, "no adapter was swapped in"
        assert not any(step.copies for _, step in quiet), "adapters were swapped in between"
        slowdown = median_of(ms for ms, _ in storm) / median_of(ms for ms, _ in quiet)
        return {
            "swap_in_gb_s": num_bytes / sum(clock.ms(start, end) for _, start, end in copies) / 1e6,
            "swap_in_decode_slowdown": slowdown,
            "host_gap_b64_ms": median_of(ms - recorder.busy_ms(step) for ms, step in quiet),
            "sustained_gb_s": num_bytes / sum(ms for ms, _ in storm) / 1e6,
            "step_b64_ms": median_of(ms for ms, _ in quiet),
            "launched_ahead_share": sum(step.was_ahead for _, step in quiet) / len(quiet),
        }

    def _until_all_decode(self, recorder: Recorder, num_requests: int, run: "Future[list[list[int]]]") -> None:
        def is_over() -> bool:
            return any(step.counts.num_decode == num_requests for step in recorder.steps[-1:])

        self._record(recorder, "start", is_over, run)

    def _steps(self, recorder: Recorder, phase: str, num_steps: int, run: "Future[list[list[int]]]") -> None:
        """Record the phase for so many steps."""
        wanted = len(recorder.of(phase)) + num_steps
        self._record(recorder, phase, lambda: len(recorder.of(phase)) >= wanted, run)

    def _record(
        self, recorder: Recorder, phase: str, is_over: Callable[[], bool], run: "Future[list[list[int]]]"
    ) -> None:
        recorder.phase = phase
        deadline = time.monotonic() + WAIT_S
        while not is_over():
            assert not run.done(), f"the requests ended in phase {phase}: {run.exception()}"
            assert time.monotonic() < deadline, f"phase {phase} does not end"
            time.sleep(0.002)
        recorder.phase = None

    def _answers(self) -> list[list[int]]:
        """Of some adapters, each on the device before its request comes: a cold one may take other kernels."""
        found, storm = [], Storm(self.llm.adapters, [])
        for name in self.names[:: NUM_ADAPTERS // 6]:
            storm.bring(name)
            found += self._generate([[5, 6, 7, 8]], 8, name)
            self.llm.adapters.pin(name, False)
        return found

    def _generate(self, prompts: list[list[int]], max_tokens: int, adapter: str | None = None) -> list[list[int]]:
        names = [adapter] * len(prompts)
        results = self.llm.generate(prompts, adapter=names, max_tokens=max_tokens, temperature=0, ignore_eos=True)
        found = [result.token_ids for result in results]
        assert all(len(ids) == max_tokens for ids in found), "a request ended early"
        return found

    def _prompt(self, seed: int, length: int) -> list[int]:
        return [(7 * seed + 13 * i) % (self.vocab_size - 300) + 5 for i in range(length)]


class Attention:
    """The attention rows, over a pool of their own."""

    def __init__(self, *, is_tiny: bool) -> None:
        self._scale = 16 if is_tiny else 1
        config = ModelConfig.from_dict(TINY if is_tiny else LLAMA_8B)
        dtype, device = ("float32", "cpu") if is_tiny else ("bfloat16", "cuda")
        self._work = AttentionWork(config, dtype, device, NUM_PAGES // self._scale)

    def decode(self, num_requests: int, seq_len: int) -> float:
        seq_len //= self._scale
        us = self._work.decode_us(num_requests, seq_len)
        return self._work.kv_bytes(num_requests, seq_len) / us / 1e6 / READ_SWEEP_TB_S

    def prefill(self, seq_len: int) -> float:
        seq_len //= self._scale
        return self._work.flop(1, seq_len, 0) / self._work.prefill_us(1, seq_len, 0) / 1e6


def median_of(values: Iterable[float]) -> float:
    found = sorted(values)
    assert len(found) >= 8, f"only {len(found)} steps of the wanted shape"
    return statistics.median(found)


def measure(wanted: list[str], folder: Path, *, is_tiny: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The wanted rows, and what else is worth keeping."""
    works: list[Callable[[], Values]] = []
    engine: Engine | None = None
    if any(not name.startswith("attention") for name in wanted):
        engine = Engine(folder, is_tiny=is_tiny)
        runs = [engine.mixed] * ("step_mixed_63_plus_128_ms" in wanted)
        runs += [engine.decode] * any(name in wanted for name in DECODE_ROWS)
        works += [lambda run=run: recorded(run, engine.device) for run in runs]
    if any(name.startswith("attention") for name in wanted):
        attention = Attention(is_tiny=is_tiny)
        each = {
            "attention_decode_b64_2k_share": lambda: attention.decode(64, 2048),
            "attention_decode_b8_32k_share": lambda: attention.decode(8, 32768),
            "attention_prefill_8k_tflop_s": lambda: attention.prefill(8192),
        }
        works += [lambda name=name, run=run: {name: run()} for name, run in each.items() if name in wanted]
    found: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for work in works:
            for name, value in work().items():
                if number:  # the first round warms up: graphs are recorded, kernels compiled
                    found.setdefault(name, []).append(value)
        print(f"round {number} of {ROUNDS}", flush=True)
        if engine:
            engine.check()
    if engine:
        engine.llm.close()
    rows = {name: values for name, values in found.items() if name in wanted}
    return rows, {name: values for name, values in found.items() if name not in wanted}


def recorded(run: Callable[[Recorder], Values], device: torch.device) -> Values:
    with Recorder(device) as recorder:
        return run(recorder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "serving")
    parser.add_argument("--rows", default=",".join(UNITS), help="names, separated by commas; by default all")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    wanted = args.rows.split(",")
    if unknown := set(wanted) - set(UNITS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; there are {', '.join(UNITS)}")
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.manual_seed(0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        values, beside = measure(wanted, Path(folder), is_tiny=args.device == "cpu")
    rows = {name: row(values[name], UNITS[name]) for name in wanted}
    write_rows(args, rows, beside=beside, seconds=round(time.perf_counter() - start, 1))
    print(json.dumps({name: round(statistics.median(v), 4) for name, v in beside.items()}))


if __name__ == "__main__":
    main()
