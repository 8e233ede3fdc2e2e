"""`slora chat`, spoken to through a pipe."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import ADAPTERS, BASE
from serving import ADMIN, EXAMPLE, Served

pytestmark = pytest.mark.cpu_only(reason="the terminal, whoever answers it")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


def chat(lines: str, *arguments: str, key: str = ADMIN) -> tuple[int, list[str], str]:
    command = [sys.executable, "-m", "slora", "chat", *arguments]
    environment = os.environ | {"SLORA_API_KEY": key}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=180, env=environment)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_adapters_answer_in_turn(served: Served) -> None:
    lines = "hello\n/adapter upper\n/reset\nhello\n/adapters\n\n/base\n/reset\nhello\n"
    code, printed, errors = chat(lines, served.url, "--adapter", "reverse", "--max-tokens", "32")
    assert (code, errors) == (0, "")
    assert printed[:4] == ["olleh", "upper answers", "the conversation is forgotten", "HELLO"]
    assert "* upper" in printed
    assert "  reverse" in printed
    assert "base answers" in printed


def test_mistakes_are_said_and_the_chat_goes_on(served: Served) -> None:
    code, printed, errors = chat("/adapter nobody\n/dance\n/help\n", served.url)
    assert code == 0, "the last line worked"
    assert "no adapter is named 'nobody'; hint: /adapters lists them" in errors
    assert "there is no command /dance; hint: /help lists them" in errors
    assert any("/system TEXT" in line for line in printed)
    assert chat("/dance\n", served.url)[0] == 1
    code, _, errors = chat("hello\n", served.url, key="wrong")
    assert code == 1
    assert "401" in errors
    assert "hint: give the key with --api-key or SLORA_API_KEY" in errors
    code, _, errors = chat("hello\n", "nowhere")
    assert (code, "neither http://HOST:PORT nor a model's folder" in errors) == (1, True)
    code, _, errors = chat("hello\n", served.url, "--adapters", str(ADAPTERS))
    assert (code, "--adapters is for a model's folder" in errors) == (1, True)


def test_a_models_folder_is_served_for_as_long_as_the_chat_lasts() -> None:
    code, printed, errors = chat(
        "hello\n", str(BASE), "--adapters", str(ADAPTERS), "--adapter", "upper", key="not the server's"
    )
    assert (code, printed, errors) == (0, ["HELLO"], "")


class Endless(BaseHTTPRequestHandler):
    """Answers chats with the numbers of their messages, and to the word `more` without end."""

    bodies: list[dict[str, Any]]
    has_lost_client: threading.Event

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text != "more":
            end = "" if text == "cut" else "data: [DONE]\n\n"
            self.answer(self.event(f"{len(body['messages'])} messages") + end)
            return
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(self.event("more ").encode())
                time.sleep(0.02)
        except OSError:
            self.has_lost_client.set()

    @staticmethod
    def event(text: str) -> str:
        return f": comment\n\ndata: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"

    def answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endless() -> Iterator[str]:
    Endless.bodies, Endless.has_lost_client = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_ctrl_c_stops_a_reply_and_not_the_chat(endless: str) -> None:
    command = [sys.executable, "-m", "slora", "chat", endless]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"more\n")
        assert process.stdout.read(4) == b"more"
        process.send_signal(signal.SIGINT)
        assert Endless.has_lost_client.wait(30), "the connection is closed, so that the server stops"
        process.stdin.write(b"hi\n")
        process.stdin.close()
        assert process.stdout.read().endswith(b"\n3 messages\n")
        assert process.wait(60) == 0


def test_the_conversation_goes_to_whoever_answers(endless: str) -> None:
    lines = "/system be brief\none\n/adapter a\ntwo\n/reset\n/system\nthree\n"
    code, printed, _ = chat(lines, endless, "--temperature", "0.5")
    assert code == 0
    assert [line for line in printed if line.endswith(" messages")] == ["2 messages", "4 messages", "1 messages"]
    assert [body["model"] for body in Endless.bodies] == ["base", "a", "a"]
    assert Endless.bodies[1]["messages"][0] == {"role": "system", "content": "be brief"}
    assert Endless.bodies[1]["messages"][2] == {"role": "assistant", "content": "2 messages"}
    assert Endless.bodies[0]["temperature"] == 0.5
    assert "max_tokens" not in Endless.bodies[0]


def test_an_answer_that_ends_early_is_an_error(endless: str) -> None:
    code, printed, errors = chat("cut\n", endless)
    assert (code, printed) == (1, ["1 messages"])
    assert "the answer ended early" in errors
