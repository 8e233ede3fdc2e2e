"""An obviously right planner for tests: packs adapters into images and writes StepPlans by hand.

Follows docs/architecture.md and nothing else, so it also says what the Rust side must produce. Pages are handed out at
random, and the pool starts as NaN everywhere, so that reading what nobody wrote shows.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from slora.memory import DTYPES, HostTier, PagePool
from slora.models.config import ModelConfig
from slora.plan import HAS_LORA, HAS_PENALTIES, HAS_RANDOM, Counts, StepPlan
from slora.runner import StepOutput, create_runner
from slora.weights import Weights

GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
Modules = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]]
"""(layer, module 0..7) -> A [rank, in], B [out, rank], scale."""


def pack(config: ModelConfig, modules: Modules, page_bytes: int, dtype: str) -> tuple[torch.Tensor, np.ndarray]:
    """An adapter's image uint8 [pages, page_bytes] and its descriptor int32 [layers * 7, 12]."""
    descriptor = np.zeros((config.num_layers * 7, 12), np.int32)
    pages = [torch.zeros(page_bytes, dtype=torch.uint8)]
    offset = 0

    def put(rows: torch.Tensor) -> list[int]:
        nonlocal offset
        placed = []
        rows = rows.to(DTYPES[dtype]).contiguous().view(torch.uint8)
        row_bytes = (rows.shape[1] + 15) // 16 * 16
        for row in rows:
            if offset + row_bytes > page_bytes:
                pages.append(torch.zeros(page_bytes, dtype=torch.uint8))
                offset = 0
            pages[-1][offset : offset + len(row)] = row
            placed.append((len(pages) - 1, offset))
            offset += row_bytes
        first = placed[0]
        return [*first, row_bytes, sum(page == first[0] for page, _ in placed), page_bytes // row_bytes]

    for layer in range(config.num_layers):
        for group in GROUPS:
            present = [m for m in group if (layer, m) in modules]
            for m in present:
                a, _, scale = modules[layer, m]
                words = descriptor[layer * 7 + m]
                words[0] = len(a)
                words[1] = np.array(scale, np.float32).view(np.int32)
                words[2:7] = put(a)
            for m in present:
                descriptor[layer * 7 + m, 7:12] = put(modules[layer, m][1].t())
    return torch.stack(pages), descriptor


def peft_modules(peft_model: torch.nn.Module, adapter: str = "default") -> Modules:
    """The LoRA of a live PEFT model, with the scale that PEFT itself uses."""
    modules: Modules = {}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name, module in peft_model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            layer = int(name.split("layers.")[1].split(".")[0])
            a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            modules[layer, names.index(name.rsplit(".", 1)[1])] = (a, b, module.scaling[adapter])
    return modules


@dataclass
class Request:
    prompt: list[int]
    adapter: str | None = None
    max_tokens: int = 4
    logprobs: int = 0
    prompt_logprobs: int = 0
    sampling: dict[str, float] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)
    uniforms: list[float] = field(default_factory=list)
    # what came out
    output: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    best: list[dict[int, float]] = field(default_factory=list)
    prompt_chosen: list[float] = field(default_factory=list)
    # progress
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    state_row: int = -1

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def is_done(self) -> bool:
        return len(self.output) >= self.max_tokens


NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
    "top_k": 0,
}
CAPACITIES = {"counts": 32, "reset_tokens": 8192}
FLOATS = {"temperature", "top_p", "min_p", "presence", "frequency", "repetition", "uniform", "bias_values"}
ARRAYS = """\
    counts token_ids positions slots query_indptr seq_lens page_indptr seg_indptr seg_adapter sample_rows state_rows
    temperature top_p min_p presence frequency repetition uniform top_k num_logprobs bias_indptr bias_ids bias_values
    reset_rows reset_prompt_lens reset_indptr reset_tokens prompt_rows prompt_targets prompt_num_logprobs
    copy_host_pages copy_pages copy_layers changed_rows changed_pages_indptr changed_pages changed_modules
    page_indices""".split()  # noqa: SIM905


