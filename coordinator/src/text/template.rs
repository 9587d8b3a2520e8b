//! The interpreter of chat templates.
//!
//! Templates are programs from the model's file. They see nothing but the conversation and cannot
//! reach files; instructions, messages and output are bounded, and so is the time they take. Memory
//! on the way is not: a template that doubles a string again and again takes what there is, and one
//! that nests a list deeply enough takes the stack. That is why programs that serve have templates
//! rendered by processes of their own ([`super::renderers`]).

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use millrace_shared::wire::rpc::MAX_CHAT_MESSAGES;
use minijinja::syntax::SyntaxConfig;
use minijinja::tests::is_iterable;
use minijinja::value::{Kwargs, Serde, Value as Any};
use minijinja::{Environment, Error, ErrorKind, context};
use regex_automata::meta::Regex;
use serde_json::Value;

use super::python_json::{self, Style};
use super::{TextError, clock};

/// Instructions that a template may run, besides some per message.
const FUEL: u64 = 1_000_000;
const FUEL_PER_MESSAGE: u64 = 10_000;
/// Instructions in all, however many messages there are: seconds at most.
const MAX_FUEL: u64 = 10_000_000;
/// Longest prompt in bytes.
pub(super) const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// A compiled template.
#[derive(Clone, Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// Compiles a template; `bos` and `eos` are what its variables `bos_token` and `eos_token` are.
    ///
    /// # Errors
    /// If it is not valid.
    pub(super) fn new(source: &str, bos: String, eos: String) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TextError::Template(describe(&e)))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| clock::strftime_now(&format));
        environment.add_filter("tojson", to_json);
        // In Python, nothing is not iterable.
        environment.add_test("iterable", |value: &Any| !value.is_none() && is_iterable(value));
        environment
            .add_template_owned(NAME, without_generation(source))
            .map_err(|e| TextError::Template(describe(&e)))?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the model's answer
    /// begins. The template may add a system message of its own.
    ///
    /// # Errors
    /// If there are more than [`MAX_CHAT_MESSAGES`], or the template refuses the conversation (such
    /// as roles out of turn), or runs too long.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let found = messages.len();
        if found > MAX_CHAT_MESSAGES {
            return Err(TextError::Messages { found, limit: MAX_CHAT_MESSAGES });
        }
        let failed = |e: &Error| TextError::Render(describe(e));
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(MAX_FUEL.min(FUEL + FUEL_PER_MESSAGE * found as u64)));
        let template = environment.get_template(NAME).map_err(|e| failed(&e))?;
        let mut out = Bounded(Vec::new());
        let context = context! {
            messages => Serde(messages),
            tools => (!tools.is_empty()).then_some(Serde(tools)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        // The interpreter has panics that templates reach, such as `''[::-1]`.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            template.render_captured_to(context, &mut out).map(drop)
        }));
        let broken = |_| TextError::Render("the template breaks its interpreter".to_owned());
        rendered.map_err(broken)?.map_err(|e| failed(&e))?;
        String::from_utf8(out.0).map_err(|e| TextError::Render(e.to_string()))
    }
}

/// Templates that were used in training mark with `{% generation %}` what the assistant said. Here
/// that is a block like any other.
fn without_generation(source: &str) -> String {
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}");
    let tag = tag.expect("invariant: the pattern is valid");
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    for found in tag.captures_iter(source) {
        let group = |n| found.get_group(n).map(|span| &source[span.range()]);
        let Some(whole) = found.get_match() else { continue };
        let block = if group(2).is_some() { "endif" } else { "if true" };
        let (before, after) = (group(1).unwrap_or_default(), group(3).unwrap_or_default());
        out.push_str(&source[copied..whole.start()]);
        out.push_str(&format!("{{%{before} {block} {after}%}}"));
        copied = whole.end();
    }
    out + &source[copied..]
}

/// JSON as Hugging Face's templates write it, with the options of `json.dumps` that they have.
fn to_json(value: Any, options: Kwargs) -> Result<String, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let style = Style {
        indent: options.get("indent")?,
        separators: match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
            None => None,
            Some([between, behind]) => Some((between.clone(), behind.clone())),
            Some(_) => {
                let why = "tojson: separators are two texts";
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        },
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    if options.get::<Option<bool>>("sort_keys")?.unwrap_or(false) {
        let mut sorted = serde_json::to_value(&value).map_err(failed)?;
        sorted.sort_all_objects();
        return python_json::written(&sorted, &style).map_err(failed);
    }
    python_json::written(&value, &style).map_err(failed)
}

