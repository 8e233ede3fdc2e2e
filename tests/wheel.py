"""Run by `make test-wheel` in a clean environment: the installed wheel is whole and works from there."""

import sys
from importlib.metadata import version
from pathlib import Path

import slora

package = Path(slora.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel"
assert slora.__version__ == version("slora")
assert (package / "py.typed").exists()
assert (package / "_core.pyi").exists()
sources = {path.name for path in (package / "cuda").glob("*.cu")}
assert {"lora.cu", "paged_attention.cu", "rope_kv.cu"} <= sources, sources
assert len(list((package / "examples" / "tiny" / "adapters").iterdir())) == 10

with slora.LLM(package / "examples/tiny/base", adapters=package / "examples/tiny/adapters", device="cpu") as llm:
    assert llm.generate("abc", adapter="reverse", temperature=0).text == "cba"
print(f"the wheel of slora {slora.__version__} is whole and works")
