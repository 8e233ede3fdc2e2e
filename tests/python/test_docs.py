"""What README shows works as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving import EXAMPLE, Served

from slora.cli import main
from slora.settings import BY_NAME

pytestmark = pytest.mark.cpu_only(reason="commands as a reader types them, without a device")

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=180)


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if "slora" in line])
def test_commands_run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(line)[1:]) == 0


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_the_images_variables_are_settings_and_its_health_check_works() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    variables = set(re.findall(r"^    SLORA_(\w+)=", dockerfile, re.MULTILINE))
    assert variables - {"CACHE_DIR"} == {"ADAPTER_DIR", "HOST", "MODEL"} <= {name.upper() for name in BY_NAME}
    _, *check = json.loads(re.findall(r"^    CMD (\[.*\])$", dockerfile, re.MULTILINE)[0])
    with Served(*EXAMPLE) as served:
        environment = os.environ | {"SLORA_PORT": served.url.rsplit(":", 1)[1]}
        assert subprocess.run([sys.executable, *check], env=environment, check=False).returncode == 0
    assert subprocess.run([sys.executable, *check], env=environment, check=False, capture_output=True).returncode
