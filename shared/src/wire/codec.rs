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

/// Most that a message may claim to hold.
const LIMIT: usize = 64 << 20;
/// Bytes in memory that one byte of a message may stand for: a `u128` of one byte.
const GROWTH: usize = 16;

fn config<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, config::<LIMIT>())
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
    bincode::serde::decode_from_slice(bytes, config::<LIMIT>())
        .map_err(|e| CodecError::Malformed(e.to_string()))
}

/// Decodes exactly one message. What it claims to hold is bounded by what it is, for texts are given
/// memory before their bytes are looked for.
///
/// # Errors
/// If the bytes are not one whole message of this type.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    const SHORT: usize = 256;
    const MIDDLE: usize = 4 << 10;
    const LONG: usize = 64 << 10;
    if bytes.len() <= SHORT {
        decode_within::<T, { GROWTH * SHORT }>(bytes)
    } else if bytes.len() <= MIDDLE {
        decode_within::<T, { GROWTH * MIDDLE }>(bytes)
    } else if bytes.len() <= LONG {
        decode_within::<T, { GROWTH * LONG }>(bytes)
    } else {
        decode_within::<T, LIMIT>(bytes)
    }
}

fn decode_within<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8]) -> Result<T, CodecError> {
    let (message, used) = bincode::serde::decode_from_slice(bytes, config::<LIMIT>())
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_message_claims_little() {
        // A text of 16 MiB, of which nothing follows.
        let claims = [253, 0, 0, 0, 1, 0, 0, 0, 0];
        let message = decode::<String>(&claims).unwrap_err().to_string();
        assert!(message.contains("LimitExceeded"), "{message}");
    }

    #[test]
    fn what_grows_most_is_still_decoded() {
        for count in [1, 255, 256, 257, 4000, 5000, 65_000, 70_000, 1 << 20] {
            let ones = vec![1u128; count];
            assert_eq!(decode::<Vec<u128>>(&encode(&ones)).unwrap(), ones, "{count}");
            let text = "a".repeat(count);
            assert_eq!(decode::<String>(&encode(&text)).unwrap(), text, "{count}");
        }
    }
}
