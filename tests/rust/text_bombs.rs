//! Templates and messages that would take for ever, fill the memory or overflow the stack end early, with an error.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use slora_text::{ChatInput, ChatTemplate, TextError};

mod processor_time;

/// Of the processor's. Well above what any bomb takes (50 ms), for slow machines.
const MAX_TIME: Duration = Duration::from_secs(1);

fn render(source: &str, messages: Value) -> Result<String, TextError> {
    let input = ChatInput { messages, ..ChatInput::default() };
    ChatTemplate::new(source)?.render([], &input)
}

/// Runs on the smallest stack that a thread of ours may have.
fn on_small_stack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(1 << 20).spawn(work).unwrap().join().unwrap()
}

fn peak_memory_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or("VmHWM: 0 kB");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<usize>().ok()).unwrap_or(0) * 1024
}

const LOOP: &str = "{% set ns = namespace(s='x' * 1000, l=[0]) %}{% for i in range(100000) %}";

#[test]
fn every_bomb_ends_early_with_a_limit() {
    let looped = |body: &str| format!("{LOOP}{body}{{% endfor %}}");
    let bombs = [
        // Repetition in one instruction.
        "{{ 'x' * 10 ** 9 }}".to_owned(),
        "{{ 'x' * 10 ** 30 }}".to_owned(),
        "{{ ([0] * 10 ** 9) | length }}".to_owned(),
        "{{ range(10 ** 9) | list }}".to_owned(),
        "{{ range(0, 10 ** 30, 1) | length }}".to_owned(),
        "{{ 'x' | indent(10 ** 12) }}".to_owned(),
        "{{ 'x'.center(10 ** 12) }}{{ 'x'.zfill(10 ** 12) }}".to_owned(),
        "{{ '%1000000000d' % 1 }}".to_owned(),
        "{{ [1] | tojson(indent=10 ** 12) }}".to_owned(),
        "{{ [[[[1]]]] | tojson(indent='x' * 10 ** 7) }}".to_owned(),
        // Doubling.
        looped("{% set ns.s = ns.s ~ ns.s %}"),
        looped("{% set ns.s = ns.s + ns.s %}"),
        looped("{% set ns.s = ns.s.replace('x', 'xx') %}"),
        looped("{% set ns.s = ns.s | replace('', 'xx') %}"),
        looped("{% set ns.s = [ns.s, ns.s] | join(ns.s) %}"),
        looped("{% set ns.s = ns.s.join([ns.s, ns.s]) %}"),
        looped("{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
        looped("{% set ns.s = '{}{}'.format(ns.s, ns.s) %}"),
        looped("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        looped("{% set ns.s = ns.s | tojson %}"),
        looped("{% set ns.s = ns.s | string | indent(9999, true) %}"),
        looped("{% set ns.l = ns.l + ns.l %}"),
        looped("{% set ns.l = ns.l * 2 %}"),
        looped("{% set ns.l = (ns.l | list) + (ns.l | map('string') | list) %}"),
        // Sharing makes a small value with a huge print; nesting makes a deep one.
        "{% set ns = namespace(l=[1]) %}{% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}".to_owned(),
        "{% set ns = namespace(l=[1], m=[1]) %}{% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}{{ ns.l == ns.m }}".to_owned(),
        looped("{% set ns.l = [ns.l] %}"),
        looped("{% set ns.l = {'l': ns.l} %}"),
        looped("{% set ns.l = ({'x': ns.l}).items() %}"),
        looped("{% set ns.l = {'x': ns.l}.get %}"),
        // Output and time.
        format!("{LOOP}{}{{% endfor %}}", "x".repeat(1000)),
        looped("{{ ns.s }}"),
        format!("{{% set x %}}{LOOP}{}{{% endfor %}}{{% endset %}}", "x".repeat(1000)),
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".to_owned(),
        looped("{% set x = range(100000) | sort %}"),
        looped("{% set x = range(100000) | unique %}"),
        looped("{% set x = 'a' in 'x' * 100000 %}"),
        looped("{% set x = ('x' * 100000)[::-1] %}"),
        looped("{% set x = 'x ' * 100000 %}{% set y = x.split() %}"),
        // Recursion.
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f(x) %}{{ [[[[f([[x]])]]]] }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        // Deep trees.
        format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000)),
        format!("{{{{ {}1{} }}}}", "[".repeat(10_000), "]".repeat(10_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(10_000)),
        format!("{{{{ {}1 }}}}", "- ".repeat(10_000)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(100_000)),
        format!("{{{{ x{} }}}}", ".x".repeat(100_000)),
        format!("{{{{ x{} }}}}", "|trim".repeat(100_000)),
        format!("{{{{ x{} }}}}", "()".repeat(100_000)),
        format!("{{{{ x{} }}}}", "[0]".repeat(100_000)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(10_000)),
        "{% if 1 %}".repeat(10_000),
        "{% for x in y %}".repeat(10_000),
        "x".repeat(2 << 20),
    ];
    for bomb in bombs {
        let name: String = bomb.chars().take(200).collect();
        let (result, took) = on_small_stack(move || (render(&bomb, json!([])), processor_time::of_thread()));
        assert!(matches!(result, Err(TextError::TemplateLimit { .. })), "{name}: {:?}", result.map(|t| t.len()));
        assert!(took < MAX_TIME, "{name}: {took:?}");
    }
    let peak = peak_memory_bytes();
    assert!(peak < 512 << 20, "{peak} bytes");
}

#[test]
fn long_but_flat_templates_are_fine() {
    let source = format!("{{{{ 'a'{} }}}}{{{{ 1{} }}}}", " ~ 'b'".repeat(10_000), " or 1".repeat(10_000));
    assert_eq!(on_small_stack(move || render(&source, json!([]))).unwrap().len(), 10_002);
    let source = format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(10_000));
    assert_eq!(on_small_stack(move || render(&source, json!([]))).unwrap(), "");
}

