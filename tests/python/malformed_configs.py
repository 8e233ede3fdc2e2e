"""Configs of checkpoints that cannot be served, for `malformed`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint, Group, Write

CORPUS_REASONS = "bad_config bad_config_value unknown_config_key not_lora duplicate_key bad_pattern rank_zero "
CORPUS_REASONS += (
    "unsupported_alora unsupported_bdlora unsupported_dora unsupported_layer_replication unsupported_qalora "
)
CORPUS_REASONS += "unsupported_lora_bias unsupported_modules_to_save unsupported_target_parameters "
CORPUS_REASONS += "unsupported_trainable_tokens"
FEATURES: list[tuple[str, str, list[Any]]] = [
    ("use_dora", "unsupported_dora", [True]),
    ("lora_bias", "unsupported_lora_bias", [True]),
    ("modules_to_save", "unsupported_modules_to_save", [["lm_head"], ["embed_tokens", "lm_head"]]),
    ("trainable_token_indices", "unsupported_trainable_tokens", [[1, 2], {"embed_tokens": [1]}]),
    ("target_parameters", "unsupported_target_parameters", [["experts.w"]]),
    ("layer_replication", "unsupported_layer_replication", [[[0, 2], [1, 3]]]),
    ("alora_invocation_tokens", "unsupported_alora", [[3]]),
    ("use_qalora", "unsupported_qalora", [True]),
    ("use_bdlora", "unsupported_bdlora", [{"nblocks": 2}]),
    ("arrow_config", "unsupported_arrow", [{"top_k": 2}]),
    ("kasa_config", "unsupported_kasa", [{"beta": 1}]),
    ("monteclora_config", "unsupported_monteclora", [{"n": 1}]),
    ("velora_config", "unsupported_velora", [{"n": 1}]),
    ("corda_config", "unsupported_corda", [{"n": 1}]),
    ("eva_config", "unsupported_eva", [{"rho": 2.0}]),
    ("lora_ga_config", "unsupported_lora_ga", [{"n": 1}]),
    ("init_lora_weights", "unsupported_init", ["pissa", "olora", "loftq", "corda"]),
    ("ensure_weight_tying", "unsupported_weight_tying", [True]),
]


def configs(good: Checkpoint, corpus: Path) -> Iterator[Group]:
    def each(name: str, *values: Any) -> list[Write]:
        return [good.with_config(**{name: value}) for value in values]

    def raw(*texts: str | bytes) -> list[Write]:
        return [good.files(config=text if isinstance(text, bytes) else text.encode()) for text in texts]

    text = json.dumps(good.config)
    yield "config cut short", "bad_config", raw(*(text[: len(text) * i // 64] for i in range(64)))
    controls = [text[:i] + "\x01" + text[i + 1 :] for i in range(0, len(text), len(text) // 48)]
    yield "config with a control character", "bad_config bad_config_value", raw(*controls)
    yield "config that is no object", "bad_config", raw("[]", "null", "7", '"LORA"', "true", "{}{}", text + "x")
    yield (
        "config of another encoding",
        "bad_config",
        raw(text.encode("utf-16"), text.encode("utf-32"), b"\xff" + text.encode()),
    )
    yield "config nested too deep", "bad_config", raw(*(f'{{"x":{"[" * n}' for n in (200, 10_000, 100_000)))
    yield "config too large", "config_too_large", raw(" " * ((1 << 20) + 1), text + " " * (1 << 20))
    yield (
        "config of the fuzzer's",
        CORPUS_REASONS,
        raw(*(path.read_bytes() for path in sorted(corpus.glob("store_config/bad-*")))),
    )
    twice = [f'{{"{key}":{json.dumps(value)},{text[1:]}' for key, value in good.config.items()]
    yield "config with a key twice", "duplicate_key", raw(*twice)
    kinds = [
        "LOHA",
        "LOKR",
        "IA3",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "ADALORA",
        "OFT",
        "BOFT",
        "VERA",
        "lora",
        "",
        None,
    ]
    yield "not LoRA", "not_lora", each("peft_type", *kinds, 7, [], {})
    unknown = [good.with_config(**{f"use_{i}": value}) for i in range(8) for value in (True, 0.5, "x", {"n": 1})]
    yield "unknown key that is in use", "unknown_config_key", unknown
    yield "rank of a wrong kind", "bad_config_value", each("r", -1, 8.5, "8", 10**11, 10**30, [], {}, True)
    yield "rank 0", "rank_zero", each("r", 0)
    yield "another rank than the tensors'", "contradictory_rank", each("r", *range(3, 35))
    yield "alpha of a wrong kind", "bad_config_value", each("lora_alpha", 0, -1, -0.5, "4", [], {}, True)
    yield (
        "alpha that is no number",
        "bad_config",
        raw(*(text.replace('"lora_alpha": 4', f'"lora_alpha": {x}') for x in ("NaN", "1e", "+1"))),
    )
    yield "scale out of range", "bad_scale", each("lora_alpha", 1e300, 1e-300, 1e40, 1e-44)
    yield "switch that is none", "bad_config_value", each("use_rslora", "yes", 1, [], {})
    yield "bias of a wrong kind", "bad_config_value", each("bias", "some", 7, [], "NONE")
    yield "targets of a wrong kind", "bad_config_value", each("target_modules", 7, {"a": 1}, [1], True)
    for field, reason, values in FEATURES:
        yield f"unsupported: {field}", reason, each(field, *values)
    pattern_fields = ("rank_pattern", "alpha_pattern")
    patterns = [path.read_text().split("\n")[0] for path in sorted(corpus.glob("store_pattern/bad-[a-z]*"))]
    bad = [good.with_config(**{field: {key: 2}}) for field in pattern_fields for key in patterns if key != "x"]
    yield "pattern that is not linear", "bad_pattern", bad
    wrong = [
        good.with_config(**{field: value})
        for field in pattern_fields
        for value in ([8], 7, "x", {"q_proj": "2"}, {"q_proj": -2})
    ]
    yield "pattern of a wrong kind", "bad_config_value", wrong
    yield "pattern with rank 0", "rank_zero", each("rank_pattern", {"q_proj": 0}, {"v_proj": 0}, {"x": 0})
    yield (
        "pattern against the tensors",
        "contradictory_rank",
        each("rank_pattern", *({m: n} for m in ("q_proj", "v_proj") for n in range(3, 11))),
    )
    bombs = [{f"m{i}": 2 for i in range(5000)}, {f"m{i}.*": 2 for i in range(65)}]
    yield (
        "too many patterns",
        "too_many_patterns",
        [good.with_config(**{f: bomb}) for f in pattern_fields for bomb in bombs],
    )
    yield (
        "pattern too long",
        "bad_pattern",
        [good.with_config(**{f: {"x" * n + "*": 2}}) for f in pattern_fields for n in (1024, 100_000)],
    )
