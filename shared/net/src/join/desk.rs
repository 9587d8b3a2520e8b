//! The coordinator's half of the join exchange.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::NodeId;
use millrace_shared::wire::join::{JoinProof, JoinRequest, JoinResponse, MAX_SEAT};
use millrace_shared::wire::{MAX_JOIN_BYTES, WIRE_VERSION};
use rustls_pki_types::UnixTime;
use tokio::time::Instant;

use super::{JoinToken, SpendError, TokenStore};
use crate::budget::{Bucket, Budgets, Rate};
use crate::error::within;
use crate::identity::{ProvenKey, Validity};
use crate::revoked::Revocations;
use crate::{
    ClusterCa, Connection, MessageReceiver, MessageSender, NetError, PeerName, timing, tls,
};

/// Requests answered at once before the rate applies (a rack that is switched on together), and a
/// second after that; from one host, and with good tokens from all hosts together. Each costs two
/// signatures.
const RATE: Rate = Rate { burst: 32.0, per_second: 4.0 };

/// How long after its end a certificate may still be renewed: machines are switched off for weeks.
const GRACE: u64 = 30 * 86_400;

/// Answers joining nodes: spends their tokens and signs their keys. Renews members' certificates.
#[derive(Debug)]
pub struct JoinDesk {
    revoked: Option<Arc<Revocations>>,
    ca: Arc<ClusterCa>,
    tokens: Arc<TokenStore>,
    cluster_port: u16,
    budgets: Mutex<Budgets>,
    /// What is left to all requests whose token is good.
    good: Mutex<Bucket>,
}

impl JoinDesk {
    /// A desk that tells nodes the port of the cluster endpoint.
    pub fn new(ca: Arc<ClusterCa>, tokens: Arc<TokenStore>, cluster_port: u16) -> Self {
        let budgets = Mutex::new(Budgets::new(RATE));
        let good = Mutex::new(Bucket::full(RATE, Instant::now()));
        Self { revoked: None, ca, tokens, cluster_port, budgets, good }
    }

    /// The same desk, which renews nothing for nodes that are kept out.
    #[must_use]
    pub fn keeping_out(self, revoked: Arc<Revocations>) -> Self {
        Self { revoked: Some(revoked), ..self }
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
        if !lock(&self.budgets).take_of(from, Instant::now()) {
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
        let (key, node_id) = match &request.proof {
            JoinProof::Token(secret) => self.enrol(secret, request, now)?,
            JoinProof::Renewal(certificate) => self.renew(certificate, request, now)?,
            JoinProof::Seat(certificate, seat) => {
                let (key, node) = self.renew(certificate, request, now)?;
                (key, self.seat(node, *seat)?)
            }
        };
        let certificate_der =
            self.ca.sign_node(&key, node_id).map_err(|e| Status::internal(e.to_string()))?;
        Ok(JoinResponse::Accepted {
            node_id,
            certificate_der,
            ca_der: self.ca.ca_der().to_vec(),
            cluster_port: self.cluster_port,
        })
    }
}

impl JoinDesk {
    fn enrol(
        &self,
        secret: &str,
        request: &JoinRequest,
        now: u64,
    ) -> Result<(ProvenKey, NodeId), Status> {
        let refused = |e: SpendError| match e {
            SpendError::Store(e) => {
                tracing::error!(error = %e, "the token store failed");
                Status::internal("the coordinator cannot read its token store: see its log")
            }
            e => Status::new(ErrorCode::PermissionDenied, e.to_string()),
        };
        let secret = JoinToken::parse_secret(secret).ok_or(SpendError::Unknown).map_err(refused)?;
        self.tokens.check(&secret, now).map_err(refused)?;
        self.begin_good()?;
        let key = proven(request)?;
        let node_id = self.tokens.spend(&secret, key.spki_sha256(), now).map_err(refused)?;
        Ok((key, node_id))
    }

