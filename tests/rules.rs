//! What operators have done to prompts and answers, in a whole cluster: the same over HTTP and QUIC,
//! whole and streamed, and after the coordinator died. Coordinator and node are processes.
#![allow(clippy::unwrap_used)]

use harness::ask;
use harness::http;
use harness::local::{Local, Shape};
use harness::processes::{Coordinator, Process, command, fails_with, run};
use harness::{alone, block_on};
use millrace_net::client::{ClientConfig, GenerateStream};
use millrace_shared::error::ErrorCode;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{
    ChatMessage, Choices, FinishReason, GenerateEvent, GenerateRequest, HIDDEN_TOKEN, Prompt,
    ScoreRequest, TokenizeRequest,
};
use serde_json::{Value, json};

/// Enough that the answer is under way when half of it has come.
const TOKENS: u32 = 160;
const PROMPT: &str = "Story of a lighthouse:";
const OPTIONS: [&str; 4] = ["--kv-cache-tokens", "8192", "--recovery-timeout", "100"];

/// What a client hears of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    /// Id, text, and whether its probability was told.
    tokens: Vec<(u32, String, bool)>,
    end: Option<(FinishReason, String, u32)>,
}

impl Heard {
    fn text(&self) -> String {
        let end = self.end.as_ref().map_or("", |(_, text, _)| text);
        self.tokens.iter().map(|(_, text, _)| text.as_str()).chain([end]).collect()
    }
}

/// The rest of a stream, of which `heard` has come; stops at so many tokens.
async fn hear(stream: &mut GenerateStream, heard: &mut Heard, most: usize) {
    while heard.tokens.len() < most && heard.end.is_none() {
        match stream.next().await.unwrap().unwrap() {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { index, token_id, text, logprobs, .. } => {
                assert_eq!(index as usize, heard.tokens.len(), "each token once");
                heard.tokens.push((token_id, text, logprobs.is_some()));
            }
            GenerateEvent::Finished { reason, text, usage, .. } => {
                heard.end = Some((reason, text, usage.completion_tokens));
            }
        }
    }
}

fn asked(prompt: &str, tokens: u32) -> GenerateRequest {
    let params = SamplingParams { logprobs: Some(1), ..ask::greedy(tokens) };
    let (prompt, choices) = (Prompt::Text(prompt.to_owned()), Choices::default());
    GenerateRequest { model: String::new(), prompt, params, choices }
}

fn whole(config: &ClientConfig, request: GenerateRequest) -> Heard {
    block_on(async {
        let client = ask::connect(config).await;
        let mut heard = Heard::default();
        hear(&mut client.generate(request).await.unwrap(), &mut heard, usize::MAX).await;
        client.close().await;
        heard
    })
}

/// A pattern of exactly this text.
fn literal(text: &str) -> String {
    let mark = |c: char| if c.is_ascii_punctuation() { format!("\\{c}") } else { c.to_string() };
    text.chars().map(mark).collect()
}

