"""`slora demo`: the embedded example, all adapters and the base in one mixed batch."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from slora.errors import LoadError

LEAST_WITH, MOST_WITHOUT = 0.9, 0.2
"""Exact-match scores that each adapter must reach, and that the base alone must stay under."""


@dataclass(frozen=True)
class Case:
    """A held-out prompt, and the answer that the adapter was trained to give."""

    adapter: str
    prompt: str
    answer: str


def example_dir() -> Path:
    """The example: inside an installed package, or beside the sources."""
    package = Path(__file__).resolve().parent
    for place in (package / "examples" / "tiny", package.parents[1] / "examples" / "tiny"):
        if (place / "heldout.json").exists():
            return place
    raise LoadError("the embedded example is not in this installation; hint: install the wheel")


def read_cases(folder: Path) -> tuple[list[Case], int]:
    """All cases, those of different adapters next to each other, and how many tokens an answer may take."""
    held_out = json.loads((folder / "heldout.json").read_text())
    columns = [[Case(name, **pair) for pair in pairs] for name, pairs in held_out["adapters"].items()]
    return [case for row in zip(*columns, strict=True) for case in row], held_out["max_tokens"]


def run(device: str = "auto") -> int:
    """Print answers and scores; 0 if every score is as it should be."""
    import slora

    folder = example_dir()
    cases, max_tokens = read_cases(folder)
    with slora.LLM(folder / "base", adapters=folder / "adapters", device=device, dtype="float32") as llm:
        start = time.perf_counter()
        results = llm.generate(
            [case.prompt for case in cases] * 2,
            adapter=[case.adapter for case in cases] + [None] * len(cases),
            max_tokens=max_tokens,
            temperature=0,
        )
        seconds, num_steps = time.perf_counter() - start, llm.stats().steps
    answers = [result.text for result in results]
    num_adapters = len({case.adapter for case in cases})
    _print_answers(cases[:num_adapters], answers, len(cases))
    tokens = sum(result.usage.completion_tokens for result in results)
    print(
        f"\n{len(results)} requests for {num_adapters} adapters and the base in one batch: "
        f"{tokens} tokens, {num_steps} steps, {seconds:.1f} s\n"
    )
    return _print_scores(cases, answers)


def _print_answers(cases: list[Case], answers: list[str], without: int) -> None:
    width = max(len(case.prompt) for case in cases)
    print(f"{'prompt':{width}}  {'adapter':10}answer")
    for i, case in enumerate(cases):
        print(f"{case.prompt:{width}}  {case.adapter:10}{answers[i]}")
    print(f"{cases[0].prompt:{width}}  {'(base)':10}{answers[without]}")


def _print_scores(cases: list[Case], answers: list[str]) -> int:
    print("exact match on held-out prompts\nadapter     with   without")
    is_good = True
    for name in dict.fromkeys(case.adapter for case in cases):
        places = [i for i, case in enumerate(cases) if case.adapter == name]
        with_, without = (
            sum(answers[offset + i] == cases[i].answer for i in places) / len(places) for offset in (0, len(cases))
        )
        good = with_ >= LEAST_WITH and without <= MOST_WITHOUT
        is_good &= good
        print(f"{name:10}  {with_:.3f}  {without:.3f}{'' if good else '  wrong'}")
    if not is_good:
        print(f"an adapter scores under {LEAST_WITH}, or the base over {MOST_WITHOUT}", file=sys.stderr)
    return 0 if is_good else 1
