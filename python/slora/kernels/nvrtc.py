"""Kernels from `cuda/`: compiled at first use by NVRTC, cached on disk, launched through the driver.

NVRTC and the CUDA headers come with torch; both libraries are called directly, so nothing else needs to be installed,
and a launch costs one foreign call. Our own headers are inlined before compiling: the cache key, a hash of what NVRTC
gets to see, then covers them, and an edit of a header never runs a stale kernel.
"""

import ctypes
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from slora.errors import DeviceError

P = ParamSpec("P")
T = TypeVar("T")
Macros = Mapping[str, int | float | str]
Dim = int | tuple[int, ...]
Argument = Tensor | np.generic | int | float | ctypes.Structure | None

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)".*$', re.MULTILINE)
_ARCH = re.compile(r"^#pragma slora arch (sm_\d+a)$", re.MULTILINE)
_OPTIONS = ("--std=c++17", "--define-macro=NDEBUG", "-default-device")
_MAX_SHARED, _SHARED_PERCENT = 8, 9  # CU_FUNC_ATTRIBUTE_…
_CLUSTER, _PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_…
_STATIC_SHARED_LIMIT = 48 * 1024
CLUSTER_MAJORS = (9, 10, 11)
"""Devices with clusters whose blocks have more than 200 KB of shared memory."""
_SCALARS = {"int32": "c_int32", "int64": "c_int64", "uint32": "c_uint32", "uint64": "c_uint64", "float32": "c_float"}


def load(name: str, macros: Macros | None = None) -> "Module":
    """`cuda/<name>.cu` for the current device; one module for equal macros in a process."""
    return _load(name, tuple(sorted((macros or {}).items())), torch.cuda.current_device())