def make_layout(config: ModelConfig) -> list[tuple[str, int, int, bool]]:
    layout, offset = [], 0
    for name in ARRAYS:
        capacity = CAPACITIES.get(name, 4096)
        if name == "changed_modules":
            capacity = 32 * config.num_layers * 84
        layout.append((name, offset, capacity, name in FLOATS))
        offset += capacity
    return layout


class World:
    """A runner with its pool, adapters in a host tier, and a planner over them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        adapters: dict[str, Modules] | None = None,
        *,
        dtype: str = "float32",
        num_pages: int = 600,
        page_tokens: int = 16,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config, self.rng = config, random.Random(seed)
        page_bytes = config.page_bytes(page_tokens, dtype)
        self.pool = PagePool(
            config, dtype=dtype, device=device, pool_bytes=num_pages * page_bytes, page_tokens=page_tokens
        )
        self.pool.pages.fill_(255)
        self.free = list(range(num_pages))
        self.rng.shuffle(self.free)
        self.images = {name: pack(config, m, page_bytes, dtype) for name, m in (adapters or {}).items()}
        pages = [image for image, _ in self.images.values()]
        self.host_pages = torch.cat(pages) if pages else torch.empty(0, page_bytes, dtype=torch.uint8)
        is_cuda = device != "cpu"
        if is_cuda:
            self.host_pages = self.host_pages.pin_memory()
        half = len(self.host_pages) // 2
        host = HostTier([self.host_pages[:half], self.host_pages[half:]], page_bytes)
        self.rows: dict[str, int] = {}  # adapter -> descriptor row
        self.adapter_pages: dict[str, list[int]] = {}
        self.layout = make_layout(config)
        self.runner = create_runner(
            config,
            weights,
            self.pool,
            layout=self.layout,
            host=host,
            max_running=64,
            max_adapters=32,
            max_adapter_pages=512,
            max_rank=max([64, *(int(words[:, 0].max()) for _, words in self.images.values())]),
        )
        size = sum(capacity for _, _, capacity, _ in self.layout)
        self.buffer = torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda)
        self.plan = StepPlan(self.buffer, self.layout)
        self.step_number = 0
        self.sampled_before: list[Request] = []

    def host_start(self, name: str) -> int:
        start = 0
        for other, (image, _) in self.images.items():
            if other == name:
                return start
            start += len(image)
        raise KeyError(name)

    def evict(self, name: str) -> None:
        """Forget the adapter's row; its pages go to others, scribbled over."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize()  # what runs may still read them
        self.free += self.adapter_pages[name]
        self.pool.pages[self.adapter_pages.pop(name)] = 255
        del self.rows[name]
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize()  # a copy may be ordered into them next

    def write(self, arrays: dict[str, list[float]], scalars: dict[str, int]) -> None:
        self.buffer.fill_(-7)
        words = self.buffer.numpy()
        scalars = {"max_logprobs": -1, "max_prompt_logprobs": -1, **scalars}
        arrays["counts"] = [scalars.get(name, 0) for name in Counts._fields]
        for name, offset, capacity, is_float in self.layout:
            values = np.array(arrays.get(name, []), np.float32 if is_float else np.int32).reshape(-1)
            assert len(values) <= capacity, name
            words[offset : offset + len(values)] = values.view(np.int32)
        self.plan.refresh()

    def swap_in(self, arrays: dict[str, list], scalars: dict[str, int], requests: list[Request]) -> None:
        arrays["changed_pages_indptr"] = [0]
        arrays["changed_modules"] = []
        for name in {r.adapter: None for r in requests if r.adapter and r.adapter not in self.rows}:
            image, descriptor = self.images[name]
            pages = [self.free.pop() for _ in range(len(image))]
            self.adapter_pages[name] = pages
            self.rows[name] = self.rng.choice([row for row in range(32) if row not in self.rows.values()])
            arrays.setdefault("copy_host_pages", []).extend(
                range(self.host_start(name), self.host_start(name) + len(pages))
            )
            arrays.setdefault("copy_pages", []).extend(pages)
            arrays.setdefault("copy_layers", []).extend([0] * len(pages))
            arrays.setdefault("changed_rows", []).append(self.rows[name])
            arrays.setdefault("changed_pages", []).extend(pages)
            arrays["changed_pages_indptr"].append(len(arrays["changed_pages"]))
            arrays["changed_modules"].extend(descriptor.reshape(-1).tolist())
        scalars["num_copies"] = len(arrays.get("copy_pages", []))
        scalars["num_changed"] = len(arrays.get("changed_rows", []))
        scalars["num_changed_pages"] = len(arrays.get("changed_pages", []))

    def step(self, requests: list[tuple[Request, int]], by_reference: bool = False) -> StepOutput:
        """Run one step over (request, number of rows) pairs and hand its results to the requests."""

        def order(item: tuple[Request, int]) -> tuple[bool, str]:
            return (item[1] > 1, item[0].adapter or "")

        requests = sorted(requests, key=order)
        arrays: dict[str, list] = {name: [] for name in ARRAYS}
        for name in ("query_indptr", "page_indptr", "seg_indptr", "bias_indptr", "reset_indptr"):
            arrays[name] = [0]
        scalars: dict[str, int] = {"flags": 0}
        arrays = {name: values for name, values in arrays.items() if not name.startswith(("copy", "changed"))}
        self.swap_in(arrays, scalars, [r for r, _ in requests])
        sampled: list[Request] = []
        scored: list[Request] = []
        for request, num_rows in requests:
            self.add_rows(arrays, scalars, request, num_rows, by_reference, sampled, scored)
        self.step_number += 1
        lens = np.diff(arrays["query_indptr"])
        scalars |= {
            "step": self.step_number,
            "copies_wait_step": self.step_number - 1 if scalars["num_copies"] else 0,
            "copies_needed_step": self.step_number if scalars["num_copies"] else 0,
            "num_rows": len(arrays["token_ids"]),
            "num_decode": int((lens == 1).sum()),
            "num_requests": len(requests),
            "num_segments": len(arrays["seg_adapter"]),
            "num_sampled": len(sampled),
            "num_prompt_logprobs": len(arrays["prompt_rows"]),
            "num_page_indices": len(arrays["page_indices"]),
            "num_bias": len(arrays["bias_ids"]),
            "num_resets": len(arrays["reset_rows"]),
            "num_reset_tokens": len(arrays["reset_tokens"]),
            "max_query_len": int(lens.max()),
            "max_seq_len": max(arrays["seq_lens"]),
            "max_logprobs": max(arrays["num_logprobs"], default=-1),
            "max_prompt_logprobs": max(arrays["prompt_num_logprobs"], default=-1),
        }
        self.write(arrays, scalars)
        output = self.runner.run(self.plan)
        self.commit(output, sampled, scored)
        return output

    def add_rows(self, arrays, scalars, request, num_rows, by_reference, sampled, scored) -> None:  # type: ignore[no-untyped-def]
        first_row, end = len(arrays["token_ids"]), request.cached + num_rows
        tokens = request.tokens[request.cached : end]
        if by_reference and num_rows == 1 and request in self.sampled_before and request.output:
            tokens = [-1 - self.sampled_before.index(request)]
        if request.state_row < 0:
            request.state_row = (self.step_number * 8 + len(arrays["reset_rows"])) % 64
            arrays["reset_rows"].append(request.state_row)
            arrays["reset_prompt_lens"].append(len(request.prompt))
            arrays["reset_tokens"] += request.tokens
            arrays["reset_indptr"].append(len(arrays["reset_tokens"]))
        while len(request.pages) * self.pool.page_tokens < end:
            request.pages.append(self.free.pop())
        for position, token in zip(range(request.cached, end), tokens, strict=True):
            page, offset = divmod(position, self.pool.page_tokens)
            arrays["token_ids"].append(token)
            arrays["positions"].append(position)
            arrays["slots"].append(request.pages[page] * self.pool.page_tokens + offset)
            if request.prompt_logprobs >= 0 and position + 1 < len(request.prompt):
                arrays["prompt_rows"].append(first_row + position - request.cached)
                arrays["prompt_targets"].append(request.prompt[position + 1])
                arrays["prompt_num_logprobs"].append(request.prompt_logprobs)
                scored.append(request)
        arrays["query_indptr"].append(first_row + num_rows)
        arrays["seq_lens"].append(end)
        arrays["page_indices"] += request.pages
        arrays["page_indptr"].append(len(arrays["page_indices"]))
        adapter = self.rows[request.adapter] if request.adapter else -1
        if arrays["seg_adapter"][-1:] == [adapter]:
            arrays["seg_indptr"][-1] = first_row + num_rows
        else:
            arrays["seg_adapter"].append(adapter)
            arrays["seg_indptr"].append(first_row + num_rows)
        scalars["flags"] |= HAS_LORA if adapter >= 0 else 0
        request.cached = end
        if end == len(request.tokens):
            self.add_sampling(arrays, scalars, request, first_row + num_rows - 1)
            sampled.append(request)

    def add_sampling(self, arrays, scalars, request: Request, row: int) -> None:  # type: ignore[no-untyped-def]
        params = NEUTRAL | request.sampling
        for name, value in params.items():
            arrays[name].append(value)
        uniform = request.uniforms[len(request.output)] if request.uniforms else 0.0
        arrays["uniform"].append(uniform)
        arrays["sample_rows"].append(row)
        arrays["state_rows"].append(request.state_row)
        arrays["num_logprobs"].append(request.logprobs)
        arrays["bias_ids"] += request.bias.keys()
        arrays["bias_values"] += request.bias.values()
        arrays["bias_indptr"].append(len(arrays["bias_ids"]))
        scalars["flags"] |= HAS_RANDOM if params["temperature"] > 0 else 0
        penalised = params["presence"] or params["frequency"] or params["repetition"] != 1
        scalars["flags"] |= HAS_PENALTIES if penalised else 0

    def commit(self, output: StepOutput, sampled: list[Request], scored: list[Request]) -> None:
        assert output.ids.dtype == np.int32
        assert output.ids.shape == (len(sampled),)
        for i, request in enumerate(sampled):
            request.output.append(int(output.ids[i]))
            if output.chosen_logprobs is not None:
                request.chosen.append(float(output.chosen_logprobs[i]))
            if output.best_ids is not None and output.best_logprobs is not None:
                pairs = zip(output.best_ids[i].tolist(), output.best_logprobs[i].tolist(), strict=True)
                request.best.append(dict(list(pairs)[: request.logprobs]))
        for i, request in enumerate(scored):
            assert output.prompt_logprobs is not None
            request.prompt_chosen.append(float(output.prompt_logprobs[i]))
        self.sampled_before = sampled

    def generate(
        self, requests: list[Request], chunk: int = 1000, by_reference: bool = False, alone: bool = False
    ) -> None:
        """Run all requests to their end, at most `chunk` prompt tokens of each in a step."""
        if alone:
            for request in requests:
                self.generate([request], chunk, by_reference)
            return
        while rest := [r for r in requests if not r.is_done]:
            self.step([(r, min(chunk, len(r.tokens) - r.cached)) for r in rest], by_reference)
        for request in requests:
            self.free += request.pages
            request.pages = []


def tiny_config(**changes: object) -> dict[str, object]:
    """The content of a small Llama's config.json."""
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    }
