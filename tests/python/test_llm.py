"""Offline generation: inputs, outputs and every sampling option, end to end."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ADAPTERS, BASE, EXAMPLE
from device import engine_options, tolerance
from oracle import Oracle
from transformers import AutoTokenizer

import slora

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
TOLERANCE = tolerance(1e-4)


@pytest.mark.cpu_only(reason="no engine")
def test_importing_slora_is_quick_and_leaves_torch_alone() -> None:
    # Of the processor's time: others may use it, too.
    code = "import sys, time; t = time.process_time(); import slora; t = time.process_time() - t"
    command = [sys.executable, "-c", f"{code}; print(t, 'torch' in sys.modules)"]
    seconds, has_torch = subprocess.check_output(command, text=True).split()
    assert float(seconds) < 0.5
    assert has_torch == "False"


def test_lists_give_lists_in_order_and_one_prompt_gives_one_result(llm: slora.LLM) -> None:
    results = llm.generate(["abc", [1, 80, 81, 82]] * 20, adapter=["reverse", None] * 20, **GREEDY)
    assert [result.text for result in results] == ["cba", "abc"] * 20
    assert llm.generate("abc", adapter="upper", **GREEDY).text == "ABC"
    assert llm.generate([1, 80, 81, 82], **GREEDY).text == "abc"
    assert llm.generate(torch.tensor([1, 80, 81, 82]), **GREEDY).text == "abc"  # type: ignore[call-overload]
    assert llm.generate(list(torch.tensor([1, 80, 81, 82]).numpy()), **GREEDY).text == "abc"
    assert llm.generate([], **GREEDY) == []


@pytest.mark.parametrize("max_step", [1, 7])
def test_it_goes_on_when_step_numbers_begin_again(monkeypatch: pytest.MonkeyPatch, max_step: int) -> None:
    monkeypatch.setattr(slora._core, "Core", partial(slora._core.Core, max_step=max_step))
    adapters = {name: ADAPTERS / name for name in ("reverse", "upper", "spell")}
    with slora.LLM(BASE, adapters=adapters, **engine_options()) as llm:
        pages = max(adapter.num_pages for adapter in llm.adapters.values()) + 4
        small = engine_options(pool_bytes=pages * llm.stats().page_bytes, max_context=64, max_running=4)
    with slora.LLM(BASE, adapters=adapters, **small) as llm:
        results = llm.generate(["abc"] * 60, adapter=["reverse", "upper", "spell", None] * 15, **GREEDY)
        assert [result.text for result in results] == ["cba", "ABC", "a-b-c", "abc"] * 15
        stats = llm.stats()
        assert stats.steps > 50
        assert stats.adapter_evictions > 3


def test_a_result_says_what_was_asked_and_what_it_took(llm: slora.LLM) -> None:
    result = llm.generate("abc", adapter="reverse", **GREEDY)
    assert result.prompt_token_ids == [1, 80, 81, 82]
    assert result.adapter == "reverse"
    assert (result.finish_reason, result.stop_reason) == ("stop", 2)
    assert result.token_ids[-1] == 2
    assert result.usage.prompt_tokens == 4
    assert result.usage.total_tokens == 4 + len(result.token_ids)
    assert result.logprobs is None
    assert result.prompt_logprobs is None
    assert llm.generate("abc", max_tokens=2, temperature=0).finish_reason == "length"


def test_logprobs_hold_the_chosen_token_and_as_many_best_as_asked_for(llm: slora.LLM, oracle: Oracle) -> None:
    for k in (0, 1, 5):
        result = llm.generate("abc def", logprobs=k, prompt_logprobs=k, seed=3, temperature=5.0, max_tokens=6)
        ids = result.prompt_token_ids + result.token_ids
        assert result.prompt_logprobs is not None
        assert result.logprobs is not None
        assert result.prompt_logprobs[0] is None
        expected = oracle.log_probs(ids, None)
        for i, found in enumerate([*result.prompt_logprobs[1:], *result.logprobs]):
            assert found is not None
            best = expected[i].topk(k).indices.tolist()
            assert set(found) == {ids[i + 1], *best}
            assert found == pytest.approx({token: expected[i, token].item() for token in found}, abs=TOLERANCE)


def test_the_prompt_alone_can_be_scored(llm: slora.LLM) -> None:
    result = llm.generate("abc", max_tokens=0, prompt_logprobs=0)
    assert result.token_ids == []
    assert result.prompt_logprobs is not None
    assert [list(found) if found else None for found in result.prompt_logprobs] == [None, [80], [81], [82]]


def test_chat_renders_as_transformers_and_never_doubles_special_tokens(llm: slora.LLM) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "cba"},
        {"role": "user", "content": "hello"},
    ]
    result = llm.chat(messages, adapter="upper", temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert result.prompt_token_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert result.prompt_token_ids.count(1) == 1
    assert result.text == "HELLO"
    several = llm.chat([messages, messages[1:2]], adapter=["upper", "reverse"], temperature=0)
    assert [result.text for result in several] == ["HELLO", "cba"]


def test_text_that_is_too_long_whatever_its_tokens_are_is_refused_before_it_is_tokenized(llm: slora.LLM) -> None:
    text, max_context = "ab " * 100_000, llm.limits["max_context"]
    refused = rf"maximum context length is {max_context} tokens, which is at most \d+ bytes .* has 30\d{{4}}; hint: "
    with pytest.raises(slora.RequestError, match=refused):
        llm.generate(text)
    with pytest.raises(slora.RequestError, match=refused):
        llm.generate(["ab", text])
    with pytest.raises(slora.RequestError, match=refused):
        llm.chat([{"role": "user", "content": text}])
    with pytest.raises(slora.RequestError, match=f"maximum context length is {max_context} tokens, but the request"):
        llm.generate("ab " * max_context)


def test_mistakes_of_names_and_messages_are_told_with_a_hint(llm: slora.LLM) -> None:
    with pytest.raises(slora.UnknownAdapterError, match='no adapter is named "revers"; hint: add it first'):
        llm.generate("abc", adapter="revers")
    with pytest.raises(slora.RequestError, match="adapter holds one of type int: 3; hint: a name"):
        llm.generate(["abc"], adapter=[3])  # type: ignore[list-item]
    for messages in ("hello", None, {"role": "user", "content": "hello"}):
        with pytest.raises(slora.RequestError, match=r"messages are of type .*; hint: a list of"):
            llm.chat(messages)  # type: ignore[call-overload]


def test_a_chat_takes_text_only_and_continues_what_it_is_told_to(llm: slora.LLM) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(slora.RequestError, match=r"messages\[0\] has a part that is not text"):
        llm.chat([{"role": "user", "content": [{"type": "text", "text": "abc"}, image]}])
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "ab"}]
    prompt = llm.chat(messages, continue_final_message=True, max_tokens=1).prompt_token_ids
    opened = llm.chat(messages[:1], max_tokens=1).prompt_token_ids
    assert prompt == [*opened, *llm.generate("ab", max_tokens=1).prompt_token_ids[1:]]


def test_content_that_is_a_list_of_texts_is_as_one_text_of_so_many_lines(llm: slora.LLM) -> None:
    def ids(content: Any) -> list[int]:
        return llm.chat([{"role": "user", "content": content}], max_tokens=1).prompt_token_ids

    expected = ids("ab\ncd")
    assert ids([{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]) == ids(["ab", "cd"]) == expected


def test_n_choices_are_as_requests_with_neighbouring_seeds(llm: slora.LLM) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "max_tokens": 8, "logprobs": 0}
    result = llm.generate("hello", n=4, seed=11, **options)
    singles = [llm.generate("hello", seed=11 + i, **options) for i in range(4)]
    assert [choice.token_ids for choice in result.choices] == [single.token_ids for single in singles]
    assert len({tuple(choice.token_ids) for choice in result.choices}) > 1
    assert result.token_ids == result.choices[0].token_ids
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)


def test_a_seed_fixes_the_answer_in_any_company(llm: slora.LLM) -> None:
    filters = {"top_p": 0.99, "top_k": 100, "min_p": 1e-6}
    options: dict[str, Any] = {"temperature": 5.0, "max_tokens": 12, "seed": 7, **filters}
    alone = llm.generate("hello", adapter="twice", **options)
    together = llm.generate(["hello"] * 30, adapter=["twice", "sort", None] * 10, **options)
    assert all(result.token_ids == alone.token_ids for result in together[::3])
    unseeded = llm.generate(["hello"] * 8, **options | {"seed": None})
    assert len({tuple(result.token_ids) for result in unseeded}) > 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_filters_are_greedy(llm: slora.LLM, options: dict[str, Any]) -> None:
    assert llm.generate("water", adapter="reverse", temperature=1.0, **options).text == "retaw"


def test_stop_strings_end_the_text_before_or_behind_themselves(llm: slora.LLM) -> None:
    stop = llm.generate("window water", adapter="upper", stop=["W W", "DOW"], **GREEDY)
    assert (stop.text, stop.finish_reason, stop.stop_reason) == ("WIN", "stop", "DOW")
    assert llm.generate("window", adapter="upper", stop="DO", include_stop=True, **GREEDY).text == "WINDO"
    assert llm.generate("window", adapter="upper", stop="xyz", **GREEDY).text == "WINDOW"


def test_stop_tokens_end_the_request_and_are_no_text(llm: slora.LLM) -> None:
    stop = llm.generate("abc", stop_token_ids=[82], **GREEDY)
    assert (stop.text, stop.token_ids[-1], stop.finish_reason, stop.stop_reason) == ("ab", 82, "stop", 82)


def test_min_tokens_and_ignore_eos_keep_a_request_going(llm: slora.LLM) -> None:
    assert len(llm.generate("abc", min_tokens=10, **GREEDY).token_ids) >= 10
    assert 2 not in llm.generate("abc", min_tokens=10, **GREEDY).token_ids[:10]
    going = llm.generate("abc", ignore_eos=True, **GREEDY)
    assert (len(going.token_ids), going.finish_reason) == (24, "length")
    assert 2 in going.token_ids


def test_logit_bias_moves_and_forbids_tokens(llm: slora.LLM) -> None:
    assert set(llm.generate("abc", logit_bias={90: 100.0}, **GREEDY | {"max_tokens": 5}).token_ids) == {90}
    assert 81 not in llm.generate("abc", logit_bias={81: -100.0}, **GREEDY).token_ids


def test_a_repetition_penalty_is_transformers(llm: slora.LLM, oracle: Oracle) -> None:
    prompt = llm.generate("kitten ladder", adapter="twice", max_tokens=0).prompt_token_ids
    for penalty in (1.3, 0.8):
        ours = llm.generate(prompt, adapter="twice", repetition_penalty=penalty, ignore_eos=True, **GREEDY)
        oracle.model.set_adapter("twice")
        theirs = oracle.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=[],
        )
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()


def test_presence_and_frequency_penalties_count_the_output_only(llm: slora.LLM, oracle: Oracle) -> None:
    options: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 2.0, "ignore_eos": True}
    result = llm.generate("mirror mirror", adapter="twice", **options, **GREEDY)
    ids, counts = list(result.prompt_token_ids), torch.zeros(llm._engine.model_config.vocab_size)
    for token in result.token_ids:
        scores = oracle.log_probs(ids, "twice")[-1] - 1.5 * (counts > 0) - 2.0 * counts
        assert scores[token] >= scores.max() - TOLERANCE
        counts[token] += 1
        ids.append(token)


def test_special_tokens_are_shown_on_demand(llm: slora.LLM) -> None:
    assert llm.generate("abc", skip_special_tokens=False, **GREEDY).text.startswith("<|assistant|>abc")


def test_more_prompts_than_the_queue_takes_are_fed_gradually(settled: Any) -> None:
    with slora.LLM(BASE, **engine_options(max_waiting=3, max_running=2, max_batch_tokens=16)) as llm:
        results = llm.generate([f"word {i}" for i in range(50)], n=2, **GREEDY)
        assert [result.text for result in results] == [f"word {i}" for i in range(50)]
        settled(llm)


def test_a_base_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    for file in BASE.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with slora.LLM(tmp_path, **engine_options()) as llm:
        result = llm.generate([1, 80, 81, 82], **GREEDY)
        assert (result.token_ids, result.text) == ([5, 80, 81, 82, 2], "")
        with pytest.raises(slora.RequestError, match="hint: send token ids"):
            llm.generate("abc")
        with pytest.raises(slora.RequestError, match="hint: send token ids"):
            llm.generate([1, 80], stop="x")


def test_dummy_weights_need_the_configuration_alone_and_are_the_same_every_time(tmp_path: Path) -> None:
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 128, "intermediate_size": 96}))
    answers = []
    for _ in range(2):
        with slora.LLM(tmp_path, **engine_options(load_format="dummy")) as llm:
            answers.append(llm.generate([5, 6, 7], ignore_eos=True, **GREEDY).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_too(dtype: str) -> None:
    with slora.LLM(BASE, adapters=EXAMPLE / "adapters", **engine_options(dtype=dtype)) as llm:
        assert llm.generate(["kitten", "kitten"], adapter=["reverse", "spell"], **GREEDY)[0].text == "nettik"
