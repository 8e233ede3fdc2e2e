#!/usr/bin/env python3
"""Train the example: a small Llama base, its tokenizer, and one PEFT adapter for each of ten text transformations.

    python train.py                    # everything, beside this file; a few minutes on a GPU
    python train.py --device cpu       # the same, hours
    python train.py --evaluate         # only score what is there (fp32, greedy, transformers + PEFT)

The recipe, which makes a rank of two enough to teach a transformation to a model of three million parameters:

1. Tokenizer: byte-level BPE whose merges only join the bytes of one character. So a letter is a token, which
   is what transformations of letters need, and any UTF-8 text can be encoded.
2. Base: trained on all transformations at once. A task token after the first token (``<|reverse|>``) says which
   one is asked for; without a task token the answer is the input itself. So the base can do everything
   but, left alone, only echoes.
3. Adapters: LoRA on the frozen base (already rounded to bfloat16, as it is stored), each trained on one
   transformation with prompts that hold no task token. All an adapter must learn is to say which task it is.

A prompt is plain text (``abc``), which the model closes itself by emitting ``<|assistant|>`` before the answer, or a
chat in the template's form. Answers end with ``<|end|>``. Only what the assistant says counts in the loss.
The words, the transformations and the split into training and held-out words are in corpus.py.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import ASSISTANT, BEGIN, END, PAD, SEED, SYSTEM, TASKS, USER, Batches, held_out_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("unknown role: " + message.role) -}}
    {%- endif -%}
    {{- "<|" + message.role + "|>" + message.content | trim + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


@dataclass
class Recipe:
    """One adapter's shape: together the ten cover what real PEFT checkpoints look like."""

    rank: int
    alpha: float
    targets: list[str] | str
    dtype: torch.dtype
    extra: dict[str, Any] = field(default_factory=dict)


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"v_proj": 20, r"layers\.0\.mlp\.(gate|up)_proj": 4},
    "alpha_pattern": {"v_proj": 30, "o_proj": 8.5},
}
RECIPES: dict[str, Recipe] = {
    "reverse": Recipe(8, 16, ["q_proj", "v_proj"], torch.bfloat16),
    "upper": Recipe(2, 4, ["q_proj", "v_proj"], torch.float32),
    "rot13": Recipe(16, 32, ATTENTION + MLP, torch.bfloat16),
    "stars": Recipe(4, 8, MLP, torch.float16),
    "stutter": Recipe(12, 12, ATTENTION + MLP, torch.float16),
    "sort": Recipe(32, 16, ATTENTION + MLP, torch.bfloat16, {"use_rslora": True}),
    "piglatin": Recipe(8, 16, ATTENTION + MLP, torch.float32, PATTERNS),
    "spell": Recipe(64, 64, r".*\.self_attn\.(q|v)_proj", torch.bfloat16),
    "count": Recipe(24, 48, ATTENTION, torch.bfloat16, {"layers_to_transform": [0, 1, 2]}),
    "twice": Recipe(16, 16, MLP, torch.float32),
}


