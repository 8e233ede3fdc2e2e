"""`slora chat`: talk to a running server from a terminal, or through a pipe."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from slora.errors import ConfigError, RequestError, SloraError
from slora.remote import Remote

HELP = """  /adapter NAME   answer with this adapter from now on
  /adapters       list them; * marks the one in use
  /base           answer with the base model again
  /system TEXT    set the system message; without TEXT there is none
  /reset          forget the conversation
  /help           this text
ctrl-C stops a reply, ctrl-D ends."""
KEYS = ("SLORA_API_KEY", "SLORA_API_KEYS_FILE", "SLORA_ADMIN_KEY")


class Chat:
    """One conversation: its messages, and who answers."""

    def __init__(self, remote: Remote, sampling: dict[str, Any]) -> None:
        self.remote, self.sampling, self.system = remote, sampling, ""
        self.messages: list[dict[str, str]] = []
        self.base = self.model = remote.models()[0]["id"]

    def adapters(self) -> list[str]:
        """What can answer instead of the base, now: adapters come and go."""
        return [model["id"] for model in self.remote.models() if model.get("parent")]

    def use(self, name: str) -> None:
        """Answer with this adapter. Raises RequestError if there is none."""
        if name not in self.adapters():
            raise RequestError(f"no adapter is named {name!r}; hint: /adapters lists them")
        self.model = name

    def ask(self, text: str) -> Generator[str, None, None]:
        """The reply, as it comes. What was said of it stays in the conversation, however it ends."""
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": system + self.messages, "stream": True, **self.sampling}
        reply = ""
        try:
            for event in self.remote.events("/v1/chat/completions", body):
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    reply += piece
                    yield piece
        finally:
            if reply:
                self.messages.append({"role": "assistant", "content": reply})
            else:
                self.messages.pop()

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; the answer to show."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/adapter":
                self.use(argument)
                return f"{self.model} answers"
            case "/adapters":
                names = self.adapters()
                return "\n".join(f"{'*' if name == self.model else ' '} {name}" for name in names) or "there are none"
            case "/base":
                self.model = self.base
                return f"{self.model} answers"
            case "/system":
                self.system = argument
                return "the system message is set" if argument else "there is no system message"
            case "/reset":
                self.messages = []
                return "the conversation is forgotten"
            case "/help":
                return HELP
        raise RequestError(f"there is no command {name}; hint: /help lists them")


def chat(
    server: str,
    adapters: Path | None,
    api_key: str | None,
    adapter: str | None,
    sampling: dict[str, Any],
    system: str,
) -> int:
    """Talk to a running server, or to one of our own for a model's folder."""
    is_running = "://" in server
    if is_running and adapters:
        raise ConfigError("--adapters is for a model's folder; hint: a running server has its own, see /adapters")
    with nullcontext(server) if is_running else served(Path(server), adapters) as url:
        conversation = Chat(Remote(url, api_key), {key: value for key, value in sampling.items() if value is not None})
        conversation.system = system
        if adapter:
            conversation.use(adapter)
        return run(conversation)


def run(chat: Chat) -> int:
    """Read lines until the end of the input: 0, or 1 if the last one failed."""
    is_terminal, code = sys.stdin.isatty(), 0
    if is_terminal:
        _edit_lines()
        print(f"{chat.model} at {chat.remote.url}. /help says what there is to say; ctrl-D ends.")
    while True:
        try:
            line = input(f"{chat.model}> " if is_terminal else "").strip()
            if line:
                _answer(chat, line)
            code = 0
        except EOFError:
            if is_terminal:
                print()
            return code
        except KeyboardInterrupt:
            print(flush=True)
        except SloraError as error:
            print(f"slora: {error}", file=sys.stderr, flush=True)
            code = 1


def _answer(chat: Chat, line: str) -> None:
    if line.startswith("/"):
        print(chat.command(line), flush=True)
        return
    with closing(chat.ask(line)) as reply:
        for piece in reply:
            print(piece, end="", flush=True)
    print(flush=True)


def _edit_lines() -> None:
    """Arrow keys and history, where Python was built with them."""
    with suppress(ImportError):
        import readline  # noqa: F401


@contextmanager
def served(model: Path, adapters: Path | None) -> Iterator[str]:
    """The address of a server of our own for a model's folder, for as long as the block lasts."""
    if not model.is_dir():
        raise ConfigError(f"{str(model)!r} is neither http://HOST:PORT nor a model's folder")
    command = [sys.executable, "-m", "slora", "serve", str(model), "--host", "127.0.0.1", "--port", "0"]
    command += ["--adapter-dir", str(adapters)] if adapters else []
    # Without keys it answers this machine.
    environment = {name: value for name, value in os.environ.items() if name not in KEYS}
    # A session of its own: ctrl-C stops a reply, not the server.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("serving ")), None)
            if line is None:
                raise ConfigError(f"the server for {str(model)!r} did not start")
            # Its log goes nowhere, but it must go: a full pipe would stop the server.
            log = threading.Thread(target=lambda: all(True for _ in process.stdout or ()), daemon=True)
            log.start()
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
