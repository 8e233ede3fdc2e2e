"""CPU generation on the embedded example: slora against transformers' `generate` and PEFT's mixed batches.

    python benches/python/generate.py            # writes benches/results/cpu-generate.json

Batch 16, prompts of 24 tokens, 64 new ones, greedy, float32, 2 threads; the base alone, and 8 adapters mixed in one
batch. Both must give the same tokens before anything is timed. Rounds alternate, so that a noisy machine disturbs both
alike. The time of a step outside the runner is what scheduling, committing and the step loop cost.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import slora
from slora.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches"))
from record import machine, output_of  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny"
BATCH, PROMPT_LEN, NEW_TOKENS, THREADS, ROUNDS, SEED = 16, 24, 64, 2, 7, 0
NAMES = ["reverse", "upper", "rot13", "stars", "stutter", "sort", "piglatin", "twice"]
Generate = Callable[[], list[list[int]]]


def draw_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    prompts: list[list[int]] = torch.randint(80, 106, (BATCH, PROMPT_LEN), generator=generator).tolist()
    return prompts


def theirs(model: Any, prompts: list[list[int]], **options: Any) -> Generate:
    ids = torch.tensor(prompts)

    def generate() -> list[list[int]]:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[],
            **options,
        )
        return [row[PROMPT_LEN:] for row in out.tolist()]

    return generate


def ours(llm: slora.LLM, prompts: list[list[int]], names: list[str | None]) -> Generate:
    def generate() -> list[list[int]]:
        results = llm.generate(prompts, adapter=names, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        return [result.token_ids for result in results]

    return generate


def compare(label: str, slora_: Generate, other: Generate) -> dict[str, Any]:
    same = sum(a == b for a, b in zip(slora_(), other(), strict=True))
    assert same >= BATCH - 1, f"{label}: only {same} of {BATCH} answers are equal"
    seconds: dict[str, list[float]] = {"slora": [], "other": []}
    for _ in range(ROUNDS):
        for name, generate in (("slora", slora_), ("other", other)):
            start = time.perf_counter()
            generate()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: sorted(BATCH * NEW_TOKENS / s for s in values) for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{label}: slora {medians['slora']:.0f} tokens/s, other {medians['other']:.0f} tokens/s")
    return {f"{name}_tokens_per_s": {"median": round(medians[name], 1), "all": rates[name]} for name in rates}


def outside_runner(llm: slora.LLM, generate: Generate) -> dict[str, float]:
    """Microseconds of a decode step, and those of them outside the runner."""
    inside, run = [0.0], Runner.run

    def timed(runner: Runner, plan: Any) -> Any:
        start = time.perf_counter()
        output = run(runner, plan)
        inside[0] += time.perf_counter() - start
        return output

    Runner.run = timed  # type: ignore[method-assign]
    before, start = llm.stats().steps, time.perf_counter()
    generate()
    seconds, steps = time.perf_counter() - start, llm.stats().steps - before
    Runner.run = run  # type: ignore[method-assign]
    found = {"step_us": 1e6 * seconds / steps, "outside_runner_us": 1e6 * (seconds - inside[0]) / steps}
    print(f"a step takes {found['step_us']:.0f} us, {found['outside_runner_us']:.0f} us of them outside the runner")
    return found


def main() -> None:
    torch.set_num_threads(THREADS)
    prompts, names = draw_prompts(), [NAMES[i % len(NAMES)] for i in range(BATCH)]
    base = AutoModelForCausalLM.from_pretrained(EXAMPLE / "base", dtype=torch.float32)
    with slora.LLM(EXAMPLE / "base", adapters=EXAMPLE / "adapters", device="cpu", dtype="float32") as llm:
        figures = {
            "base, transformers": compare(
                "base, transformers", ours(llm, prompts, [None] * BATCH), theirs(base, prompts)
            )
        }
        mixed = PeftModel.from_pretrained(base, EXAMPLE / "adapters" / NAMES[0], adapter_name=NAMES[0])
        for name in NAMES[1:]:
            mixed.load_adapter(EXAMPLE / "adapters" / name, adapter_name=name)
        mixed.eval()
        slora_mixed = ours(llm, prompts, [*names])
        figures["8 adapters, PEFT"] = compare(
            "8 adapters, PEFT", slora_mixed, theirs(mixed, prompts, adapter_names=names)
        )
        steps = outside_runner(llm, slora_mixed)
    result = {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "is_clean": not output_of("git", "status", "--porcelain", "--untracked-files=no"),
        "command": "python benches/python/generate.py",
        "versions": {"torch": torch.__version__, "slora": slora.__version__},
        "machine": machine() | {"threads": THREADS},
        "seed": SEED,
        "figures": figures,
        "step": steps,
    }
    path = ROOT / "benches" / "results" / "cpu-generate.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
