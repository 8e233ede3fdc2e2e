"""The executor against transformers and PEFT, on random bases of every family, through plans written by hand."""

import random
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from device import device_name, tolerance
from planning import Modules, Request, World, peft_modules

from slora.kernels import reference
from slora.models.config import ModelConfig
from slora.weights import load_weights

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = tolerance(5e-5)
THETA = {"rope_theta": 10000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **THETA}
BASES = {
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}},
    "llama-llama3": {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 500000.0}},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}},
    "llama-yarn": {"rope_parameters": YARN, "num_key_value_heads": 1},
    "llama-yarn-mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}},
    "llama-yarn-betas": {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "mistral-window": {"sliding_window": 24, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {"head_dim": 32, "attention_bias": False},
}


def make_base(name: str, path: Path) -> transformers.PreTrainedModel:
    """Save a random base, with logits that differ enough for greedy choices to be clear."""
    torch.manual_seed(len(name))
    options = {
        "vocab_size": 151,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "pad_token_id": 0,
        "eos_token_id": 2,
        **BASES[name],
    }
    config = transformers.AutoConfig.for_model(name.split("-")[0], **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in key:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.float().eval().save_pretrained(path, max_shard_size="100KB")
    return model


ADAPTERS: dict[str, dict] = {
    "one": {"r": 1, "target_modules": ["q_proj", "v_proj"]},
    "three": {"r": 3, "target_modules": LINEARS[4:], "use_rslora": True, "lora_alpha": 7},
    "all": {"r": 16, "target_modules": LINEARS, "rank_pattern": {"v_proj": 20}, "alpha_pattern": {"o_proj": 3}},
    "last": {"r": 64, "target_modules": LINEARS, "layers_to_transform": [2]},
    "large": {"r": 300, "target_modules": ["k_proj", "up_proj"]},
}


def make_peft(base: Path, options: dict) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(**{"lora_alpha": 8, **options}, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.12)
    return adapted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, peft.PeftModel]]:
    """A base and the PEFT models of all adapters."""
    path = tmp_path_factory.mktemp("base")
    make_base("llama-llama3", path)
    return path, {name: make_peft(path, options) for name, options in ADAPTERS.items()}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


def make_world(path: Path, models: dict[str, peft.PeftModel] | None = None, dtype: str = "float32", **options) -> World:  # type: ignore[no-untyped-def]
    config = ModelConfig.from_dir(path)
    adapters: dict[str, Modules] = {name: peft_modules(model) for name, model in (models or {}).items()}
    weights = load_weights(config, path, dtype=dtype, device=device_name())
    return World(config, weights, adapters, dtype=dtype, device=device_name(), **options)


def make_requests(adapters: list[str | None], seed: int = 0, lens: tuple[int, ...] = (1, 7, 40, 133)) -> list[Request]:
    rng = random.Random(seed)
    return [Request([rng.randrange(3, 151) for _ in range(rng.choice(lens))], adapter) for adapter in adapters]


@torch.inference_mode()
def check(request: Request, model: torch.nn.Module, tolerance: float = TOLERANCE) -> None:
    """Every prompt token's and every chosen token's log-probability, and that what was chosen is the best."""
    tokens = request.tokens
    logprobs = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0].float(), -1)
    expected = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    got = torch.tensor(request.prompt_chosen + request.chosen)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance
    chosen = expected[len(request.prompt) - 1 :]
    assert (logprobs[len(request.prompt) - 1 :].max(-1).values - chosen).max() < tolerance