    /// Checks that the request is signed by the key of a certificate of ours that is valid, or was
    /// until lately, and whose node is not kept out.
    fn renew(
        &self,
        certificate: &[u8],
        request: &JoinRequest,
        now: u64,
    ) -> Result<(ProvenKey, NodeId), Status> {
        let refused = |message: String| {
            Status::new(ErrorCode::PermissionDenied, format!("{message}: {ANEW}"))
        };
        let validity = Validity::of_certificate(certificate).map_err(|e| refused(e.to_string()))?;
        if now > validity.until.saturating_add(GRACE) {
            return Err(refused("the certificate ended more than 30 days ago".to_owned()));
        }
        // One that begins in the future was made while our clock was ahead.
        let at = now.max(validity.from).min(validity.until);
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
        tls::check_member(self.ca.ca_der(), certificate, at)
            .map_err(|e| refused(format!("not a certificate of this cluster ({e})")))?;
        let Ok(PeerName::Node(node)) = PeerName::of_certificate(certificate) else {
            return Err(refused("the certificate is not a node's".to_owned()));
        };
        if self.revoked.as_ref().is_some_and(|revoked| revoked.has(node)) {
            return Err(refused(format!("node {node} was revoked")));
        }
        let key = proven(request)?;
        if !key.is_of(certificate) {
            return Err(refused("the certificate is for another key".to_owned()));
        }
        self.begin_good()?;
        Ok((key, node))
    }

    /// The name of a further node of the machine whose first node this is.
    fn seat(&self, node: NodeId, seat: u16) -> Result<NodeId, Status> {
        let refused = |message: String| Status::new(ErrorCode::PermissionDenied, message);
        if !(1..=MAX_SEAT).contains(&seat) {
            return Err(Status::invalid("seat", format!("{seat} is not from 1 to {MAX_SEAT}")));
        }
        // Or one machine would have as many as it likes.
        if node.is_seat() {
            return Err(refused("only a machine's first node enrols further ones".to_owned()));
        }
        let (machine, node) = (node, node.seat(seat));
        if self.revoked.as_ref().is_some_and(|revoked| revoked.has(node)) {
            return Err(refused(format!("node {node} was revoked")));
        }
        // Whoever is to revoke the whole machine finds its name here.
        tracing::info!(%machine, %node, seat, "a further node of a machine");
        Ok(node)
    }

