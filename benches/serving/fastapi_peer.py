"""The same fake tokens from FastAPI and uvicorn, for `--peer` of the serving bench.

    pip install fastapi uvicorn uvloop httptools
    cargo bench -p slora-server --bench serving -- streams --peer "python benches/serving/fastapi_peer.py"

It does as little as a server can: no tokenizer, no limits, no keys, no metrics. One task makes a step by the clock;
every request waits for it and writes an event, as servers with an engine in asyncio do.
"""

import asyncio
import json
import os
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

LETTERS = "abcdefghijklmnopqrstuvwxyz"

app = FastAPI()
step_s = int(sys.argv[1]) / 1e6
made = os.open(sys.argv[2], os.O_WRONLY)
running: set[asyncio.Queue[str]] = set()


async def make_steps() -> None:
    """A token for every running request, by the clock; without a time for steps, as fast as they are taken."""
    step, due = 0, time.monotonic()
    while True:
        due = max(due + step_s, time.monotonic() - 0.05)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        letter = step % len(LETTERS)
        os.pwrite(made, struct.pack("<Q", time.time_ns()), 8 * letter)
        for queue in running:
            queue.put_nowait(LETTERS[letter])
        step += 1


async def tokens(count: int) -> AsyncIterator[str]:
    queue: asyncio.Queue[str] = asyncio.Queue()
    running.add(queue)
    try:
        for _ in range(count):
            yield await queue.get()
    finally:
        running.discard(queue)


def answer(text: str, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    head = {"id": "cmpl-0", "object": "text_completion", "created": int(time.time()), "model": "base"}
    return head | {"choices": [choice]} | fields


@app.post("/v1/completions")
async def complete(request: Request) -> Any:
    body = await request.json()
    count, num_prompt = body["max_tokens"], len(body["prompt"])
    usage = {"prompt_tokens": num_prompt, "completion_tokens": count, "total_tokens": num_prompt + count}
    if not body["stream"]:
        return answer("".join([token async for token in tokens(count)]), usage=usage)

    async def events() -> AsyncIterator[str]:
        async for token in tokens(count):
            yield f"data: {json.dumps(answer(token))}\n\n"
        yield f"data: {json.dumps(answer('', choices=[], usage=usage))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def main() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", backlog=4096))
    steps = asyncio.create_task(make_steps())
    print("bench", json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    steps.cancel()


if __name__ == "__main__":
    uvloop.run(main())
