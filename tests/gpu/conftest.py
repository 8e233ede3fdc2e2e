"""GPU tests share the planner of the CPU tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

from slora.graphs import Graphs

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def launches_instead_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the sanitizer (sanitizer.sh), where no graph can be recorded."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        for name in ("run", "record"):
            monkeypatch.setattr(Graphs, name, lambda self, key, body: body())
