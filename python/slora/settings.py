"""The settings of `slora serve`: one table, of which flags, variables, the file's keys and the help are made."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slora import _core
from slora.options import DTYPES, LOAD_FORMATS, QUEUES, Options

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def integer(raw: object) -> int:
    """Also of a text. Raises ValueError, like every function of this kind."""
    try:
        value = int(raw) if isinstance(raw, str) else raw
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("must be an integer, 0 or more")
    return value


def port(raw: object) -> int:
    if isinstance(raw, str) and "://" in raw:
        raise ValueError("must be a port; hint: Kubernetes sets this variable itself: enableServiceLinks: false")
    if (value := integer(raw)) > 65_535:
        raise ValueError("must be a port, 0 to 65535")
    return value


def num_bytes(raw: object) -> int:
    unit = _UNITS.get(raw[-3:], 1) if isinstance(raw, str) else 1
    try:
        return integer(raw[:-3] if isinstance(raw, str) and unit > 1 else raw) * unit
    except ValueError:
        raise ValueError("must be a number of bytes, or one of KiB, MiB or GiB as in 8GiB") from None


def number(raw: object) -> float:
    try:
        value = float(raw) if isinstance(raw, str | int | float) and not isinstance(raw, bool) else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("must be a number, 0 or more")
    return value


def boolean(raw: object) -> bool:
    value = _WORDS.get(raw.lower()) if isinstance(raw, str) else raw
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(raw: object) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError("must be a text; hint: in a file, quote it")
    return raw


def texts(raw: object) -> list[str]:
    return [text(item) for item in _items(raw)]


def mapping(raw: object) -> dict[str, Any]:
    value = _parse_json(raw) if isinstance(raw, str) else raw
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def sampling(raw: object) -> dict[str, Any]:
    known, value = _SERVER_DEFAULTS["sampling_defaults"], mapping(raw)
    if unknown := set(value) - set(known):
        raise ValueError(f"unknown field {min(map(str, unknown))!r}; hint: there are {', '.join(known)}")
    return value


def adapters(raw: object) -> list[dict[str, Any]]:
    """`name=path`, vLLM's JSON object, several of these, or a file's mapping of names to paths."""
    if isinstance(raw, dict):
        return [_adapter({"name": name, "path": path}) for name, path in raw.items()]
    return [_adapter(item) for item in _items(raw)]


def _adapter(item: object) -> dict[str, Any]:
    if isinstance(item, str) and not item.startswith("{"):
        name, _, path = item.partition("=")
        fields: dict[str, Any] = {"name": name, "path": path}
    else:
        fields = mapping(item)
    # vLLM's field for the `parent` that is shown, which here is always the base.
    fields = {key: value for key, value in fields.items() if key != "base_model_name"}
    if unknown := set(fields) - {"name", "path", "pinned"}:
        raise ValueError(f"adapter with {min(unknown)!r}: may have name, path and pinned")
    if not all(isinstance(fields.get(key), str) and fields[key] for key in ("name", "path")):
        raise ValueError('must be NAME=PATH or {"name": NAME, "path": PATH}; hint: MODEL comes before the flags')
    return fields | {"pinned": boolean(fields.get("pinned", False))}


def _items(raw: object) -> list[object]:
    """A list, also as JSON; anything else is the only item of one."""
    if isinstance(raw, list):
        return [item for part in raw for item in _items(part)]
    if isinstance(raw, str) and raw.startswith("["):
        return list(_parse_json(raw))
    return [raw]


def _parse_json(raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None


@dataclass(frozen=True)
class Setting:
    """One thing that an operator may set."""

    name: str
    """The flag is `--a-name`, the variable `SLORA_A_NAME`, the file's key `a_name` or `a-name`."""
    parse: Callable[[object], Any]
    help: str
    aliases: tuple[str, ...] = ()
    """vLLM's names, where they mean the same."""
    owner: str = "server"
    """Whose field it is: the server's, its `limits`', the engine's, or `slora serve`'s own."""
    field: str = ""
    """Its name there, if it is another."""
    metavar: str = ""
    is_secret: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def owner_field(self) -> str:
        return self.field or self.name

    @property
    def is_list(self) -> bool:
        return self.parse in (texts, adapters)

    def default(self) -> Any:
        return _DEFAULTS[self.owner].get(self.owner_field)


def _engine(name: str, parse: Callable[[object], Any], help: str, alias: str = "", metavar: str = "") -> Setting:
    return Setting(name, parse, help, (alias,) if alias else (), owner="engine", metavar=metavar)


