//! Generations by themselves: choices, who listens, what is told again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::RequestId;
use millrace_shared::sampling::{SamplingParams, choice_seed};
use millrace_shared::scheduler::Priority;
use millrace_shared::wire::codec;
use millrace_shared::wire::rpc::{FinishReason, GenerateEvent, HIDDEN_TOKEN, TokenLogprobs};
use uuid::Uuid;

use super::*;
use crate::journal::{Head, JournalConfig};
use crate::service::EventStream;
use crate::text::Tokenizer;
use crate::text::rules::{AnswerRules, RulesArgs};

/// A vocabulary of the letters: `a` is token 0.
fn letters() -> Arc<Tokenizer> {
    let vocab: BTreeMap<String, u32> =
        (b'a'..=b'z').map(|c| ((c as char).to_string(), u32::from(c - b'a'))).collect();
    let bytes = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Arc::new(Tokenizer::from_folder(dir.path()).unwrap())
}

fn head(n: u32, best_of: u32) -> Head {
    Head {
        id: RequestId(Uuid::from_u128(1)),
        model: [0; 32],
        prompt: vec![0, 1, 2],
        params: SamplingParams { stop: vec!["bcd".into()], ..SamplingParams::default() },
        seed: 5,
        chat: false,
        max_new: 6,
        choices: best_of,
        client: 1,
        priority: Priority::Normal,
        submitted_ms: 0,
        deadline_ms: None,
        keep_ms: 1_000,
        digest: [0; 32],
        tag: 0,
        n,
        calls: None,
        note: Vec::new(),
        rules: None,
        left_out: 0,
        altered: false,
    }
}

struct Rig {
    generation: Generation,
    journal: Journal,
    tokenizer: Arc<Tokenizer>,
}

fn rig(head: Head) -> Rig {
    let journal = Journal::without_disk(JournalConfig::default());
    let tokenizer = letters();
    let generation = Generation::new(Arc::new(head), &tokenizer, &journal);
    Rig { generation, journal, tokenizer }
}

impl Rig {
    fn listen(&mut self, from: &[u32], returns: bool) -> EventStream {
        self.generation.listen(from.to_vec(), returns, &self.journal).unwrap()
    }

    /// Gives a choice the tokens of these letters, after those that it has.
    fn say(&mut self, choice: u32, text: &str, logprob: f32) -> Verdict {
        let mut verdict = Verdict::Continue;
        for letter in text.bytes() {
            let index = self.generation.token_ids(choice).len() as u32;
            let logprobs = self.generation.head().scored();
            let logprobs = logprobs.map(|_| TokenLogprobs { logprob, top: Vec::new() });
            let token = (index, u32::from(letter - b'a'), false);
            let now = Duration::from_millis(10);
            verdict = self.generation.on_token(choice, token, logprobs, now, &self.journal);
        }
        verdict
    }

    /// What an earlier life left of it.
    fn restored(&self) -> Generation {
        let entry = self.generation.entry();
        Generation::restored(entry, &self.tokenizer, Duration::from_secs(9), &self.journal)
    }
}

/// What is in the stream now: text, tokens and end of each choice; each token once.
async fn heard(
    stream: &mut EventStream,
    from: &[u32],
) -> BTreeMap<u32, (String, u32, Option<u32>)> {
    let mut all = BTreeMap::<u32, (String, u32, Option<u32>)>::new();
    let at = |choice: u32| from.get(choice as usize).copied().unwrap_or_default();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(50), stream.next()).await
    {
        match event.unwrap() {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { choice, index, text, logprobs, .. } => {
                assert!(logprobs.is_none(), "nobody asked for them");
                let (all, next, _) =
                    all.entry(choice).or_insert_with(|| (String::new(), at(choice), None));
                assert_eq!(index, *next, "each once, in order");
                *next += 1;
                all.push_str(&text);
            }
            GenerateEvent::Finished { choice, text, usage, .. } => {
                let (all, _, end) =
                    all.entry(choice).or_insert_with(|| (String::new(), at(choice), None));
                all.push_str(&text);
                assert!(end.replace(usage.completion_tokens).is_none(), "one end");
                assert_eq!(usage.prompt_tokens, 3);
            }
        }
    }
    all
}

fn answer(text: &str, tokens: u32) -> (String, u32, Option<u32>) {
    (text.to_owned(), tokens, Some(tokens))
}