    /// One more request that looks good: it costs signatures.
    fn begin_good(&self) -> Result<(), Status> {
        let full = || Status::exhausted("too many join requests: try again", 1000);
        lock(&self.good).take(RATE, Instant::now()).then_some(()).ok_or_else(full)
    }
}

/// What helps where renewal does not.
const ANEW: &str =
    "to enrol the machine as a new node, remove its folder and start it with --token";

fn proven(request: &JoinRequest) -> Result<ProvenKey, Status> {
    ProvenKey::from_csr(&request.csr_der).map_err(|e| Status::invalid("csr_der", e.to_string()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
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
            proof: JoinProof::Token(token.secret_text()),
            csr_der: key.csr_der().to_vec(),
        };
        let guess = JoinToken { secret: [9; 32], ..token };
        // Not even looked at: it is no certificate request.
        let proof = JoinProof::Token(guess.secret_text());
        let guess = JoinRequest { proof, csr_der: vec![1], ..good.clone() };
        for host in 1..5 {
            let host = IpAddr::from([10, 0, 0, host]);
            let codes: Vec<_> =
                (0..60).map(|_| desk.answer(&guess, host, NOW).unwrap_err().code).collect();
            assert!(codes[..32].iter().all(|c| *c == ErrorCode::PermissionDenied), "{codes:?}");
            assert_eq!(codes[59], ErrorCode::ResourceExhausted);
            let status = desk.answer(&good, host, NOW).unwrap_err();
            assert_eq!(status.code, ErrorCode::ResourceExhausted, "{status}");
        }
        // Nor is anything spent on certificates that anybody can make.
        let foreign =
            ClusterCa::create().unwrap().issue_node(NodeId(uuid::Uuid::now_v7())).unwrap();
        let proof = JoinProof::Renewal(foreign.cert_der);
        let renewal = JoinRequest { proof, ..good.clone() };
        for host in 5..9 {
            let host = IpAddr::from([10, 0, 0, host]);
            for _ in 0..32 {
                let status = desk.answer(&renewal, host, NOW).unwrap_err();
                assert_eq!(status.code, ErrorCode::PermissionDenied, "{status}");
            }
        }
        let other = IpAddr::from([10, 0, 1, 1]);
        assert!(desk.answer(&good, other, NOW).is_ok());
    }

    /// A member's certificate is renewed for its own key, in time and for a while after, and not
    /// where it was revoked, is another cluster's or another's.
    #[test]
    fn renewal() {
        let (dir, desk) = desk();
        let revoked = Arc::new(Revocations::open(dir.path()).unwrap());
        let desk = desk.keeping_out(revoked.clone());
        let host = IpAddr::from([10, 0, 0, 1]);
        let id = NodeId(uuid::Uuid::now_v7());
        let day = 86_400;
        let now = 2_000 * day;
        let validity = Validity { from: now - 90 * day, until: now };
        let node = desk.ca.issue_node_for(id, validity).unwrap();
        assert_eq!(node.validity().unwrap(), validity);
        assert!(validity.is_due(now) && !validity.is_due(now - 31 * day));
        assert!(validity.is_due(now - 91 * day), "made by a clock that was ahead");
        let key = NodeKey::of_identity(&node).unwrap();
        let of = |certificate: &[u8], key: &NodeKey| JoinRequest {
            wire_version: WIRE_VERSION,
            proof: JoinProof::Renewal(certificate.to_vec()),
            csr_der: key.csr_der().to_vec(),
        };
        let good = of(&node.cert_der, &key);
        for at in [now - 400 * day, now - 40 * day, now, now + 29 * day] {
            let JoinResponse::Accepted { node_id, certificate_der, .. } =
                desk.answer(&good, host, at).unwrap()
            else {
                panic!("refused")
            };
            assert_eq!(node_id, id);
            let renewed = key.certified(certificate_der, node.ca_der.clone()).unwrap();
            assert_eq!(renewed.name().unwrap(), PeerName::Node(id));
            assert!(renewed.validity().unwrap().until > now);
        }
        // A seat: the same key under another name, which stays the same, and enrols nobody.
        let seat_of = |certificate: &[u8], seat: u16| JoinRequest {
            proof: JoinProof::Seat(certificate.to_vec(), seat),
            ..good.clone()
        };
        let mut seats = Vec::new();
        for seat in [1, 2, 1] {
            let answer = desk.answer(&seat_of(&node.cert_der, seat), host, now).unwrap();
            let JoinResponse::Accepted { node_id, certificate_der, .. } = answer else {
                panic!("refused")
            };
            assert_eq!(
                PeerName::of_certificate(&certificate_der).unwrap(),
                PeerName::Node(node_id)
            );
            assert!(node_id == id.seat(seat) && node_id.is_seat() && !id.is_seat());
            seats.push((node_id, certificate_der));
        }
        assert!(seats[0].0 == seats[2].0 && seats[0].0 != seats[1].0);
        for (request, message) in [
            (seat_of(&node.cert_der, 0), "not from 1 to"),
            (seat_of(&node.cert_der, MAX_SEAT + 1), "not from 1 to"),
            (seat_of(&seats[0].1, 3), "first node"),
        ] {
            let status = desk.answer(&request, host, now).unwrap_err();
            assert!(status.message.contains(message), "{status}");
        }

        let stranger = ClusterCa::create().unwrap().issue_node_for(id, validity).unwrap();
        let strange = of(&stranger.cert_der, &NodeKey::of_identity(&stranger).unwrap());
        let stolen = of(&node.cert_der, &NodeKey::generate().unwrap());
        let posed = of(&desk.ca.issue_coordinator().unwrap().cert_der, &key);
        for (request, at, message) in [
            (&good, now + 31 * day, "30 days ago"),
            (&strange, now, "not a certificate of this cluster"),
            (&stolen, now, "another key"),
        ] {
            let status = desk.answer(request, host, at).unwrap_err();
            assert!(status.message.contains(message), "{status}");
            assert_eq!(status.code, ErrorCode::PermissionDenied);
        }
        let posed_at = Validity::lasting(Duration::from_secs(1)).until;
        let status = desk.answer(&posed, host, posed_at).unwrap_err();
        assert!(status.message.contains("not a node's"), "{status}");
        revoked.revoke(id, "n", now).unwrap();
        let status = desk.answer(&good, host, now).unwrap_err();
        assert!(status.message.contains("was revoked"), "{status}");
    }
}
