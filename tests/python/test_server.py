"""`slora serve` as its users start it: a process, spoken to over HTTP."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASE
from device import flags
from serving import ADMIN, EXAMPLE, Served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


def complete(served: Served, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 32, "temperature": 0}
    status, text = served.call("/v1/completions", body)
    assert status == 200, text
    answer: str = json.loads(text)["choices"][0]["text"]
    return answer


def test_adapters_answer_by_name(served: Served) -> None:
    assert complete(served, "reverse", "banana") == "ananab"
    assert complete(served, "base:upper", "letter kernel") == "LETTER KERNEL"
    assert complete(served, "base", "banana") != "ananab"
    models = [model["id"] for model in json.loads(served.call("/v1/models")[1])["data"]]
    assert models[0] == "base"
    assert {"reverse", "upper"} < set(models)


def test_what_is_odd_about_an_adapter_is_told_and_logged_once_a_version(tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "upper", tmp_path / "odd")
    config = tmp_path / "odd" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/else"}))
    with Served(str(BASE), "--adapter-dir", str(tmp_path), "--admin-key", ADMIN) as served:
        found = json.loads(served.call("/v1/adapters/odd")[1])["warnings"]
        assert complete(served, "odd", "banana") == "BANANA"
        body = {"path": str(tmp_path / "odd")}
        assert served.call("/v1/adapters/again", body, method="PUT")[0] == 200
        assert served.call("/v1/adapters/again", body, method="PUT")[0] == 200
    assert [warning["code"] for warning in found] == ["base_mismatch"]
    assert "somebody/else" in found[0]["message"]
    lines = [json.loads(line) for line in served.log if line.startswith("{")]
    logged = [(line["adapter"], line["message"]) for line in lines if line["event"] == "adapter_warning"]
    assert logged == [(name, found[0]["message"]) for name in ("odd", "again", "again")]


def test_a_stream_brings_the_text_in_events(served: Served) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "upper", "messages": messages, "max_tokens": 32, "temperature": 0, "stream": True}
    with served.open("/v1/chat/completions", body | {"stream_options": {"include_usage": True}}) as answer:
        events = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "HELLO"
    assert chunks[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "prompt": "a"}, 404, "model_not_found"),
        ({"model": "base", "prompt": [1] * 1020, "max_tokens": 50}, 400, "context_length_exceeded"),
        ({"model": "base", "prompt": "a", "temperature": -1}, 400, "invalid_value"),
        ({"model": "base", "prompt": [1, 99999]}, 400, "invalid_value"),
        ({"model": "base", "prompt": "a", "n": 100000}, 400, "invalid_value"),
    ],
)
def test_a_users_mistake_is_a_4xx(served: Served, body: dict[str, Any], status: int, code: str) -> None:
    got, text = served.call("/v1/completions", body)
    assert got == status, text
    error = json.loads(text)["error"]
    assert error["message"]
    assert error["code"] == code
    assert error["param"] in (*body, None if code == "context_length_exceeded" else "")


def test_adapters_come_and_go(served: Served) -> None:
    body = {"lora_name": "again", "lora_path": str(ADAPTERS.resolve() / "twice")}
    assert served.call("/v1/load_lora_adapter", body) == (200, "Success: LoRA adapter 'again' added successfully.")
    assert complete(served, "again", "hello") == "hello hello"
    assert served.call("/v1/load_lora_adapter", body)[0] == 400
    for name, answer in (("upper", "HELLO"), ("twice", "hello hello")):
        path = body | {"lora_path": str(ADAPTERS.resolve() / name), "load_inplace": True}
        assert served.call("/v1/load_lora_adapter", path)[0] == 200
        assert complete(served, "again", "hello") == answer, "the very next request"
    assert served.call("/v1/load_lora_adapter", body | {"lora_path": "/etc"})[0] == 400
    assert served.call("/v1/load_lora_adapter", body, key=None)[0] == 401
    assert served.call("/v1/unload_lora_adapter", {"lora_name": "again"})[0] == 200
    assert served.call("/v1/completions", {"model": "again", "prompt": "hello"})[0] == 404
    status, text = served.call("/v1/unload_lora_adapter", {"lora_name": "again"})
    assert (status, json.loads(text)["error"]["param"]) == (404, "lora_name")


def test_the_log_names_the_adapter_of_refused_requests_too() -> None:
    prompt = {"model": "reverse", "prompt": "x "}
    refused = [prompt | {"prompt": "x " * 5000}, prompt | {"temperature": -1}]
    with Served(*EXAMPLE) as served:
        assert [served.call("/v1/completions", body)[0] for body in [*refused, prompt]] == [400, 400, 200]
    lines = [json.loads(line) for line in served.log if '"event":"request"' in line]
    assert [(line["adapter"], line["error"]) for line in lines] == [
        ("reverse", "context_length_exceeded"),
        ("reverse", "invalid_value"),
        ("reverse", None),
    ]


def test_the_base_says_where_it_lies(served: Served) -> None:
    base = json.loads(served.call("/v1/models")[1])["data"][0]
    assert (base["id"], base["root"]) == ("base", str(BASE.absolute()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_ends_it(number: signal.Signals) -> None:
    """In the middle of what importing torch does, which would swallow a KeyboardInterrupt."""
    script = (
        "import os, sys; from importlib.abc import MetaPathFinder\n"
        "class Finder(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        try:\n"
        f"            name == 'torch' and os.kill(os.getpid(), {number})\n"
        "        except BaseException: pass\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from slora.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "serve", str(BASE), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_chat_template_that_cannot_be_parsed_is_logged_at_the_start(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "chat_template.jinja").write_text("{% for x in %}")
    with Served(str(base)) as served:
        assert served.call("/v1/completions", {"prompt": "a"})[0] == 200
        chat = {"messages": [{"role": "user", "content": "a"}]}
        assert served.call("/v1/chat/completions", chat, key=None)[0] == 400
    assert any('"chat_template_refused"' in line and "line 1" in line for line in served.log)


def test_a_folder_whose_name_cannot_be_an_adapters_is_logged(tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "upper", tmp_path / "my adapter")
    shutil.copytree(ADAPTERS / "upper", tmp_path / ".hidden")
    with Served(str(BASE), "--adapter-dir", str(tmp_path)) as served:
        assert len(json.loads(served.call("/v1/models", key=None)[1])["data"]) == 1
    (refusal,) = (json.loads(line) for line in served.log if '"adapter_refused"' in line)
    assert (refusal["adapter"], "must be 1 to 128" in refusal["error"]) == ("my adapter", True)


def test_a_compressed_body_is_refused(served: Served) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip", "authorization": f"Bearer {ADMIN}"}
    body = gzip.compress(b'{"prompt": "a"}')
    request = urllib.request.Request(f"{served.url}/v1/completions", body, headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code == 415
    assert "must not be compressed" in refusal.value.read().decode()


def test_answers_that_outlast_the_drain_end_with_an_error() -> None:
    with Served(*EXAMPLE, "--drain-timeout", "0.2") as served:
        body = {"model": "base", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 64}
        with served.open("/v1/completions", body) as answer:
            answer.readline()
            served.process.terminate()
            *_, last = [line for line in answer if line.startswith(b"data: ")]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "service_unavailable"
        assert served.process.wait(60) == 0


def test_metrics_and_health_tell(served: Served) -> None:
    assert served.call("/health", key=None)[0] == 200
    status, text = served.call("/metrics")
    assert status == 200
    assert "vllm:num_requests_running" in text
    assert "slora:" in text


def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    command = [sys.executable, "-m", "slora", "serve", *EXAMPLE, *flags(), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
        for _ in range(1000):  # Of lines that together are longer than what a pipe holds.
            urllib.request.urlopen(f"{url}/health").close()
        process.terminate()
        assert process.wait(60) == 0
