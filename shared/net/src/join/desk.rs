//! The coordinator's half of the join exchange.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::join::{JoinRequest, JoinResponse};
use millrace_shared::wire::{MAX_JOIN_BYTES, WIRE_VERSION};
use tokio::time::Instant;

use super::{JoinToken, SpendError, TokenStore};
use crate::error::within;
use crate::identity::ProvenKey;
use crate::{ClusterCa, Connection, MessageReceiver, MessageSender, NetError, timing};

/// Requests answered at once before the rate applies: a rack that is switched on together.
const BURST: f64 = 32.0;
/// Requests a second after that; each costs two signatures, and no secret can be guessed.
const RATE: f64 = 4.0;

/// Answers joining nodes: spends their tokens and signs their keys.
#[derive(Debug)]
pub struct JoinDesk {
    ca: Arc<ClusterCa>,
    tokens: Arc<TokenStore>,
    cluster_port: u16,
    budget: Mutex<(f64, Instant)>,
}

impl JoinDesk {
    /// A desk that tells nodes the port of the cluster endpoint.
    pub fn new(ca: Arc<ClusterCa>, tokens: Arc<TokenStore>, cluster_port: u16) -> Self {
        Self { ca, tokens, cluster_port, budget: Mutex::new((BURST, Instant::now())) }
    }

    /// Serves the one request of a connection of [`crate::Alpn::Join`]; `now` is Unix seconds.
    /// Returns the node that was admitted, if one was.
    ///
    /// # Errors
    /// If the exchange breaks down; a refusal is no error.
    pub async fn serve(
        &self,
        connection: &Connection,
        now: u64,
    ) -> Result<Option<NodeId>, NetError> {
        let served = within(timing::JOIN, "a join request", self.exchange(connection, now)).await;
        connection.close(if served.is_ok() { "" } else { "malformed join request" });
        served
    }

    async fn exchange(
        &self,
        connection: &Connection,
        now: u64,
    ) -> Result<Option<NodeId>, NetError> {
        let (send, recv) = connection.accept_incoming().await?.into_halves();
        let request = MessageReceiver::new(recv).recv_one::<JoinRequest>(MAX_JOIN_BYTES).await?;
        let response = self.answer(&request, now).unwrap_or_else(JoinResponse::Refused);
        let admitted = match &response {
            JoinResponse::Accepted { node_id, .. } => Some(*node_id),
            JoinResponse::Refused(status) => {
                tracing::warn!(peer = %connection.remote_address(), %status, "join refused");
                None
            }
        };
        let mut out = MessageSender::new(send);
        out.send(&response).await?;
        out.finish();
        out.stopped().await;
        Ok(admitted)
    }

    /// Decides on a request.
    fn answer(&self, request: &JoinRequest, now: u64) -> Result<JoinResponse, Status> {
        if !self.admit(Instant::now()) {
            return Err(Status::exhausted("too many join requests: try again", 1000));
        }
        if request.wire_version != WIRE_VERSION {
            return Err(Status::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "the node speaks wire version {}, this cluster {WIRE_VERSION}: \
                     install the same release on both",
                    request.wire_version
                ),
            ));
        }
        let key = ProvenKey::from_csr(&request.csr_der)
            .map_err(|e| Status::invalid("csr_der", e.to_string()))?;
        let refused = |e: SpendError| match e {
            SpendError::Store(e) => {
                tracing::error!(error = %e, "the token store failed");
                Status::internal("the coordinator cannot read its token store: see its log")
            }
            e => Status::new(ErrorCode::PermissionDenied, e.to_string()),
        };
        let secret =
            JoinToken::parse_secret(&request.secret).ok_or(SpendError::Unknown).map_err(refused)?;
        let node_id = self.tokens.spend(&secret, key.spki_sha256(), now).map_err(refused)?;
        let certificate_der =
            self.ca.sign_node(&key, node_id).map_err(|e| Status::internal(e.to_string()))?;
        Ok(JoinResponse::Accepted {
            node_id,
            certificate_der,
            ca_der: self.ca.ca_der().to_vec(),
            cluster_port: self.cluster_port,
        })
    }

    /// Takes one request from the budget, if there is one.
    fn admit(&self, now: Instant) -> bool {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed: Duration = now.saturating_duration_since(budget.1);
        let tokens = (budget.0 + elapsed.as_secs_f64() * RATE).min(BURST);
        let admitted = tokens >= 1.0;
        *budget = (if admitted { tokens - 1.0 } else { tokens }, now);
        admitted
    }
}
