"""The configuration of `slora serve`: flags, variables, the file, defaults."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ADAPTERS, BASE
from serving import ADMIN, Served

from slora import _core
from slora.cli import main
from slora.config import Config, doubtful_variables, hint
from slora.errors import ConfigError
from slora.options import Options
from slora.settings import BY_NAME, SETTINGS, VLLM_HINTS, adapters, texts

pytestmark = pytest.mark.cpu_only(reason="settings, before any engine")

SAMPLES = {"adapters": "a=b", "texts": "x", "text": "x", "boolean": "true", "integer": "7", "number": "1.5"}
SAMPLES |= {"num_bytes": "64MiB", "port": "81", "sampling": '{"top_k": 3}'}
"""A value that each kind of setting takes."""


def in_force(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """Setting → JSON and source, as `--show-config` prints them."""
    assert main(["serve", "--show-config", *arguments]) == 0
    lines = [line.removeprefix("# ") for line in capsys.readouterr().out.splitlines() if ": " in line]
    pairs = (line.split(": ", 1) for line in lines)
    return {name: tuple(rest.rsplit("  # ", 1)) for name, rest in pairs}  # type: ignore[misc]


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nhost: a\nmax-running: 1\n")
    monkeypatch.setenv("SLORA_PORT", "2")
    monkeypatch.setenv("SLORA_HOST", "b")
    found = in_force(capsys, "--config", str(file), "--port", "3")
    assert found["port"] == ("3", "--port")
    assert found["host"] == ('"b"', "SLORA_HOST")
    assert found["max_running"] == ("1", str(file))
    assert found["max_batch_tokens"] == ("2048", "default")
    assert found.keys() == SETTINGS.keys()


def test_what_is_shown_is_a_file_that_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["m", "--adapter", "a=b", "c=d", "--no-prefetch", "--max-model-len", "9", "--pool-bytes", "8GiB"]
    arguments += ["--served-model-name", "x", "y", "--step-timeout", "2.5", "--queue", "fair"]
    assert main(["serve", *arguments, "--show-config"]) == 0
    file = tmp_path / "serve.yaml"
    file.write_text(capsys.readouterr().out)
    first, second = in_force(capsys, *arguments), in_force(capsys, "--config", str(file))
    assert {name: value for name, (value, _) in first.items()} == {name: value for name, (value, _) in second.items()}
    assert first["pool_bytes"] == (str(8 << 30), "--pool-bytes")
    assert first["queue"] == ('"fair"', "--queue")
    assert json.loads(first["adapter"][0])[1] == {"name": "c", "path": "d", "pinned": False}


def test_keys_are_counted_and_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLORA_API_KEY", '["secret-1", "secret-2"]')
    assert main(["serve", "--show-config", "--admin-key", "secret-3"]) == 0
    output = capsys.readouterr().out
    assert "api_key: 2 given, not shown  # SLORA_API_KEY" in output
    assert "admin_key: 1 given" in output
    assert "secret" not in output
    with pytest.raises(ConfigError) as refused:
        Config({}, {"SLORA_ADMIN_KEY": '["secret'})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_setting_is_a_flag_a_variable_and_a_key(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = BY_NAME[name]
    flag = "--" + name.replace("_", "-")
    is_switch = isinstance(setting.default(), bool)
    raw = SAMPLES[setting.parse.__name__]
    value = setting.parse(raw)
    file = tmp_path / "serve.yaml"
    file.write_text(f"{flag[2:]}: {raw}\n")
    for config, source in [
        (Config({"config": str(file)}, {}), str(file)),
        (Config({}, {f"SLORA_{name.upper()}": raw}), f"SLORA_{name.upper()}"),
    ]:
        assert (config[setting.name], config.source(setting.name)) == (value, source)
    found = in_force(capsys, *([flag] if is_switch else [flag, raw]))
    assert found[setting.name][1] == "--" + setting.name.replace("_", "-")


def test_every_field_of_the_server_and_of_the_engine_is_a_setting() -> None:
    defaults = json.loads(_core.Server.default_config())
    known = {(setting.owner, setting.owner_field) for setting in SETTINGS.values()}
    assert {("limits", name) for name in defaults.pop("limits")} <= known
    assert {("server", name) for name in defaults} <= known
    assert {("engine", name) for name in Options.__dataclass_fields__ if name != "adapters"} <= known


def test_what_was_not_given_is_left_to_its_owner() -> None:
    config = Config({"model": "m", "max_n": "4", "adapter_dir": "d", "device": "cpu"}, {})
    assert config.server() == {"model": str(Path("m").absolute()), "adapter_dir": "d", "limits": {"max_n": 4}}
    assert Config({"model": "."}, {}).server()["model"] == str(Path.cwd()), "a name for the base"
    assert config.fields("engine") == {"device": "cpu"}
    with pytest.raises(ConfigError, match="hint: slora serve path/to/base"):
        Config({}, {}).server()


def test_adapters_are_taken_in_every_spelling() -> None:
    expected = [{"name": "a", "path": "b=c", "pinned": False}]
    assert adapters("a=b=c") == adapters(["a=b=c"]) == adapters({"a": "b=c"}) == expected
    vllm = '{"name": "a", "path": "b=c", "base_model_name": "m"}'
    assert adapters(vllm) == adapters([vllm]) == adapters(f"[{vllm}]") == adapters([json.loads(vllm)]) == expected
    assert adapters([{"name": "a", "path": "b=c", "pinned": True}])[0]["pinned"] is True
    assert texts(["x", '["y", "z"]']) == ["x", "y", "z"]
    for bad in ("a", "=b", "a=", "{", '{"name": "a"}', '{"name": "a", "path": "b", "rank": 1}', [3], {"a": 3}):
        with pytest.raises(ValueError, match=r"must be|no JSON|may have"):
            adapters(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "unknown key 'prot'; hint: did you mean port?"),
        ("gpu-memory-utilization: 0.9", "hint: --pool-fraction"),
        ("port: many", "port 'many': must be an integer"),
        ("port: 70000", "port 70000: must be a port"),
        ("port: true", "must be an integer"),
        ("seed: -1", "must be an integer, 0 or more"),
        ("sampling_defaults: {temp: 1}", "unknown field 'temp'; hint: there are temperature, top_p"),
        ("pool_bytes: 8GB", "as in 8GiB"),
        ("drain_timeout: .nan", "must be a number"),
        ("prefetch: 3", "must be true or false"),
        ("api_key: 1234", "api_key: must be a text; hint: in a file, quote it"),
        ("port: 1\nport: 2", "port is there twice"),
        ("max_context: 1\nmax-model-len: 2", "max_context is there twice, with 'max-model-len'"),
        ("- port", "must be a mapping"),
        ("port: [", "is no YAML"),
        ("port: !!python/object/apply:os.getpid []", "is no YAML"),
        ("\xff", "is no YAML"),
        ("seed: 2026-99-99", "is no YAML"),
        ("port: " + "[" * 100_000, "is no YAML"),
        ("# " + "x" * (1 << 20), "larger than"),
        ("? [port]\n: 1", "is no YAML"),
        ("~: 1", "unknown key '~'"),
        ("<<: {port: 1}", "unknown key '<<'"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_a_hint(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as refused:
        Config({"config": str(file)}, {})
    assert str(refused.value).startswith(str(file))
    assert message in str(refused.value)


def test_an_empty_file_sets_nothing_and_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\nport: null\n")
    assert Config({"config": str(tmp_path / "empty.yaml")}, {}).source("port") == "default"
    with pytest.raises(ConfigError, match="cannot be read"):
        Config({}, {"SLORA_CONFIG": str(tmp_path / "nowhere.yaml")})


def test_variables_with_a_mistake_are_told() -> None:
    with pytest.raises(ConfigError, match="SLORA_MAX_MODEL_LEN and SLORA_MAX_CONTEXT are one setting"):
        Config({}, {"SLORA_MAX_CONTEXT": "1", "SLORA_MAX_MODEL_LEN": "1"})
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        Config({}, {"SLORA_PORT": "tcp://10.0.0.1:8000"})
    kubernetes = {"SLORA_SERVICE_HOST": "a", "SLORA_SERVICE_PORT": "1", "SLORA_PORT_8000_TCP_ADDR": "b"}
    assert doubtful_variables(kubernetes | {"SLORA_CACHE_DIR": "c", "SLORA_PORT": "1"}) == []
    assert doubtful_variables({"SLORA_ADAPTR_DIR": "x"}) == [
        "SLORA_ADAPTR_DIR sets nothing; did you mean SLORA_ADAPTER_DIR?"
    ]


def test_a_command_line_of_vllms_is_taken_where_it_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    lora = [
        "--enable-lora",
        "--lora-modules",
        "a=b",
        '{"name": "c", "path": "d", "base_model_name": "m"}',
        "--max-loras",
        "4",
    ]
    others = [
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "8",
        "--served-model-name",
        "x",
        "y",
        "--allowed-origins",
        '["*"]',
    ]
    found = in_force(capsys, "m", *lora, *others)
    values = {name: json.loads(found[name][0]) for name in ("max_adapters", "max_context", "max_running")}
    assert values == {"max_adapters": 4, "max_context": 64, "max_running": 8}
    assert [adapter["name"] for adapter in json.loads(found["adapter"][0])] == ["a", "c"]
    assert json.loads(found["served_model_name"][0]) == ["x", "y"]
    assert json.loads(found["allowed_origins"][0]) == ["*"]


def test_flags_of_vllm_that_mean_something_else_are_refused_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert not VLLM_HINTS.keys() & BY_NAME.keys()
    with pytest.raises(SystemExit) as end:
        main(["serve", str(BASE), "--max-cpu-loras", "64"])
    assert end.value.code == 2
    assert "hint: --host-bytes bounds the host tier" in capsys.readouterr().err
    assert hint("adaptor-dir") == "did you mean --adapter-dir?"
    assert hint("zzz") == "slora serve --help lists what there is"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-n", "0"],
        ["--max-queued-tokens", "0"],
        ["--header-timeout", "0"],
        ["--adapter-root", "/nowhere"],
        ["--api-keys-file", "/nowhere"],
        ["--metrics-prefix", "a.b"],
        ["--allowed-origins", "https://a.test/"],
        ["--allowed-origins", "a.test"],
        ["--served-model-name", "a:b"],
        ["--adapter", "base=/nowhere"],
    ],
)
def test_a_mistake_is_found_before_the_base_is_loaded(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/base", *arguments]) == 1
    assert "ConfigError" in capsys.readouterr().err


def test_a_port_that_is_taken_is_found_before_the_base_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments in (["--port", port], ["--port", "0", "--metrics-port", port]):
            assert main(["serve", "/no/such/base", *arguments]) == 1
            assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_weights_of_keys_need_a_fair_queue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [{"sha256": "0" * 64, "tenant": "a", "weight": 2}]}))
    arguments = ["serve", "/no/such/base", "--port", "0", "--api-keys-file", str(file)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "keys[0]: weight is 2" in error
    assert "hint: start the server with --queue fair" in error
    assert main([*arguments, "--queue", "fair"]) == 1
    assert "/no/such/base" in capsys.readouterr().err


def test_yaml_is_imported_for_a_file_only() -> None:
    script = "import sys; from slora.config import Config; Config({}, {}); assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_server_is_configured_by_all_three(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {BASE}\nadmin-key: {ADMIN}\nmax_n: 2\nlora-modules:\n  mirror: {ADAPTERS / 'reverse'}\n")
    environment = {"SLORA_CONFIG": str(file), "SLORA_SERVED_MODEL_NAME": '["tiny", "small"]'}
    with Served("--max-model-len", "64", environment=environment) as served:
        models = json.loads(served.call("/v1/models")[1])["data"]
        found = [(model["id"], model["max_model_len"]) for model in models]
        assert found == [("tiny", 64), ("small", 64), ("mirror", 64)]
        request = {"model": "small:mirror", "prompt": "banana", "temperature": 0}
        assert json.loads(served.call("/v1/completions", request)[1])["choices"][0]["text"] == "ananab"
        status, text = served.call("/v1/completions", request | {"n": 3})
        assert (status, json.loads(text)["error"]["param"]) == (400, "n")
