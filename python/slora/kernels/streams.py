"""The streams that graphs are recorded on: one pair for a device, however many engines come and go.

cuBLAS keeps a workspace for every stream that it ever ran on.
"""

from functools import cache
from threading import Lock

import torch

RECORDING = Lock()
"""Held while these streams are in use: what another thread enqueued on them would become part of what is recorded."""


@cache
def recording_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The main stream of a graph, and that of branches beside it."""
    streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
    for stream in streams:  # the workspace must not come from a graph's memory
        with torch.cuda.stream(stream):
            x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
            torch.mm(x, x)
        stream.synchronize()
    return streams
