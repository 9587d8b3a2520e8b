//! A model whose chat template takes for ever, where it is asked to.

use std::pin::pin;

use futures::future::join_all;
use harness::processes::Coordinator;
use harness::{alone, ask, block_on, model};
use millrace_shared::error::ErrorCode;
use millrace_shared::wire::chat::{ChatMessage, Conversation};
use millrace_shared::wire::rpc::Prompt;

/// As many templates are rendered at a time, and one more.
const SPINNING: usize = 4;
/// Each round changes sixteen megabytes to capitals: minutes in all, by few instructions.
const TEMPLATE: &str = "{% if messages[0].content == 'spin' %}{% set s = 'aaaaaaaaaaaaaaaa' * 999999 %}\
    {% for i in range(9999) %}{% set x = s | upper %}{% endfor %}{% endif %}{{ messages[0].content }}";

/// The model's file with this template instead of its own, which is longer.
fn with_template(template: &str) -> Vec<u8> {
    let mut file = std::fs::read(model()).unwrap();
    let key = b"tokenizer.chat_template";
    let at = file.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    let length = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let padding = length - template.len() - "{##}".len();
    let whole = format!("{template}{{#{}#}}", " ".repeat(padding));
    file[at + 8..at + 8 + length].copy_from_slice(whole.as_bytes());
    file
}

/// All renderers are taken for as long as they may be: prompts without a conversation do not wait for
/// them, answers go on, and each conversation gets its refusal.
#[test]
fn templates_that_spin_hold_up_nobody() {
    let _turn = alone();
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("spins.gguf");
    std::fs::write(&file, with_template(TEMPLATE)).unwrap();
    let flags = ["--kv-cache-tokens", "8192", "--engine", "mock"];
    let cluster = Coordinator::serve(file.to_str().unwrap(), root.path(), 1, &flags);
    let _node = cluster.node("node", &["--engine", "mock"]);
    cluster.wait_ready();
    block_on(async {
        let client = ask::connect(&cluster.client).await;
        let chat = |content: &str| {
            let messages = vec![ChatMessage::new("user", content)];
            let prompt = Prompt::Chat(Conversation { messages, ..Conversation::default() });
            ask::generate(&client, prompt, ask::greedy(4))
        };
        assert_eq!(chat("hello").await.unwrap().tokens.len(), 4);
        let plain = || {
            let prompt = Prompt::Text("A request like any other".to_owned());
            ask::generate(&client, prompt, ask::greedy(32))
        };
        let undisturbed = plain().await.unwrap();
        let mut spinning = pin!(join_all((0..SPINNING).map(|_| chat("spin"))));
        for _ in 0..3 {
            tokio::select! {
                biased;
                ended = &mut spinning => panic!("none of them spun: {ended:?}"),
                answer = plain() => assert_eq!(answer.unwrap(), undisturbed),
            }
        }
        for refused in spinning.await {
            let status = refused.unwrap_err();
            let late =
                status.code == ErrorCode::InvalidArgument && status.message.contains("too long");
            let turned_away = status.message.contains("take too long to render");
            assert!(late || turned_away, "{status}");
        }
        assert_eq!(chat("hello").await.unwrap().tokens.len(), 4);
        client.close().await;
    });
}
