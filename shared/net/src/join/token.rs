//! The text of a join token: `mlrj1.` and base64url of what a node needs to join.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use millrace_shared::wire::codec;
use serde::{Deserialize, Serialize};

const PREFIX: &str = "mlrj1.";
/// Far more than any token needs; longer text is not looked at.
const MAX_TEXT_BYTES: usize = 1024;

/// Everything a node needs to join: where, whom to trust, a secret, until when.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// `host:port` of the coordinator's `--quic` endpoint.
    pub addr: String,
    /// SHA-256 of the cluster's CA certificate (DER).
    pub ca_sha256: [u8; 32],
    /// The secret; the coordinator keeps only its hash.
    pub secret: [u8; 32],
    /// Seconds since the Unix epoch from which it is refused.
    pub expires: u64,
}

/// Why text is not a join token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Other text, or another version.
    #[error(
        "not a join token: it must begin with `mlrj1.`; copy all of what `token create` prints"
    )]
    Prefix,
    /// The rest is not base64url.
    #[error("the join token is damaged: a character was lost or changed in copying")]
    Encoding,
    /// It decodes to something else.
    #[error("the join token is incomplete or damaged: copy all of what `token create` prints")]
    Content,
    /// The address in it has no port.
    #[error("the join token names no `host:port`: create another one")]
    Address,
}

impl JoinToken {
    /// The secret as the join request carries it.
    pub fn secret_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.secret)
    }

    /// The reverse of [`JoinToken::secret_text`].
    pub(crate) fn parse_secret(text: &str) -> Option<[u8; 32]> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("addr", &self.addr)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(codec::encode(self)))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if body.len() > MAX_TEXT_BYTES {
            return Err(TokenError::Content);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Encoding)?;
        let token: Self = codec::decode(&bytes).map_err(|_| TokenError::Content)?;
        match token.addr.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(token),
            _ => Err(TokenError::Address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            addr: "coordinator.example:4700".into(),
            ca_sha256: [1; 32],
            secret: [2; 32],
            expires: 1_900_000_000,
        }
    }

    #[test]
    fn round_trip() {
        let text = token().to_string();
        assert!(text.starts_with("mlrj1."));
        assert_eq!(text.parse::<JoinToken>().unwrap(), token());
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let text = token().to_string();
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::Prefix));
        assert_eq!(text.replace("mlrj1.", "mlrj2.").parse::<JoinToken>(), Err(TokenError::Prefix));
        assert_eq!(format!("{text}*").parse::<JoinToken>(), Err(TokenError::Encoding));
        assert_eq!(text[..text.len() - 8].parse::<JoinToken>(), Err(TokenError::Content));
        let nowhere = JoinToken { addr: "host".into(), ..token() }.to_string();
        assert_eq!(nowhere.parse::<JoinToken>(), Err(TokenError::Address));
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", token()).contains("secret"));
    }
}