fn completion(coordinator: &Coordinator, more: Value) -> http::Response {
    let mut body = json!({
        "model": "model", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": true
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let key = &coordinator.client.api_key;
    http::post(coordinator.http(), "/v1/completions", key, body.to_string().as_bytes())
}

/// The text of a stream, and why it ended.
fn streamed(response: &http::Response) -> (String, String) {
    let (mut text, mut reason) = (String::new(), String::new());
    let body = response.text();
    let chunks = body.lines().filter_map(|line| line.strip_prefix("data: "));
    for chunk in chunks.filter_map(|data| serde_json::from_str::<Value>(data).ok()) {
        let choice = &chunk["choices"][0];
        text.push_str(choice["text"].as_str().unwrap());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    (text, reason)
}

fn start(root: &std::path::Path, rules: &[&str]) -> (Coordinator, Process) {
    let coordinator = Coordinator::start(root, 1, &[&OPTIONS[..], rules].concat());
    let node = coordinator.node("node-0", &[]);
    coordinator.wait_ready();
    (coordinator, node)
}

#[test]
fn what_is_hidden_is_hidden_everywhere_and_after_a_death() {
    let _turn = alone();
    let single = Local::start(Shape::default());
    let truth = whole(single.client(), asked(PROMPT, TOKENS));
    drop(single);
    let text = |range: std::ops::Range<usize>| -> String {
        truth.tokens[range].iter().map(|(_, text, _)| text.as_str()).collect()
    };
    // Of several tokens each; one comes before the coordinator dies, one after.
    let (first, second) = (text(20..24), text(70..78));
    let patterns = [literal(first.trim()), literal(second.trim())];
    let hide = ["--answer-redact", &patterns[0], "--answer-redact", &patterns[1]];
    let root = tempfile::tempdir().unwrap();
    let (mut coordinator, _node) = start(root.path(), &hide);
    let config = coordinator.client.clone();

    let expected =
        truth.text().replace(first.trim(), "[redacted]").replace(second.trim(), "[redacted]");
    assert_ne!(expected, truth.text());
    let hidden = whole(&config, asked(PROMPT, TOKENS));
    assert_eq!(hidden.text(), expected);
    assert_eq!(hidden.end.as_ref().unwrap().2, TOKENS, "usage is exact");
    for ((id, text, told), (was, ..)) in hidden.tokens.iter().zip(&truth.tokens) {
        assert_eq!((*id == *was, *id == HIDDEN_TOKEN), (*told, !told), "{text}");
    }
    assert!((72..76).all(|i| hidden.tokens[i].0 == HIDDEN_TOKEN));

    let body = completion(&coordinator, json!({"logprobs": 1})).json();
    assert_eq!(body["choices"][0]["text"], expected.as_str());
    assert_eq!(body["usage"]["completion_tokens"], TOKENS);
    let entries = body["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(entries.len(), hidden.tokens.iter().filter(|(_, _, told)| *told).count());
    let (text, reason) = streamed(&completion(&coordinator, json!({"stream": true})));
    assert_eq!((text, reason.as_str()), (expected.clone(), "length"));
    let chat = |path: &str, body: Value| {
        let key = &config.api_key;
        http::post(coordinator.http(), path, key, body.to_string().as_bytes())
    };
    let refused = block_on(async {
        let client = ask::connect(&config).await;
        let request = ScoreRequest { model: String::new(), tokens: vec![1, 2, 3], top_k: 1 };
        let refused = client.score(request).await.unwrap_err().code;
        client.close().await;
        refused
    });
    assert_eq!(refused, ErrorCode::InvalidArgument, "logits would tell");
    let echoed = |logprobs: u32| {
        let more = json!({"echo": true, "logprobs": logprobs, "max_tokens": 0});
        completion(&coordinator, more)
    };
    let answer = echoed(1);
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("logprobs")));
    let known = &echoed(0).json()["choices"][0];
    assert_eq!(known["text"], PROMPT);
    assert!(known["logprobs"]["token_logprobs"][1].as_f64().unwrap() < 0.0);
    let counted = coordinator.metric("millrace_text_rules_total");
    assert!(counted >= 3.0, "{counted} requests");
    let answer = chat(
        "/v1/responses",
        json!({"model": "model", "input": "Say: hello", "max_output_tokens": 4}),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());

    // A death between the two, and other rules in the next life.
    let mut heard = Heard::default();
    block_on(async {
        let client = ask::connect(&config).await;
        let mut stream = client.generate(asked(PROMPT, TOKENS)).await.unwrap();
        hear(&mut stream, &mut heard, 50).await;
        coordinator.process.kill();
        coordinator.start_again(1, &[&OPTIONS[..], &["--answer-block", "lighthouse"]].concat());
        hear(&mut stream, &mut heard, usize::MAX).await;
        client.close().await;
    });
    assert_eq!(heard, hidden, "a request keeps the rules that it began with");
    let now = whole(&config, asked(PROMPT, TOKENS));
    let (reason, ..) = now.end.as_ref().unwrap();
    let whole_text = truth.text();
    let before = whole_text.split("lighthouse").next().unwrap_or_default().to_owned();
    assert_eq!((*reason, now.text()), (FinishReason::ContentFilter, before.clone()));
    let (text, reason) = streamed(&completion(&coordinator, json!({"stream": true})));
    assert_eq!((text, reason.as_str()), (before, "content_filter"));
}

#[test]
fn prompts_are_shortened_redacted_and_blocked_alike() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let rules = [
        "--prompt-redact",
        r"\d{4,}",
        "--prompt-block",
        "(?i)open sesame",
        "--prompt-limit",
        "24",
        "--prompt-overflow",
        "keep-end",
        "--prompt-trim",
    ];
    let (coordinator, _node) = start(root.path(), &rules);
    let config = &coordinator.client;
    let started = |prompt: &str| {
        block_on(async {
            let client = ask::connect(config).await;
            let mut stream = client.generate(asked(prompt, 4)).await.unwrap();
            let first = stream.next().await.unwrap();
            client.close().await;
            match first {
                Ok(GenerateEvent::Started { prompt_token_ids, left_out, .. }) => {
                    Ok((prompt_token_ids, left_out))
                }
                Ok(other) => panic!("{other:?}"),
                Err(status) => Err((status.code, status.param)),
            }
        })
    };
    let (secret, plain) = ("  My number is 123456. ", "My number is [redacted].");
    assert_eq!(started(secret), started(plain));
    let long = format!("{} and so the long day ends", "one two three ".repeat(20));
    let (ids, left_out) = started(&long).unwrap();
    assert!(ids.len() == 24 && left_out > 20, "{left_out}");
    assert_eq!(started("Open Sesame!"), Err((ErrorCode::InvalidArgument, Some("prompt".into()))));

    let echoed = |prompt: &str| {
        let body = json!({"prompt": prompt, "echo": true, "max_tokens": 4});
        completion(&coordinator, body)
    };
    let answer = echoed(secret);
    let text = answer.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with(plain), "{text}");
    assert_eq!(answer.header("x-millrace-truncated"), None);
    let answer = echoed(&long);
    assert_eq!(answer.header("x-millrace-truncated"), Some(left_out.to_string().as_str()));
    assert!(answer.json()["choices"][0]["text"].as_str().unwrap().contains("so the long day ends"));
    let scored = |prompt: &str| {
        let more = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 1});
        completion(&coordinator, more)
    };
    let (of_secret, of_plain) = (scored(secret), scored(plain));
    assert_eq!(of_secret.json()["choices"], of_plain.json()["choices"]);
    assert_eq!(scored("open sesame").status, 400);
    let answer = scored(&long);
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("prompt")));
    let answer = echoed("open sesame");
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(!answer.text().contains("sesame"), "rules are not told");

    // What is kept of a conversation is what the rules leave.
    let key = &config.api_key;
    let body = json!({"model": "model", "input": "Is 987654 a number?", "max_output_tokens": 4,
        "instructions": "Never say 55555."});
    let made = http::post(coordinator.http(), "/v1/responses", key, body.to_string().as_bytes());
    assert_eq!(made.status, 200, "{}", made.text());
    assert_eq!(made.json()["instructions"], "Never say [redacted].");
    let journal = std::fs::read(coordinator.dir().join("journal.redb")).unwrap();
    let has = |text: &str| journal.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(has("Is [redacted] a number?") && !has("987654") && !has("55555"));
    for did in ["redacted", "blocked", "shortened"] {
        let metrics = http::get_with(coordinator.http(), "/metrics", key).text();
        let line = |l: &&str| l.starts_with("millrace_text_rules_total{") && l.contains(did);
        assert!(metrics.lines().any(|l| line(&l)), "{metrics}");
    }
}

