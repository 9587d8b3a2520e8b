//! Sampling against a slow, obvious implementation; stop strings against naive search.

use std::cmp::Ordering;

use millrace_shared::sampling::{
    MAX_CANDIDATES, Place, SampleError, SamplingParams, Scratch, StopMatcher, TokenMask,
    largest_logits, sample, sample_top, score, uniform,
};
use proptest::prelude::*;

/// Everything by the book: full sorts, no shortcuts.
fn reference(
    raw: &[f32],
    p: &SamplingParams,
    history: &[u32],
    prompt: usize,
    seed: u64,
    position: u32,
) -> u32 {
    let mut logits = raw.to_vec();
    for &(id, bias) in &p.logit_bias {
        logits[id as usize] = (f64::from(logits[id as usize]) + f64::from(bias)) as f32;
    }
    for (id, logit) in logits.iter_mut().enumerate() {
        let seen = history.iter().any(|&t| t as usize == id);
        let count = history.iter().skip(prompt).filter(|&&t| t as usize == id).count();
        let mut x = f64::from(*logit);
        if seen {
            let r = f64::from(p.repetition_penalty);
            x = if x > 0.0 { x / r } else { x * r };
        }
        if count > 0 {
            x -= f64::from(p.frequency_penalty) * count as f64;
            x -= f64::from(p.presence_penalty);
        }
        *logit = x as f32;
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        let (x, y) = (logits[a as usize], logits[b as usize]);
        y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    });
    if p.temperature == 0.0 {
        return ids[0];
    }
    let max = f64::from(logits[ids[0] as usize]);
    let weight =
        |id: u32| libm::exp((f64::from(logits[id as usize]) - max) / f64::from(p.temperature));
    if p.top_k > 0 {
        ids.truncate(p.top_k as usize);
    }
    ids.retain(|&id| weight(id) >= f64::from(p.min_p));
    let sum_by_id = |ids: &[u32]| -> f64 {
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        sorted.iter().map(|&id| weight(id)).sum()
    };
    if p.top_p < 1.0 {
        let mass = f64::from(p.top_p) * sum_by_id(&ids);
        let mut sum = 0.0;
        let mut keep = ids.len();
        for (index, &id) in ids.iter().enumerate() {
            sum += weight(id);
            if sum >= mass {
                keep = index + 1;
                break;
            }
        }
        ids.truncate(keep);
    }
    let target = uniform(seed, position) * sum_by_id(&ids);
    ids.sort_unstable();
    let mut sum = 0.0;
    for &id in &ids {
        sum += weight(id);
        if sum > target {
            return id;
        }
    }
    *ids.iter().rfind(|&&id| weight(id) > 0.0).expect("the largest has weight 1")
}

/// Coarse logits, so that ties are frequent.
fn logits(max: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..max)
}

fn params() -> impl Strategy<Value = SamplingParams> {
    (
        prop_oneof![Just(0.0f32), Just(1.0), 0.01f32..2.0],
        prop_oneof![Just(0u32), Just(1), 1u32..400],
        prop_oneof![Just(1.0f32), 0.01f32..1.0],
        prop_oneof![Just(0.0f32), Just(1.0), 0.0f32..0.5],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop_oneof![Just(0.0f32), -2.0f32..2.0],
        prop::collection::vec((0u32..1, -100.0f32..100.0), 0..2),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, repetition, presence, frequency, bias)| {
                SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty: repetition,
                    presence_penalty: presence,
                    frequency_penalty: frequency,
                    logit_bias: bias,
                    ..SamplingParams::default()
                }
            },
        )
}

