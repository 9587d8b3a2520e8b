//! The request fields that both generating endpoints share.
//!
//! Only the shape is checked here (types, signs, what is not supported); what a sampling parameter
//! may be is the service's to say, so that QUIC and HTTP agree.

use std::collections::BTreeMap;

use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::Choices;
use serde_json::{Value, json};

use super::constraint;
use super::error::ApiError;
use super::fields::Fields;

/// Most rivals per position; the sampler's own limit.
const MAX_TOP_LOGPROBS: u8 = 64;

/// What a request asks for besides its prompt.
#[derive(Debug)]
pub(crate) struct Options {
    /// As the client named it; empty where it did not.
    pub(crate) model: String,
    /// Sampling and stopping.
    pub(crate) params: SamplingParams,
    /// How many answers.
    pub(crate) choices: Choices,
    /// Server-sent events instead of one body.
    pub(crate) stream: bool,
    /// A usage chunk at the end of a stream.
    pub(crate) include_usage: bool,
}

#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "must be a string or an array of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Takes the shared fields. `usual` applies where the client says nothing, `default_max_tokens` where
/// it sets no limit.
///
/// # Errors
/// Naming the field that is wrong or not supported.
pub(crate) fn take(
    fields: &mut Fields,
    usual: SamplingParams,
    default_max_tokens: Option<u32>,
) -> Result<Options, ApiError> {
    refuse_unsupported(fields)?;
    let model = fields.take("model")?.unwrap_or_default();
    let stream = fields.take("stream")?.unwrap_or(false);
    let include_usage = stream_options(fields)?;
    let choices = take_choices(fields, stream)?;
    fields.take_value("user");
    let mut params = usual;
    let max_tokens = take_limit(fields, "max_tokens")?;
    params.max_tokens =
        take_limit(fields, "max_completion_tokens")?.or(max_tokens).or(default_max_tokens);
    take_sampling(fields, &mut params)?;
    params.stop = take_stop(fields)?;
    params.stop_token_ids = fields.take("stop_token_ids")?.unwrap_or_default();
    params.grammar = constraint::take(fields)?;
    params.ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
    Ok(Options { model, params, choices, stream, include_usage })
}

fn take_choices(fields: &mut Fields, stream: bool) -> Result<Choices, ApiError> {
    let n = fields.take("n")?.unwrap_or(1);
    let best_of = fields.take("best_of")?.unwrap_or(n);
    let choices = Choices { n, best_of };
    choices.validate()?;
    if stream && best_of > n {
        let why = "answers that are compared first cannot be streamed: leave 'stream' out, or ask \
                   for 'n' alone";
        return Err(ApiError::invalid("best_of", why));
    }
    Ok(choices)
}

fn take_sampling(fields: &mut Fields, params: &mut SamplingParams) -> Result<(), ApiError> {
    for (name, slot) in [
        ("temperature", &mut params.temperature),
        ("top_p", &mut params.top_p),
        ("min_p", &mut params.min_p),
        ("repetition_penalty", &mut params.repetition_penalty),
        ("presence_penalty", &mut params.presence_penalty),
        ("frequency_penalty", &mut params.frequency_penalty),
    ] {
        if let Some(value) = fields.take::<f32>(name)? {
            *slot = finite(name, value)?;
        }
    }
    // -1 is how other servers spell "all tokens".
    if let Some(k) = fields.take::<i64>("top_k")? {
        params.top_k = u32::try_from(k.max(0))
            .map_err(|_| ApiError::invalid("top_k", "must be at most 4294967295"))?;
    }
    params.seed = take_seed(fields)?;
    params.logit_bias = take_logit_bias(fields)?;
    Ok(())
}

/// Logprobs as chat spells them: a switch, and a count of rivals.
///
/// # Errors
/// If the count is too large, or given without the switch.
pub(crate) fn take_chat_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let on = fields.take("logprobs")?.unwrap_or(false);
    let top = fields.take::<u64>("top_logprobs")?;
    match (on, top) {
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::invalid("top_logprobs", "needs \"logprobs\": true beside it"))
        }
        (true, top) => count("top_logprobs", top.unwrap_or(0)).map(Some),
    }
}

/// Logprobs as completions spell them: the count of rivals alone.
///
/// # Errors
/// If the count is too large.
pub(crate) fn take_completion_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    match fields.take_value("logprobs") {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(value) => {
            let top = value.as_u64().ok_or_else(|| {
                ApiError::invalid("logprobs", "must be a whole number of alternatives, 0 or more")
            })?;
            count("logprobs", top).map(Some)
        }
    }
}

fn count(param: &str, top: u64) -> Result<u8, ApiError> {
    match u8::try_from(top) {
        Ok(k @ 0..=MAX_TOP_LOGPROBS) => Ok(k),
        _ => Err(ApiError::invalid(param, format!("must be at most {MAX_TOP_LOGPROBS}"))),
    }
}

fn finite(param: &str, value: f32) -> Result<f32, ApiError> {
    if value.is_finite() { Ok(value) } else { Err(ApiError::invalid(param, "is out of range")) }
}

fn take_limit(fields: &mut Fields, name: &str) -> Result<Option<u32>, ApiError> {
    match fields.take::<u32>(name)? {
        Some(0) => Err(ApiError::invalid(name, "must be at least 1")),
        limit => Ok(limit),
    }
}

fn take_seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take_value("seed") else { return Ok(None) };
    // OpenAI's seeds are signed; the bits are all that matters.
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| ApiError::invalid("seed", "must be a whole number of 64 bits"))
}