#[test]
fn rules_that_cannot_be_used_are_named_at_the_start() {
    let root = tempfile::tempdir().unwrap();
    let refused = |args: &[&str]| {
        let mut serve = command("millrace-coordinator", root.path());
        serve
            .args(["serve", "--model", "none.gguf", "--dir"])
            .arg(root.path().join("c"))
            .args(args);
        run(serve)
    };
    let output = refused(&["--answer-redact", r"key-\w+"]);
    fails_with(
        &output,
        &["--answer-redact", r"'key-\w+' can match texts of any length", "1024 bytes"],
    );
    let file = root.path().join("c.toml");
    let config = |text: &str| {
        std::fs::write(&file, text).unwrap();
        refused(&["--config", file.to_str().unwrap()])
    };
    let output = config("[serve]\nanswer-redac = ['x']\n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("there is no flag --answer-redac of [serve]"), "{said}");
    let mut print = command("millrace-coordinator", root.path());
    std::fs::write(&file, "[serve]\nprompt-redact = ['a{3}', 'b']\nanswer-json = true\n").unwrap();
    print.args(["--config", file.to_str().unwrap(), "serve", "--model", "m", "--print-config"]);
    print.env("MILLRACE_COORDINATOR_PROMPT_OVERFLOW", "drop-turns");
    let printed = run(print);
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    for (key, value, source) in [
        ("prompt-redact = ", "[\"a{3}\", \"b\"]", "# file"),
        ("answer-json = ", "true", "# file"),
        ("prompt-overflow = ", "drop-turns", "PROMPT_OVERFLOW"),
    ] {
        let line =
            printed.lines().find(|l| l.starts_with(key)).unwrap_or_else(|| panic!("{printed}"));
        assert!(line.contains(value) && line.contains(source), "{line}");
    }
}

#[test]
fn the_oldest_turns_are_left_out_of_a_conversation() {
    let _turn = alone();
    const LIMIT: usize = 64;
    let root = tempfile::tempdir().unwrap();
    let rules = ["--prompt-limit", "64", "--prompt-overflow", "drop-turns"];
    let (coordinator, _node) = start(root.path(), &rules);
    let config = &coordinator.client;
    let system = ChatMessage::new("system", "You are a miller.");
    let mut turns = Vec::new();
    for number in ["one", "two", "three", "four"] {
        let ask = format!("This is question {number}: how does the water turn the wheel?");
        turns.push([ChatMessage::new("user", ask), ChatMessage::new("assistant", "It falls.")]);
    }
    let conversation = |left_out: usize| {
        let mut messages = vec![system.clone()];
        messages.extend(turns[left_out..].iter().flatten().cloned());
        messages.push(ChatMessage::new("user", "And the stone?"));
        messages
    };
    let chat = |messages: Vec<ChatMessage>| Prompt::Chat(messages.into());
    block_on(async {
        let client = ask::connect(config).await;
        let ids = async |left_out: usize| {
            let prompt = chat(conversation(left_out));
            client.tokenize(TokenizeRequest { model: String::new(), prompt }).await.unwrap()
        };
        // As few turns as it takes go, and the template says the rest as if they had not been there.
        let whole = ids(0).await;
        let (mut gone, mut expected) = (0, whole.clone());
        while expected.len() > LIMIT {
            gone += 1;
            expected = ids(gone).await;
        }
        assert!((1..4).contains(&gone), "{gone} turns of {} tokens", whole.len());
        let request = GenerateRequest { prompt: chat(conversation(0)), ..asked("", 8) };
        let shorter = GenerateRequest { prompt: chat(conversation(gone)), ..asked("", 8) };
        let mut stream = client.generate(request).await.unwrap();
        match stream.next().await.unwrap().unwrap() {
            GenerateEvent::Started { prompt_token_ids, left_out, .. } => {
                assert_eq!(prompt_token_ids, expected);
                assert_eq!(left_out as usize, whole.len() - expected.len());
            }
            other => panic!("{other:?}"),
        }
        let (mut heard, mut same) = (Heard::default(), Heard::default());
        hear(&mut stream, &mut heard, usize::MAX).await;
        hear(&mut client.generate(shorter).await.unwrap(), &mut same, usize::MAX).await;
        assert_eq!(heard, same);

        let long = ChatMessage::new("user", "one two three ".repeat(40));
        let request = GenerateRequest { prompt: chat(vec![system.clone(), long]), ..asked("", 8) };
        let refused = client.generate(request).await.unwrap().next().await.unwrap().unwrap_err();
        assert_eq!(refused.param.as_deref(), Some("messages"), "{refused}");
        client.close().await;
    });
}

#[test]
fn json_is_taken_out_of_an_answer() {
    let _turn = alone();
    let prompt = "Q: A JSON object with a name and an age?\nA: Here it is: {\"name\": \"Ann\", \
                  \"age\": 3}.\nQ: Another one?\nA: Here";
    let single = Local::start(Shape::default());
    let truth = whole(single.client(), asked(prompt, 48)).text();
    drop(single);
    let from = truth.find('{').expect("the model writes an object");
    let mut values = serde_json::Deserializer::from_str(&truth[from..]).into_iter::<Value>();
    assert!(values.next().unwrap().unwrap().is_object(), "{truth}");
    let expected = &truth[from..from + values.byte_offset()];
    assert!(from > 0 && truth.len() > from + expected.len(), "prose around it: {truth}");

    let root = tempfile::tempdir().unwrap();
    let (coordinator, _node) = start(root.path(), &["--answer-json"]);
    let heard = whole(&coordinator.client, asked(prompt, 48));
    assert_eq!(heard.text(), expected);
    let (reason, _, tokens) = heard.end.unwrap();
    assert!(reason == FinishReason::Stop && tokens < 48, "it ends where the object does");
    let more = json!({"prompt": prompt, "max_tokens": 48});
    let body = completion(&coordinator, more.clone()).json();
    assert_eq!(body["choices"][0]["text"], expected);
    let mut streaming = more;
    streaming["stream"] = json!(true);
    let response = completion(&coordinator, streaming);
    assert_eq!(streamed(&response), (expected.to_owned(), "stop".to_owned()));
    let piece = serde_json::to_string(expected).unwrap();
    assert!(response.text().contains(&piece), "it comes in one piece: {}", response.text());
    // Without any the answer is whole.
    let plain = json!({"prompt": "The capital of France is", "max_tokens": 4});
    let text = completion(&coordinator, plain).json()["choices"][0]["text"].clone();
    assert!(text.as_str().unwrap().contains("Paris"), "{text}");
}
