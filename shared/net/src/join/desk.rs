//! The coordinator's half of the join exchange.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::join::{JoinRequest, JoinResponse};
use millrace_shared::wire::{MAX_JOIN_BYTES, WIRE_VERSION};
use tokio::time::Instant;

use super::{JoinToken, SpendError, TokenStore};
use crate::error::within;
use crate::identity::ProvenKey;
use crate::{ClusterCa, Connection, MessageReceiver, MessageSender, NetError, seats, timing};

/// Requests answered at once before the rate applies: a rack that is switched on together.
const BURST: f64 = 32.0;
/// Requests a second after that, from one host and with good tokens from all hosts together; each
/// costs two signatures.
const RATE: f64 = 4.0;
/// Hosts whose budgets are remembered.
const MAX_HOSTS: usize = 4096;

/// Answers joining nodes: spends their tokens and signs their keys.
#[derive(Debug)]
pub struct JoinDesk {
    ca: Arc<ClusterCa>,
    tokens: Arc<TokenStore>,
    cluster_port: u16,
    budgets: Mutex<Budgets>,
}

/// A bucket of requests that fills up again with time.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// What is left to each host, and to all requests whose token is good.
#[derive(Debug)]
struct Budgets {
    hosts: HashMap<IpAddr, Bucket>,
    good: Bucket,
}

impl JoinDesk {
    /// A desk that tells nodes the port of the cluster endpoint.
    pub fn new(ca: Arc<ClusterCa>, tokens: Arc<TokenStore>, cluster_port: u16) -> Self {
        let good = Bucket { left: BURST, at: Instant::now() };
        let budgets = Mutex::new(Budgets { hosts: HashMap::new(), good });
        Self { ca, tokens, cluster_port, budgets }
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
        let host = connection.remote_address().ip();
        let response = self.answer(&request, host, now).unwrap_or_else(JoinResponse::Refused);
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

    /// Decides on a request. Whoever has no good token uses up the budget of their own host only,
    /// and costs no signature.
    fn answer(
        &self,
        request: &JoinRequest,
        from: IpAddr,
        now: u64,
    ) -> Result<JoinResponse, Status> {
        let admitted = |yes: bool| {
            let full = || Status::exhausted("too many join requests: try again", 1000);
            if yes { Ok(()) } else { Err(full()) }
        };
        admitted(self.budgets().take_of(from, Instant::now()))?;
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
        let refused = |e: SpendError| match e {
            SpendError::Store(e) => {
                tracing::error!(error = %e, "the token store failed");
                Status::internal("the coordinator cannot read its token store: see its log")
            }
            e => Status::new(ErrorCode::PermissionDenied, e.to_string()),
        };
        let secret =
            JoinToken::parse_secret(&request.secret).ok_or(SpendError::Unknown).map_err(refused)?;
        self.tokens.check(&secret, now).map_err(refused)?;
        admitted(self.budgets().good.take(Instant::now()))?;
        let key = ProvenKey::from_csr(&request.csr_der)
            .map_err(|e| Status::invalid("csr_der", e.to_string()))?;
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

    fn budgets(&self) -> MutexGuard<'_, Budgets> {
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    fn level(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.at);
        (self.left + elapsed.as_secs_f64() * RATE).min(BURST)
    }

    /// Takes one request, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let level = self.level(now);
        let admitted = level >= 1.0;
        *self = Self { left: if admitted { level - 1.0 } else { level }, at: now };
        admitted
    }
}

impl Budgets {
    /// Takes one request of this host, if there is one.
    fn take_of(&mut self, from: IpAddr, now: Instant) -> bool {
        // Loopback is one host like others here.
        let host = seats::host(from).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        if self.hosts.len() >= MAX_HOSTS && !self.hosts.contains_key(&host) {
            self.hosts.retain(|_, bucket| bucket.level(now) < BURST);
            let oldest = self.hosts.iter().min_by_key(|(_, bucket)| bucket.at).map(|(h, _)| *h);
            if let Some(oldest) = oldest.filter(|_| self.hosts.len() >= MAX_HOSTS) {
                self.hosts.remove(&oldest);
            }
        }
        self.hosts.entry(host).or_insert(Bucket { left: BURST, at: now }).take(now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::NodeKey;

    const NOW: u64 = 1_000;

    fn desk() -> (tempfile::TempDir, JoinDesk) {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Arc::new(TokenStore::open(dir.path()).unwrap());
        let ca = Arc::new(ClusterCa::create().unwrap());
        (dir, JoinDesk::new(ca, tokens, 1))
    }

    /// A flood of guesses is refused, and keeps nobody else from joining.
    #[test]
    fn guesses_use_up_their_own_budget_only() {
        let (_dir, desk) = desk();
        let token = desk.tokens.create("h:1", [0; 32], 1, NOW + 10).unwrap();
        let key = NodeKey::generate().unwrap();
        let good = JoinRequest {
            wire_version: WIRE_VERSION,
            secret: token.secret_text(),
            csr_der: key.csr_der().to_vec(),
        };
        let guess = JoinToken { secret: [9; 32], ..token };
        // Not even looked at: it is no certificate request.
        let guess = JoinRequest { secret: guess.secret_text(), csr_der: vec![1], ..good.clone() };
        for host in 1..5 {
            let host = IpAddr::from([10, 0, 0, host]);
            let codes: Vec<_> =
                (0..60).map(|_| desk.answer(&guess, host, NOW).unwrap_err().code).collect();
            assert!(codes[..32].iter().all(|c| *c == ErrorCode::PermissionDenied), "{codes:?}");
            assert_eq!(codes[59], ErrorCode::ResourceExhausted);
            let status = desk.answer(&good, host, NOW).unwrap_err();
            assert_eq!(status.code, ErrorCode::ResourceExhausted, "{status}");
        }
        let other = IpAddr::from([10, 0, 1, 1]);
        assert!(desk.answer(&good, other, NOW).is_ok());
    }

    #[test]
    fn budgets_are_forgotten_when_there_are_many() {
        let (_dir, desk) = desk();
        let now = Instant::now();
        let mut budgets = desk.budgets();
        for i in 0..3 * MAX_HOSTS as u32 {
            assert!(budgets.take_of(IpAddr::from((i + (10 << 24)).to_be_bytes()), now));
        }
        assert_eq!(budgets.hosts.len(), MAX_HOSTS);
        budgets.take_of(IpAddr::from([11, 0, 0, 1]), now + Duration::from_secs(60));
        assert_eq!(budgets.hosts.len(), 1, "full buckets need not be remembered");
    }
}
