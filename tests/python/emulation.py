"""Kernels of `cuda/` on the CPU, lane by lane (`tests/emulator`); needs g++."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def library(name: str, macros: Mapping[str, int], folder: Path) -> ctypes.CDLL:
    """`tests/emulator/<name>.cpp`, built in an empty folder."""
    for source in (ROOT / "cuda", ROOT / "tests" / "emulator"):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    options = [f"-D{macro}={value}" for macro, value in macros.items()]
    options.append("-U_FORTIFY_SOURCE")  # it takes a jump to another fiber's stack for an error
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, f"{name}.cpp", "-o", f"{name}.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))