fn take_logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let bias: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let mut parsed = Vec::with_capacity(bias.len());
    for (id, value) in bias {
        let id: u32 = id.parse().map_err(|_| {
            let shown: String = id.chars().take(40).collect();
            ApiError::invalid("logit_bias", format!("'{shown}' is not a token id"))
        })?;
        parsed.push((id, finite("logit_bias", value)?));
    }
    parsed.sort_by_key(|(id, _)| *id);
    Ok(parsed)
}

fn take_stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stop = match fields.take("stop")? {
        None => Vec::new(),
        Some(OneOrMany::One(one)) => vec![one],
        Some(OneOrMany::Many(many)) => many,
    };
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "an empty string would stop every answer"));
    }
    Ok(stop)
}

fn stream_options(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(value) = fields.take_value("stream_options") else { return Ok(false) };
    let mut options = Fields::nested("stream_options", value)?;
    let include_usage = options.take("include_usage")?.unwrap_or(false);
    fields.note_ignored(options.into_ignored());
    Ok(include_usage)
}

/// Fields of OpenAI and of other servers that would change the answer.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let table: &[(&str, &[Value])] = &[
        ("suffix", &[json!("")]),
        ("modalities", &[json!(["text"])]),
        ("audio", &[]),
        ("prediction", &[]),
        ("web_search_options", &[]),
        ("reasoning_effort", &[json!("none")]),
        ("verbosity", &[json!("medium")]),
        ("use_beam_search", &[json!(false)]),
        ("min_tokens", &[json!(0)]),
        ("bad_words", &[json!([])]),
        ("allowed_token_ids", &[]),
    ];
    table.iter().try_for_each(|(field, harmless)| fields.refuse_unless(field, harmless))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).expect("an object")
    }

    fn options(value: &Value) -> Result<Options, ApiError> {
        take(&mut fields(value), SamplingParams::default(), Some(16))
    }

    #[test]
    fn everything_supported_arrives() {
        let body = json!({
            "model": "m", "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25,
            "top_k": -1, "min_p": 0.125, "repetition_penalty": 1.5, "presence_penalty": 1,
            "frequency_penalty": -1, "logit_bias": {"10": 2, "9": -100}, "seed": -1,
            "stop": "END", "stop_token_ids": [3], "ignore_eos": true, "user": "u",
            "n": 1, "response_format": {"type": "text"},
        });
        let got = options(&body).expect("valid");
        assert!(got.stream && got.include_usage);
        assert_eq!(got.model, "m");
        let expected = SamplingParams {
            temperature: 0.5,
            top_p: 0.25,
            min_p: 0.125,
            repetition_penalty: 1.5,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            logit_bias: vec![(9, -100.0), (10, 2.0)],
            seed: Some(u64::MAX),
            max_tokens: Some(7),
            stop: vec!["END".into()],
            stop_token_ids: vec![3],
            ignore_eos: true,
            ..SamplingParams::default()
        };
        assert_eq!(got.params, expected);
        assert_eq!(got.choices, Choices::default());
        assert_eq!(options(&json!({})).expect("valid").params.max_tokens, Some(16));
        for (body, n, best_of) in [
            (json!({"n": 3}), 3, 3),
            (json!({"n": 2, "best_of": 5}), 2, 5),
            (json!({"best_of": 4}), 1, 4),
            (json!({"n": 3, "best_of": 3, "stream": true}), 3, 3),
        ] {
            assert_eq!(options(&body).expect("valid").choices, Choices { n, best_of }, "{body}");
        }
    }

    #[test]
    fn what_is_not_said_is_as_the_model_advises() {
        let advised =
            SamplingParams { temperature: 0.6, top_p: 0.9, top_k: 20, ..SamplingParams::default() };
        let got = |body: &Value| take(&mut fields(body), advised.clone(), None).expect("valid");
        assert_eq!(got(&json!({})).params, advised);
        let own = got(&json!({"temperature": 0, "top_k": 0})).params;
        assert_eq!((own.temperature, own.top_p, own.top_k), (0.0, 0.9, 0));
    }

    #[test]
    fn wrong_fields_are_named() {
        for (body, param) in [
            (json!({"n": 0}), "n"),
            (json!({"n": 17}), "n"),
            (json!({"n": 1.5}), "n"),
            (json!({"n": 3, "best_of": 2}), "best_of"),
            (json!({"best_of": 17}), "best_of"),
            (json!({"best_of": 2, "stream": true}), "best_of"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"stop": 7}), "stop"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"stream_options": 1}), "stream_options"),
            (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        ] {
            let error = options(&body).expect_err("refused");
            let found = serde_json::to_value(error.body()).expect("serialisable");
            assert_eq!(found["error"]["param"], param, "{body} gave {found}");
        }
    }

    #[test]
    fn logprobs_of_both_kinds() {
        let chat = |v: &Value| take_chat_logprobs(&mut fields(v)).ok();
        assert_eq!(chat(&json!({})), Some(None));
        assert_eq!(chat(&json!({"logprobs": true})), Some(Some(0)));
        assert_eq!(chat(&json!({"logprobs": true, "top_logprobs": 5})), Some(Some(5)));
        assert_eq!(chat(&json!({"top_logprobs": 5})), None);
        assert_eq!(chat(&json!({"logprobs": true, "top_logprobs": 65})), None);
        let completion = |v: &Value| take_completion_logprobs(&mut fields(v)).ok();
        assert_eq!(completion(&json!({"logprobs": 3})), Some(Some(3)));
        assert_eq!(completion(&json!({"logprobs": false})), Some(None));
        assert_eq!(completion(&json!({"logprobs": true})), None);
    }
}
