//! Rules by themselves: growing text as text that is whole, what is hidden, what is refused.

use std::ops::Range;

use millrace_shared::wire::rpc::{ChatMessage, Conversation, Prompt, ToolCall};
use proptest::prelude::*;
use serde::de::IgnoredAny;

use super::answer::Source;
use super::patterns::{MAX_MATCH_BYTES, Patterns};
use super::*;

fn args(change: impl FnOnce(&mut RulesArgs)) -> RulesArgs {
    let mut args = RulesArgs { redact_with: "[redacted]".into(), ..RulesArgs::default() };
    change(&mut args);
    args
}

fn texts(all: &[&str]) -> Vec<String> {
    all.iter().map(|text| (*text).to_owned()).collect()
}

fn answers(block: &[&str], redact: &[&str]) -> AnswerRules {
    let rules = args(|a| (a.answer_block, a.answer_redact) = (texts(block), texts(redact)));
    rules.rules().expect("rules").answer.expect("some")
}

/// Matches in a text that is whole.
fn matches(block: &[&str], redact: &[&str], text: &str) -> Vec<(Range<usize>, bool)> {
    let patterns = Patterns::new(&texts(block), &texts(redact), false).unwrap().unwrap();
    let (mut all, mut from) = (Vec::new(), 0);
    while let Some(found) = patterns.find(text, from) {
        all.push((found.start..found.end, found.blocks));
        from = found.end;
        if found.blocks {
            break;
        }
    }
    all
}

/// What becomes of a text whose tokens are these pieces of its bytes: text, hidden tokens, and
/// whether it was blocked.
fn screened(rules: &AnswerRules, pieces: &[&[u8]]) -> (String, Vec<bool>, bool) {
    let mut screen = Screen::new(rules).expect("it hides");
    let (mut out, mut hidden) = (String::new(), Vec::new());
    let (mut held, mut bytes) = (Vec::new(), 0);
    let mut take = |shown: Vec<Shown>, out: &mut String| {
        for Shown { index, text, hidden: is } in shown {
            assert_eq!(index as usize, hidden.len(), "in order, each once");
            hidden.push(is);
            out.push_str(&text);
        }
        hidden.len()
    };
    for (index, piece) in (0..).zip(pieces) {
        held.extend_from_slice(piece);
        let valid = std::str::from_utf8(&held).map_or_else(|e| e.valid_up_to(), str::len);
        let rest = held.split_off(valid);
        let text = String::from_utf8(std::mem::replace(&mut held, rest)).unwrap();
        screen.token(index, bytes..bytes + text.len(), !held.is_empty());
        bytes += text.len();
        let told = take(screen.push(&text), &mut out);
        let waiting: usize = pieces[told..=index as usize].iter().map(|p| p.len()).sum();
        let longest = pieces.iter().map(|p| p.len()).max().unwrap_or_default();
        assert!(waiting <= MAX_MATCH_BYTES + 8 + 2 * longest, "what is held back is bounded");
    }
    let (shown, rest) = screen.finish("");
    take(shown, &mut out);
    out.push_str(&rest);
    (out, hidden, screen.blocked())
}

/// Cuts bytes into pieces of these lengths, over and over.
fn cut<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let (mut pieces, mut rest, mut lengths) = (Vec::new(), bytes, lengths.iter().cycle());
    while !rest.is_empty() {
        let n = lengths.next().map_or(1, |n| *n).clamp(1, rest.len());
        pieces.push(&rest[..n]);
        rest = &rest[n..];
    }
    pieces
}

const REDACT: [&str; 9] = [
    "ab|abc|bcd",
    r"\bcat\b",
    r"(?i)key-[a-c]{1,5}",
    "é{2,3}x?",
    "^a{2,4}",
    "(?m)^c{1,2}$",
    r"b\B.{0,3}c",
    "(?:aab){1,3}$",
    r".é\b",
];