#[tokio::test]
async fn choices_end_by_themselves() {
    let mut rig = rig(head(3, 3));
    let mut stream = rig.listen(&[], false);
    assert_eq!(rig.generation.seed(2), choice_seed(5, 2));
    rig.say(0, "ab", 0.0);
    rig.say(1, "xy", 0.0);
    // One stops at its string, which another one holds back for ever.
    assert_eq!(rig.say(0, "cd", 0.0), Verdict::Finished(FinishReason::Stop));
    assert_eq!(rig.say(2, "abc", 0.0), Verdict::Continue);
    assert!(rig.generation.open().eq([1, 2]) && !rig.generation.is_done());
    // Somebody comes in the middle, with a part of each.
    let mut late = rig.listen(&[3, 1, 9], true);
    assert_eq!(rig.say(1, "zxyz", 0.0), Verdict::Finished(FinishReason::Length));
    assert_eq!(rig.generation.finish(2, FinishReason::Length, &rig.journal), FinishReason::Length);
    assert!(rig.generation.is_done());
    let whole = heard(&mut stream, &[]).await;
    let expected = [(0, answer("a", 4)), (1, answer("xyzxyz", 6)), (2, answer("abc", 3))];
    assert_eq!(whole, BTreeMap::from(expected.clone()));
    let rest = heard(&mut late, &[3, 1, 9]).await;
    assert_eq!(rest[&1], answer("yzxyz", 6));
    assert_eq!((rest[&0].1, rest[&0].2), (4, Some(4)));
    assert_eq!(rest[&2].2, Some(3), "its end, which nobody said was heard");
    // The same again when it is over.
    let entry = rig.generation.entry();
    let mut again = play_again(&entry, Vec::new(), &rig.tokenizer, &rig.journal);
    assert_eq!(heard(&mut again, &[]).await, BTreeMap::from(expected));
}

/// Nothing is told before all have ended; the best come first, and again the same after a restart.
#[tokio::test]
async fn the_best_are_chosen() {
    let mut rig = rig(head(2, 4));
    assert_eq!(rig.generation.params().logprobs, Some(0), "what comparing takes");
    let mut stream = rig.listen(&[], false);
    rig.say(0, "uuuuuu", -0.5);
    rig.say(1, "vvvvvv", -0.2);
    rig.say(2, "wwwwww", -0.7);
    assert!(heard(&mut stream, &[]).await.is_empty());
    let mut late = rig.listen(&[2], true);
    rig.say(3, "xx", -0.2);
    let mut next = rig.restored();
    let mut back = next.listen(Vec::new(), true, &rig.journal).unwrap();
    assert_eq!(rig.say(3, "xxxx", -0.2), Verdict::Finished(FinishReason::Length));
    let best = BTreeMap::from([(0, answer("vvvvvv", 6)), (1, answer("xxxxxx", 6))]);
    assert_eq!(heard(&mut stream, &[]).await, best, "as good a mean, and it was first");
    assert_eq!(heard(&mut late, &[2]).await[&0].0, "vvvv");
    for index in 2..6 {
        let logprobs = Some(TokenLogprobs { logprob: -0.2, top: Vec::new() });
        let token = (index, u32::from(b'x' - b'a'), false);
        next.on_token(3, token, logprobs, Duration::ZERO, &rig.journal);
    }
    assert_eq!(heard(&mut back, &[]).await, best);
    let mut again = play_again(&next.entry(), Vec::new(), &rig.tokenizer, &rig.journal);
    assert!(matches!(again.next().await, Some(Ok(GenerateEvent::Started { choices: 2, .. }))));
    assert_eq!(heard(&mut again, &[]).await, best);
}

#[tokio::test]
async fn what_is_left_out_is_counted() {
    let mut rig = rig(head(1, 3));
    let mut stream = rig.listen(&[], false);
    for choice in 0..3 {
        rig.say(choice, "abcd", -0.1 * choice as f32);
    }
    let mut usages = Vec::new();
    while let Some(event) = stream.next().await {
        if let GenerateEvent::Finished { usage, .. } = event.unwrap() {
            usages.push((usage.completion_tokens, usage.discarded_tokens));
            break;
        }
    }
    assert_eq!(usages, [(4, 8)]);
}

/// A failure is that of the whole request, also for who comes later.
#[tokio::test]
async fn a_failure_ends_all() {
    let mut rig = rig(head(2, 2));
    let mut stream = rig.listen(&[], false);
    rig.say(1, "abcd", 0.0);
    rig.say(0, "x", 0.0);
    rig.generation.fail(&Status::internal("broken"), &rig.journal);
    assert!(rig.generation.is_done());
    let mut again = play_again(&rig.generation.entry(), Vec::new(), &rig.tokenizer, &rig.journal);
    for stream in [&mut stream, &mut again] {
        let (mut ends, mut failed) = (Vec::new(), None);
        while failed.is_none() {
            match stream.next().await.expect("an end") {
                Ok(GenerateEvent::Finished { choice, .. }) => ends.push(choice),
                Ok(_) => {}
                Err(status) => failed = Some(status.code),
            }
        }
        assert_eq!((ends, failed), (vec![1], Some(ErrorCode::Internal)));
    }
}

