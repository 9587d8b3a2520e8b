//! Tools in a request and calls in an answer, as OpenAI's endpoints spell them.
//!
//! Only the form is read here; whether a tool makes sense is for the service to say.

use millrace_shared::wire::rpc::{
    CallPiece, Conversation, MAX_TOOL_CALLS, MAX_TOOLS, ToolCall, ToolChoice,
};
use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::Fields;
use super::types::{CallBody, CallFunction};

/// Where a function's fields are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nesting {
    /// In `function`, as chat completions have it.
    Function,
    /// Beside `type`, as responses have it.
    Flat,
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
///
/// # Errors
/// Naming the field that is wrong or not supported.
pub(crate) fn take(
    fields: &mut Fields,
    nesting: Nesting,
    conversation: &mut Conversation,
) -> Result<(), ApiError> {
    if let Some(value) = fields.take_value("tools") {
        let Value::Array(items) = value else {
            return Err(ApiError::invalid("tools", "must be an array of tools"));
        };
        if items.len() > MAX_TOOLS {
            let message = format!("has {} tools, at most {MAX_TOOLS} are possible", items.len());
            return Err(ApiError::invalid("tools", message));
        }
        for (index, item) in items.into_iter().enumerate() {
            let mut tool = Fields::nested(&format!("tools[{index}]"), item)?;
            let definition = match kind_of(&mut tool)?.as_str() {
                "function" => take_definition(&mut tool, nesting, fields)?,
                other => {
                    let why = format!("tools of type '{other}' are not supported; use function");
                    return Err(ApiError::invalid(&tool.name("type"), why));
                }
            };
            conversation.tools.push(definition);
        }
    }
    conversation.tool_choice = take_choice(fields, nesting)?;
    conversation.single_call = !fields.take("parallel_tool_calls")?.unwrap_or(true);
    Ok(())
}

fn kind_of(fields: &mut Fields) -> Result<String, ApiError> {
    Ok(fields.take("type")?.unwrap_or_else(|| "function".to_owned()))
}

/// The function's fields, for reading.
fn function_of(item: &mut Fields, nesting: Nesting) -> Result<Option<Fields>, ApiError> {
    match nesting {
        Nesting::Flat => Ok(None),
        Nesting::Function => {
            let name = item.name("function");
            let missing = || ApiError::invalid(&name, "is missing");
            let value = item.take_value("function").ok_or_else(missing)?;
            Fields::nested(&name, value).map(Some)
        }
    }
}

/// A tool's definition as JSON: name, description, parameters.
fn take_definition(
    tool: &mut Fields,
    nesting: Nesting,
    all: &mut Fields,
) -> Result<String, ApiError> {
    let mut nested = function_of(tool, nesting)?;
    let function = nested.as_mut().unwrap_or(tool);
    // Arguments of calls that are asked for are always as the schema says.
    function.take_value("strict");
    let mut definition = Map::new();
    for name in ["name", "description", "parameters"] {
        if let Some(value) = function.take_value(name) {
            definition.insert(name.to_owned(), value);
        }
    }
    if let Some(nested) = nested {
        all.note_ignored(nested.into_ignored());
    }
    Ok(Value::Object(definition).to_string())
}

fn take_choice(fields: &mut Fields, nesting: Nesting) -> Result<ToolChoice, ApiError> {
    let value = match fields.take_value("tool_choice") {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => return Ok(ToolChoice::Auto),
            "none" => return Ok(ToolChoice::None),
            "required" => return Ok(ToolChoice::Required),
            other => {
                let why = format!("'{other}' is not known: use none, auto, required or a function");
                return Err(ApiError::invalid("tool_choice", why));
            }
        },
        Some(value) => value,
    };
    let mut choice = Fields::nested("tool_choice", value)?;
    let kind = kind_of(&mut choice)?;
    if kind != "function" {
        let why = format!("choices of type '{kind}' are not supported; use function");
        return Err(ApiError::invalid("tool_choice.type", why));
    }
    let mut nested = function_of(&mut choice, nesting)?;
    let function = nested.as_mut().unwrap_or(&mut choice);
    let name = function.take("name")?;
    let missing = || ApiError::invalid(&function.name("name"), "is missing");
    name.map(ToolChoice::Named).ok_or_else(missing)
}

