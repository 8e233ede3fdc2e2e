"""The cache of kernels notices what it should; errors name their place. Needs no device."""

from pathlib import Path

import pytest

from slora.errors import DeviceError
from slora.kernels import nvrtc

pytestmark = pytest.mark.cpu_only(reason="no engine")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inner.cuh").write_text("#pragma once\n#define INNER 1\n")
    (tmp_path / "outer.cuh").write_text('#include "inner.cuh"\n')
    text = '#include <cuda_bf16.h>\n#include "outer.cuh"\n#include "inner.cuh"\n'
    (tmp_path / "op.cu").write_text(text + 'extern "C" __global__ void op(int* x) { *x = INNER + OUTER; }\n')
    monkeypatch.setattr(nvrtc, "_source_dir", lambda: tmp_path)
    monkeypatch.setenv("SLORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_headers_are_inlined_once(sources: Path) -> None:
    assert nvrtc.expand("op").count("#define INNER") == 1
    assert nvrtc.compile_only("op", {"OUTER": 2}, "sm_80").startswith(b"\x7fELF")


def test_an_edited_header_is_compiled_anew(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nvrtc, "_compile", lambda source, name, options: compiled.append(source) or b"code")
    for _ in range(2):
        assert nvrtc._cached("op", {"OUTER": 2}, "sm_90") == b"code"
    assert len(compiled) == 1
    (sources / "inner.cuh").write_text("#define INNER 2\n")
    nvrtc._cached("op", {"OUTER": 2}, "sm_90")
    nvrtc._cached("op", {"OUTER": 3}, "sm_90")
    nvrtc._cached("op", {"OUTER": 3}, "sm_80")
    assert len(compiled) == 4
    assert len(list((sources / "cache").iterdir())) == 4


def test_an_error_names_the_file_and_line(sources: Path) -> None:
    (sources / "inner.cuh").write_text("#define INNER 1\nint broken = ;\n")
    with pytest.raises(DeviceError, match=r"inner\.cuh\(2\)"):
        nvrtc.compile_only("op", {"OUTER": 2}, "sm_90")
    with pytest.raises(DeviceError, match=r"op\.cu\(4\)"):
        nvrtc.compile_only("op", {}, "sm_90")


def test_a_source_may_ask_for_hopper_only_features(sources: Path) -> None:
    source = "#pragma slora arch sm_90a\n"
    assert nvrtc._options(source, {}, "sm_90")[0] == "-arch=sm_90a"
    assert nvrtc._options(source, {}, "sm_100")[0] == "-arch=sm_100"
    assert nvrtc._options("", {}, "sm_90")[0] == "-arch=sm_90"
