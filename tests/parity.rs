//! Placement changes nothing: on the real model, the same tokens and logits, bit for bit, whatever
//! the number of stages, the threads, the chunks, the micro-batches, the company and the
//! instruction set. And those logits are right, by the rule of `testdata/README.md`.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::OnceLock;

use futures::future::try_join_all;
use harness::ask::{self, Answer};
use harness::fixtures::{self, Reference};
use harness::local::{Local, Shape};
use harness::{alone, block_on, model, model_arg, processes};
use millrace_coordinator::text::Tokenizer;
use millrace_engine::Isa;
use millrace_net::client::Client;
use millrace_shared::error::Status;
use millrace_shared::model::gguf::Gguf;
use millrace_shared::options::MicroBatches;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{PositionScore, Prompt, TokenizeRequest};
use serde_json::Value;

/// Of the sampled requests; the n-th uses this plus n.
const SEED: u64 = 20_260_117;
/// Sequences at once.
const REQUESTS: usize = 16;

type Request = (Vec<u32>, SamplingParams);

/// Sixteen different sequences: every fixture greedily and sampled, some with every other knob.
fn requests(cases: &[Reference]) -> Vec<Request> {
    let mut requests: Vec<Request> = cases
        .iter()
        .map(|case| (case.token_ids.clone(), ask::greedy(case.greedy.len() as u32)))
        .collect();
    for (i, case) in cases.iter().enumerate() {
        requests.push((case.token_ids.clone(), ask::sampled(SEED + i as u64, 32)));
    }
    let text = &cases.last().unwrap().token_ids;
    for (i, len) in [63, 64, 65, 129].into_iter().enumerate() {
        let params = SamplingParams {
            top_k: 40,
            top_p: 0.95,
            repetition_penalty: 1.1,
            presence_penalty: 0.2,
            frequency_penalty: 0.1,
            ..ask::sampled(SEED + 100 + i as u64, 24)
        };
        requests.push((text[i..i + len].to_vec(), params));
    }
    assert_eq!(requests.len(), REQUESTS);
    requests
}

/// What one stage on one thread says, one request after the other.
struct Truth {
    cases: Vec<Reference>,
    scores: Vec<Vec<PositionScore>>,
    answers: Vec<Answer>,
}

fn truth() -> &'static Truth {
    static TRUTH: OnceLock<Truth> = OnceLock::new();
    TRUTH.get_or_init(|| {
        eprintln!("seeds: {SEED} and following");
        let cases = fixtures::references();
        let cluster = Local::start(Shape::default());
        let (scores, answers) = block_on(async {
            let client = ask::connect(cluster.client()).await;
            let (mut scores, mut answers) = (Vec::new(), Vec::new());
            for case in &cases {
                scores.push(ask::score(&client, case.forced(), fixtures::TOP).await.unwrap());
            }
            for (prompt, params) in requests(&cases) {
                let prompt = Prompt::Tokens(prompt);
                answers.push(ask::generate(&client, prompt, params).await.unwrap());
            }
            client.close().await;
            (scores, answers)
        });
        Truth { cases, scores, answers }
    })
}

async fn scores(client: &Client, cases: &[Reference]) -> Result<Vec<Vec<PositionScore>>, Status> {
    let all = cases.iter().map(|case| ask::score(client, case.forced(), fixtures::TOP));
    try_join_all(all).await
}

async fn answers(client: &Client, cases: &[Reference]) -> Result<Vec<Answer>, Status> {
    let all = requests(cases)
        .into_iter()
        .map(|(prompt, params)| ask::generate(client, Prompt::Tokens(prompt), params));
    try_join_all(all).await
}

/// Equal as numbers is not enough.
fn bits(score: &PositionScore) -> (u32, Option<u32>, Vec<(u32, u32)>, u32) {
    let top = score.top_logits.iter().map(|&(id, logit)| (id, logit.to_bits())).collect();
    let next = score.next_logprob.map(f32::to_bits);
    (score.position, next, top, score.log_sum_exp.to_bits())
}

#[track_caller]
fn same_scores(who: &str, found: &[Vec<PositionScore>]) {
    let truth = truth();
    for ((case, found), expected) in truth.cases.iter().zip(found).zip(&truth.scores) {
        assert_eq!(found.len(), expected.len(), "{who}, {}", case.name);
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(bits(found), bits(expected), "{who}, {}", case.name);
        }
    }
}

#[track_caller]
fn same_answers(who: &str, found: &[Answer]) {
    for (i, (found, expected)) in found.iter().zip(&truth().answers).enumerate() {
        assert_eq!(found, expected, "{who}, request {i}");
    }
}

/// A cluster of this shape, with all sixteen at once, says the same as one stage with each alone.
fn says_the_same(shape: Shape) {
    let who = format!("{shape:?}");
    let truth = truth();
    let cluster = Local::start(shape);
    let (scores, answers) = block_on(async {
        let client = ask::connect(cluster.client()).await;
        let scores = scores(&client, &truth.cases).await.unwrap();
        let answers = answers(&client, &truth.cases).await.unwrap();
        ask::idle(&client).await;
        client.close().await;
        (scores, answers)
    });
    same_scores(&who, &scores);
    same_answers(&who, &answers);
    fixtures::check(&who, &truth.cases, &scores);
}