def build_tokenizer(out: Path) -> None:
    """Write the tokenizer's two files: 256 bytes, two- and three-byte characters as merges, special tokens first."""
    specials = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT, *(f"<|{task}|>" for task in TASKS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=alphabet)
    ranges = [(0xA1, 0x100), (0x391, 0x3CA), (0x410, 0x450), (0x2013, 0x2015), (0x2018, 0x201E), (0x100, 0x180)]
    characters = [chr(code) for first, end in ranges for code in range(first, end)]
    tokenizer.train_from_iterator([c * (len(characters) - i) for i, c in enumerate(characters)], trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_held_out(out: Path) -> None:
    """Write heldout.json: the prompts go to ``generate`` as they are, ``max_tokens`` is enough for every answer."""
    pairs = {name: held_out_pairs(name, 32) for name in RECIPES}
    (out / "heldout.json").write_text(json.dumps({"max_tokens": 64, "adapters": pairs}, indent=1) + "\n")


def train(model: torch.nn.Module, batches: Batches, peak_lr: float, workers: int) -> None:
    """AdamW with warm-up and cosine decay over all batches."""
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    steps, warm_up, started = len(batches), min(200, len(batches) // 10 + 1), time.monotonic()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    for step, (ids, labels) in enumerate(DataLoader(batches, batch_size=None, num_workers=workers)):
        ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0 or step == steps - 1:
            elapsed_s = time.monotonic() - started
            print(f"  {batches.stage} step {step} loss {loss.item():.4f} after {elapsed_s:.0f} s", flush=True)


def train_base(out: Path, args: argparse.Namespace) -> None:
    """Write base/. Echoing, which has no token, gets twice the share of a transformation."""
    path = out / "base"
    path.mkdir(parents=True, exist_ok=True)
    build_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(args.device)
    train(model, Batches(tokenizer, "base", [None, None, *TASKS], args.base_steps, args.rows), 1.5e-3, args.workers)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    model.to(torch.bfloat16).save_pretrained(path)


def train_adapter(out: Path, name: str, args: argparse.Namespace) -> None:
    """Write adapters/<name>/ as PEFT saves it; the base it names is this one, wherever it lies."""
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(args.device)
    base.name_or_path = base.config._name_or_path = "examples/tiny/base"
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path="examples/tiny/base",
        **recipe.extra,
    )
    torch.manual_seed(SEED)
    model = get_peft_model(base, config)
    train(model, Batches(tokenizer, name, [name], args.adapter_steps, args.rows // 4), 3e-3, args.workers)
    path = out / "adapters" / name
    shutil.rmtree(path, ignore_errors=True)
    model.to(recipe.dtype).save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: list[str], chat: bool) -> list[str]:
    """Greedy answers, without the special tokens around them."""
    if chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, add_special_tokens=not chat, padding=True, return_tensors="pt").to(model.device)
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_new_tokens=64, do_sample=False)[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def evaluate(out: Path, args: argparse.Namespace) -> None:
    """Print the exact-match scores of what is stored, in fp32, on the pairs of heldout.json and on a larger such set.

    ``token`` is the base's score with the task token: what the adapter has to bring back. ``echo`` is how often the
    base alone repeats its input.
    """
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    print("| adapter | with | chat | larger set | without | token | echo |\n" + "|---" * 7 + "|")
    for name, pairs in json.loads((out / "heldout.json").read_text())["adapters"].items():
        base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).to(args.device)
        prompts, answers = [p["prompt"] for p in pairs], [p["answer"] for p in pairs]

        def score(model: Any, prompts: list[str], answers: list[str], chat: bool = False) -> float:
            given = complete(model, tokenizer, prompts, chat)
            return sum(g == a for g, a in zip(given, answers, strict=True)) / len(answers)

        alone = [
            score(base, prompts, answers),
            score(base, [f"<|{name}|>{p}" for p in prompts], answers),
            score(base, prompts, prompts),
        ]
        model = PeftModel.from_pretrained(base, out / "adapters" / name)
        more = held_out_pairs(name, args.large_set)
        adapted = [
            score(model, prompts, answers),
            score(model, prompts, answers, chat=True),
            score(model, [p["prompt"] for p in more], [p["answer"] for p in more]),
        ]
        print(f"| {name} | " + " | ".join(f"{s:.3f}" for s in adapted + alone) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--base-steps", type=int, default=8000)
    parser.add_argument("--adapter-steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1024, help="batch of the base; adapters take a quarter of it")
    parser.add_argument("--large-set", type=int, default=512, help="held-out prompts of the larger set")
    parser.add_argument("--only", nargs="+", choices=RECIPES, help="train these adapters, on the base that is there")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, score what is there")
    args = parser.parse_args()
    if not args.evaluate:
        if not args.only:
            train_base(args.out, args)
        for name in args.only or RECIPES:
            train_adapter(args.out, name, args)
        write_held_out(args.out)
    evaluate(args.out, args)


if __name__ == "__main__":
    main()