fn run(
    logits: &[f32],
    params: &SamplingParams,
    history: &[u32],
    prompt: usize,
    seed: u64,
    position: u32,
) -> u32 {
    let mut copy = logits.to_vec();
    let place = Place { history, prompt_len: prompt, seed, position, mask: None };
    sample(&mut copy, params, place, &mut Scratch::default()).expect("finite logits").token
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn equals_the_reference(
        logits in logits(700),
        mut params in params(),
        history in prop::collection::vec(0u32..800, 0..40),
        prompt in 0usize..40,
        seed in any::<u64>(),
        position in any::<u32>(),
        logprobs in prop::option::of(0u8..=64),
    ) {
        params.logprobs = logprobs;
        let expected = reference(&logits, &params, &history, prompt, seed, position);
        // A scratch that another call has used must not matter.
        let mut scratch = Scratch::default();
        let other = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() };
        let mut unrelated = vec![1.0, 2.0, 3.0];
        let elsewhere =
            Place { history: &[2, 2], prompt_len: 1, seed: 1, position: 1, mask: None };
        sample(&mut unrelated, &other, elsewhere, &mut scratch).expect("finite");
        let mut copy = logits.clone();
        let place = Place { history: &history, prompt_len: prompt, seed, position, mask: None };
        let got = sample(&mut copy, &params, place, &mut scratch).expect("finite");
        prop_assert_eq!(got.token, expected);
        prop_assert_eq!(got.logprobs.is_some(), logprobs.is_some());
        if let Some(got_logprobs) = got.logprobs {
            let scored = score(&logits, position, Some(expected), logprobs.unwrap_or(0), &mut scratch)
                .expect("finite");
            prop_assert_eq!(Some(got_logprobs.logprob), scored.next_logprob, "raw, by either way");
            let ids = |top: &[(u32, f32)]| top.iter().map(|t| t.0).collect::<Vec<_>>();
            prop_assert_eq!(ids(&got_logprobs.top), ids(&scored.top_logits));
        }
    }

    /// Wherever the largest logits are said to be enough, they give the same token.
    #[test]
    fn the_largest_logits_are_enough(
        logits in logits(700),
        mut params in params(),
        small_k in 0u32..80,
        seed in any::<u64>(),
        position in any::<u32>(),
    ) {
        params.top_k = small_k;
        let adjusted = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0
            || !params.logit_bias.is_empty();
        prop_assert!(!adjusted || params.candidates(logits.len()).is_none());
        params.logit_bias.clear();
        params.repetition_penalty = 1.0;
        (params.presence_penalty, params.frequency_penalty) = (0.0, 0.0);
        if let Some(k) = params.candidates(logits.len()) {
            prop_assert!(k <= MAX_CANDIDATES);
            let mut scratch = Scratch::default();
            let mut top = Vec::new();
            largest_logits(&logits, k, &mut top).expect("finite");
            let got = sample_top(&top, &params, seed, position, &mut scratch).expect("some");
            prop_assert_eq!(got.token, run(&logits, &params, &[1, 2], 1, seed, position));
            prop_assert_eq!(got.logprobs, None);
            params.logprobs = Some(0);
            prop_assert_eq!(params.candidates(logits.len()), None);
        } else {
            let all = small_k == 0 || small_k as usize >= logits.len().min(MAX_CANDIDATES + 1);
            prop_assert!(params.temperature != 0.0 && all);
        }
    }

    #[test]
    fn top_k_of_one_is_greedy(logits in logits(300), seed in any::<u64>()) {
        let greedy = run(&logits, &SamplingParams::greedy(), &[], 0, seed, 0);
        let one = SamplingParams { top_k: 1, ..SamplingParams::default() };
        prop_assert_eq!(run(&logits, &one, &[], 0, seed, 0), greedy);
        for top_p in [0.0, 1e-6] {
            for top_k in [0, 2] {
                let tiny = SamplingParams { top_p, top_k, ..SamplingParams::default() };
                prop_assert_eq!(run(&logits, &tiny, &[], 0, seed, 0), greedy);
            }
        }
        let strict = SamplingParams { min_p: 1.0, top_k: 1, ..SamplingParams::default() };
        prop_assert_eq!(run(&logits, &strict, &[], 0, seed, 0), greedy);
    }

    #[test]
    fn broken_logits_are_an_error(
        mut logits in logits(300),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        mut params in params(),
        logprobs in prop::option::of(0u8..=64),
    ) {
        params.logprobs = logprobs;
        let at = at.index(logits.len());
        logits[at] = bad;
        let place = Place { history: &[0], prompt_len: 0, seed: 1, position: 1, mask: None };
        let result = sample(&mut logits, &params, place, &mut Scratch::default());
        let named = matches!(result, Err(SampleError::NonFinite { id, .. }) if id == at);
        prop_assert!(named);
    }

    /// A mask makes the vocabulary smaller and changes nothing else.
    #[test]
    fn a_mask_is_a_smaller_vocabulary(
        logits in logits(300),
        mut params in params(),
        history in prop::collection::vec(0u32..300, 0..40),
        prompt in 0usize..40,
        seed in any::<u64>(),
        position in any::<u32>(),
        allowed in prop::collection::btree_set(0u32..300, 1..60),
        logprobs in prop::option::of(0u8..=64),
    ) {
        params.logprobs = logprobs;
        let kept: Vec<u32> =
            allowed.iter().copied().filter(|&id| (id as usize) < logits.len()).collect();
        let mask = TokenMask::of(allowed.iter().copied());
        let place = Place { history: &history, prompt_len: prompt, seed, position, mask: None };
        let masked = Place { mask: Some(&mask), ..place };
        let mut scratch = Scratch::default();
        let got = sample(&mut logits.clone(), &params, masked, &mut scratch);
        if kept.is_empty() {
            prop_assert_eq!(got, Err(SampleError::NothingAllowed));
            return Ok(());
        }
        let got = got.expect("finite");
        // The same among the kept tokens alone, under new ids.
        let renamed = |id: u32| kept.binary_search(&id).map_or(u32::MAX, |index| index as u32);
        let fewer: Vec<f32> = kept.iter().map(|&id| logits[id as usize]).collect();
        let history_renamed: Vec<u32> = history.iter().map(|&id| renamed(id)).collect();
        let mut params_renamed = params.clone();
        params_renamed.logprobs = None;
        params_renamed.logit_bias.iter_mut().for_each(|b| b.0 = renamed(b.0));
        let place = Place { history: &history_renamed, ..place };
        let expected =
            sample(&mut fewer.clone(), &params_renamed, place, &mut scratch).expect("finite");
        prop_assert_eq!(got.token, kept[expected.token as usize]);
        // Log-probabilities stay those of all tokens.
        if let Some(raw) = got.logprobs {
            let scored = score(&logits, position, Some(got.token), 0, &mut scratch).expect("finite");
            prop_assert_eq!(Some(raw.logprob), scored.next_logprob);
        }
    }

    #[test]
    fn stop_matcher_equals_naive_search(
        text in "[ab€]{0,24}",
        stops in prop::collection::vec("[ab€]{1,5}", 0..4),
        cuts in prop::collection::vec(any::<bool>(), 24),
    ) {
        let found = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let expected = &text[..found.unwrap_or(text.len())];
        let mut matcher = StopMatcher::new(&stops);
        let mut got = String::new();
        let mut piece = String::new();
        for (index, c) in text.chars().enumerate() {
            piece.push(c);
            if cuts[index] {
                let out = matcher.push(&std::mem::take(&mut piece));
                got.push_str(&out.emit);
                prop_assert_eq!(out.stopped, matcher.stopped());
                prop_assert!(expected.starts_with(&got), "never emits part of a stop string");
            }
        }
        got.push_str(&matcher.push(&piece).emit);
        got.push_str(&matcher.finish());
        prop_assert_eq!(&got, expected);
        prop_assert_eq!(matcher.stopped(), found.is_some());
    }
}

