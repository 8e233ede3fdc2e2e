"""The golden renderings of tests/golden/templates are what transformers renders.

The Rust test (tests/rust/text_templates.rs) compares slora's own renderer with the same files, so that both agree.
After a change of templates or cases: `python tests/python/test_text_templates.py` writes the golden files anew.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu_only(reason="no engine")

GOLDEN = Path(__file__).parents[1] / "golden" / "templates"
DOCUMENT = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


def render(case: dict[str, Any]) -> tuple[str, str]:
    """The text that transformers renders, or the message it refuses with; first which of the two."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    class FixedTime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "FixedTime":
            return cls.fromtimestamp(DOCUMENT["now_unix_s"], datetime.UTC)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")),
        **DOCUMENT["special_tokens"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", FixedTime)
        try:
            text = tokenizer.apply_chat_template(
                case["messages"],
                chat_template=(GOLDEN / f"{case['template']}.jinja").read_text(encoding="utf-8"),
                tools=case.get("tools"),
                documents=case.get("documents"),
                add_generation_prompt=case.get("add_generation_prompt", False),
                continue_final_message=case.get("continue_final_message", False),
                tokenize=False,
                **case.get("kwargs", {}),
            )
        except chat_template_utils.jinja2.exceptions.TemplateError as error:
            return "error", str(error)
    return "txt", text


@pytest.mark.parametrize("case", DOCUMENT["cases"], ids=lambda case: case["name"])
def test_golden_is_what_transformers_renders(case: dict[str, Any]) -> None:
    kind, text = render(case)
    assert (GOLDEN / "expected" / f"{case['name']}.{kind}").read_bytes() == text.encode()


def test_no_golden_file_is_left_over() -> None:
    names = {case["name"] for case in DOCUMENT["cases"]}
    assert {path.stem for path in (GOLDEN / "expected").iterdir()} == names


if __name__ == "__main__":
    for old in (GOLDEN / "expected").iterdir():
        old.unlink()
    for golden_case in DOCUMENT["cases"]:
        suffix, rendering = render(golden_case)
        (GOLDEN / "expected" / f"{golden_case['name']}.{suffix}").write_bytes(rendering.encode())
