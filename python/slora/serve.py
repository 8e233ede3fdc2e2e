"""`slora serve`: an engine and its HTTP server until a signal comes."""

import faulthandler
import json
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from slora import _core
from slora.options import Options

if TYPE_CHECKING:
    from slora.engine import Engine

POLL_S = 0.05
EXIT_GRACE_S = 5.0
"""After a failure, until the server ends the process itself: the failed step may hold the interpreter."""
CLOSE_TIMEOUT_S = 30
"""For a step that hangs when the engine is closed: the process then ends, telling where."""


def serve(model: str, options: Options, config: dict[str, Any], drain_timeout_s: float) -> int:
    """Serve until SIGTERM or ctrl-C: 0. A failed engine: 1.

    `config` holds the fields of the server's configuration (docs/http.md). After the first signal new work is refused
    and running requests may finish within the timeout; a second one, or one before it serves, ends the process at once.
    """
    with _Signals() as signals:
        # Takes seconds, and swallows a KeyboardInterrupt now and then: the signals come first.
        from slora.engine import Engine

        server_config = json.dumps(config)
        _core.Server.check(server_config, options.queue)
        engine = Engine(model, options)
        try:
            server = _core.Server(engine.core, server_config)
        except BaseException:
            engine.close()
            raise
        server.exit_after_failure(EXIT_GRACE_S)
        signals.is_serving = True
        # One write even where Python's output is not buffered: the server's log goes to the same place.
        print(f"serving {model} on http://{server.address}\n", end="", flush=True)
        while not signals.count and engine.core.failure is None:
            server.wait(POLL_S)
        _stop(engine, server, drain_timeout_s)
    return 0


def _stop(engine: "Engine", server: _core.Server, drain_timeout_s: float) -> None:
    """Let running requests finish, and close; after a failure the process ends here."""
    failure = engine.core.failure
    if failure is None:
        # Nothing is printed here: a full pipe behind stdout would hold up the end.
        server.begin_drain()
        if not server.wait(drain_timeout_s):
            engine.core.begin_close()  # tells those whose answers are not whole
    server.stop()
    if failure is not None:
        print(f"slora: the engine has failed: {failure}", file=sys.stderr, flush=True)
        # The step thread may hang, and whoever waits for it with it.
        os._exit(1)
    # Needs neither the interpreter nor a signal, which the first process of a container would ignore.
    faulthandler.dump_traceback_later(CLOSE_TIMEOUT_S, exit=True)
    engine.close()
    faulthandler.cancel_dump_traceback_later()


class _Signals:
    """Counts SIGTERM and SIGINT. A second one, or one before there is anything to drain, ends the process."""

    def __init__(self) -> None:
        self.count, self.is_serving = 0, False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            os._exit(128 + number)
        if not self.is_serving:
            os._exit(0)