/// An error with its causes, without the template's source.
fn describe(error: &Error) -> String {
    let mut text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it runs for too long".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line} of the template)"));
    }
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        text.push_str(&format!(": {e}"));
        cause = e.source();
    }
    text
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0.len() + data.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("the prompt exceeds {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    fn user(content: &str) -> Value {
        json!({"role": "user", "content": content})
    }

    fn render(source: &str, messages: &[Value]) -> Result<String, TextError> {
        Template::new(source, "<s>".to_owned(), "</s>".to_owned())?.render(messages, &[], true)
    }

    #[test]
    fn python_methods_and_tokens() {
        let source = "{{ bos_token }}{% for m in messages %}\n{{ m['content'].strip().upper() }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(render(source, &[user(" hi "), user("x")]).unwrap(), "<s>HI</s>X</s>>");
    }

    #[test]
    fn refusals_carry_the_templates_words() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let message = render(source, &[user("a")]).unwrap_err().to_string();
        assert!(message.contains("refused the conversation: roles must alternate"), "{message}");
    }

    #[test]
    fn invalid_and_endless_templates() {
        assert!(matches!(render("{% for %}", &[]), Err(TextError::Template(_))));
        let source =
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}";
        let message = render(source, &[user("a")]).unwrap_err().to_string();
        assert!(message.contains("too long"), "{message}");
    }

    #[test]
    fn what_breaks_the_interpreter_is_an_error() {
        let message = render("{{ ''[::-1] }}", &[user("a")]).unwrap_err().to_string();
        assert!(message.contains("breaks its interpreter"), "{message}");
    }

    #[test]
    fn conversations_have_a_longest_length() {
        let source =
            "{% for m in messages %}{{ '<' + m.role + '>' + m.content.strip() }}{% endfor %}";
        let longest = vec![user("a"); MAX_CHAT_MESSAGES];
        assert_eq!(render(source, &longest).unwrap().len(), 7 * MAX_CHAT_MESSAGES);
        let message = render(source, &vec![user("a"); 4097]).unwrap_err().to_string();
        assert!(message.contains("4097 messages, at most 4096"), "{message}");
        // What takes some thousand instructions for each message ends, too.
        let source =
            "{% for m in messages %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}";
        let message = render(source, &longest).unwrap_err().to_string();
        assert!(message.contains("too long"), "{message}");
    }

    #[test]
    fn marks_of_training_are_blocks_like_any_other() {
        let source = "{% for m in messages %}\n{{- m.role }}:\n{%- generation -%}\n  {{ m.content }}\n{%- endgeneration %}\n{% generation %}.{% endgeneration %}\n{% endfor %}";
        assert_eq!(render(source, &[user("a"), user("b")]).unwrap(), "user:a.user:b.");
    }

    #[test]
    fn nothing_is_not_iterable() {
        let source = "{% if tools is iterable and tools | length > 0 %}tools{% else %}none{% endif %}{{ '' is iterable }}{{ [] is iterable }}{{ 1 is iterable }}";
        assert_eq!(render(source, &[user("a")]).unwrap(), "noneTrueTrueFalse");
    }

    #[test]
    fn options_of_json() {
        let json = |options: &str| {
            let source = format!("{{{{ {{'b': ['é', 1], 'a': 2}} | tojson({options}) }}}}");
            render(&source, &[user("a")]).unwrap()
        };
        assert_eq!(json(""), r#"{"b": ["é", 1], "a": 2}"#);
        assert_eq!(json("ensure_ascii=True, sort_keys=True"), r#"{"a": 2, "b": ["\u00e9", 1]}"#);
        assert_eq!(json("separators=(',', ':')"), r#"{"b":["é",1],"a":2}"#);
    }

    #[test]
    fn dates() {
        let text = render("{{ strftime_now('%Y') }}", &[]).unwrap();
        assert!(text.parse::<u32>().unwrap() >= 2024);
    }
}
