//! What an answer has to look like.

use serde::{Deserialize, Serialize};

use super::params::SamplingError;

/// Longest source of a grammar, bytes.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// A language; answers are texts of it. Compiled by the coordinator, which keeps the state and tells
/// the last stage which tokens may come ([`super::TokenMask`]).
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes; the schema's own JSON.
    JsonSchema(String),
    /// A regular expression, in the syntax of the `regex` crate; it matches the whole answer.
    Regex(String),
    /// A grammar in llguidance's form of Lark.
    Lark(String),
}

impl Grammar {
    /// Its source; empty where there is none.
    pub fn source(&self) -> &str {
        match self {
            Self::JsonObject => "",
            Self::JsonSchema(source) | Self::Regex(source) | Self::Lark(source) => source,
        }
    }

    pub(super) fn validate(&self) -> Result<(), SamplingError> {
        let bytes = self.source().len();
        if bytes > MAX_GRAMMAR_BYTES {
            let message =
                format!("a grammar may have at most {MAX_GRAMMAR_BYTES} bytes, got {bytes}");
            return Err(SamplingError::new("grammar", message));
        }
        if bytes == 0 && *self != Self::JsonObject {
            return Err(SamplingError::new("grammar", "must not be empty"));
        }
        Ok(())
    }
}