/// Takes the calls of an assistant's message.
///
/// # Errors
/// Naming the field that is wrong.
pub(crate) fn take_calls(item: &mut Fields) -> Result<Vec<ToolCall>, ApiError> {
    let name = item.name("tool_calls");
    let items = match item.take_value("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_TOOL_CALLS => items,
        Some(_) => {
            let why = format!("must be an array of at most {MAX_TOOL_CALLS} calls");
            return Err(ApiError::invalid(&name, why));
        }
    };
    let mut calls = Vec::with_capacity(items.len());
    for (index, value) in items.into_iter().enumerate() {
        let mut call = Fields::nested(&format!("{name}[{index}]"), value)?;
        let kind = kind_of(&mut call)?;
        if kind != "function" {
            let why = format!("calls of type '{kind}' are not supported");
            return Err(ApiError::invalid(&call.name("type"), why));
        }
        let id = call.take("id")?.unwrap_or_default();
        let function = function_of(&mut call, Nesting::Function)?;
        let mut function = function.unwrap_or(call);
        calls.push(take_call(&mut function, id)?);
    }
    Ok(calls)
}

/// The name and arguments of a call.
///
/// # Errors
/// Naming the field that is missing or wrong.
pub(crate) fn take_call(function: &mut Fields, id: String) -> Result<ToolCall, ApiError> {
    let text = |function: &mut Fields, name: &str| {
        let missing = || ApiError::invalid(&function.name(name), "is missing");
        let missing = missing();
        function.take::<String>(name)?.ok_or(missing)
    };
    let name = text(function, "name")?;
    Ok(ToolCall { id, name, arguments: text(function, "arguments")? })
}

/// Adds pieces to the calls that are known.
pub(crate) fn gather(calls: &mut Vec<ToolCall>, pieces: Vec<CallPiece>) {
    for piece in pieces {
        let at = piece.call as usize;
        if calls.len() <= at {
            calls.resize_with(at + 1, ToolCall::default);
        }
        let call = &mut calls[at];
        if !piece.id.is_empty() {
            (call.id, call.name) = (piece.id, piece.name);
        }
        call.arguments.push_str(&piece.arguments);
    }
}

/// Whole calls as JSON.
pub(crate) fn whole(calls: Vec<ToolCall>) -> Vec<CallBody> {
    let body = |call: ToolCall| CallBody {
        index: None,
        id: Some(call.id),
        kind: Some("function"),
        function: CallFunction { name: Some(call.name), arguments: call.arguments },
    };
    calls.into_iter().map(body).collect()
}

/// Pieces of calls as a chunk has them.
pub(crate) fn deltas(pieces: Vec<CallPiece>) -> Vec<CallBody> {
    let body = |piece: CallPiece| {
        let opens = !piece.id.is_empty();
        CallBody {
            index: Some(piece.call),
            id: opens.then_some(piece.id),
            kind: opens.then_some("function"),
            function: CallFunction {
                name: opens.then_some(piece.name),
                arguments: piece.arguments,
            },
        }
    };
    pieces.into_iter().map(body).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn taken(body: &Value, nesting: Nesting) -> Result<Conversation, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).expect("an object");
        let mut conversation = Conversation::default();
        let took = take(&mut fields, nesting, &mut conversation);
        took.map(|()| conversation).map_err(|e| e.to_string())
    }

    #[test]
    fn both_spellings() {
        let parameters = json!({"type": "object"});
        let nested =
            json!({"name": "f", "description": "d", "parameters": parameters, "strict": true});
        let flat = json!({"type": "function", "name": "f", "description": "d",
            "parameters": parameters, "strict": true});
        let chat = taken(
            &json!({"tools": [{"type": "function", "function": nested}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": false}),
            Nesting::Function,
        );
        let expected = Conversation {
            tools: vec![r#"{"name":"f","description":"d","parameters":{"type":"object"}}"#.into()],
            tool_choice: ToolChoice::Named("f".into()),
            single_call: true,
            ..Conversation::default()
        };
        assert_eq!(chat, Ok(expected.clone()));
        let choice = json!({"type": "function", "name": "f"});
        let body = json!({"tools": [flat], "tool_choice": choice, "parallel_tool_calls": false});
        assert_eq!(taken(&body, Nesting::Flat), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, said) in [
            (json!({"tools": {}}), "must be an array"),
            (json!({"tools": [{"type": "web_search"}]}), "'web_search' are not supported"),
            (json!({"tools": [{"type": "function"}]}), "is missing"),
            (json!({"tool_choice": "maybe"}), "'maybe' is not known"),
            (json!({"tool_choice": {"type": "function", "function": {}}}), "is missing"),
            (json!({"parallel_tool_calls": 1}), "boolean"),
        ] {
            let error = taken(&body, Nesting::Function).expect_err("refused");
            assert!(error.contains(said), "{body}: {error}");
        }
    }
}
