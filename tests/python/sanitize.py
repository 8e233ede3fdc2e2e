"""The emulated kernels' tests under a sanitizer: sanitize.py thread|address, then what pytest takes."""

import subprocess
import sys
from pathlib import Path

import emulation

FILES = ("test_sampling_emulated.py", "test_attention_emulated.py", "test_lora_emulated.py")


def run(sanitizer: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *FILES, *arguments]
    return subprocess.run(command, env=emulation.environment(sanitizer), cwd=Path(__file__).parent, text=True)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]).returncode)
