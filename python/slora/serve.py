"""`slora serve`: an engine and its HTTP server until a signal comes."""

import json
import os
import signal
import sys
from types import FrameType
from typing import Any

from slora import _core
from slora.engine import Engine
from slora.options import Options

POLL_S = 0.05
EXIT_GRACE_S = 5.0
"""After a failure, until the server ends the process itself: the failed step may hold the interpreter."""
CLOSE_TIMEOUT_S = 30
"""For a step that hangs when the engine is closed: the signal then ends the process."""


def serve(model: str, options: Options, config: dict[str, Any], drain_timeout_s: float) -> int:
    """Serve until SIGTERM or ctrl-C: 0. A failed engine: 1.

    `config` holds the fields of the server's configuration (docs/http.md). After the first signal new work is refused
    and running requests may finish within the timeout; a second one ends the process at once.
    """
    server_config = json.dumps(config)
    _core.Server.check(server_config, options.queue)
    engine = Engine(model, options)
    try:
        server = _core.Server(engine.core, server_config)
    except BaseException:
        engine.close()
        raise
    server.exit_after_failure(EXIT_GRACE_S)
    signals = _Signals()
    # One write even where Python's output is not buffered: the server's log goes to the same place.
    print(f"serving {model} on http://{server.address}\n", end="", flush=True)
    while not signals.count and engine.core.failure is None:
        server.wait(POLL_S)
    failure = engine.core.failure
    if failure is None:
        # Nothing is printed here: a full pipe behind stdout would hold up the end.
        server.begin_drain()
        server.wait(drain_timeout_s)
    server.stop()
    if failure is not None:
        print(f"slora: the engine has failed: {failure}", file=sys.stderr, flush=True)
        # The step thread may hang, and whoever waits for it with it.
        os._exit(1)
    signal.alarm(CLOSE_TIMEOUT_S)
    engine.close()
    return 0


class _Signals:
    """Counts SIGTERM and SIGINT; the second one ends the process."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
