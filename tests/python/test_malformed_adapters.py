"""A thousand adapters that cannot be served, sent to a server that goes on serving others."""

import itertools
import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoint import Checkpoint
from conftest import ADAPTERS, EXAMPLE, NAMES
from device import tolerance
from malformed import Malformed, malformed
from serving import EXAMPLE as ARGUMENTS
from serving import Served

CORPUS = EXAMPLE.parents[1] / "fuzz" / "corpus"
PROMPTS = ["banana", "hello world", "abc xyz"]


def completion(served: Served, model: str, prompt: str) -> tuple[int, dict[str, Any]]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 1, "ignore_eos": True}
    status, text = served.call("/v1/completions", body)
    return status, json.loads(text)


def text_and_logprobs(answer: dict[str, Any]) -> tuple[str, list[float]]:
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


class Traffic:
    """Requests for every good adapter, each compared with what it gave when nothing else ran."""

    def __init__(self, served: Served) -> None:
        self.num_answers, self.wrong = 0, []
        self._served, self._is_over = served, threading.Event()
        self._asks = list(itertools.product([*NAMES, "base"], PROMPTS))
        self._alone = {ask: text_and_logprobs(completion(served, *ask)[1]) for ask in self._asks}
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(3)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, num_answers: int) -> None:
        deadline = time.monotonic() + 60
        while self.num_answers < num_answers:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _run(self, offset: int) -> None:
        for ask in itertools.cycle(self._asks[offset::3]):
            if self._is_over.is_set():
                return
            status, answer = completion(self._served, *ask)
            text, logprobs = self._alone[ask]
            expected = (text, pytest.approx(logprobs, abs=tolerance(1e-4)))
            if status != 200 or text_and_logprobs(answer) != expected:
                self.wrong.append((ask, status, answer))
            self.num_answers += 1


def attack(served: Served, case: Malformed, folder: Path) -> tuple[int, str, str | None]:
    """Status, code and reason that the case came to, wherever it was found."""
    folder.mkdir()
    case.write(folder)
    status, text = served.call("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)})
    if case.is_late:
        assert status == 200, text
        if case.spoil:
            case.spoil(folder)
        status, answer = completion(served, "bad", "abc")
        assert served.call("/v1/unload_lora_adapter", {"lora_name": "bad"})[0] == 200
    else:
        answer = {} if status == 200 else json.loads(text)
        if status == 200:
            served.call("/v1/unload_lora_adapter", {"lora_name": "bad"})
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
    error = answer.get("error", {})
    return status, error.get("code"), error.get("reason")


def gauges(served: Served) -> dict[str, str]:
    """Pages by owner in the pool and in the host tier, adapters by state, what is unfinished."""
    lines = [line.split() for line in served.call("/metrics")[1].splitlines()]
    names = ("slora:pool_pages", "slora:host_pages", "slora:adapters{", "slora:unfinished", "slora:body_bytes")
    return {line[0]: line[1] for line in lines if line[0].startswith(names)}


def test_malformed_adapters_are_refused_and_nothing_else_changes(tmp_path: Path) -> None:
    cases = list(malformed(Checkpoint(ADAPTERS / "upper"), CORPUS))
    counts = Counter(case.kind for case in cases)
    assert len(cases) >= 1000
    assert len(counts) >= 40
    root, wrong = tmp_path / "root", []
    root.mkdir()
    with Served(*ARGUMENTS, "--adapter-root", str(root)) as served:
        traffic = Traffic(served)
        before, descriptors = gauges(served), served.num_descriptors()
        with traffic:
            for i, case in enumerate(cases):
                status, code, reason = attack(served, case, root / str(i))
                found = reason if code == "adapter_invalid" else code
                if status != 400 or found not in case.reasons:
                    wrong.append((case.kind, i, status, found, set(case.reasons)))
                traffic.wait_for(i // 10)
        assert served.process.poll() is None
        deadline = time.monotonic() + 30
        while (after := gauges(served)) != before or served.num_descriptors() > descriptors:
            assert time.monotonic() < deadline, (after, before, served.num_descriptors(), descriptors)
            time.sleep(0.05)
        models = {model["id"] for model in json.loads(served.call("/v1/models")[1])["data"]}
    print(f"{len(cases)} cases of {len(counts)} kinds, {traffic.num_answers} answers beside them")
    assert wrong == []
    assert traffic.wrong == []
    assert traffic.num_answers > 100
    assert models == {"base", *NAMES}