def differences(a: list[Request], b: list[Request]) -> float:
    for x, y in zip(a, b, strict=True):
        assert x.output == y.output
    pairs = [(x.chosen + x.prompt_chosen, y.chosen + y.prompt_chosen) for x, y in zip(a, b, strict=True)]
    return max(abs(p - q) for x, y in pairs for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize("name", BASES)
def test_a_base_equals_transformers(name: str, tmp_path: Path) -> None:
    model = make_base(name, tmp_path)
    world = make_world(tmp_path)
    requests = make_requests([None] * 5)
    world.generate(requests, chunk=50)
    for request in requests:
        check(request, model)


def test_a_mixed_batch_equals_peft(llama: tuple[Path, dict[str, peft.PeftModel]]) -> None:
    path, models = llama
    base = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    world = make_world(path, models)
    requests = make_requests([*ADAPTERS, None, *ADAPTERS, None, "all"])
    world.generate(requests, chunk=30, by_reference=True)
    for request in requests:
        check(request, models[request.adapter] if request.adapter else base)


@pytest.mark.parametrize(
    ("chunk", "alone", "by_reference"), [(1, False, False), (7, False, True), (1000, True, True), (33, True, False)]
)
def test_a_result_does_not_depend_on_chunks_or_neighbours(
    llama: tuple[Path, dict[str, peft.PeftModel]], chunk: int, alone: bool, by_reference: bool
) -> None:
    path, models = llama
    names = [*ADAPTERS, None, "all", None]
    whole, other = make_requests(names, lens=(3, 40, 133)), make_requests(names, lens=(3, 40, 133))
    make_world(path, models).generate(whole)
    make_world(path, models, seed=1).generate(other, chunk, by_reference, alone)
    assert differences(whole, other) < TOLERANCE


def test_windows_hold_across_chunks(tmp_path: Path) -> None:
    make_base("qwen2-window", tmp_path)
    whole, chunked = make_requests([None] * 4, lens=(11, 12, 13, 90)), make_requests([None] * 4, lens=(11, 12, 13, 90))
    make_world(tmp_path).generate(whole)
    make_world(tmp_path, seed=1).generate(chunked, chunk=5, alone=True)
    assert differences(whole, chunked) < TOLERANCE


def test_a_descriptor_row_is_reused_by_another_adapter(llama: tuple[Path, dict[str, peft.PeftModel]]) -> None:
    path, models = llama
    world = make_world(path, models)
    world.rng.choice = lambda rows: min(rows)  # always the lowest free descriptor row
    for adapter in ("one", "all", "last", "one"):
        (request,) = make_requests([adapter])
        world.generate([request])
        assert world.rows == {adapter: 0}
        check(request, models[adapter])
        world.evict(adapter)


def test_an_adapter_may_move_between_two_steps_of_a_request(llama: tuple[Path, dict[str, peft.PeftModel]]) -> None:
    path, models = llama
    world = make_world(path, models)
    (request,) = make_requests(["all"])
    world.generate([request])
    world.evict("all")
    request.max_tokens, request.cached, request.chosen, request.prompt_chosen = 8, 0, request.chosen, []
    world.generate([request])  # resumed: all tokens so far are computed again
    check(request, models["all"])


def test_only_the_pages_of_the_plan_are_written(llama: tuple[Path, dict[str, peft.PeftModel]]) -> None:
    path, models = llama
    world = make_world(path, models)
    free = list(world.free)
    world.generate(make_requests([*ADAPTERS, None]))
    resident = {page for pages in world.adapter_pages.values() for page in pages}
    for name, pages in world.adapter_pages.items():
        assert torch.equal(world.pool.pages[pages].cpu(), world.images[name][0])
    touched = [page for page in free if (world.pool.pages[page] != 255).any()]
    assert len(touched) <= len(resident) + 5 * 9  # five requests of at most 137 tokens


@pytest.mark.cpu_only(reason="replaces a function of the reference")
def test_a_step_without_adapters_runs_no_lora(
    llama: tuple[Path, dict[str, peft.PeftModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(*llama)
    world.generate(make_requests(["all"]))

    def fail(*_: object) -> None:
        raise AssertionError("LoRA ran")

    monkeypatch.setattr(reference, "_lora_tile", fail)
    world.generate(make_requests([None, None]))
    with pytest.raises(AssertionError, match="LoRA ran"):
        world.generate(make_requests(["all"]))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.3), ("float16", 0.04)])
def test_half_precision_stays_near(llama: tuple[Path, dict[str, peft.PeftModel]], dtype: str, tolerance: float) -> None:
    path, models = llama
    world = make_world(path, models, dtype)
    requests = make_requests([*ADAPTERS, None])
    world.generate(requests, chunk=50)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for request in requests:
        check(request, models[request.adapter] if request.adapter else base, tolerance)


def test_a_broken_row_is_reported_alone(llama: tuple[Path, dict[str, peft.PeftModel]]) -> None:
    path, models = llama
    world = make_world(path, models)
    world.runner._decoder.weights.embed[5] = torch.nan
    broken, fine = Request([7, 5, 9], "all", max_tokens=3), Request([7, 6, 9], "all", max_tokens=3)
    world.generate([broken, fine], by_reference=True)
    assert broken.output == [-1, -1, -1]
    check(fine, models["all"])


def test_best_and_prompt_logprobs_in_chunks_of_rows(
    llama: tuple[Path, dict[str, peft.PeftModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, models = llama
    requests = make_requests(["all", None], lens=(133,))
    for request in requests:
        request.logprobs, request.prompt_logprobs = 3, 2
    world = make_world(path, models)
    monkeypatch.setattr(f"{type(world.runner).__module__}.PROMPT_LOGPROB_ROWS", 16)
    output = world.step([(request, 133) for request in requests])
    assert output.prompt_best_ids is not None
    assert output.prompt_best_ids.shape == (264, 2)
    check(requests[0], models["all"])
    with torch.inference_mode():
        expected = models["all"](torch.tensor([requests[0].prompt])).logits[0].log_softmax(-1)
    assert list(requests[0].best[0]) == expected[-1].topk(3).indices.tolist()
    assert max(requests[0].best[0].values()) == pytest.approx(float(expected[-1].max()), abs=tolerance(1e-4))
    first = [r.adapter for r in sorted(requests, key=lambda r: r.adapter or "")].index("all") * 132
    assert output.prompt_best_ids[first : first + 132].tolist() == expected[:-1].topk(2).indices.tolist()
