//! bincode behind one door, always with a limit, and length-prefixed framing.
//!
//! A frame is a little-endian `u32` length, then that many bytes. The reader checks the length
//! against the limit before it allocates.

use serde::{Serialize, de::DeserializeOwned};

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The peer announced more than the plane allows.
    #[error("message of {len} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Announced length.
        len: usize,
        /// The plane's limit.
        limit: usize,
    },
    /// The bytes do not decode.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The message decoded, but bytes were left over.
    #[error("malformed message: {0} bytes left over")]
    Trailing(usize),
}

const LIMIT: usize = 64 << 20;

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, config())
        .expect("invariant: our own messages are serialisable")
}

/// Encodes a message behind its length.
pub fn encode_frame<T: Serialize>(message: &T) -> Vec<u8> {
    let body = encode(message);
    let mut out = Vec::with_capacity(4 + body.len());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// Decodes a message at the beginning of `bytes`; with it, how many they were.
///
/// # Errors
/// If there is none.
pub fn decode_first<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), CodecError> {
    bincode::serde::decode_from_slice(bytes, config())
        .map_err(|e| CodecError::Malformed(e.to_string()))
}

/// Decodes exactly one message.
///
/// # Errors
/// If the bytes are not one whole message of this type.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (message, used) = decode_first(bytes)?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(message)
}

/// Checks an announced length against the plane's limit.
///
/// # Errors
/// If it is longer.
pub fn check_len(prefix: [u8; 4], limit: usize) -> Result<usize, CodecError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > limit { Err(CodecError::TooLong { len, limit }) } else { Ok(len) }
}
