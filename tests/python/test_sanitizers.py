"""Emulated kernels under ThreadSanitizer and AddressSanitizer (`make sanitize` runs all of them; this is a choice).

Lanes are threads there: whoever reads what another wrote must be ordered behind it by what orders it on a device.
"""

import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import sanitize

CASES = [
    "a barrier of the block",
    "a barrier of the warp, which a shuffle is not",
    "a bulk copy's bytes",
    "a bulk copy's place",
    "the bytes of a group of copies",
    "the place of a group of copies",
    "a store to another block",
    "a page",
]
CHOSEN = "1.0-5000 or (grouped and mixed) or (chunks and grouped) or (definition and (rounds and cluster))"
pytestmark = [
    pytest.mark.skipif(emulation.environment("thread") is None, reason="needs g++ and its libtsan"),
    pytest.mark.cpu_only(reason="an emulated device"),
]


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.build("orders", {"__CUDA_ARCH__": 900}, tmp_path_factory.mktemp("orders"), "thread")


@pytest.mark.parametrize("case", CASES)
def test_what_nothing_orders_is_a_race(orders: Path, case: str) -> None:
    for is_ordered in (True, False):
        call = f"import ctypes; ctypes.CDLL('{orders}').run({CASES.index(case)}, {is_ordered})"
        command = [sys.executable, "-c", call]
        found = subprocess.run(command, env=emulation.environment("thread"), capture_output=True, text=True)
        assert found.returncode == (0 if is_ordered else emulation.FOUND), found.stdout + found.stderr
        assert ("data race" in found.stderr) != is_ordered


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels_are_clean(sanitizer: str) -> None:
    assert sanitize.run(sanitizer, "-k", CHOSEN).returncode == 0
