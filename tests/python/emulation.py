"""Kernels of `cuda/` on the CPU, lane by lane (`tests/emulator`); needs g++."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SANITIZER = "SLORA_EMULATOR_SANITIZER"
_OPTIONS = {
    None: [],
    "thread": ["-fsanitize=thread", "-g"],
    # Lanes have stacks of their own, which it does not know.
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param=asan-stack=0", "-g"],
}
_LIBRARIES = {"thread": "libtsan.so", "address": "libasan.so"}
FOUND = 66
"""How a process ends in which a sanitizer has found something."""


def library(name: str, macros: Mapping[str, int], folder: Path) -> ctypes.CDLL:
    """`tests/emulator/<name>.cpp`, built in an empty folder."""
    return ctypes.CDLL(str(build(name, macros, folder, os.environ.get(_SANITIZER))))


def build(name: str, macros: Mapping[str, int], folder: Path, sanitizer: str | None = None) -> Path:
    for source in (ROOT / "cuda", ROOT / "tests" / "emulator"):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    options = [f"-D{macro}={value}" for macro, value in macros.items()]
    options.append("-U_FORTIFY_SOURCE")  # it takes a jump to another fiber's stack for an error
    options += ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", *_OPTIONS[sanitizer]]
    subprocess.run(["g++", *options, f"{name}.cpp", "-o", f"{name}.so"], cwd=folder, check=True)
    return folder / f"{name}.so"


def environment(sanitizer: str) -> dict[str, str] | None:
    """Of a Python that builds and runs kernels with "thread" or "address"; None: the compiler has no such sanitizer."""
    if shutil.which("g++") is None:
        return None
    command = ["g++", f"-print-file-name={_LIBRARIES[sanitizer]}"]
    preloaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(preloaded).is_absolute():
        return None
    options = f"halt_on_error=1:exitcode={FOUND}"
    return os.environ | {
        _SANITIZER: sanitizer,
        "LD_PRELOAD": preloaded,
        "TSAN_OPTIONS": options,
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