def cached_by_device(make: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache` of what is made for the current device: a kernel of one is none of another's."""

    def make_for(device: int, *args: Any, **kwargs: Any) -> T:
        return make(*args, **kwargs)

    made: Callable[..., T] = cache(make_for)

    @wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        return made(torch.cuda.current_device(), *args, **kwargs)

    return found


@cache
def _load(name: str, macros: tuple[tuple[str, int | float | str], ...], device: int) -> "Module":
    major, minor = torch.cuda.get_device_capability(device)
    return Module(name, _cached(name, dict(macros), f"sm_{major}{minor}"), major)


def compile_only(name: str, macros: Macros | None = None, arch: str = "sm_90") -> bytes:
    """The machine code of `cuda/<name>.cu`; needs no device and no cache."""
    source = expand(name)
    return _compile(source, name, _options(source, macros or {}, arch))


def expand(name: str) -> str:
    """The source of `cuda/<name>.cu` with our own headers inlined, each once."""
    return _inline(f"{name}.cu", set())


class Module:
    """The kernels of one file, loaded on the current device."""

    def __init__(self, name: str, binary: bytes, major: int) -> None:
        """`major`: of the device's compute capability."""
        self.name, self.has_programmatic_launch, self.has_clusters = name, major >= 9, major in CLUSTER_MAJORS
        torch.cuda.synchronize()  # makes the device's primary context this thread's
        self._handle = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._handle), binary), f"load {name}")
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> "Kernel":
        """A kernel by its `extern "C"` name."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]

    def function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        found = _driver().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
        _check(found, f"find kernel {name} in {self.name}")
        return function


class Kernel:
    """A kernel; call it to launch it once, or `bind` its arguments to launch it often."""

    def __init__(self, module: Module, name: str) -> None:
        self.name = name
        self.has_programmatic_launch = module.has_programmatic_launch
        self.function = module.function(name)
        self._shared_bytes = _STATIC_SHARED_LIMIT

    def __call__(
        self,
        grid: Dim,
        block: Dim,
        args: tuple[Argument, ...],
        shared_bytes: int = 0,
        stream: int | None = None,
        *,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> None:
        """Launch on `stream` (a raw pointer; None: torch's current one). For the other arguments see `bind`."""
        self.bind(grid, block, args, shared_bytes, cluster=cluster, programmatic=programmatic)(stream)

    def bind(
        self,
        grid: Dim,
        block: Dim,
        args: tuple[Argument, ...],
        shared_bytes: int = 0,
        *,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> "Launch":
        """A launch that can be repeated; it keeps its tensors alive.

        Tensors are passed as their address, Python's ints as int32 and its floats as float32, numpy scalars and ctypes
        structures as they are. `cluster`: blocks along x that share a cluster. `programmatic`: the kernel may start
        before the one before it has ended, and waits for it itself (`griddepcontrol`; without effect before sm_90).
        """
        self._allow(shared_bytes)
        return Launch(self, grid, block, args, shared_bytes, cluster, programmatic and self.has_programmatic_launch)

    def max_clusters(self, block: Dim, shared_bytes: int, cluster: int) -> int:
        """How many clusters of so many blocks the device can hold at once."""
        self._allow(shared_bytes)
        launch, num_clusters = Launch(self, cluster, block, (), shared_bytes, cluster, False), ctypes.c_int()
        counted = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(num_clusters), self.function, launch.config)
        _check(counted, f"count clusters of {self.name}")
        return num_clusters.value

    def _allow(self, shared_bytes: int) -> None:
        if shared_bytes > self._shared_bytes:
            granted = _driver().cuFuncSetAttribute(self.function, _MAX_SHARED, shared_bytes)
            _check(granted, f"give {self.name} {shared_bytes} bytes of shared memory")
            # no more of it for L1: what the kernel itself leaves is for blocks of others beside it
            granted = _driver().cuFuncSetAttribute(self.function, _SHARED_PERCENT, 100)
            _check(granted, f"give {self.name} all shared memory")
            self._shared_bytes = shared_bytes


class Launch:
    """A kernel with its arguments, ready to be enqueued: about a microsecond a call."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim,
        block: Dim,
        args: tuple[Argument, ...],
        shared_bytes: int,
        cluster: int,
        programmatic: bool,
    ) -> None:
        self._name, self._args = kernel.name, args
        self._values = [_value(arg) for arg in args]
        self._pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(value) for value in self._values])
        self._attributes = (_LaunchAttribute * 2)()
        self._config = _LaunchConfig(*_dim3(grid), *_dim3(block), shared_bytes)
        self._config.attrs = ctypes.addressof(self._attributes)
        if cluster > 1:
            self._add_attribute(_CLUSTER, cluster, 1, 1)
        if programmatic:
            self._add_attribute(_PROGRAMMATIC, 1)
        self._call = (ctypes.byref(self._config), kernel.function, self._pointers, None)
        self._launch = _driver().cuLaunchKernelEx

    def set(self, index: int, value: Argument) -> None:
        """Replace an argument by one of the same type. A tensor is not kept alive: it must last until the launch."""
        new = _value(value)
        old = self._values[index]
        assert type(new) is type(old), f"argument {index} of {self._name} changes its type"
        ctypes.memmove(ctypes.addressof(old), ctypes.addressof(new), ctypes.sizeof(old))

    def set_clusters(self, count: int, size: int) -> None:
        """How many clusters of how many blocks, along x, the next calls launch; it was bound with clusters."""
        attribute = self._attributes[0]
        assert attribute.id == _CLUSTER, f"{self._name} was bound without clusters"
        attribute.value[0] = size
        self._config.grid_x = count * size

    def __call__(self, stream: int | None = None) -> None:
        self._config.stream = current_stream() if stream is None else stream
        error = self._launch(*self._call)
        if error:
            _check(error, f"launch {self._name}")

    @property
    def config(self) -> Any:
        """CUlaunchConfig*."""
        return ctypes.byref(self._config)

    def _add_attribute(self, kind: int, *values: int) -> None:
        attribute = self._attributes[self._config.num_attrs]
        attribute.id = kind
        attribute.value[: len(values)] = values
        self._config.num_attrs += 1


def current_stream() -> int:
    """The raw pointer of torch's current stream. Look it up once a step, not once a launch."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return stream


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attrs", ctypes.c_void_p),
        ("num_attrs", ctypes.c_uint),
    )


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16))


def _dim3(dim: Dim) -> tuple[int, ...]:
    dims = (dim,) if isinstance(dim, int) else dim
    return (*dims, 1, 1)[:3]


def _value(arg: Argument) -> Any:
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if arg is None:
        return ctypes.c_void_p()
    if isinstance(arg, np.generic):
        return getattr(ctypes, _SCALARS[arg.dtype.name])(arg.item())
    if isinstance(arg, ctypes.Structure):
        return arg
    assert not isinstance(arg, bool), "a kernel takes no bool: its size is not obvious"
    if isinstance(arg, int):
        assert -(2**31) <= arg < 2**31, f"{arg} is no int32; hint: pass np.int64"
        return ctypes.c_int32(arg)
    return ctypes.c_float(arg)


# Sources and the cache


def _source_dir() -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parents[1] / "cuda"


def _inline(file: str, seen: set[str]) -> str:
    seen.add(file)
    text = (_source_dir() / file).read_text()

    def replace(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 2
        header = match[1]
        body = "" if header in seen else f'#line 1 "{header}"\n{_inline(header, seen)}\n'
        return f'{body}#line {line} "{file}"'

    return _INCLUDE.sub(replace, text)


def _options(source: str, macros: Macros, arch: str) -> list[str]:
    asked = _ARCH.search(source)
    if asked and asked[1].rstrip("a") == arch:
        arch = asked[1]
    return [f"-arch={arch}", *_OPTIONS, *(f"--define-macro={name}={value}" for name, value in sorted(macros.items()))]


def _cached(name: str, macros: Macros, arch: str) -> bytes:
    source = expand(name)
    options = _options(source, macros, arch)
    key = hashlib.sha256("\0".join((source, *options, nvrtc_version())).encode()).hexdigest()
    path = _cache_dir() / f"{name}-{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        binary = _compile(source, name, options)
        _write(path, binary)
        return binary


def _cache_dir() -> Path:
    asked = os.environ.get("SLORA_CACHE_DIR")
    return Path(asked) if asked else Path.home() / ".cache" / "slora" / "kernels"


def _write(path: Path, binary: bytes) -> None:
    """Atomically: a reader sees the whole file or none. A cache that cannot be written is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    except OSError:
        return


# The libraries


def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _compile(source: str, name: str, options: list[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    text = _ARCH.sub("", source).encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None):
        raise DeviceError(f"nvrtc cannot take cuda/{name}.cu")
    try:
        encoded = [option.encode() for option in (*options, *(f"-I{path}" for path in _include_dirs()))]
        error = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        if error:
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            raise DeviceError(f"cuda/{name}.cu does not compile with {' '.join(options)}:\n{log}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    found = [path for place in _nvidia_dirs() for path in sorted((place / "lib").glob("libnvrtc.so.*"))]
    for candidate in (*map(str, found), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise DeviceError("libnvrtc is not found; hint: install nvidia-cuda-nvrtc, on which CUDA builds of torch depend")


@cache
def _include_dirs() -> tuple[str, ...]:
    """Where <cuda_bf16.h>, <cuda_fp16.h> and <cuda/…> lie: of several candidates all, in this order."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [place / "include" for place in _nvidia_dirs()] + [Path(home) / "include"]
    places += [place / "cccl" for place in places]
    return tuple(str(place) for place in places if place.is_dir())


@cache
def _nvidia_dirs() -> tuple[Path, ...]:
    """Folders of NVIDIA's packages that lie beside torch or on the path."""
    roots = dict.fromkeys((Path(torch.__file__).parents[1], *map(Path, sys.path)))
    return tuple(place for root in roots for place in sorted((root / "nvidia").glob("*")) if place.is_dir())


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the NVIDIA driver is not found: {error}") from error
    driver.cuFuncSetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return driver


def _check(error: int, what: str) -> None:
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {error}"
        raise DeviceError(f"cannot {what}: {reason}")
