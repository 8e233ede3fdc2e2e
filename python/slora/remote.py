"""A running server, as `slora chat` and `slora bench serve` speak to it: the standard library is enough."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from slora.errors import ConfigError, RequestError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0


class Remote:
    """A server at `http://HOST:PORT`; each call is a connection of its own."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError(f"{url!r} must be http://HOST:PORT, without a path")
        try:
            self.port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}") from error
        self.url, self.host, self.is_tls = url.rstrip("/"), parts.hostname, parts.scheme == "https"
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Any:
        """The JSON of a route. Raises RequestError if the server refuses."""
        with self._open("GET", path) as answer:
            return json.loads(answer.read())

    def models(self) -> list[dict[str, Any]]:
        """What the key may use, the base first; adapters have a `parent`."""
        models: list[dict[str, Any]] = self.get("/v1/models")["data"]
        return models

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator cancels the request."""
        with self._open("POST", path, body) as answer:
            for line in answer:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip():
                    continue
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(event["error"]["message"])
                yield event
        raise RequestError("the answer ended early: the server has closed the connection")

    @contextmanager
    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        make = HTTPSConnection if self.is_tls else HTTPConnection
        connection = make(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
        try:
            try:
                connection.connect()
            except OSError as error:
                hint = "hint: start one with `slora serve MODEL`"
                raise ConfigError(f"no server answers at {self.url}: {error}; {hint}") from error
            connection.sock.settimeout(ANSWER_TIMEOUT_S)
            headers = self.headers | ({"content-type": "application/json"} if body is not None else {})
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise RequestError(_refusal(answer.status, answer.read()))
            yield answer
        except (HTTPException, OSError) as error:
            raise RequestError(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()


def _refusal(status: int, body: bytes) -> str:
    """What a refusal says, in OpenAI's shape or any other."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:200]
    hint = "; hint: give the key with --api-key or SLORA_API_KEY" if status == 401 else ""
    return f"{status}: {message}{hint}"