#[test]
fn a_long_chat_stays_far_below_the_limits() {
    let source = include_str!("../golden/templates/qwen.jinja");
    let turn = |i: usize| json!({"role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": "word ".repeat(100)});
    let messages = Value::Array((0..1000).map(turn).collect());
    assert!(render(source, messages).unwrap().len() > 500_000);
    let one_long = json!([{"role": "user", "content": "x".repeat(3 << 20)}]);
    assert!(render(source, one_long).unwrap().len() > 3 << 20);
}

#[test]
fn input_of_the_wrong_shape_is_named() {
    let message = |messages: Value| render("{{ messages }}", messages).unwrap_err().to_string();
    assert_eq!(message(json!("hi")), "messages must be an array");
    assert_eq!(message(json!([{"role": "user"}, 3])), "messages[1] must be an object");
    let mut deep = json!(1);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    assert_eq!(message(json!([{"content": deep}])), "the input has more than 128 levels of nested values");
    let input = ChatInput {
        messages: json!([]),
        add_generation_prompt: true,
        continue_final_message: true,
        ..ChatInput::default()
    };
    let error = ChatTemplate::new("").unwrap().render([], &input).unwrap_err();
    assert_eq!(error.to_string(), "continue_final_message and add_generation_prompt exclude each other");
}