/// A life later each choice goes on where it was; one whose last token had ended it has ended.
#[tokio::test]
async fn choices_are_restored() {
    let mut rig = rig(head(3, 3));
    rig.say(0, "xbc", 0.0);
    rig.say(1, "xbcd", 0.0);
    let mut next = rig.restored();
    assert!(next.open().eq([0, 2]));
    assert_eq!(next.token_ids(0).len(), 3);
    let mut stream = next.listen(vec![2], true, &rig.journal).unwrap();
    let d = (3, u32::from(b'd' - b'a'), false);
    let verdict = next.on_token(0, d, None, Duration::ZERO, &rig.journal);
    assert_eq!(verdict, Verdict::Finished(FinishReason::Stop), "half of it was matched before");
    let all = heard(&mut stream, &[2]).await;
    assert_eq!((all[&0].0.as_str(), &all[&1]), ("", &answer("x", 4)));
}

/// As long as one listens, or may come back in time, it goes on.
#[tokio::test]
async fn the_last_listener_decides() {
    let at = Duration::from_millis;
    let mut both = rig(head(1, 1));
    let (first, second) = (both.listen(&[], false), both.listen(&[], false));
    drop(second);
    assert!(!both.generation.is_abandoned(at(0)));
    drop(first);
    assert!(both.generation.is_abandoned(at(0)), "at once");

    // The first one's connection is lost; meanwhile somebody else looks in.
    let mut other = rig(head(1, 1));
    let first = other.listen(&[], false);
    first.lost();
    drop(first);
    assert!(!other.generation.is_abandoned(at(0)));
    drop(other.listen(&[], false));
    assert!(!other.generation.is_abandoned(at(100)), "the first one may come back");
    let back = other.listen(&[1], true);
    assert!(!other.generation.is_abandoned(at(5_000)));
    drop(back);
    assert!(other.generation.is_abandoned(at(5_000)), "it has left for good");

    let mut never = rig(head(1, 1));
    let first = never.listen(&[], false);
    first.lost();
    drop(first);
    assert!(!never.generation.is_abandoned(at(0)));
    assert!(!never.generation.is_abandoned(at(999)));
    assert!(never.generation.is_abandoned(at(1_000)));
}

/// Room in the journal is promised as it is used, not for what an answer might come to.
#[test]
fn promises_grow() {
    let long = Head { max_new: 100_000, ..head(1, 1) };
    let first = Generation::first_bytes(&long);
    assert!(first < 32 << 10, "{first}");
    let mut rig = rig(long);
    assert_eq!(rig.generation.promised_bytes(), first);
    let mut promised = first;
    for _ in 0..1_000 {
        rig.say(0, "x", 0.0);
        promised += rig.generation.take_promise().unwrap_or_default();
        assert!(rig.generation.entry().bytes() <= promised);
    }
    assert_eq!(rig.generation.promised_bytes(), promised);
    assert!(promised < 2 * rig.generation.entry().bytes());
}

/// Rules as a configuration has them.
fn rules(change: impl FnOnce(&mut RulesArgs)) -> Option<AnswerRules> {
    let mut args = RulesArgs { redact_with: "#".into(), ..RulesArgs::default() };
    change(&mut args);
    args.rules().unwrap().answer
}

fn with_rules(n: u32, change: impl FnOnce(&mut RulesArgs)) -> Head {
    let params = SamplingParams { logprobs: Some(0), ..SamplingParams::default() };
    Head { rules: rules(change), params, max_new: 20, ..head(n, n) }
}

/// What is in the stream now, as one text for each event of a choice.
async fn told(stream: &mut EventStream) -> Vec<String> {
    let mut all = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(50), stream.next()).await
    {
        match event.unwrap() {
            GenerateEvent::Started { .. } => {}
            GenerateEvent::Token { index, token_id, text, logprobs, .. } => {
                let hidden = token_id == HIDDEN_TOKEN;
                assert_eq!(hidden, logprobs.is_none(), "nor its probability");
                all.push(format!("{index}{}{text}", if hidden { "!" } else { ":" }));
            }
            GenerateEvent::Finished { reason, text, usage, .. } => {
                all.push(format!("{}={text}/{}", reason.as_str(), usage.completion_tokens));
            }
        }
    }
    all
}