/// Frequencies follow the probabilities, and filters cut exactly what they should.
#[test]
fn distribution_is_that_of_the_softmax() {
    let logits = [1.0f32, 2.0, 3.0, 0.0, -30.0];
    let weights: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
    let total: f64 = weights.iter().sum();
    let n = 40_000;
    let mut counts = [0u32; 5];
    for position in 0..n {
        counts[run(&logits, &SamplingParams::default(), &[], 0, 11, position) as usize] += 1;
    }
    for (count, weight) in counts.iter().zip(&weights) {
        let (got, expected) = (f64::from(*count) / f64::from(n), weight / total);
        assert!((got - expected).abs() < 0.01, "{got} {expected}");
    }
    let nucleus = SamplingParams { top_p: 0.8, ..SamplingParams::default() };
    let drawn: std::collections::BTreeSet<u32> =
        (0..2000).map(|position| run(&logits, &nucleus, &[], 0, 5, position)).collect();
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), vec![1, 2]);
    let min_p = SamplingParams { min_p: 0.1, ..SamplingParams::default() };
    let drawn: std::collections::BTreeSet<u32> =
        (0..2000).map(|position| run(&logits, &min_p, &[], 0, 5, position)).collect();
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), vec![0, 1, 2]);
}

/// Fixed numbers: a change here changes the answers of every seeded request.
#[test]
fn the_random_stream_is_fixed() {
    let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 11) as f32 / 3.0).collect();
    let tokens: Vec<u32> = (0..8)
        .map(|position| run(&logits, &SamplingParams::default(), &[], 0, 1234, position))
        .collect();
    assert_eq!(tokens, [63, 43, 5, 27, 96, 73, 5, 30]);
}

