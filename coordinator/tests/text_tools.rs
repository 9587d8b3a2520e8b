//! Conversations with tools as chat templates write them: those that know tools as transformers
//! render them, the others in words.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use millrace_coordinator::text::{CallStyle, ChatTemplate, Conversation};
use millrace_shared::wire::rpc::{ChatMessage, ToolCall, ToolChoice};
use serde_json::Value;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/tools").join(name)
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "<s>".into(), "</s>".into()).unwrap()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn message(value: &Value) -> ChatMessage {
    let call = |call: &Value| ToolCall {
        id: text(&call["id"]),
        name: text(&call["function"]["name"]),
        arguments: call["function"]["arguments"].to_string(),
    };
    let calls = value["tool_calls"].as_array().map(|c| c.iter().map(call).collect());
    ChatMessage {
        tool_calls: calls.unwrap_or_default(),
        tool_call_id: value["tool_call_id"].as_str().map(str::to_owned),
        ..ChatMessage::new(text(&value["role"]), text(&value["content"]))
    }
}

fn conversation(case: &Value) -> Conversation {
    let tools = case["tools"].as_array().unwrap();
    Conversation {
        messages: case["messages"].as_array().unwrap().iter().map(message).collect(),
        tools: tools.iter().map(|t| t["function"].to_string()).collect(),
        ..Conversation::default()
    }
}

fn cases() -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(testdata("cases.json")).unwrap()).unwrap()
}

#[test]
fn templates_that_know_tools_are_used_as_they_are() {
    for case in cases() {
        let name = text(&case["template"]);
        let template = template(&std::fs::read_to_string(testdata(&name)).unwrap());
        let rendered = template.render(&conversation(&case), true).unwrap();
        assert_eq!(rendered, text(&case["text"]), "{name}");
    }
    let style =
        |name: &str| template(&std::fs::read_to_string(testdata(name)).unwrap()).call_style();
    assert_eq!(style("tagged.jinja"), CallStyle::Tagged);
    assert_eq!(style("json.jinja"), CallStyle::Json);
}

const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}!{% endif %}\n{% endfor %}";

#[test]
fn other_templates_are_told_in_words() {
    let case = &cases()[1];
    let template = template(PLAIN);
    let text = template.render(&conversation(case), true).unwrap();
    let tools =
        text.find("<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"get_weather\"");
    assert!(text.starts_with("<system>Be brief.\n\nYou can call") && tools.is_some(), "{text}");
    let call = "<assistant><tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \
                \"Zürich\", \"days\": 2, \"exact\": true, \"at\": [1.5, null]}}\n</tool_call>";
    assert!(text.contains(call), "{text}");
    let result = "<user><tool_response>\n{\"celsius\": 21}\n</tool_response>";
    assert!(text.ends_with(result), "{text}");
    // Two results are one turn.
    let mut two = conversation(case);
    two.messages.push(two.messages[3].clone());
    assert_eq!(template.render(&two, true).unwrap().matches("<user>").count(), 2);
    // Where none is to be called, none is spoken of.
    let none = Conversation { tool_choice: ToolChoice::None, ..conversation(case) };
    assert!(!template.render(&none, true).unwrap().contains("<tools>"));
}

/// A template that speaks of tools and does not take them.
#[test]
fn what_a_template_says_is_tried() {
    let source = format!("{{# tools as <tool_call> #}}{PLAIN}");
    let text = template(&source).render(&conversation(&cases()[0]), true).unwrap();
    assert!(text.contains("You can call"), "{text}");
}

#[test]
fn tools_that_are_wrong_are_named() {
    for (tools, said) in [
        (vec!["{"], "tools[0]"),
        (vec!["[]"], "must be an object"),
        (vec!["{}"], "needs a name"),
        (vec![r#"{"name": "a b"}"#], "needs a name"),
        (vec![r#"{"name": "a", "parameters": 3}"#], "no JSON schema"),
        (vec![r#"{"name": "a"}"#, r#"{"name": "a"}"#], "tools[1]"),
    ] {
        let conversation = Conversation {
            messages: vec![ChatMessage::new("user", "hi")],
            tools: tools.iter().map(|t| (*t).to_owned()).collect(),
            ..Conversation::default()
        };
        let error = template(PLAIN).render(&conversation, true).unwrap_err().to_string();
        assert!(error.contains(said), "{tools:?}: {error}");
    }
}