def _limit(name: str, parse: Callable[[object], Any], help: str, field: str = "") -> Setting:
    return Setting(name, parse, help, owner="limits", field=field)


_SERVER_DEFAULTS = json.loads(_core.Server.default_config())
_DEFAULTS: dict[str, dict[str, Any]] = {
    "server": {
        key: value for key, value in _SERVER_DEFAULTS.items() if key not in ("model", "sampling_defaults", "limits")
    },
    "limits": _SERVER_DEFAULTS["limits"],
    "engine": {field.name: field.default for field in dataclasses.fields(Options)},
    "command": {"drain_timeout": 15.0},
}

GROUPS: dict[str, tuple[Setting, ...]] = {
    "model": (
        Setting("model", text, "folder of the base model; also the first argument", metavar="MODEL"),
        Setting(
            "served_model_name",
            texts,
            "names of the base model; default: its folder's name",
            field="served_model_names",
            metavar="NAME",
        ),
        _engine(
            "max_context", integer, "tokens of prompt and answer together; default: the model's limit", "max_model_len"
        ),
        _engine("dtype", text, f"one of {', '.join(DTYPES)}"),
        _engine("load_format", text, f"one of {', '.join(LOAD_FORMATS)}; dummy: random weights"),
        _engine("seed", integer, "for requests that bring no seed of their own"),
        Setting(
            "sampling_defaults",
            sampling,
            'for requests that leave them out, as JSON: {"temperature": 0.7}',
            ("override_generation_config",),
            metavar="JSON",
        ),
        Setting(
            "generation_config",
            text,
            "further defaults: auto takes the model folder's generation_config.json, vllm none, DIR that folder's",
            metavar="auto|vllm|DIR",
        ),
    ),
    "adapters": (
        Setting(
            "adapter",
            adapters,
            "adapters to register at the start, also as JSON with name, path and pinned",
            ("lora_modules",),
            field="adapters",
            metavar="NAME=PATH",
        ),
        Setting("adapter_dir", text, "folder whose sub-folders are adapters; watched for changes", metavar="DIR"),
        Setting("adapter_poll", number, "seconds between two looks at --adapter-dir", field="adapter_poll_s"),
        Setting(
            "adapter_root",
            texts,
            "folders from which adapters may be loaded over HTTP, beside --adapter-dir",
            field="adapter_roots",
            metavar="DIR",
        ),
        _engine(
            "max_adapters",
            integer,
            "different adapters among the running requests; any number may be registered",
            "max_loras",
        ),
        _engine(
            "max_rank", integer, "rank of an adapter, at most; default: 256 on CUDA, any on the CPU", "max_lora_rank"
        ),
    ),
    "device and memory": (
        _engine("device", text, "auto, cpu, cuda or cuda:N"),
        _engine("pool_bytes", num_bytes, "size of the pool of KV cache and adapters, as in 8GiB; CPU: 512 MiB"),
        _engine(
            "pool_fraction",
            number,
            "the same as a share of the memory that the base leaves free; CUDA: 0.9",
            metavar="SHARE",
        ),
        _engine("host_bytes", num_bytes, "size of the host tier, where adapters wait; CPU: 1 GiB, CUDA: 8 GiB"),
        _engine("page_tokens", integer, "tokens of a page of the pool; default: chosen by the model", "block_size"),
        _engine("max_running", integer, "requests that run at once; CUDA: at most 1024", "max_num_seqs"),
        _engine("max_batch_tokens", integer, "tokens that one step computes at most", "max_num_batched_tokens"),
        _engine("max_waiting", integer, "requests that wait in the engine, at most"),
        _engine("prefetch", boolean, "copy adapters to the device before their requests run"),
    ),
    "network": (
        Setting("host", text, "address to listen on; without a key only loopback is answered"),
        Setting("port", port, "port to listen on; 0: any free one"),
        Setting("metrics_port", port, "second port, with /metrics and the health routes, without a key"),
        Setting("allowed_origins", texts, "origins from which browsers may call; *: any", metavar="ORIGIN"),
        Setting("num_threads", integer, "HTTP threads; 0: half of the cores, 1 to 8"),
        Setting("drain_timeout", number, "seconds that running requests get after the first signal", owner="command"),
        Setting(
            "step_timeout",
            number,
            "seconds after which a step counts as hung and ends the server; 0: never",
            field="step_timeout_s",
        ),
    ),
    "keys": (
        Setting("api_key", texts, "keys of users", field="api_keys", metavar="KEY", is_secret=True),
        Setting(
            "api_keys_file", text, "keys of users with tenants, adapters and limits, as in docs/http.md", metavar="FILE"
        ),
        Setting(
            "admin_key", texts, "keys that may also manage adapters", field="admin_keys", metavar="KEY", is_secret=True
        ),
    ),
    "requests": (
        _engine(
            "queue",
            text,
            "who is next: fcfs, the one who came first; fair, the tenant (without keys: the adapter) that got the "
            "fewest tokens for its weight",
            metavar="|".join(QUEUES),
        ),
        Setting("strict_fields", boolean, "refuse requests with unknown fields"),
        Setting("access_log", boolean, "log one line for each request, never its prompt"),
        Setting("metrics_prefix", text, "prefix of the metrics that other servers have too"),
    ),
    "limits": (
        _limit("max_connections", integer, "open connections; further ones get 503"),
        _limit("max_queued_requests", integer, "answers that may wait, beyond those that can run at once"),
        _limit("max_queued_tokens", integer, "prompt tokens of all unfinished requests"),
        _limit("max_queued_bytes", num_bytes, "bodies being read or worked on, together"),
        _limit("max_body_bytes", num_bytes, "body of one request"),
        _limit("max_header_bytes", num_bytes, "headers of one request"),
        _limit("max_json_depth", integer, "nesting of a JSON body"),
        _limit("max_n", integer, "answers to one request, over all its prompts"),
        _limit("max_messages", integer, "messages of one chat"),
        _limit("max_message_bytes", num_bytes, "bytes of the messages of one chat"),
        _limit("header_timeout", number, "seconds for a request's headers", "header_timeout_s"),
        _limit("body_timeout", number, "seconds for a request's body", "body_timeout_s"),
        _limit(
            "stall_timeout", number, "seconds after which a reader that takes nothing is dropped", "stall_timeout_s"
        ),
        _limit("accept_timeout", number, "seconds that a stream's headers wait for its adapter", "accept_timeout_s"),
        _limit("keep_alive", number, "seconds between comments in a silent stream", "keep_alive_s"),
        _limit("text_threads", integer, "threads for templates and tokenizing"),
    ),
}
SETTINGS = {setting.name: setting for settings in GROUPS.values() for setting in settings}
BY_NAME = {name: setting for setting in SETTINGS.values() for name in setting.names}
"""Aliases too."""

