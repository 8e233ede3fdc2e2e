"""Whole steps of Llama-3.1-8B shapes, dummy bf16 weights: device and host time, prefill tokens a second, clock, power.

python benches/kernels/step.py [--out FILE.json]
"""

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path

import torch
from planner import Planner, make_layout
from power import under_load
from shapes import LLAMA_8B
from torch.profiler import ProfilerActivity, profile

from slora.cuda_runner import CudaRunner
from slora.kernels import nvrtc
from slora.memory import PagePool
from slora.models.config import ModelConfig
from slora.weights import load_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import Row, add_output, row, write_rows

DECODE = [(1, 128), (16, 128), (64, 128), (256, 128), (64, 2048), (256, 512)]


def main() -> None:
    parser = argparse.ArgumentParser()
    add_output(parser, "step")
    parser.add_argument("--kernels", action="store_true", help="what each kernel takes")
    parser.add_argument("--host", action="store_true", help="what the host does in a launch")
    parser.add_argument("--plain-launches", action="store_true", help="no programmatic dependent launch")
    args = parser.parse_args()
    config, rows_of_file = ModelConfig.from_dict(LLAMA_8B), dict[str, Row]()
    if args.plain_launches:
        nvrtc._PROGRAMMATIC = 0  # an attribute that is ignored
    start = time.perf_counter()
    weights = load_weights(config, "", dtype="bfloat16", device="cuda", load_format="dummy")
    torch.cuda.synchronize()
    print(f"weights: {time.perf_counter() - start:.1f} s")
    pool_bytes = 10000 * config.page_bytes(16, "bfloat16")
    pool = PagePool(config, dtype="bfloat16", device="cuda", pool_bytes=pool_bytes, page_tokens=16)
    layout = make_layout(pool.num_pages)
    limits = {"max_running": 512, "max_adapters": 4, "max_adapter_pages": 64, "max_rank": 64}
    runner = CudaRunner(config, weights, pool, layout=layout, **limits)
    planners = [Planner(pool, layout) for _ in range(3)]
    start = time.perf_counter()
    runner.record_graphs(with_lora=False, most_rows=64)
    print(f"recording {len(runner._graphs._graphs)} graphs: {time.perf_counter() - start:.2f} s")

    def measure(name: str, requests: list[tuple[int, int]], steps: int) -> float:
        plans = [planner.write(requests) for planner in planners]
        for i in range(3):
            runner.launch(plans[i % 3]).result()
        torch.cuda.synchronize()
        hosts, begin, pending = [], time.perf_counter(), None
        for i in range(steps):
            t = time.perf_counter()
            plans[i % 3].refresh()
            launched = runner.launch(plans[i % 3])
            hosts.append(time.perf_counter() - t)
            if pending is not None:
                pending.result()
            pending = launched
        pending.result()
        ms = (time.perf_counter() - begin) / steps * 1e3
        begin = time.perf_counter()
        for i in range(steps):
            runner.launch(plans[i % 3]).result()
        alone = (time.perf_counter() - begin) / steps * 1e3
        host_us = sorted(hosts)[len(hosts) // 2] * 1e6
        rows = sum(n for n, _ in requests)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for i in range(10):
            runner.launch(plans[i % 3])
        events[1].record()
        events[1].synchronize()
        device = events[0].elapsed_time(events[1]) / 10
        found = {"device": device, "step": ms, "step_without_overlap": alone, "host": host_us / 1e3}
        rows_of_file.update({f"{name.replace(' ', '_')}_{which}_ms": row([found[which]], "ms") for which in found})
        print(
            f"{name}: device {device:.3f} ms, {ms:.3f} ms a step ({alone:.3f} without overlap), host {host_us:.0f} us, "
            f"{rows / ms * 1000:.0f} tok/s",
            flush=True,
        )
        load = under_load(lambda: runner.launch(plans[0]).result())
        if load is not None:
            long_run = f"{name.replace(' ', '_')}_long_run"
            rows_of_file[f"{long_run}_step_without_overlap_ms"] = row([load.call_ms], "ms")
            rows_of_file[f"{long_run}_clock_mhz"] = row([load.clock_mhz], "MHz")
            rows_of_file[f"{long_run}_power_w"] = row([load.power_w], "W")
            print(f"    in a long run {load.call_ms:.3f}, {load.clock_mhz:.0f} MHz, {load.power_w:.0f} W", flush=True)
        if args.kernels:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for plan in plans:
                    runner.launch(plan).result()
            table = profiled.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60)
            print("\n".join(line[:62] + line[-80:] for line in table.splitlines()[:18]))
        return ms

    for n, seq_len in DECODE:
        measure(f"decode {n} x {seq_len}", [(1, seq_len)] * n, 60)
    if args.host:
        plans = [planner.write([(1, 512)] * 64) for planner in planners]
        profiler = cProfile.Profile()
        profiler.enable()
        for i in range(60):
            runner.launch(plans[i % 3]).result()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    measure("mixed 63 x 512 + 193", [(1, 512)] * 63 + [(193, 400)], 30)
    measure("prefill 8 x 1024", [(1024, 1024)] * 8, 8)
    measure("prefill 1 x 8192", [(8192, 8192)], 8)
    runner.close()
    write_rows(args, rows_of_file, is_shown=False)


if __name__ == "__main__":
    main()
