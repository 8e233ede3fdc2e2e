"""Checkpoints that cannot be served: a good one, broken in every way."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import CONFIG, WEIGHTS, Checkpoint, Group, Write, safetensors
from device import is_cuda
from malformed_configs import configs


@dataclass(frozen=True)
class Malformed:
    """A way to break a checkpoint, and what must be said of it."""

    kind: str
    reasons: frozenset[str]
    """Of `adapter_invalid`; `path_not_allowed` stands for that code."""
    write: Write
    spoil: Write | None = None
    """What happens to the folder after it was registered: found when the adapter is first used."""
    is_late: bool = False
    """Found when the weights are read."""


def malformed(good: Checkpoint, corpus: Path) -> Iterator[Malformed]:
    """Every case. `corpus`: the fuzzers'."""
    for kind, reasons, writes in [*configs(good, corpus), *headers(good, corpus), *tensors(good), *folders(good)]:
        for write in writes:
            yield Malformed(kind, frozenset(reasons.split()), write)
    yield from late(good)


def headers(good: Checkpoint, corpus: Path) -> Iterator[Group]:
    def raw(*contents: bytes) -> list[Write]:
        return [good.files(weights=content) for content in contents]

    def each(change: Callable[[str, list[int], list[int]], dict[str, Any]]) -> list[Write]:
        """One change to each tensor, from its name, shape and offsets."""
        fields = good.header
        return [good.with_tensor(n, **change(n, fields[n]["shape"], fields[n]["data_offsets"])) for n in good.tensors]

    size, end = len(good.raw), len(good.raw) - len(good.data)
    text = good.raw[8:end]
    cuts = [good.raw[: size * i // 96] for i in range(96)]
    yield "weights cut short", "truncated", raw(*cuts)
    yield "weights cut in the header", "truncated", raw(*(good.raw[:i] for i in (*range(9), 9, 100, end - 1, end)))
    yield "weights with a tail", "trailing_bytes", raw(*(good.raw + b"\0" * n for n in (1, 2, 7, 8, 4096, 1 << 20)))
    lengths = [1 << 23, (1 << 23) + 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8]
    yield (
        "header length out of range",
        "header_too_large truncated",
        raw(*(struct.pack("<Q", n) + good.raw[8:] for n in lengths)),
    )
    yield (
        "header length wrong",
        "bad_header trailing_bytes hole",
        raw(*(struct.pack("<Q", n) + good.raw[8:] for n in (0, 1, 8, end - 40))),
    )
    controls = [good.raw[:i] + b"\x02" + good.raw[i + 1 :] for i in range(8, end, len(text) // 48)]
    yield "header with a control character", "bad_header", raw(*controls)
    yield (
        "header that is no text",
        "bad_header",
        raw(*(good.raw[:i] + b"\xff" + good.raw[i + 1 :] for i in range(8, end, 128))),
    )
    yield "header too large", "header_too_large", raw(safetensors(text + b" " * (8 << 20), good.data))
    files = sorted(corpus.glob("store_header/bad-*"))
    header_reasons = (
        "bad_header duplicate_key overlapping_tensors hole reversed_offsets shape_overflow wrong_tensor_bytes "
    )
    header_reasons += "unsupported_dtype trailing_bytes truncated unknown_tensor"
    yield "header of the fuzzer's", header_reasons, raw(*(safetensors(p.read_bytes(), b"\0" * 12) for p in files))
    yield (
        "another file's content",
        "bad_header truncated header_too_large",
        raw(b"PK\3\4" * 99, b"\x80\x02}q\0." * 99, b"\x7fELF" * 99, b"\0" * 99, b"{}" * 99),
    )
    many = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range((1 << 16) + 1)}
    yield "too many tensors", "too_many_tensors", [good.with_header(many, b"")]
    first = json.dumps({good.tensors[0]: good.header[good.tensors[0]]}).encode()[:-1]
    yield "tensor twice", "duplicate_key", [good.with_header(first + b"," + json.dumps(good.header).encode()[1:])]
    yield "reversed offsets", "reversed_offsets", each(lambda _n, _s, o: {"data_offsets": o[::-1]})
    yield (
        "overlapping tensors",
        "overlapping_tensors hole wrong_tensor_bytes",
        each(lambda _n, _s, o: {"data_offsets": [0, 2048] if o[0] else [2048, 4096]}),
    )
    yield (
        "offsets beyond the end",
        "truncated wrong_tensor_bytes",
        each(lambda _n, _s, o: {"data_offsets": [o[0], o[1] + (1 << 40)]}),
    )
    yield (
        "offsets that leave a hole",
        "hole wrong_tensor_bytes",
        each(lambda _n, s, o: {"data_offsets": [o[0] + 4, o[1]]}),
    )
    yield (
        "offsets of a wrong kind",
        "bad_header",
        each(lambda n, _s, o: {"data_offsets": [[-1, 4], [0.5, 4], [0], [0, 1, 2], "0", None, 0][len(n) % 7]}),
    )
    yield "shape and bytes that differ", "wrong_tensor_bytes", each(lambda _n, s, _o: {"shape": [s[0], s[1] - 1]})
    yield "shape beyond 64 bits", "shape_overflow", each(lambda _n, _s, _o: {"shape": [1 << 32, 1 << 32]})
    yield (
        "shape of a wrong kind",
        "bad_header",
        each(lambda n, _s, _o: {"shape": [[-1, 2], [1.5], "2", None, 2, [1] * 9, [1 << 64]][len(n) % 7]}),
    )
    dtypes = ["F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "float32", ""]
    some = [good.with_tensor(name, dtype=dtype) for name in good.tensors[:2] for dtype in dtypes]
    yield "dtype that is not served", "unsupported_dtype wrong_tensor_bytes", some
    yield "dtype of a wrong kind", "bad_header", [good.with_tensor(good.tensors[0], dtype=x) for x in (7, None, [], {})]
    yield "field that no tensor has", "bad_header", each(lambda _n, _s, _o: {"stride": [1, 2]})
    metadata = [good.with_header(good.header | {"__metadata__": x}) for x in (7, [], "pt", {"format": 1}, {"a": {}})]
    yield "metadata of a wrong kind", "bad_header", metadata


def tensors(good: Checkpoint) -> Iterator[Group]:
    header = good.header
    layer = "base_model.model.model.layers.0"
    pairs = [name for name in good.tensors if ".lora_A." in name]

    def added(*names: str) -> list[Write]:
        tensor = {"dtype": "F32", "shape": [1], "data_offsets": [len(good.data), len(good.data) + 4]}
        return [good.with_header(header | {name: tensor}, good.data + b"\0" * 4) for name in names]

    def without(name: str) -> Write:
        """The data of the others moves together."""
        kept, data = {}, b""
        for other in good.tensors:
            if other != name:
                begin, end = header[other]["data_offsets"]
                kept[other] = header[other] | {"data_offsets": [len(data), len(data) + end - begin]}
                data += good.data[begin:end]
        return good.with_header(kept, data)

    yield "A without B, B without A", "missing_pair", [without(name) for name in good.tensors]
    transposed = [good.with_tensor(name, shape=header[name]["shape"][::-1]) for name in good.tensors]
    yield "transposed", "wrong_shape rank_mismatch contradictory_rank", transposed
    flat = [
        good.with_tensor(name, shape=[header[name]["shape"][0] * header[name]["shape"][1]]) for name in good.tensors
    ]
    yield "flattened", "wrong_shape", flat
    deep = [good.with_tensor(name, shape=[1, *header[name]["shape"]]) for name in good.tensors]
    yield "with a dimension more", "wrong_shape", deep
    halved = [good.with_tensor(name, shape=[1, 2 * header[name]["shape"][1]]) for name in pairs]
    yield "of another base", "wrong_shape", halved
    yield (
        "A and B of different ranks",
        "rank_mismatch wrong_shape",
        [
            good.with_tensor(name, shape=[2 * header[name]["shape"][0], header[name]["shape"][1]], dtype="BF16")
            for name in pairs
        ],
    )
    zero = {
        name: {"dtype": "F32", "shape": [0, 256] if ".lora_A." in name else [256, 0], "data_offsets": [0, 0]}
        for name in good.tensors[:2]
    }
    yield "tensors of rank 0", "rank_zero", [good.with_header(zero, b"")]
    yield "no tensors", "nothing_mapped", [good.with_header({}, b""), good.with_header({"__metadata__": {}}, b"")]
    outside = [
        good.renamed(name, name.replace("layers.0", f"layers.{n}").replace("layers.1", f"layers.{n}"))
        for name in good.tensors[:2]
        for n in (4, 5, 100, 65_535, 65_536, 10**9)
    ]
    yield "layer that is not there", "layer_out_of_range unknown_tensor missing_pair", outside
    names = [
        f"{layer}.mlp.experts.0.up_proj.lora_A.weight",
        f"{layer}.mlp.gate_up_proj.lora_A.weight",
        "",
        "x",
        "x" * 100_000,
    ]
    names += [
        "\x1b[2J\0",
        "../../etc/passwd",
        "model.layers.-1.mlp.up_proj.lora_A.weight",
        "model.layers.01.mlp.up_proj.lora_A.weight",
    ]
    names += [
        f"model.layers.{1 << 64}.mlp.up_proj.lora_A.weight",
        "vision_tower.layers.0.self_attn.q_proj.lora_A.weight",
    ]
    names += [f"{layer}.self_attn.q_proj.lora_A.other.weight", "lora_A.weight"]
    names += [
        f"{layer}.self_attn.{module}.lora_A.weight" for module in ("qkv_proj", "query", "wq", "c_attn", "out_proj")
    ]
    yield "tensor that is not known", "unknown_tensor", added(*names)
    yield (
        "tensor under a second name",
        "duplicate_module",
        added(good.tensors[0].removeprefix("base_model.model."), good.tensors[0].replace("lora_A", "lora_A.default")),
    )
    yield "DoRA's tensors", "unsupported_dora", added(f"{layer}.self_attn.q_proj.lora_magnitude_vector")
    yield (
        "biases",
        "unsupported_bias unsupported_lora_bias",
        added(f"{layer}.self_attn.q_proj.bias", f"{layer}.self_attn.q_proj.lora_B.bias"),
    )
    embedding = ["base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_A.weight"]
    yield "adapted embedding", "unsupported_embedding", added(*embedding)
    saved = [
        "base_model.model.lm_head.weight",
        f"{layer}.self_attn.q_proj.base_layer.weight",
        f"{layer}.self_attn.q_proj.lora_C.weight",
    ]
    yield "saved modules", "unsupported_modules_to_save", added(*saved)
    token = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    yield "trained tokens", "unsupported_trainable_tokens", added(token)
    reason = "rank_too_large" if is_cuda() else "too_many_pages"
    yield "image beyond the pool", reason, [huge(good, rank) for rank in (1 << 20, 1 << 24)]


def huge(good: Checkpoint, rank: int) -> Write:
    """Honest shapes of a sparse file."""

    def write(folder: Path) -> None:
        name, other = good.tensors[:2]
        width = 4 * rank * 256
        shapes = [(name, [rank, 256], 0), (other, [256, rank], width)]
        header = {n: {"dtype": "F32", "shape": shape, "data_offsets": [at, at + width]} for n, shape, at in shapes}
        (folder / CONFIG).write_text(json.dumps(good.config | {"r": rank}))
        content = safetensors(header, b"")
        (folder / WEIGHTS).write_bytes(content)
        os.truncate(folder / WEIGHTS, len(content) + 2 * width)

    return write


def folders(good: Checkpoint) -> Iterator[Group]:
    whole = good.files()

    def instead(*changes: tuple[str, Callable[[Path], Any]]) -> list[Write]:
        """A good checkpoint of which one file became something else."""

        def one(name: str, make: Callable[[Path], Any]) -> Write:
            def write(folder: Path) -> None:
                whole(folder)
                (folder / name).unlink()
                make(folder / name)

            return write

        return [one(name, make) for name, make in changes]

    def both(make: Callable[[Path], Any]) -> list[Write]:
        return instead((CONFIG, make), (WEIGHTS, make))

    def bind(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))

    def nest(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).mkdir()
            whole(folder / name)

    def become(path: Path) -> None:
        path.rmdir()
        path.write_text("no folder")

    yield "without a config", "missing_config", [lambda folder: None, *instead((CONFIG, lambda path: None))]
    yield "without weights", "missing_weights", instead((WEIGHTS, lambda path: None))
    pickles = [lambda path: path.with_name("adapter_model.bin").write_bytes(b"\x80\x02}q\0.")]
    yield "a pickle only", "pickle_only", instead(*((WEIGHTS, pickle) for pickle in pickles))
    yield "empty files", "bad_config truncated", both(Path.touch)
    yield "folders for files", "not_a_regular_file", both(Path.mkdir)
    yield "fifos for files", "not_a_regular_file", both(os.mkfifo)
    yield "sockets for files", "not_a_regular_file", both(bind)
    yield (
        "links that lead out",
        "path_not_allowed",
        [
            *both(lambda path: path.symlink_to("/etc/passwd")),
            *both(lambda path: path.symlink_to("/dev/zero")),
            *both(lambda path: path.symlink_to(Path(__file__))),
        ],
    )
    yield (
        "links that lead nowhere",
        "io missing_config missing_weights",
        [
            *both(lambda path: path.symlink_to(path.name)),
            *both(lambda path: path.symlink_to("absent")),
        ],
    )
    yield "a link for a folder", "path_not_allowed", [lambda folder: (folder / "x").symlink_to("/etc")]
    yield "several adapters", "ambiguous_folder", [nest]
    yield "a file for the folder", "not_a_folder", [become]
    yield "no folder", "not_found", [Path.rmdir]


def late(good: Checkpoint) -> Iterator[Malformed]:
    """What only reading the weights can find."""
    for kind, value in [("nan", b"\xff\xff\xff\xff"), ("infinite", b"\0\0\x80\x7f"), ("infinite", b"\0\0\x80\xff")]:
        for at in range(0, len(good.data), len(good.data) // 32 & ~3):
            data = good.data[:at] + value + good.data[at + 4 :]
            yield Malformed(f"{kind} weights", frozenset([kind]), good.with_header(good.header, data), is_late=True)
    spoils: dict[str, Write] = {
        "cut after registration": lambda folder: os.truncate(folder / WEIGHTS, 100),
        "longer after registration": lambda folder: os.truncate(folder / WEIGHTS, 1 << 20),
        "touched after registration": lambda folder: os.utime(folder / WEIGHTS, (0, 0)),
        "removed after registration": lambda folder: (folder / WEIGHTS).unlink(),
        "config changed after registration": lambda folder: os.utime(folder / CONFIG, (0, 0)),
        "folder removed after registration": shutil.rmtree,
    }
    for kind, spoil in spoils.items():
        yield Malformed(kind, frozenset(["changed"]), good.files(), spoil, is_late=True)