/// What is redacted is told of late and by nobody: not by ids, nor by log-probabilities; the same to
/// whoever comes in the middle, comes late, or comes in the coordinator's next life.
#[tokio::test]
async fn hidden_tokens_are_hidden_from_everybody() {
    let mut rig = rig(with_rules(1, |a| a.answer_redact = vec!["se{1,3}t".into()]));
    let mut stream = rig.listen(&[], false);
    assert_eq!(rig.say(0, "ase", -0.5), Verdict::Continue);
    assert_eq!(told(&mut stream).await, ["0:a"], "what may be a match waits");
    // Attached where the client is, and by a client that has heard nothing.
    let (mut late, mut anew) = (rig.listen(&[1], true), rig.listen(&[], true));
    assert_eq!(told(&mut late).await, Vec::<String>::new());
    let mut next_life = rig.restored();
    let mut after = next_life.listen(vec![1], true, &rig.journal).unwrap();
    rig.say(0, "etsxse", -0.5);
    let rest = ["1!#", "2!", "3!", "4!"];
    assert_eq!(told(&mut stream).await, [&rest[..], &["5:s", "6:x"]].concat());
    assert_eq!(rig.generation.finish(0, FinishReason::Stop, &rig.journal), FinishReason::Stop);
    let end = ["7:s", "8:e", "stop=/9"];
    assert_eq!(told(&mut stream).await, end);
    let tail = [&rest[..], &["5:s", "6:x"], &end].concat();
    assert_eq!(told(&mut late).await, tail);
    assert_eq!(told(&mut anew).await, [&["0:a"], tail.as_slice()].concat());
    let mut replayed = play_again(&rig.generation.entry(), vec![3], &rig.tokenizer, &rig.journal);
    assert_eq!(told(&mut replayed).await, tail[2..]);
    // The next life computes the same tokens, and tells the same of them.
    for (index, letter) in (3..).zip("etsxse".bytes()) {
        let logprobs = Some(TokenLogprobs { logprob: -0.5, top: Vec::new() });
        let token = (index, u32::from(letter - b'a'), false);
        next_life.on_token(0, token, logprobs, Duration::from_millis(10), &rig.journal);
    }
    next_life.finish(0, FinishReason::Stop, &rig.journal);
    assert_eq!(told(&mut after).await, tail);
    let did = RulesDid { redacted: true, ..RulesDid::default() };
    assert_eq!((rig.generation.rules_did(), next_life.rules_did()), (did, did));
}

#[tokio::test]
async fn a_blocked_answer_ends() {
    let mut rig = rig(with_rules(2, |a| a.answer_block = vec!["bad".into(), "s?x".into()]));
    let mut stream = rig.listen(&[], false);
    let filtered = Verdict::Finished(FinishReason::ContentFilter);
    assert_eq!(rig.say(0, "okba", 0.0), Verdict::Continue);
    assert_eq!(rig.say(0, "d", 0.0), Verdict::Continue, "nothing longer begins before it");
    assert_eq!(rig.say(0, "y", 0.0), filtered);
    let ended = ["0:o", "1:k", "2!", "3!", "4!", "5!", "content_filter=/6"];
    assert_eq!(told(&mut stream).await, ended);
    // One that becomes certain only with the end.
    rig.say(1, "sx", 0.0);
    let reason = rig.generation.finish(1, FinishReason::Length, &rig.journal);
    assert_eq!(reason, FinishReason::ContentFilter);
    assert_eq!(told(&mut stream).await, ["0!", "1!", "content_filter=/2"]);
    assert!(rig.generation.rules_did().blocked);
}

#[tokio::test]
async fn the_rules_go_through_the_journal() {
    let head = with_rules(1, |a| (a.answer_redact, a.answer_json) = (vec!["q".into()], true));
    let kept: Head = codec::decode(&codec::encode(&head)).unwrap();
    assert_eq!(kept, head);
    assert!(kept.bytes() > Head { rules: None, ..head.clone() }.bytes());
    let mut rig = rig(kept);
    let mut stream = rig.listen(&[], false);
    rig.say(0, "aqa", 0.0);
    rig.generation.finish(0, FinishReason::Length, &rig.journal);
    // There is no JSON in it: all of it comes, at the end.
    assert_eq!(told(&mut stream).await, ["0:", "1!", "2:", "length=a#a/3"]);
}

/// A request that has been answered so far, for tests of others.
pub(crate) struct Spoken(Rig);

impl Spoken {
    /// Of three prompt tokens.
    pub(crate) fn new() -> Self {
        Self(rig(head(1, 1)))
    }

    pub(crate) fn generation(&self) -> &Generation {
        &self.0.generation
    }

    /// Tokens come.
    pub(crate) fn say(&mut self, text: &str) {
        self.0.generation.on_scheduled(0, Duration::from_millis(1), 0);
        self.0.say(0, text, 0.0);
    }
}
