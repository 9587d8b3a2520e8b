//! Join tokens: made, listed and revoked, beside the coordinator or by an administrator from afar.

use std::sync::Arc;

use millrace_net::NetError;
use millrace_net::join::{JoinToken, TokenStore};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::admin::{AdminReply, TokenInfo, TokenRequest};

use crate::state::ClusterDir;

/// What a join token says, and where the records of all of them are.
#[derive(Debug)]
pub struct Invitations {
    tokens: Arc<TokenStore>,
    /// Where nodes join: `host:port` of the QUIC API.
    quic: String,
    /// SHA-256 of the CA's certificate.
    ca: [u8; 32],
}

impl Invitations {
    /// Those of a cluster whose nodes join at `quic`.
    pub fn of(dir: &ClusterDir, quic: &str) -> Self {
        let (tokens, ca) = (Arc::clone(&dir.tokens), dir.ca.fingerprint());
        Self { tokens, quic: quic.to_owned(), ca }
    }

    /// A token for so many nodes, for so many seconds from `now` (Unix seconds) on.
    ///
    /// # Errors
    /// If `uses` is not between 1 and 1000, or a record cannot be written.
    pub fn create(&self, uses: u32, seconds: u64, now: u64) -> Result<JoinToken, NetError> {
        self.tokens.purge(now)?;
        self.tokens.create(&self.quic, self.ca, uses, now.saturating_add(seconds))
    }

    /// All that are valid at `now`.
    ///
    /// # Errors
    /// If the records cannot be read.
    pub fn list(&self, now: u64) -> Result<Vec<TokenInfo>, NetError> {
        self.tokens.purge(now)?;
        self.tokens.list()
    }

    /// Makes one invalid; whether there was one.
    ///
    /// # Errors
    /// If the records cannot be read or deleted.
    pub fn revoke(&self, id: &str) -> Result<bool, NetError> {
        self.tokens.revoke(id)
    }

    /// Answers an administrator.
    pub(super) fn answer(&self, request: TokenRequest, now: u64) -> Result<AdminReply, Status> {
        match request {
            TokenRequest::List => {}
            TokenRequest::Create { seconds: 0, .. } => {
                return Err(Status::invalid("expires", "a join token must be valid for a while"));
            }
            TokenRequest::Create { uses, seconds } => {
                let token = self.create(uses, seconds, now).map_err(failed)?;
                let id = TokenStore::id(&token);
                let (left, expires) = (uses, token.expires);
                let info = TokenInfo { id, left, nodes: Vec::new(), expires };
                tracing::info!(id = %info.id, uses, "join token made");
                return Ok(AdminReply::NewToken { info, token: token.to_string() });
            }
            TokenRequest::Revoke { id } => {
                if !self.revoke(&id).map_err(failed)? {
                    let message = format!("no join token has the id '{id}'");
                    return Err(Status::new(ErrorCode::NotFound, message));
                }
                tracing::info!(%id, "join token revoked");
            }
        }
        Ok(AdminReply::Tokens(self.list(now).map_err(failed)?))
    }
}

fn failed(e: NetError) -> Status {
    match e {
        NetError::Protocol(what) => Status::invalid("uses", what),
        other => {
            tracing::error!("join tokens: {other}");
            Status::internal("the coordinator cannot use its join tokens: see its log")
        }
    }
}