#[test]
fn a_mistake_in_a_template_is_named_with_its_line() {
    let cases = [
        ("a\n{{ x.y }}", "chat template, line 2: 'x' is undefined"),
        ("{{ 1 + 'a' }}", "chat template, line 1: unsupported operand types for +: 'int' and 'str'"),
        ("{{ 1 | nope }}", "chat template, line 1: there is no filter named 'nope'"),
        ("{{ 1 is nope }}", "chat template, line 1: there is no test named 'nope'"),
        ("\n\n{% nope %}", "chat template, line 3: tag 'nope' is unknown here"),
        ("{% if x %}", "chat template, line 1: expected '{% elif / else / endif %}' before the end"),
        ("{{ 1 / 0 }}", "chat template, line 1: division by zero"),
        (
            "{{ [].append(1) }}",
            "chat template, line 1: list.append would change a list: values are immutable; hint: use a namespace and +",
        ),
        ("{{ nope() }}", "chat template, line 1: 'nope' is undefined"),
        ("{{ 'a'.split('') }}", "chat template, line 1: split: empty separator"),
        ("{{ raise_exception('no ' ~ 1) }}", "chat template: no 1"),
        ("{{ 'a", "chat template, line 1: a string is not closed"),
        ("{# a", "chat template, line 1: a comment is not closed with '#}'"),
        ("{{ (1] }}", "chat template, line 1: unexpected ']'"),
        ("{% break %}", "chat template, line 1: 'break' outside a loop"),
        ("{{ 10 ** 99 }}", "chat template, line 1: the result of ** is too large for this renderer"),
        ("{{ 'x' * 10 ** 9 }}", "chat template, line 1: more than 1000000 units of work"),
    ];
    for (source, message) in cases {
        assert_eq!(render(source, json!([])).unwrap_err().to_string(), message, "{source}");
    }
}

const GOLDEN: [&str; 6] = [
    include_str!("../golden/templates/llama.jinja"),
    include_str!("../golden/templates/mistral.jinja"),
    include_str!("../golden/templates/qwen.jinja"),
    include_str!("../golden/templates/python.jinja"),
    include_str!("../golden/templates/tools.jinja"),
    include_str!("../golden/templates/whitespace.jinja"),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_soup_of_tokens_panics(
        soup in prop::collection::vec(
            prop::sample::select(vec![
                "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", "*", "/", "//", "%", "**", "~", "(", ")", "[", "]", "{", "}",
                "|", ".", ",", ":", "=", "==", "<", "'a'", "\"é\"", "\\", "'", "0", "-1", "9999999999999999999", "1.5", "1e",
                "if", "else", "endif", "for", "in", "endfor", "set", "endset", "macro", "endmacro", "call", "is", "not", "and",
                "raw", "endraw", "x", "ns", "messages", "loop", "range", "namespace", "list", "tojson", "split", "\n", " ", "é",
            ]),
            0..40,
        ),
        glue in prop::sample::select(vec!["", " "]),
    ) {
        let _ = render(&soup.join(glue), json!([{"role": "user", "content": "hé\u{1c} x"}]));
    }

    #[test]
    fn no_damaged_template_panics(which in 0..GOLDEN.len(), at in 0.0..1.0f64, cut in 0usize..40, paste in "[ a-z0-9{}%()|~'.\\[\\]:*-]{0,6}") {
        let chars: Vec<char> = GOLDEN[which].chars().collect();
        let at = (at * chars.len() as f64) as usize;
        let end = (at + cut).min(chars.len());
        let damaged: String = chars[..at].iter().copied().chain(paste.chars()).chain(chars[end..].iter().copied()).collect();
        let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>", "tool_calls": []}]);
        let _ = render(&damaged, messages);
    }

    #[test]
    fn slices_are_pythons(len in 0usize..6, start in -8i64..8, stop in -8i64..8, step in -3i64..4) {
        prop_assume!(step != 0);
        let source = format!("{{{{ range({len}) | list | tojson }}}}{{{{ (range({len}) | list)[{start}:{stop}:{step}] | tojson }}}}");
        // Python's definition: indices from the clamped start, by step, as long as they are before the clamped stop.
        let clamp = |i: i64| {
            let i = if i < 0 { i + len as i64 } else { i };
            if step > 0 { i.clamp(0, len as i64) } else { i.clamp(-1, len as i64 - 1) }
        };
        let (mut i, stop) = (clamp(start), clamp(stop));
        let mut expected = Vec::new();
        while if step > 0 { i < stop } else { i > stop } {
            expected.push(i);
            i += step;
        }
        let all: Vec<usize> = (0..len).collect();
        let json = |v: Value| v.to_string().replace(',', ", ");
        prop_assert_eq!(render(&source, json!([])).unwrap(), json(json!(all)) + &json(json!(expected)));
    }
}
