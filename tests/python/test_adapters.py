"""`llm.adapters`: names, versions, states, and what requests notice of it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASE, NAMES
from device import engine_options
from safetensors.torch import load_file, save_file

import slora

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def fresh() -> Iterator[slora.LLM]:
    with slora.LLM(BASE, adapters={"reverse": ADAPTERS / "reverse"}, **engine_options()) as llm:
        yield llm


def wait_for(llm: slora.LLM, name: str, state: str) -> None:
    deadline = time.monotonic() + 5
    while llm.adapters[name].state != state:
        assert time.monotonic() < deadline, llm.adapters[name]
        time.sleep(0.005)


def test_a_folder_of_adapters_is_a_mapping(llm: slora.LLM) -> None:
    assert sorted(llm.adapters) == NAMES
    assert len(llm.adapters) == len(NAMES)
    assert "reverse" in llm.adapters
    assert "nobody" not in llm.adapters
    assert llm.adapters.get("nobody") is None
    with pytest.raises(slora.UnknownAdapterError, match="nobody"):
        llm.adapters["nobody"]


def test_an_adapter_says_what_it_is(fresh: slora.LLM) -> None:
    info = fresh.adapters["reverse"]
    assert (info.name, info.version, info.state, info.reason, info.pins) == ("reverse", 1, "registered", None, 0)
    assert info.ranks == {"q_proj": (8, 8), "v_proj": (8, 8)}
    assert info.bytes == 4 * 8 * (256 + 256 + 256 + 128) * 4
    assert str(info.path) == str(ADAPTERS / "reverse")
    fresh.generate("abc", adapter="reverse", **GREEDY)
    assert fresh.adapters["reverse"].state == "resident"


def test_an_adapter_keeps_its_warnings(fresh: slora.LLM, tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "upper", tmp_path / "upper")
    config = tmp_path / "upper" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "down_proj"]}))
    added = fresh.adapters.add("upper", tmp_path / "upper")
    codes = [warning["code"] for warning in added.warnings]
    assert {"untargeted_module", "unused_target"} <= set(codes)
    assert fresh.adapters["upper"].warnings == added.warnings
    replaced = fresh.adapters.add("upper", ADAPTERS / "upper", replace=True)
    assert not {"untargeted_module", "unused_target"} & {warning["code"] for warning in replaced.warnings}


def test_adapters_come_and_go(fresh: slora.LLM, settled: Callable[[slora.LLM], slora.outputs.Stats]) -> None:
    assert fresh.adapters.add("loud", ADAPTERS / "upper").state == "registered"
    assert fresh.generate("abc", adapter="loud", **GREEDY).text == "ABC"
    with pytest.raises(slora.AdapterError, match="loud"):
        fresh.adapters.add("loud", ADAPTERS / "sort")
    fresh.adapters.remove("loud")
    assert list(fresh.adapters) == ["reverse"]
    with pytest.raises(slora.UnknownAdapterError, match="loud"):
        fresh.generate("abc", adapter="loud")
    with pytest.raises(slora.UnknownAdapterError, match="loud"):
        fresh.adapters.remove("loud")
    assert settled(fresh).resident_adapters == 0


def test_a_replaced_adapter_is_another_version(fresh: slora.LLM) -> None:
    assert fresh.generate("abc", adapter="reverse", **GREEDY).text == "cba"
    for version, name, answer in ((2, "upper", "ABC"), (3, "reverse", "cba")):
        assert fresh.adapters.add("reverse", ADAPTERS / name, replace=True).version == version
        assert fresh.generate("abc", adapter="reverse", **GREEDY).text == answer, "the very next request"


def test_the_one_of_a_folder_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    for name in ("good", "odd"):
        shutil.copytree(ADAPTERS / "upper", tmp_path / name)
    (tmp_path / "odd" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(slora.AdapterError, match=r"^adapter 'odd': .*LOHA"):
        slora.LLM(BASE, adapters=tmp_path, **engine_options())


def test_a_replacement_that_cannot_be_loaded_is_an_error_and_changes_nothing(fresh: slora.LLM, tmp_path: Path) -> None:
    assert fresh.generate("abc", adapter="reverse", **GREEDY).text == "cba"
    copy = tmp_path / "broken"
    shutil.copytree(ADAPTERS / "upper", copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(slora.AdapterError, match="weights must be finite"):
        fresh.adapters.add("reverse", copy, replace=True)
    assert fresh.generate("abc", adapter="reverse", **GREEDY).text == "cba"
    assert fresh.adapters["reverse"].version == 1


def test_a_pinned_adapter_is_loaded_at_once(fresh: slora.LLM) -> None:
    assert fresh.adapters.add("sort", ADAPTERS / "sort", pinned=True).pinned
    wait_for(fresh, "sort", "resident")
    fresh.adapters.pin("sort", False)
    assert not fresh.adapters["sort"].pinned


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 129, "ü"])
def test_names_that_cannot_be_one_are_refused(fresh: slora.LLM, name: str) -> None:
    with pytest.raises(slora.AdapterError, match="must be 1 to 128"):
        fresh.adapters.add(name, ADAPTERS / "upper")


def test_files_changed_after_registering_fail_their_requests_only(fresh: slora.LLM, tmp_path: Path) -> None:
    copy = tmp_path / "upper"
    shutil.copytree(ADAPTERS / "upper", copy)
    fresh.adapters.add("upper", copy)
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(slora.AdapterError, match="upper"):
        fresh.generate("abc", adapter="upper", **GREEDY)
    assert fresh.adapters["upper"].state == "failed"
    assert fresh.adapters["upper"].reason
    with pytest.raises(slora.AdapterError, match="upper"):
        fresh.generate("abc", adapter="upper", **GREEDY)
    assert fresh.generate("abc", adapter="reverse", **GREEDY).text == "cba"
    fresh.adapters.add("upper", ADAPTERS / "upper", replace=True)
    assert fresh.generate("abc", adapter="upper", **GREEDY).text == "ABC"


def test_links_are_followed_as_a_hub_cache_has_them(fresh: slora.LLM, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (ADAPTERS / "upper").iterdir():
        (snapshot / file.name).symlink_to(file)
    fresh.adapters.add("linked", snapshot)
    assert fresh.generate("abc", adapter="linked", **GREEDY).text == "ABC"