proptest! {
    /// However an answer is cut into tokens, also inside characters: the text is what the rules make
    /// of the whole, and exactly the tokens with bytes of a match are hidden.
    #[test]
    fn growing_is_whole(
        text in r"[abctéÉ \n]{0,60}|(key-|cat|ab| |é|\n|KEY-b){0,12}",
        lengths in prop::collection::vec(1usize..6, 1..8),
        redact in prop::sample::subsequence(REDACT.to_vec(), 1..5),
        block in prop::option::of(prop::sample::select(vec!["tt", r"c\b", "ca{0,2}t$"])),
    ) {
        let block: Vec<&str> = block.into_iter().collect();
        let (mut whole, mut from, mut gone) = (String::new(), 0, Vec::new());
        let mut blocked = false;
        for (range, blocks) in matches(&block, &redact, &text) {
            whole.push_str(&text[from..range.start]);
            from = range.end;
            blocked = blocks;
            gone.push(range.start..if blocks { text.len() } else { range.end });
            if !blocks {
                whole.push_str("[redacted]");
            }
        }
        if !blocked {
            whole.push_str(&text[from..]);
        }
        let pieces = cut(text.as_bytes(), &lengths);
        let mut at = 0;
        let hidden: Vec<bool> = pieces.iter().map(|piece| {
            let token = at..at + piece.len();
            at = token.end;
            // A character is hidden as a whole, and all tokens of it.
            let start = (0..=token.start).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
            let end = (token.end..=text.len()).find(|&i| text.is_char_boundary(i));
            let end = end.unwrap_or(text.len());
            gone.iter().any(|gone| gone.start < end && start < gone.end)
        }).collect();
        let found = screened(&answers(&block, &redact), &pieces);
        prop_assert_eq!(found, (whole, hidden, blocked));
    }

    /// The first JSON of a text is the same however the text is cut.
    #[test]
    fn json_grows(
        text in r#"([{}\[\],:]|"a"|"\\""|12|null|-|x| |\n|\{"k":|```json|é){0,24}"#,
        lengths in prop::collection::vec(1usize..6, 1..8),
    ) {
        let starts = text.char_indices().filter(|(_, c)| "{[".contains(*c)).map(|(at, _)| at);
        let value = starts.into_iter().find_map(|at| {
            let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter::<IgnoredAny>();
            values.next()?.ok()?;
            Some(&text[at..at + values.byte_offset()])
        });
        let mut finder = JsonFinder::default();
        let (mut out, chars): (String, Vec<char>) = (String::new(), text.chars().collect());
        let (mut rest, mut lengths) = (chars.as_slice(), lengths.iter().cycle());
        while !rest.is_empty() {
            let n = lengths.next().map_or(1, |n| (*n).min(rest.len()));
            out.push_str(&finder.push(&rest[..n].iter().collect::<String>()));
            rest = &rest[n..];
        }
        out.push_str(&finder.finish());
        prop_assert_eq!(finder.found(), value.is_some());
        prop_assert_eq!(out.as_str(), value.unwrap_or(&text));
    }
}

#[test]
fn a_stream_goes_on_where_no_match_can() {
    let rules = answers(&[], &[r"\b\d{4}(?:[ -]?\d{4}){3}\b"]);
    let mut screen = Screen::new(&rules).unwrap();
    let mut at = 0;
    let mut push = |text: &str| {
        screen.token(0, at..at + text.len(), false);
        at += text.len();
        screen.push(text).into_iter().map(|s| (s.text, s.hidden)).collect::<Vec<_>>()
    };
    let shown = |text: &str| (text.to_owned(), false);
    assert_eq!(push("Pay "), [shown("Pay ")], "nothing is held back without need");
    assert_eq!(push("4000 12"), []);
    assert_eq!(push("3 apples"), [shown("4000 12"), shown("3 apples")]);
    assert_eq!(push(" 4111"), []);
    assert_eq!(push("-1111-1111-1111"), []);
    let found = push(" or");
    assert_eq!(found[0], (" [redacted]".to_owned(), true));
    assert_eq!(found[1], (String::new(), true));
    assert_eq!(found[2..], [shown(" or")]);
}

#[test]
fn fences_and_prose_go() {
    let of = |text: &str| {
        let mut finder = JsonFinder::default();
        finder.push(text) + &finder.finish()
    };
    assert_eq!(of("Here [you] are:\n```json\n{\"a\": [1]}\n```\nDone."), "{\"a\": [1]}");
    assert_eq!(of("[1, 2] {}"), "[1, 2]");
    assert_eq!(of("no JSON {a: 1}"), "no JSON {a: 1}");
    assert_eq!(of("{\"cut\": \"off"), "{\"cut\": \"off");
    assert_eq!(of("{\"cut\": [1, 2], \"off"), "[1, 2]");
}