#[test]
fn penalties_tell_prompt_from_answer() {
    let logits = [2.0f32, 1.9, 1.8];
    let presence = SamplingParams { presence_penalty: 1.0, ..SamplingParams::greedy() };
    assert_eq!(run(&logits, &presence, &[0, 1], 2, 0, 1), 0, "the prompt is not the answer");
    assert_eq!(run(&logits, &presence, &[0, 1], 1, 0, 1), 0);
    assert_eq!(run(&logits, &presence, &[1, 0], 1, 0, 1), 1);
    let frequency = SamplingParams { frequency_penalty: 0.15, ..SamplingParams::greedy() };
    assert_eq!(run(&logits, &frequency, &[0, 0, 1], 0, 0, 2), 2);
    let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
    assert_eq!(run(&logits, &repetition, &[0, 1], 2, 0, 1), 2);
    assert_eq!(run(&[-1.0, -1.1], &repetition, &[0], 1, 0, 0), 1, "negative logits are multiplied");
    let bias = SamplingParams { logit_bias: vec![(2, 100.0)], ..SamplingParams::greedy() };
    assert_eq!(run(&logits, &bias, &[], 0, 0, 0), 2);
}

#[test]
fn extreme_parameters_do_not_panic() {
    let logits = [3.0e38f32, -3.0e38, 0.0];
    for repetition_penalty in [f32::MIN_POSITIVE, 1e-45, f32::MAX] {
        for temperature in [0.0, 1e-45, 2.0] {
            let params = SamplingParams {
                repetition_penalty,
                temperature,
                top_p: 0.5,
                logprobs: Some(3),
                ..SamplingParams::default()
            };
            params.validate(3).expect("in range");
            run(&logits, &params, &[0, 1, 2, 7], 1, 9, 3);
        }
    }
}

#[test]
fn validation_names_the_field() {
    let check = |change: fn(&mut SamplingParams), field: &str| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let error = params.validate(100).expect_err(field);
        assert_eq!(error.param, field);
        assert!(!error.message.is_empty());
    };
    SamplingParams::default().validate(100).expect("defaults are valid");
    SamplingParams::greedy().validate(100).expect("greedy is valid");
    check(|p| p.temperature = -0.1, "temperature");
    check(|p| p.temperature = 2.1, "temperature");
    check(|p| p.temperature = f32::NAN, "temperature");
    let top_one = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
    top_one.validate(100).expect("top_p of 0 is valid");
    check(|p| p.top_p = -0.1, "top_p");
    check(|p| p.top_p = 1.1, "top_p");
    check(|p| p.min_p = -0.1, "min_p");
    check(|p| p.repetition_penalty = 0.0, "repetition_penalty");
    check(|p| p.repetition_penalty = f32::INFINITY, "repetition_penalty");
    check(|p| p.presence_penalty = 2.5, "presence_penalty");
    check(|p| p.frequency_penalty = -2.5, "frequency_penalty");
    check(|p| p.logit_bias = vec![(100, 1.0)], "logit_bias");
    check(|p| p.logit_bias = vec![(1, 101.0)], "logit_bias");
    check(|p| p.logit_bias = vec![(1, 1.0); 1025], "logit_bias");
    check(|p| p.max_tokens = Some(0), "max_tokens");
    check(|p| p.stop = vec![String::new()], "stop");
    check(|p| p.stop = vec!["x".to_owned(); 17], "stop");
    check(|p| p.stop = vec!["x".repeat(1025)], "stop");
    check(|p| p.stop_token_ids = vec![100], "stop_token_ids");
    check(|p| p.logprobs = Some(65), "logprobs");
}
