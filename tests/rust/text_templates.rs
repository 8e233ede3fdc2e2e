//! slora's chat templates render what transformers renders: the golden files are checked against transformers by
//! tests/python/test_text_templates.py.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde_json::{Value, json};
use slora_text::{ChatInput, ChatTemplate, TextError};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/templates").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(golden(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn renderings_equal_the_golden_ones() {
    let document: Value = serde_json::from_str(&read("cases.json")).unwrap();
    let special_tokens: Vec<(&str, &str)> = document["special_tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str().unwrap()))
        .collect();
    let mut failures = Vec::new();
    let cases = document["cases"].as_array().unwrap();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let template = ChatTemplate::new(&read(&format!("{}.jinja", case["template"].as_str().unwrap()))).unwrap();
        let input = ChatInput {
            messages: case["messages"].clone(),
            tools: case.get("tools").cloned(),
            documents: case.get("documents").cloned(),
            add_generation_prompt: case["add_generation_prompt"] == true,
            continue_final_message: case["continue_final_message"] == true,
            kwargs: case["kwargs"].as_object().cloned().unwrap_or_default(),
            now_unix_s: document["now_unix_s"].as_i64().unwrap(),
            utc_offset_s: 0,
        };
        let (kind, rendered) = match template.render(special_tokens.iter().copied(), &input) {
            Ok(text) => ("txt", text),
            Err(TextError::TemplateRaised(message)) => ("error", message),
            Err(other) => ("fault", other.to_string()),
        };
        let file = golden(&format!("expected/{name}.{kind}"));
        let expected = std::fs::read_to_string(file).unwrap_or_else(|_| format!("(no {kind} expected)"));
        for (line, (ours, theirs)) in rendered.split('\n').zip(expected.split('\n')).enumerate() {
            if ours != theirs {
                failures.push(format!("{name}, line {}:\n   slora: {ours:?}\n  golden: {theirs:?}", line + 1));
                break;
            }
        }
        if rendered != expected && !failures.last().is_some_and(|f| f.starts_with(name)) {
            failures.push(format!("{name}: one ends before the other"));
        }
    }
    assert!(cases.len() >= 35, "{} cases", cases.len());
    assert!(failures.is_empty(), "{} of {} differ\n{}", failures.len(), cases.len(), failures.join("\n"));
}

fn rendered(template: &str, messages: Value) -> Result<String, TextError> {
    ChatTemplate::new(template).unwrap().render([], &ChatInput { messages, ..ChatInput::default() })
}

#[test]
fn a_list_of_texts_is_text_for_a_template_that_does_not_read_lists() {
    let all = |body: &str| format!("{{% for message in messages %}}<{body}>{{% endfor %}}");
    let messages = json!([
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        {"role": "assistant", "content": "c"},
    ]);
    let walk = "{% for part in message.content %}[{{ part.text }}]{% endfor %}";
    let either =
        format!("{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}{walk}{{% endif %}}");
    let cases = [
        ("prints", all("{{ message.content }}"), "<s><a\nb><c>"),
        ("adds", all("{{ message.role + message.content }}"), "<systems><usera\nb><assistantc>"),
        ("prints JSON", all("{{ message.content | tojson }}"), "<\"s\"><\"a\\nb\"><\"c\">"),
        ("leaves lists out", all("{% if message.content is string %}{{ message.content }}{% endif %}"), "<s><a\nb><c>"),
        (
            "reads the first part",
            all(
                "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}",
            ),
            "<s><a\nb><c>",
        ),
        ("reads lists", all(&either), "<[s]><[a][b]><c>"),
        (
            "reads them of users",
            all(&format!("{{% if message.role == 'user' %}}{walk}{{% else %}}{{{{ message.content }}}}{{% endif %}}")),
            "<s><[a][b]><c>",
        ),
    ];
    for (what, template, expected) in cases {
        assert_eq!(rendered(&template, messages.clone()).as_deref(), Ok(expected), "{what}");
    }
}

#[test]
fn a_list_of_texts_can_be_continued() {
    let messages =
        json!([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}]);
    for (body, expected) in [("{{ m.content }}", "a\nb "), ("{% for p in m.content %}{{ p.text }}{% endfor %}", "ab ")]
    {
        let template = ChatTemplate::new(&format!("{{% for m in messages %}}{body}<end>{{% endfor %}}")).unwrap();
        let input = ChatInput { messages: messages.clone(), continue_final_message: true, ..ChatInput::default() };
        assert_eq!(template.render([], &input).as_deref(), Ok(expected));
    }
}
