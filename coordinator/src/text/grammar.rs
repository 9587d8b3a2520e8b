//! Constrained answers: which tokens a grammar allows next.
//!
//! A [`Grammars`] compiles what requests ask for; a [`Matcher`] is the state of one answer, a pure
//! function of its grammar and tokens, so that any life of the coordinator can make it anew. The
//! automata are llguidance's, as are the limits on their time and memory. JSON is written with one
//! space behind `,` and `:` and no other white space: small models otherwise write blank lines for
//! ever. Not here: when masks are computed, and who hears of them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie, TokenId};
use millrace_shared::sampling::{Grammar, TokenMask};
use serde_json::{Value, json};

use super::Tokenizer;

/// Compiled grammars that are kept for the next request with the same.
const KEPT: usize = 16;
/// Work on regular expressions when a grammar is compiled; 50,000 take about a millisecond.
const COMPILE_FUEL: u64 = 1_000_000;
/// Longest part of an error that is shown.
const MAX_ERROR_CHARS: usize = 400;

/// Why a grammar cannot be used, or an answer has left it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    fn new(error: &dyn fmt::Display) -> Self {
        let text = error.to_string();
        let short: String = text.chars().take(MAX_ERROR_CHARS).collect();
        let more = if short.len() < text.len() { "…" } else { "" };
        Self(format!("{short}{more}"))
    }

    /// There is no state: it failed before.
    pub(crate) fn missing() -> Self {
        Self("the answer's grammar was lost by an earlier error".into())
    }

    /// The computation did not end in order.
    pub(crate) fn panicked(error: &dyn fmt::Display) -> Self {
        Self(format!("the grammar could not be followed: {error}"))
    }
}

/// Compiles grammars for the tokens of one model.
pub struct Grammars {
    factory: ParserFactory,
    /// The end that llguidance knows.
    end: TokenId,
    /// All of them.
    ends: Vec<TokenId>,
    kept: Mutex<Vec<(Grammar, llguidance::Matcher)>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For the tokens of a model. Takes some tenths of a second.
    ///
    /// # Errors
    /// If the model names no token that ends texts: then no constrained answer could end.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let ends = tokenizer.eos_ids().to_vec();
        let &end = ends.first().ok_or_else(|| {
            GrammarError("the model names no token that ends texts, so no answer could end".into())
        })?;
        let info = TokRxInfo {
            vocab_size: tokenizer.vocab_size(),
            tok_eos: end,
            tok_bos: tokenizer.bos_id(),
            tok_pad: None,
            tok_unk: None,
            tok_end_of_turn: None,
        };
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id);
            // The marker keeps markup out of what grammars match as text.
            let marked = tokenizer.is_special(id) || ends.contains(&id);
            let marker = marked.then_some(TokTrie::SPECIAL_TOKEN_MARKER);
            marker.into_iter().chain(bytes.iter().copied()).collect()
        };
        let words: Vec<Vec<u8>> = (0..info.vocab_size).map(word).collect();
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|e| GrammarError::new(&e))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.verbose_errors = false;
        Ok(Self { factory, end, ends, kept: Mutex::default() })
    }

    /// The state of an answer that has not begun.
    ///
    /// # Errors
    /// If the grammar is not valid, or too complex.
    pub fn compile(self: &Arc<Self>, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let found = |kept: &mut Vec<(Grammar, llguidance::Matcher)>| {
            let at = kept.iter().position(|(g, _)| g == grammar)?;
            // The last is the latest used.
            let entry = kept.remove(at);
            let fresh = entry.1.deep_clone();
            kept.push(entry);
            Some(fresh)
        };
        let kept = found(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        let inner = match kept {
            Some(inner) => inner,
            None => self.compile_anew(grammar)?,
        };
        Ok(Matcher { inner, grammars: Arc::clone(self) })
    }

    fn compile_anew(&self, grammar: &Grammar) -> Result<llguidance::Matcher, GrammarError> {
        let source = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(tight(json!({
                "type": "object"
            }))),
            Grammar::JsonSchema(schema) => {
                let schema: Value = serde_json::from_str(schema)
                    .map_err(|e| GrammarError(format!("the schema is not valid JSON: {e}")))?;
                if !schema.is_object() {
                    return Err(GrammarError("the schema must be a JSON object".into()));
                }
                TopLevelGrammar::from_json_schema(tight(schema))
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let matcher = llguidance::Matcher::new(self.factory.create_parser(source));
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::new(&error));
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((grammar.clone(), matcher.deep_clone()));
        Ok(matcher)
    }
}

/// The schema with the form of white space that is written.
pub(super) fn tight(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| {
            json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " })
        });
    }
    schema
}

/// Where an answer is in its grammar.
pub struct Matcher {
    inner: llguidance::Matcher,
    grammars: Arc<Grammars>,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").finish_non_exhaustive()
    }
}

impl Matcher {
    /// The same state, to go on from independently: for another choice of the request.
    #[must_use]
    pub fn fresh(&self) -> Self {
        Self { inner: self.inner.deep_clone(), grammars: Arc::clone(&self.grammars) }
    }

    /// Takes tokens of the answer.
    ///
    /// # Errors
    /// If the grammar does not allow them, or has become too complex.
    pub fn consume(&mut self, tokens: &[u32]) -> Result<(), GrammarError> {
        self.inner.consume_tokens(tokens).map_err(|e| GrammarError::new(&e))
    }

    /// The tokens that may come next; those that end texts where the answer may end here.
    ///
    /// # Errors
    /// If the grammar has become too complex.
    pub fn mask(&mut self) -> Result<TokenMask, GrammarError> {
        let words = self.inner.compute_mask_or_eos().map_err(|e| GrammarError::new(&e))?;
        let mut mask = TokenMask::from_words(words.into());
        if mask.allows(self.grammars.end) {
            self.grammars.ends.iter().for_each(|&id| mask.allow(id));
        }
        Ok(mask)
    }
}
