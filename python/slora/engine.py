"""Builds an engine, and runs its step loop on a thread of its own."""

import logging
import os
import sys
import threading
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from slora import _core
from slora.base import make_base
from slora.errors import AdapterError, ConfigError, RequestError
from slora.host import HostMemory, allocate_host
from slora.kernels.lora import MAX_SEGMENTS
from slora.memory import DEFAULT_POOL_BYTES, HostTier, PagePool, device_pool_bytes
from slora.models.config import ModelConfig
from slora.options import DEFAULT_MAX_RANK, GIB, Options
from slora.plan import StepPlan
from slora.runner import AnyRunner, Pending, create_runner
from slora.weights import Weights, load_weights

RING = 3
"""Plan buffers: one being written, one being run, one whose copy to the device may still be under way."""
IDLE_WAIT_S = 0.05
COPY_WAIT_S = 0.0005
"""How soon the arrival of page copies is looked for while there is nothing else to run."""
DEFAULT_POOL_FRACTION = 0.9
DEFAULT_HOST_BYTES = {"cpu": GIB, "cuda": 8 * GIB}
MAX_LOADERS = 8
"""Threads that pack adapters: about 1 GB/s each."""
STEP_COPY_BYTES = 256 << 20
"""Swap-ins that one step waits for: what the link moves in about a step's time. More arrive beside the steps."""