#[test]
fn what_cannot_be_used_is_named() {
    let refused = |change: fn(&mut RulesArgs)| args(change).rules().unwrap_err().to_string();
    for (message, parts) in [
        (
            refused(|a| a.answer_redact = vec![r"\d+".into()]),
            ["--answer-redact", r"'\d+' can match texts of any length", "1024 bytes", "{1,100}"],
        ),
        (
            refused(|a| a.answer_block = vec![r"\w{600}".into()]),
            ["--answer-block", "texts of 2400 bytes", "1024 bytes", r"\w"],
        ),
        (
            refused(|a| a.prompt_block = vec!["x*".into()]),
            ["--prompt-block", "'x*'", "empty text", ""],
        ),
        (
            refused(|a| a.prompt_redact = vec!["(".into()]),
            ["--prompt-redact", "'('", "unclosed", ""],
        ),
        (
            refused(|a| a.answer_redact = vec!["e".into()]),
            ["--answer-redact", "[redacted]", "--redact-with", ""],
        ),
        (
            refused(|a| a.prompt_block = vec![r"(\w{1,100}){1,100}".into()]),
            ["--prompt-block", "compile", "MiB", ""],
        ),
        (
            refused(|a| a.prompt_block = vec!["x".into(); 65]),
            ["--prompt-block", "65 patterns", "64", ""],
        ),
    ] {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    // A prompt is there as a whole.
    assert!(args(|a| a.prompt_redact = vec![r"\d+".into()]).rules().is_ok());
}

/// What a program cannot compile any more it does not let through.
#[test]
fn rules_that_are_not_understood_block() {
    let rules = AnswerRules::from(Source { redact: texts(&["("]), ..Source::default() });
    assert_eq!(screened(&rules, &[b"a", b"b"]), (String::new(), vec![true, true], true));
}

fn ruled(rules: &RulesArgs, mut prompt: Prompt) -> Result<(Prompt, Touched), String> {
    let text_of = |ids: &[u32]| ids.iter().filter_map(|id| char::from_u32(*id)).collect();
    let touched = rules.rules().unwrap().prompt.apply(&mut prompt, text_of);
    touched.map(|t| (prompt, t)).map_err(|status| status.param.unwrap_or_default())
}

#[test]
fn prompts_are_normalised() {
    let of = |change: fn(&mut RulesArgs), text: &str| match ruled(
        &args(change),
        Prompt::Text(text.into()),
    )
    .unwrap()
    {
        (Prompt::Text(text), touched) => (text, touched.changed),
        other => panic!("{other:?}"),
    };
    let found = |text: &str| (text.to_owned(), true);
    assert_eq!(of(|_| {}, "e\u{301} \u{7}"), ("e\u{301} \u{7}".to_owned(), false));
    assert_eq!(of(|a| a.prompt_unicode = Some(UnicodeForm::Nfc), "e\u{301}ﬁ"), found("éﬁ"));
    assert_eq!(of(|a| a.prompt_unicode = Some(UnicodeForm::Nfkc), "e\u{301}ﬁ１"), found("éfi1"));
    assert_eq!(of(|a| a.prompt_strip_control = true, "a\u{7}\u{0}\tb\r\n"), found("a\tb\r\n"));
    assert_eq!(of(|a| a.prompt_collapse_whitespace = true, " a \t b \n\n c "), found(" a b\nc "));
    assert_eq!(of(|a| a.prompt_trim = true, " \n a b\t"), found("a b"));
    let all = |a: &mut RulesArgs| {
        a.prompt_unicode = Some(UnicodeForm::Nfkc);
        (a.prompt_strip_control, a.prompt_collapse_whitespace, a.prompt_trim) = (true, true, true);
    };
    assert_eq!(of(all, "\u{feff}\u{a0} e\u{0}\u{301}\u{2003}\u{3000}x "), found("\u{feff} é x"));
}

#[test]
fn prompts_are_searched() {
    let rules = args(|a| {
        a.prompt_redact = texts(&[r"\d{3,}"]);
        a.prompt_block = texts(&["(?i)forbidden"]);
    });
    let redacted = Touched { changed: true, redacted: true };
    let chat = |content: &str, arguments: &str, tool: &str| {
        let call = ToolCall { arguments: arguments.into(), ..ToolCall::default() };
        let message = ChatMessage { tool_calls: vec![call], ..ChatMessage::new("user", content) };
        Prompt::Chat(Conversation { tools: texts(&[tool]), ..vec![message].into() })
    };
    assert_eq!(
        ruled(&rules, chat("12 123", "{\"a\":\"4567\"}", "{\"name\":\"t89\"}")),
        Ok((chat("12 [redacted]", "{\"a\":\"[redacted]\"}", "{\"name\":\"t89\"}"), redacted))
    );
    for blocked in [chat("Forbidden", "", ""), chat("", "FORBIDDEN", ""), chat("", "", "forbidden")]
    {
        assert_eq!(ruled(&rules, blocked), Err("messages".into()));
    }
    let ids = |text: &str| Prompt::Tokens(text.chars().map(u32::from).collect());
    assert_eq!(ruled(&rules, ids("a 12")), Ok((ids("a 12"), Touched::default())));
    assert_eq!(ruled(&rules, ids("a 123")), Ok((Prompt::Text("a [redacted]".into()), redacted)));
    assert_eq!(ruled(&rules, ids("forbidden")), Err("prompt".into()));
}

/// Each character is a token; each message takes two more.
fn ids_of(conversation: &Conversation) -> Vec<u32> {
    let mut ids = Vec::new();
    for message in &conversation.messages {
        ids.push(1);
        ids.extend(message.content.chars().map(u32::from));
        ids.push(2);
    }
    ids
}

#[test]
fn long_prompts_are_shortened() {
    let plain = |how, limit| {
        let ids = vec![9, 1, 2, 3, 4, 5];
        let fitted = Overlong { ids, limit }.plain(how, Some(9));
        fitted.map(|Fitted { ids, left_out }| (ids, left_out)).map_err(|s| s.message)
    };
    assert_eq!(plain(Overflow::Refuse, 6), Ok((vec![9, 1, 2, 3, 4, 5], 0)));
    assert_eq!(plain(Overflow::KeepEnd, 4), Ok((vec![9, 3, 4, 5], 2)));
    assert_eq!(plain(Overflow::KeepBeginning, 4), Ok((vec![9, 1, 2, 3], 2)));
    for how in [Overflow::Refuse, Overflow::DropTurns] {
        let message = plain(how, 4).unwrap_err();
        assert!(message.contains("6 tokens, at most 4"), "{message}");
    }
}

#[test]
fn long_conversations_are_shortened() {
    let said = [
        ("system", "ss"),
        ("user", "aaaa"),
        ("assistant", "bbbb"),
        ("tool", "cc"),
        ("user", "dddd"),
        ("assistant", "ee"),
        ("user", "0123456789"),
    ];
    let of = |said: &[(&str, &str)]| -> Conversation {
        said.iter().map(|(role, text)| ChatMessage::new(*role, *text)).collect::<Vec<_>>().into()
    };
    let all = of(&said);
    let length = ids_of(&all).len();
    let fit = |how, limit| {
        let overlong = Overlong { ids: ids_of(&all), limit };
        let fitted = overlong.chat(how, &all, |shorter| Ok(ids_of(shorter)));
        fitted.map(|Fitted { ids, left_out }| (ids, left_out)).map_err(|s| s.message)
    };
    let kept = |said: &[(&str, &str)]| {
        let ids = ids_of(&of(said));
        let left_out = (length - ids.len()) as u32;
        Ok((ids, left_out))
    };
    assert_eq!(fit(Overflow::DropTurns, length), kept(&said));
    assert_eq!(fit(Overflow::DropTurns, length - 1), kept(&[said[0], said[4], said[5], said[6]]));
    assert_eq!(fit(Overflow::DropTurns, 16), kept(&[said[0], said[6]]));
    assert!(fit(Overflow::DropTurns, 15).unwrap_err().contains("all turns but the last"));
    let mut cut = said;
    cut[6].1 = "6789";
    assert_eq!(fit(Overflow::KeepEnd, length - 6), kept(&cut));
    cut[6].1 = "0123";
    assert_eq!(fit(Overflow::KeepBeginning, length - 6), kept(&cut));
    assert!(
        fit(Overflow::KeepEnd, length - 10).unwrap_err().contains("even without its last message")
    );
    assert!(fit(Overflow::Refuse, 9).unwrap_err().contains("at most 9"));
}