VLLM_HINTS = {
    "gpu_memory_utilization": "--pool-fraction is the share of what is free once the base is loaded",
    "lora_dtype": "adapters are served in the base's type; leave it out",
    "fully_sharded_loras": "one GPU serves the base; leave it out",
    "max_cpu_loras": "--host-bytes bounds the host tier in bytes",
    "swap_space": "preempted requests are computed again; leave it out",
    "tensor_parallel_size": "one GPU serves the base; leave it out",
    "pipeline_parallel_size": "one GPU serves the base; leave it out",
    "data_parallel_size": "start one server for each GPU",
    "enforce_eager": "leave it out",
    "scheduling_policy": "--queue says who is next; priorities are the keys' (--api-keys-file)",
    "enable_chunked_prefill": "prefill is always chunked; --max-batch-tokens bounds a chunk",
    "enable_prefix_caching": "there is no prefix cache yet; leave it out",
    "kv_cache_dtype": "the KV cache has the base's type; leave it out",
    "quantization": "quantised bases are not supported",
    "tokenizer": "the tokenizer is the model folder's",
    "trust_remote_code": "no code of a checkpoint is ever run; leave it out",
    "chat_template": "templates come from the model's folder",
    "disable_log_requests": "--no-access-log",
    "enable_log_requests": "requests are logged without their prompts, always",
    "disable_uvicorn_access_log": "--no-access-log",
    "uvicorn_log_level": "--no-access-log",
    "allow_credentials": "keys are sent as headers; leave it out",
    "root_path": "a proxy's business",
    "ssl_keyfile": "TLS is a proxy's business",
    "ssl_certfile": "TLS is a proxy's business",
    "enable_auto_tool_choice": "tools are not supported yet",
    "tool_call_parser": "tools are not supported yet",
    "reasoning_parser": "reasoning is not told apart from text",
    "max_logprobs": "requests may ask for 20",
    "revision": "the model is a folder on this machine",
    "download_dir": "nothing is downloaded",
}
