//! Chat templates that take all the memory or stack there is, rendered as programs that serve do it:
//! their process dies, ours does not notice.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use millrace_coordinator::text::{ChatMessage, ChatTemplate, TextError, renderers};

fn render(source: &str, content: &str) -> Result<String, TextError> {
    renderers::enable_as(PathBuf::from(env!("CARGO_BIN_EXE_millrace-coordinator")));
    let template = ChatTemplate::new(source, "<s>".into(), "</s>".into())?;
    rendered(&template, content)
}

fn rendered(template: &ChatTemplate, content: &str) -> Result<String, TextError> {
    let message = ChatMessage::new("user", content);
    template.render(&vec![message].into(), true)
}

#[track_caller]
fn dies(source: &str) {
    let message = render(source, "a").unwrap_err().to_string();
    // Whichever a busy machine comes to first.
    let ended = ["takes too much memory, or breaks", "runs for too long"];
    assert!(ended.iter().any(|end| message.contains(end)), "{source}: {message}");
}

/// A loop around a statement that makes `ns.x` larger.
fn growing(first: &str, statement: &str) -> String {
    format!(
        "{{% set ns = namespace(x={first}) %}}{{% for i in range(9999) %}}{statement}{{% endfor %}}\
         {{{{ ns.x | length }}}}"
    )
}

#[test]
fn honest_templates_do_as_ever() {
    let source = "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m.content.strip() }}{% endfor %}{{ eos_token }}";
    assert_eq!(render(source, " h\u{e9} ").unwrap(), "<s>user: h\u{e9}</s>");
    let message = render("{{ raise_exception('no system here') }}", "a").unwrap_err().to_string();
    assert!(message.contains("refused the conversation: no system here"), "{message}");
    assert!(matches!(render("{% for %}", "a"), Err(TextError::Template(_))));
    let long = "a".repeat(1 << 20);
    assert_eq!(render("{{ messages[0].content }}", &long).unwrap(), long);
}

#[test]
fn what_doubles_ends_with_its_process() {
    dies(&growing("'aaaaaaaa'", "{% set ns.x = ns.x ~ ns.x %}"));
    dies(&growing("'aaaaaaaa'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"));
    // Deeper than the stack: taken apart at the end, or shown.
    dies(&growing("[]", "{% for j in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}"));
    dies("{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}");
}

/// Seeded mixtures of what makes values larger: whatever comes of each, the next one is rendered.
#[test]
fn mixtures_of_growth_take_nothing_down() {
    const GROWTH: [&str; 8] = [
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% set ns.x = ns.x * 9 %}",
        "{% set ns.x = (ns.x | string) + 'a' %}",
        "{% set ns.x = [ns.x, ns.x] | tojson %}",
        "{% set ns.x = ns.x | string | replace('a', 'bab') %}",
        "{% set ns.x = [ns.x] * 99 %}",
        "{% set ns.x = (ns.x | list) | join(ns.x) %}",
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    ];
    let mut state = 7u64;
    for _ in 0..4 {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            GROWTH[(state >> 33) as usize % GROWTH.len()]
        };
        let statements: String = (0..30).map(|_| next()).collect();
        let source =
            format!("{{% set ns = namespace(x='abc') %}}{statements}{{{{ ns.x | length }}}}");
        let _ = render(&source, "a");
        assert_eq!(render("{{ messages[0].content }}", "still here").unwrap(), "still here");
    }
}

/// A template that bides its time: the conversation that sets it off is refused, others are not.
#[test]
fn a_dead_renderer_is_replaced() {
    let source = "{% set ns = namespace(x='aaaaaaaa') %}{% if messages[0].content == 'now' %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endif %}{{ messages[0].content }}";
    renderers::enable_as(PathBuf::from(env!("CARGO_BIN_EXE_millrace-coordinator")));
    let template = ChatTemplate::new(source, String::new(), String::new()).unwrap();
    for _ in 0..2 {
        assert_eq!(rendered(&template, "not yet").unwrap(), "not yet");
        assert!(matches!(rendered(&template, "now"), Err(TextError::Render(_))));
    }
    assert_eq!(rendered(&template, "not yet").unwrap(), "not yet");
}
