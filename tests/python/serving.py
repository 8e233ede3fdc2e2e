"""`slora serve` as a process of its own, for tests that speak HTTP to it."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from conftest import ADAPTERS, BASE
from device import flags

ADMIN = "the-admin-key"
EXAMPLE = (str(BASE), "--adapter-dir", str(ADAPTERS), "--admin-key", ADMIN)


class Served:
    """A running server process; on leaving it must end by itself after SIGTERM."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.log: list[str] = []
        command = [sys.executable, "-m", "slora", "serve", *flags(), *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError(f"{command} ended with {self.process.wait()}")
        self.url = line.split()[-1]
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(self.process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()  # the log is whole
        assert error is not None or code == 0

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def open(self, path: str, body: Any = None, key: str | None = ADMIN, method: str | None = None) -> Any:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        return urllib.request.urlopen(request, timeout=60)

    def call(self, path: str, body: Any = None, key: str | None = ADMIN, method: str | None = None) -> tuple[int, str]:
        try:
            with self.open(path, body, key, method) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