#[test]
fn one_stage_agrees_with_the_reference() {
    let _turn = alone();
    let truth = truth();
    fixtures::check("one stage", &truth.cases, &truth.scores);
    for (case, answer) in truth.cases.iter().zip(&truth.answers) {
        let certain = case.certain_steps();
        assert_eq!(answer.tokens[..certain], case.greedy[..certain], "{}", case.name);
        eprintln!("{}: {certain} of {} steps are certain", case.name, case.greedy.len());
    }
}

/// What is chosen greedily has the largest logit when the answer is scored as given tokens.
#[test]
fn scores_and_greedy_answers_agree() {
    let _turn = alone();
    let truth = truth();
    let cluster = Local::start(Shape { stages: 2, ..Shape::default() });
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        for (case, answer) in truth.cases.iter().zip(&truth.answers) {
            let given = [&case.token_ids[..], &answer.tokens].concat();
            let scores = ask::score(&client, given, 1).await.unwrap();
            let chosen = scores[case.token_ids.len() - 1..].iter().map(|s| s.top_logits[0].0);
            let chosen: Vec<u32> = chosen.take(answer.tokens.len()).collect();
            assert_eq!(chosen, answer.tokens, "{}", case.name);
        }
        client.close().await;
    });
}

#[test]
fn one_stage_with_fifteen_others() {
    let _turn = alone();
    says_the_same(Shape::default());
}

#[test]
fn stage_counts() {
    let _turn = alone();
    for stages in [2, 3, 5, 30] {
        says_the_same(Shape { stages, ..Shape::default() });
    }
}

#[test]
fn threads_and_a_whole_prefill() {
    let _turn = alone();
    says_the_same(Shape { threads: 2, prefill_chunk: 2048, ..Shape::default() });
}

#[test]
fn single_positions_one_micro_batch() {
    let _turn = alone();
    let micro_batches = MicroBatches::Fixed(1);
    says_the_same(Shape { stages: 2, prefill_chunk: 1, micro_batches, ..Shape::default() });
}

#[test]
fn chunks_of_seven_four_micro_batches() {
    let _turn = alone();
    let micro_batches = MicroBatches::Fixed(4);
    says_the_same(Shape { stages: 3, prefill_chunk: 7, micro_batches, ..Shape::default() });
}

/// A cache too small for all: sequences give their blocks up and are computed again.
#[test]
fn preemption() {
    let _turn = alone();
    let truth = truth();
    let cluster = Local::start(Shape { stages: 2, kv_cache_tokens: 448, ..Shape::default() });
    let (answers, status) = block_on(async {
        let client = ask::connect(cluster.client()).await;
        let answers = answers(&client, &truth.cases).await.unwrap();
        let status = ask::idle(&client).await;
        client.close().await;
        (answers, status)
    });
    eprintln!("{} preemptions in {} blocks", status.preemptions, status.kv_blocks);
    assert!(status.preemptions > 0, "{status:?}");
    same_answers("a small cache", &answers);
}

#[test]
fn tokenizer() {
    let _turn = alone();
    let cases = fixtures::tokens();
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(model()).unwrap()).unwrap();
    for case in &cases {
        assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&case.ids, false), case.text);
    }
    let cluster = Local::start(Shape::default());
    block_on(async {
        let client = ask::connect(cluster.client()).await;
        for case in &cases {
            let prompt = Prompt::Text(case.text.clone());
            let request = TokenizeRequest { model: String::new(), prompt };
            assert_eq!(client.tokenize(request).await.unwrap(), case.ids, "{:?}", case.text);
            assert_eq!(client.detokenize(case.ids.clone()).await.unwrap(), case.text);
        }
        client.close().await;
    });
}

/// One answer of `millrace generate` on an instruction set; empty: the best there is.
fn generate_on(isa: &str, home: &Path) -> Value {
    let case = &truth().cases[3];
    std::fs::write(home.join("ids.json"), serde_json::to_string(&case.token_ids).unwrap()).unwrap();
    let mut generate = processes::command("millrace", home);
    generate.args(["generate", "--model", model_arg(), "--stages", "2", "--threads", "1"]);
    generate.args(["--token-ids", "ids.json", "--max-tokens", "12", "--temperature", "0"]);
    generate.args(["--ignore-eos", "--logprobs", "5", "--output", "json"]);
    if !isa.is_empty() {
        generate.env("MILLRACE_CPU_PATH", isa);
    }
    let output = processes::run(generate);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{isa}: {stderr}");
    let mut answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    answer.as_object_mut().unwrap().remove("timings");
    answer
}

#[test]
fn instruction_sets() {
    let _turn = alone();
    let home = tempfile::tempdir().unwrap();
    let best = generate_on("", home.path());
    let expected: Vec<Value> =
        truth().answers[3].tokens.iter().take(12).map(|&t| t.into()).collect();
    assert_eq!(best["token_ids"], Value::from(expected));
    assert_eq!(best["logprobs"].as_array().map(Vec::len), Some(12), "{best}");
    for isa in [Isa::Scalar, Isa::Avx2] {
        if isa <= Isa::best() {
            // Shortest decimals that read back as the same float: equal text is equal bits.
            assert_eq!(generate_on(&isa.to_string(), home.path()), best, "{isa}");
        }
    }
}