class StepLoop:
    """Schedule, run, commit, until the engine stops.

    An executor that launches without waiting gets step n + 1 while n runs; never are two launched steps uncommitted.
    """

    def __init__(self, core: _core.Core, runner: AnyRunner, device: torch.device) -> None:
        self._core, self._runner, self._device = core, runner, device
        buffers = [
            torch.zeros(core.num_words, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(RING)
        ]
        self._ring = [(buffer.numpy(), StepPlan(buffer, core.layout)) for buffer in buffers]
        self._launched: tuple[int, Pending] | None = None
        self._copying: set[int] = set()

    def run(self) -> None:
        """The step thread. An exception ends every request and the engine, visibly."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            is_idle = False
            while self._core.wait(self._idle_wait_s() if is_idle else 0.0):
                is_idle = not self._round()
            self._commit()
        except BaseException as error:  # a panic in the core is one, too
            logging.getLogger("slora").exception("a step failed, the engine has stopped")
            self._core.fail(f"{type(error).__name__}: {error}")

    def _round(self) -> bool:
        """Launch the next step, then commit the one before it. Whether anything happened: then more may be planned."""
        if self._launched is not None and self._launched[1].is_done:
            self._commit()
        launched = self._launch()
        is_busy = launched is not None or self._launched is not None
        self._commit()
        self._launched = launched
        arrived = self._runner.copies_done()
        for step in arrived:
            self._core.copies_done(step)
            self._copying.discard(step)
        return is_busy or bool(arrived)

    def _launch(self) -> tuple[int, Pending] | None:
        buffer, plan = self._ring[0]
        step = self._core.schedule(buffer)
        if not step:
            return None
        self._ring.append(self._ring.pop(0))
        if plan.refresh().num_copies:
            self._copying.add(step)
        return step, self._runner.launch(plan)

    def _commit(self) -> None:
        if self._launched is not None:
            (step, pending), self._launched = self._launched, None
            out = pending.result()
            self._core.commit(
                step,
                out.ids,
                out.chosen_logprobs,
                out.best_ids,
                out.best_logprobs,
                out.prompt_logprobs,
                out.prompt_best_ids,
                out.prompt_best_logprobs,
            )

    def _idle_wait_s(self) -> float:
        return COPY_WAIT_S if self._copying else IDLE_WAIT_S


class Engine:
    """Base weights, pool, host tier, core and step thread of one device."""

    def __init__(self, model: str | Path, options: Options) -> None:
        self.path = Path(model)
        self.model_config = ModelConfig.from_dir(self.path)
        self.text = open_text(self.path)
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.model_config, self.device)
        self.max_rank = options.max_rank or (DEFAULT_MAX_RANK if self.device.type == "cuda" else None)
        if self.device.type == "cuda" and options.max_running > MAX_SEGMENTS:
            raise ConfigError(f"max_running = {options.max_running}: at most {MAX_SEGMENTS} on a CUDA device")
        adapter_paths = options.adapter_paths()
        if (options.max_context or 0) > self.model_config.max_context:
            limit = self.model_config.max_context
            raise ConfigError(f"max_context = {options.max_context}: the model's limit is {limit} tokens")
        with on_device(self.device):
            weights = load_weights(
                self.model_config, self.path, dtype=self.dtype, device=str(self.device), load_format=options.load_format
            )
            pool = PagePool(
                self.model_config,
                dtype=self.dtype,
                device=str(self.device),
                pool_bytes=self._choose_pool_bytes(options),
                page_tokens=options.page_tokens,
            )
            host_bytes = options.host_bytes or DEFAULT_HOST_BYTES[self.device.type]
            host = allocate_host(host_bytes, pool.page_bytes, self.device)
            self.page_bytes, self.pool_bytes = pool.page_bytes, pool.pool_bytes
            try:
                self._start(options, weights, pool, host)
            except BaseException:
                host.close()
                raise
        self._register(adapter_paths)

    def _start(self, options: Options, weights: Weights, pool: PagePool, host: HostMemory) -> None:
        self.core = self._make_core(options, pool, host)
        host.prepare(self.core.slabs_ready, self.core.fail)
        limits = self.core.config
        runner = create_runner(
            self.model_config,
            weights,
            pool,
            layout=self.core.layout,
            max_running=limits["max_running"],
            max_adapters=limits["max_adapters"],
            max_adapter_pages=limits["max_adapter_pages"],
            max_rank=self.max_rank,
            host=HostTier(host.slabs, pool.page_bytes),
        )
        runner.warm_up(limits["max_context"])
        loop = StepLoop(self.core, runner, self.device)
        thread = threading.Thread(target=loop.run, name="slora-step", daemon=True)
        thread.start()
        # Explicit close, garbage collection and the interpreter's exit all come here, once.
        self._close = weakref.finalize(self, _shut_down, self.core, thread, runner, host, self.device, os.getpid())

    @property
    def is_open(self) -> bool:
        return self._close.alive

    def check_open(self) -> None:
        """Raises RequestError after `close`; the core itself refuses use after a fork."""
        if not self.is_open:
            raise RequestError("the engine is closed")

    def close(self) -> None:
        """End every request, wait for all threads, free all memory. Again: nothing happens."""
        self._close()

    def _choose_pool_bytes(self, options: Options) -> int:
        """To be called with the base's weights in place: a fraction is one of what they leave free."""
        if options.pool_bytes is not None:
            return options.pool_bytes
        if self.device.type == "cuda":
            assert self.max_rank is not None
            return device_pool_bytes(
                self.model_config,
                dtype=self.dtype,
                device=str(self.device),
                page_tokens=options.page_tokens,
                max_batch_tokens=options.max_batch_tokens,
                max_running=options.max_running,
                max_rank=self.max_rank,
                fraction=options.pool_fraction or DEFAULT_POOL_FRACTION,
            )
        if options.pool_fraction is None:
            return DEFAULT_POOL_BYTES
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * options.pool_fraction)

    def _make_core(self, options: Options, pool: PagePool, host: HostMemory) -> _core.Core:
        config, longest = self.model_config, options.max_context or self.model_config.max_context
        eos = {*config.eos_token_ids, *(self.text.stop_token_ids if self.text else ())}
        core = _core.Core(
            make_base(config, self.path, self.dtype, pool.page_bytes, pool.num_pages, self.max_rank),
            self.text,
            slabs=host.slabs,
            num_ready_slabs=host.num_ready,
            keep_alive=host,
            num_pages=pool.num_pages,
            page_tokens=pool.page_tokens,
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            max_adapters=options.max_adapters,
            max_context=longest,
            eos_token_ids=sorted(token for token in eos if token < config.vocab_size),
            queue=options.queue,
            prefetch=options.prefetch,
            num_loaders=min(MAX_LOADERS, os.cpu_count() or 1),
            max_copy_pages=max(1, STEP_COPY_BYTES // pool.page_bytes) if self.device.type == "cuda" else None,
            seed=options.seed,
        )
        if core.config["max_context"] < longest:
            warnings.warn(
                f"max_context is lowered from {longest} to {core.config['max_context']} tokens: more do not fit the "
                f"pool of {pool.pool_bytes} bytes; hint: raise pool_bytes",
                stacklevel=user_stacklevel(),
            )
        return core

    def _register(self, paths: dict[str, Path]) -> None:
        try:
            for name, path in paths.items():
                try:
                    self.core.register(name, str(path))
                except AdapterError as error:
                    raise AdapterError(f"adapter {name!r}: {error}") from None
        except BaseException:
            self.close()
            raise


def user_stacklevel() -> int:
    """For a warning of the caller's: the line outside this package from which it was called."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level


def open_text(path: Path) -> _core.Text | None:
    """The folder's tokenizer; None: there is none, and token ids are served."""
    return _core.Text(str(path)) if (path / "tokenizer.json").exists() else None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device this thread's current one: kernels and streams belong to that, whatever tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_device(name: str) -> torch.device:
    """ "auto": CUDA if there is a device; "cuda" is the thread's current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEFAULT_HOST_BYTES:
        raise ConfigError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> str:
    """ "auto": float32 on the CPU, whose half-precision arithmetic is slow; else the checkpoint's."""
    if name != "auto":
        return name
    return "float32" if device.type == "cpu" else config.dtype


def _shut_down(
    core: _core.Core, thread: threading.Thread, runner: AnyRunner, host: HostMemory, device: torch.device, pid: int
) -> None:
    """In this order: nothing is freed that another thread may still touch."""
    if os.getpid() != pid:  # a fork took no threads with it, and left their locks as they were
        return
    core.begin_close()
    if threading.current_thread() is thread:  # garbage collection found the engine on its own step thread
        threading.Thread(target=_shut_down, args=(core, thread, runner, host, device, pid)).start()
        return
    thread.join()
    core.close()
    for owner in (runner, host):
        try:
            with on_device(device):
                owner.close()
        except RuntimeError as error:
            if core.failure is None:
                raise
            # After an illegal access the driver answers every call with it: the memory goes with the process.
            logging.getLogger("slora").warning("memory of the failed engine is not freed: %s", error)
