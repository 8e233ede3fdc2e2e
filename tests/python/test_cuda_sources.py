"""Every kernel compiles for every architecture; needs no GPU."""

import struct
from pathlib import Path

import pytest

from slora.kernels import lora, nvrtc

pytestmark = pytest.mark.cpu_only(reason="no engine")

LLAMA = {"HEAD_DIM": 128, "HEADS": 32, "KV_HEADS": 8, "PAGE_TOKENS": 16}
ODD = {"HEAD_DIM": 16, "HEADS": 3, "KV_HEADS": 1, "PAGE_TOKENS": 64}
WIDE = {"HEAD_DIM": 256, "HEADS": 32, "KV_HEADS": 2, "PAGE_TOKENS": 16}
ALL = tuple({"ELEMENT": name} for name in ("float", "__nv_bfloat16", "__half"))
HALF, NONE = ALL[1:], ({},)
LORA = tuple({"DTYPE": number} for number in lora.DTYPE_MACRO.values())
SOURCES = {
    "rms_norm": (ALL, [{"HIDDEN": 4096, "THREADS": 512}, {"HIDDEN": 100, "THREADS": 128}]),
    "silu_mul": (ALL, [{"IS_VECTOR": 0}, {"IS_VECTOR": 1}]),
    "rope_kv": (ALL, [{**LLAMA, "QK_NORM": 0}, {**ODD, "HEAD_DIM": 90, "QK_NORM": 1}]),
    "paged_attention": (HALF, [{**shape, "STAGES": 2} for shape in (LLAMA, ODD, WIDE)]),
    "chunk_attention": (HALF, [LLAMA, ODD, WIDE]),
    "simple_attention": (ALL, [LLAMA, {**ODD, "HEAD_DIM": 90}]),
    "lora": (LORA, [{"ALIGNED": 1}, {"ALIGNED": 0}]),
    **{name: (NONE, [{}]) for name in ("step", "sample", "penalties", "descriptors", "upload")},
}


SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
"""What a block may have of its own."""
SYSTEM_BYTES = 1024
"""What the system has beside it; from sm_90 on, binaries count that among the kernel's."""


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_compiles(name: str, arch: str) -> None:
    """All on sm_90, elsewhere both half types, which come last, in one shape."""
    elements, shapes = SOURCES[name]
    for element in elements if arch == "sm_90" else elements[-2:]:
        for shape in shapes if arch == "sm_90" else shapes[:1]:
            assert nvrtc.compile_only(name, {**element, **shape}, arch)


def test_no_source_is_left_out() -> None:
    assert {path.stem for path in (Path(__file__).parents[2] / "cuda").glob("*.cu")} == set(SOURCES)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_host_knows_who_has_clusters(arch: str) -> None:
    """sm_120 has clusters, but less shared memory than a block of them needs."""
    has_kernel = b"lora_cluster" in nvrtc.compile_only("lora", {"DTYPE": 1, "ALIGNED": 1}, arch)
    assert has_kernel == (int(arch[3:-1]) in nvrtc.CLUSTER_MAJORS)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_a_block_of_lora_has_room_on_every_device(arch: str) -> None:
    """`lora_shrink` takes all that sm_89 and sm_120 have: one variable more, and no launch of it is granted."""
    asked = {
        "lora_work": 0,
        "lora_cluster": lora._CLUSTER_BYTES,
        "lora_shrink": lora._SHRINK_BYTES,
        "lora_expand": lora._EXPAND_BYTES,
        "lora_silu_mul": 2 * lora._EXPAND_BYTES,
    }
    own = shared_bytes(nvrtc.compile_only("lora", {"DTYPE": 1, "ALIGNED": 1}, arch))
    assert set(own) == set(asked) - ({"lora_cluster"} if arch in ("sm_80", "sm_89", "sm_120") else set())
    most = SHARED_BYTES[arch] + (SYSTEM_BYTES if int(arch[3:]) >= 90 else 0)
    assert {name: size for name, size in own.items() if size + asked[name] > most} == {}


def shared_bytes(binary: bytes) -> dict[str, int]:
    """What each kernel declares of shared memory: the sizes of the ELF file's sections for it."""
    start, size, count, names = (*struct.unpack_from("<Q", binary, 40), *struct.unpack_from("<HHH", binary, 58))
    headers = [struct.unpack_from("<IIQQQQ", binary, start + i * size) for i in range(count)]
    name_of = lambda header: binary[headers[names][4] + header[0] :].split(b"\0", 1)[0].decode()  # noqa: E731
    found = {name_of(header): header[5] for header in headers}
    prefix = ".nv.shared."
    return {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix + "lora")}
