"""The effective configuration of `slora serve`: flags before variables before a file before defaults."""

import argparse
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora.errors import ConfigError
from slora.settings import (
    BY_NAME,
    GROUPS,
    SETTINGS,
    VLLM_HINTS,
    Setting,
    boolean,
    integer,
    num_bytes,
    number,
    port,
)

PREFIX = "SLORA_"
MAX_FILE_BYTES = 1 << 20
DESCRIPTION = """Serve the OpenAI API over HTTP.

Each setting is a flag, a variable and a key of the file: --max-running 8, SLORA_MAX_RUNNING=8, max_running: 8.
A flag goes before the variable, that before the file, that before the default. A variable or a key that is a list is
one value, or a JSON list. --show-config says what is in force, and where each value comes from.
"""
EXAMPLES = """examples:
  slora serve path/to/base --adapter-dir path/to/adapters
  slora serve path/to/base --adapter formal=path/to/formal --api-key $KEY --admin-key $ADMIN --host 0.0.0.0
  SLORA_API_KEY=$KEY slora serve path/to/base --lora-modules a=path/to/a b=path/to/b --max-model-len 4096
  slora serve --config serve.yaml --port 9000 --show-config
"""
_METAVARS: dict[object, str] = {integer: "N", port: "PORT", num_bytes: "BYTES", number: "S"}
_OTHER_VARIABLES = {"CONFIG", "CACHE_DIR"}


@dataclass(frozen=True)
class Given:
    value: Any
    source: str


class Config:
    """What is in force, by setting. Raises ConfigError for what cannot be, with its source and a hint."""

    def __init__(self, flags: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        given = {name: Given(setting.default(), "default") for name, setting in SETTINGS.items()}
        if path := flags.get("config") or environment.get(f"{PREFIX}CONFIG"):
            given |= _from_file(Path(path))
        given |= _from_environment(environment)
        for name in SETTINGS.keys() & flags.keys():
            given[name] = _given(SETTINGS[name], flags[name], _flag(name))
        self._given = given

    def __getitem__(self, name: str) -> Any:
        return self._given[name].value

    def source(self, name: str) -> str:
        """`--port`, `SLORA_PORT`, `serve.yaml` or `default`."""
        return self._given[name].source

    def fields(self, owner: str) -> dict[str, Any]:
        """What one of the owners is told, without what it knows as its own default."""
        settings = [setting for setting in SETTINGS.values() if setting.owner == owner]
        return {s.owner_field: self[s.name] for s in settings if self.source(s.name) != "default"}

    def server(self) -> dict[str, Any]:
        """The configuration of the HTTP server."""
        if not self["model"]:
            raise ConfigError("no model; hint: slora serve path/to/base, or SLORA_MODEL")
        # Clients are told where the base lies, and its folder may be its name.
        fields = {"model": os.path.abspath(self["model"]), "limits": self.fields("limits")}
        return self.fields("server") | fields

    def __str__(self) -> str:
        """As a file that `--config` reads; keys are counted, not shown."""
        lines = []
        for group, settings in GROUPS.items():
            lines.append(f"# {group}")
            for setting in settings:
                value, source = self[setting.name], self.source(setting.name)
                if setting.is_secret and value:
                    lines.append(f"# {setting.name}: {len(value)} given, not shown  # {source}")
                else:
                    lines.append(f"{setting.name}: {json.dumps(value, ensure_ascii=False)}  # {source}")
        return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, without defaults, so that only what was given is there."""
    parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="folder of the base model")
    parser.add_argument("--config", metavar="FILE", help="YAML: setting: value")
    parser.add_argument("--show-config", action="store_true", help="print the configuration in force, and exit")
    parser.add_argument("--enable-lora", action="store_true", help="vLLM's; adapters are always served")
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            _add_flag(group, setting)


def _add_flag(group: Any, setting: Setting) -> None:
    default = setting.default()
    shown = "" if default in (None, [], "", {}) or setting.is_secret else f" (default: {_shown(default)})"
    options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": setting.help + shown}
    if setting.parse is boolean:
        options |= {"action": argparse.BooleanOptionalAction}
    else:
        options |= {"metavar": setting.metavar or _METAVARS.get(setting.parse) or setting.name.split("_")[-1].upper()}
    if setting.is_list:
        options |= {"nargs": "+", "action": "extend"}
    group.add_argument(*map(_flag, setting.names), **options)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def unrecognized(arguments: list[str]) -> str:
    """Why these arguments are refused, with what may have been meant."""
    flags = [argument for argument in arguments if argument.startswith("--")]
    hints = [hint(flag.partition("=")[0].removeprefix("--")) for flag in flags]
    return f"unrecognized arguments: {' '.join(arguments)}" + "".join(f"; hint: {hint}" for hint in hints)


def hint(name: str, as_flag: bool = True) -> str:
    """What may have been meant by a name that no setting has."""
    name = name.lower().replace("-", "_")
    if name in VLLM_HINTS:
        return VLLM_HINTS[name]
    close = difflib.get_close_matches(name, BY_NAME, 1)
    if not close:
        return "slora serve --help lists what there is"
    return f"did you mean {_flag(close[0]) if as_flag else close[0]}?"


def _from_file(path: Path) -> dict[str, Given]:
    keys, values = _read_file(path)
    found: dict[str, Given] = {}
    for key in keys:
        name = key.replace("-", "_")
        if name not in BY_NAME:
            raise ConfigError(f"{path}: unknown key {key!r}; hint: {hint(key, as_flag=False)}")
        setting = BY_NAME[name]
        if setting.name in found:
            raise ConfigError(f"{path}: {setting.name} is there twice, with {key!r}")
        if values[key] is not None:
            found[setting.name] = _given(setting, values[key], str(path), key)
    return found


def _read_file(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Every key, one that is there twice too, and the values."""
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        tree, values = yaml.compose(content, yaml.SafeLoader), yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no YAML: {error}") from error
    if tree is None:
        return [], {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}: must be a mapping; hint: port: 8000")
    return [str(node.value) for node, _ in tree.value], values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for name, setting in BY_NAME.items():
        variable = PREFIX + name.upper()
        if raw := environment.get(variable):
            if setting.name in found:
                raise ConfigError(f"{variable} and {found[setting.name].source} are one setting; hint: leave one out")
            found[setting.name] = _given(setting, raw, variable)
    return found


def doubtful_variables(environment: Mapping[str, str]) -> list[str]:
    """Warnings about variables that are most likely misspelt; others may be anybody's: Kubernetes sets some."""
    names = {name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX)}
    known = [name.upper() for name in BY_NAME]
    close = {name: difflib.get_close_matches(name, known, 1, 0.8) for name in names - set(known) - _OTHER_VARIABLES}
    return [f"{PREFIX}{name} sets nothing; did you mean {PREFIX}{found[0]}?" for name, found in close.items() if found]


def _given(setting: Setting, raw: object, source: str, key: str = "") -> Given:
    try:
        return Given(setting.parse(raw), source)
    except ValueError as error:
        where = f"{source}: {key}" if key else source
        shown = "" if setting.is_secret else f" {raw!r}"
        raise ConfigError(f"{where}{shown}: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
