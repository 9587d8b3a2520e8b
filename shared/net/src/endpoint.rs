//! UDP endpoints, handshakes and connections.
//!
//! An [`Endpoint`] is one UDP socket that connects and, where it has a [`ServerTls`], accepts.
//! [`Endpoint::accept`] hands out [`Incoming`] attempts at once; their handshakes run wherever the
//! caller awaits them, so that a slow or hostile peer delays nobody else. A [`Connection`] knows
//! the protocol that was agreed on and, where certificates were shown, the peer's name.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use crate::admission::{self, Admission, Verdict};
use crate::error::{describe, within};
use crate::seats::Seat;
use crate::tls::{Alpn, ClientTls, ServerTls};
use crate::{NetError, PeerName, resets, timing};

/// Asked of the kernel for both directions of the socket; it may grant less (`rmem_max`).
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Largest datagram this side accepts and sends to loopback peers. Ten of them (quinn's largest
/// batch for segmentation offload) must fit into one 64 KiB send.
const LOOPBACK_MTU: u16 = 6400;
/// Ethernet minus IP, UDP and a little for tunnels; larger is found by probing only up to here.
const LAN_MTU: u16 = 1452;
/// Members trust each other enough to begin fast: several micro-batches in the first round trip.
const MEMBER_INITIAL_WINDOW: u64 = 1 << 20;
/// Largest stream window of members: a few large prefill frames.
const MEMBER_STREAM_WINDOW: u32 = 16 << 20;
/// Stream window of clients: their requests are small, and unauthenticated until read.
const PUBLIC_STREAM_WINDOW: u32 = 1 << 20;
/// What all streams of a client together may have unread until [`Connection::widen`].
const UNPROVEN_WINDOW: u32 = 128 << 10;
/// Streams a client may have open: concurrent calls.
const PUBLIC_STREAMS: u32 = 256;
/// Streams a member may have open: control, edges and a bounded number of blob requests.
const MEMBER_STREAMS: u32 = 64;
/// Handshakes that wait to be accepted; more are refused.
const MAX_WAITING: usize = 128;

/// A bound UDP socket that speaks QUIC.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    window: u32,
    server: Option<ServerTls>,
    admission: Arc<Admission>,
}

impl Endpoint {
    /// Binds `addr` (port 0: any free one). Must run inside a tokio runtime, which drives it.
    ///
    /// # Errors
    /// [`NetError::InUse`] if the address is taken, [`NetError::Bind`] otherwise.
    pub fn bind(addr: SocketAddr, server: Option<ServerTls>) -> Result<Self, NetError> {
        Self::bind_with(addr, server, EndpointConfig::default())
    }

    /// [`Endpoint::bind`] for one that is bound again after a crash: with the same `secret`, peers of
    /// its former life learn with their next packet that their connections are gone.
    ///
    /// # Errors
    /// As [`Endpoint::bind`].
    pub fn bind_lasting(
        addr: SocketAddr,
        server: ServerTls,
        secret: &[u8],
    ) -> Result<Self, NetError> {
        Self::bind_with(addr, Some(server), resets::lasting(secret)?)
    }

    fn bind_with(
        addr: SocketAddr,
        server: Option<ServerTls>,
        mut config: EndpointConfig,
    ) -> Result<Self, NetError> {
        let bind_error = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => NetError::InUse { addr },
            _ => NetError::Bind { addr, source },
        };
        let (socket, window) = open_socket(addr).map_err(bind_error)?;
        config.max_udp_payload_size(LOOPBACK_MTU).map_err(|e| NetError::Bind {
            addr,
            source: io::Error::new(io::ErrorKind::InvalidInput, e),
        })?;
        let server_config =
            server.as_ref().map(|tls| server_config(tls, transport(tls.public, false, window)));
        let limits = match &server {
            Some(tls) if tls.public => admission::PUBLIC,
            _ => admission::MEMBERS,
        };
        let runtime = Arc::new(quinn::TokioRuntime);
        let inner =
            quinn::Endpoint::new(config, server_config, socket, runtime).map_err(bind_error)?;
        Ok(Self { inner, window, server, admission: Arc::new(Admission::new(limits)) })
    }

    /// Binds `addr`, or the first free one of the `tries - 1` ports after it.
    ///
    /// # Errors
    /// If none is free.
    pub fn bind_next_free(
        addr: SocketAddr,
        tries: u16,
        server: Option<&ServerTls>,
    ) -> Result<Self, NetError> {
        let mut candidate = addr;
        for step in 0..tries.max(1) {
            let Some(port) = addr.port().checked_add(step) else { break };
            candidate.set_port(port);
            match Self::bind(candidate, server.cloned()) {
                Err(NetError::InUse { .. }) => {}
                other => return other,
            }
        }
        Err(NetError::InUse { addr })
    }

    /// An endpoint that only connects, on any port, of the address family of `remote`.
    ///
    /// # Errors
    /// If no socket can be had.
    pub fn client(remote: SocketAddr) -> Result<Self, NetError> {
        let any = match remote {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        Self::bind(any, None)
    }

    /// The bound address, with the port that was chosen.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr, NetError> {
        self.inner.local_addr().map_err(|e| NetError::Lost(e.to_string()))
    }

    /// Connects and checks that the peer's certificate carries `server_name`.
    ///
    /// With mutual TLS the peer judges our certificate after this returns; a refusal shows as
    /// [`NetError::Lost`] at the first use of the connection.
    ///
    /// # Errors
    /// [`NetError::Connect`], naming the address, or [`NetError::Deadline`].
    pub async fn connect(
        &self,
        addr: SocketAddr,
        server_name: &str,
        tls: &ClientTls,
        deadline: Duration,
    ) -> Result<Connection, NetError> {
        let failed = |message: String| NetError::Connect { addr, message };
        let mut config = quinn::ClientConfig::new(tls.config.clone());
        let loopback = addr.ip().is_loopback();
        config.transport_config(Arc::new(transport(tls.public, loopback, self.window)));
        let connecting = self
            .inner
            .connect_with(config, addr, server_name)
            .map_err(|e| failed(e.to_string()))?;
        match tokio::time::timeout(deadline, connecting).await {
            Err(_) => Err(NetError::NoAnswer { addr, after: deadline }),
            Ok(Err(e)) => Err(failed(describe(&e))),
            Ok(Ok(inner)) => Connection::new(inner).map_err(|e| failed(e.to_string())),
        }
    }

    /// Resolves `host:port`, then connects.
    ///
    /// # Errors
    /// As [`resolve`] and [`Endpoint::connect`].
    pub async fn connect_host(
        &self,
        host: &str,
        server_name: &str,
        tls: &ClientTls,
        deadline: Duration,
    ) -> Result<Connection, NetError> {
        let v4 = self.local_addr()?.is_ipv4();
        let addresses = resolve(host).await?;
        let addr = addresses.iter().find(|a| a.is_ipv4() == v4).ok_or_else(|| {
            let message = "no address of the family this endpoint is bound to".to_owned();
            NetError::Resolve { host: host.to_owned(), message }
        })?;
        self.connect(*addr, server_name, tls, deadline).await
    }

    /// The next attempt to connect; `None` once the endpoint is closed. Cancel-safe.
    pub async fn accept(&self) -> Option<Incoming> {
        loop {
            let inner = self.inner.accept().await?;
            let Some(tls) = self.server.clone() else {
                inner.refuse();
                continue;
            };
            let peer = inner.remote_address();
            let proven = inner.remote_address_validated() || !inner.may_retry();
            let open = self.inner.open_connections();
            let seat = match self.admission.judge(peer.ip(), open, proven, Instant::now()) {
                Verdict::Welcome(seat) => seat,
                Verdict::Retry => {
                    // It cannot fail where `may_retry` holds.
                    let _ = inner.retry();
                    continue;
                }
                Verdict::Refuse(why) => {
                    tracing::debug!(%peer, "{why}, one refused");
                    inner.refuse();
                    continue;
                }
            };
            return Some(Incoming { inner, tls, window: self.window, seat });
        }
    }

    /// Closes every connection with a reason, and stops accepting.
    pub fn close(&self, reason: &str) {
        self.inner.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits, for a bounded time, until close frames have left.
    pub async fn drain(&self) {
        let _ = tokio::time::timeout(timing::DRAIN, self.inner.wait_idle()).await;
    }
}

/// Somebody who wants to connect.
pub struct Incoming {
    inner: quinn::Incoming,
    tls: ServerTls,
    window: u32,
    seat: Seat,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({})", self.remote_address())
    }
}

impl Incoming {
    /// Where it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Whether it has shown that this address is its own.
    pub fn is_address_validated(&self) -> bool {
        self.inner.remote_address_validated()
    }

    /// Turns it away.
    pub fn refuse(self) {
        self.inner.refuse();
    }

    /// Completes the handshake. On the cluster endpoint the peer then has a name.
    ///
    /// # Errors
    /// [`NetError::Handshake`], naming the address and the reason.
    pub async fn handshake(self, deadline: Duration) -> Result<Connection, NetError> {
        let addr = self.remote_address();
        let failed = |message: String| NetError::Handshake { addr, message };
        let transport = transport(self.tls.public, addr.ip().is_loopback(), self.window);
        let config = Arc::new(server_config(&self.tls, transport));
        let connecting = self.inner.accept_with(config).map_err(|e| failed(describe(&e)))?;
        let inner = match tokio::time::timeout(deadline, connecting).await {
            Err(_) => return Err(failed(format!("not complete within {deadline:?}"))),
            Ok(Err(e)) => return Err(failed(describe(&e))),
            Ok(Ok(inner)) => inner,
        };
        let mut connection = Connection::new(inner).map_err(|e| failed(e.to_string()))?;
        connection.seat = Some(Arc::new(self.seat));
        if connection.alpn == Alpn::Cluster && connection.peer.is_none() {
            connection.close("a cluster certificate is required");
            return Err(failed("it showed no certificate".into()));
        }
        Ok(connection)
    }
}

/// An authenticated connection. Clones share it; it closes when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(crate) inner: quinn::Connection,
    alpn: Alpn,
    peer: Option<PeerName>,
    seat: Option<Arc<Seat>>,
}

impl Connection {
    fn new(inner: quinn::Connection) -> Result<Self, NetError> {
        let result = Self::inspect(&inner);
        match result {
            Ok((alpn, peer)) => Ok(Self { inner, alpn, peer, seat: None }),
            Err(e) => {
                inner.close(VarInt::from_u32(1), e.to_string().as_bytes());
                Err(e)
            }
        }
    }

    fn inspect(inner: &quinn::Connection) -> Result<(Alpn, Option<PeerName>), NetError> {
        let alpn = inner
            .handshake_data()
            .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
            .and_then(|data| data.protocol)
            .and_then(|protocol| Alpn::parse(&protocol))
            .ok_or_else(|| NetError::Protocol("no common protocol was agreed on".into()))?;
        let peer = inner
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
            .and_then(|chain| chain.first().map(|leaf| PeerName::of_certificate(leaf)));
        // Only members must have names of the cluster's; to clients a company may show its own.
        let peer = match alpn {
            Alpn::Cluster => peer.transpose()?,
            Alpn::Client | Alpn::Join => peer.and_then(Result::ok),
        };
        Ok((alpn, peer))
    }

    /// The protocol that was agreed on.
    pub fn alpn(&self) -> Alpn {
        self.alpn
    }

    /// The name in the peer's certificate; `None` for clients and joining nodes.
    pub fn peer(&self) -> Option<PeerName> {
        self.peer
    }

    /// The name in the peer's certificate.
    ///
    /// # Errors
    /// If it showed none.
    pub fn peer_name(&self) -> Result<PeerName, NetError> {
        self.peer.ok_or_else(|| NetError::Identity("the peer showed no certificate".into()))
    }

    /// The peer's address.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Current estimate of the round trip.
    pub fn rtt(&self) -> Duration {
        self.inner.rtt()
    }

    /// Lets a client that has proved who it is send as much at once as its calls need.
    pub fn widen(&self) {
        self.inner.set_receive_window(VarInt::from_u32(PUBLIC_STREAM_WINDOW.saturating_mul(4)));
    }

    /// Closes at once, telling the peer why.
    pub fn close(&self, reason: &str) {
        self.inner.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits until the connection is gone, and says why. Cancel-safe.
    pub async fn closed(&self) -> NetError {
        self.inner.closed().await.into()
    }

    /// Whether the connection is gone although nobody closed it: the peer died, or is cut off.
    pub fn was_cut(&self) -> bool {
        use quinn::ConnectionError as E;
        let reason = self.inner.close_reason();
        reason.is_some_and(|e| !matches!(e, E::ApplicationClosed(_) | E::LocallyClosed))
    }

    /// Why the connection is gone, if it is.
    pub fn close_reason(&self) -> Option<NetError> {
        self.inner.close_reason().map(NetError::from)
    }
}

/// The addresses of `host:port`, IPv4 first.
///
/// # Errors
/// [`NetError::Resolve`] if there is none, [`NetError::Deadline`] if it takes too long.
pub async fn resolve(host: &str) -> Result<Vec<SocketAddr>, NetError> {
    let failed = |message: String| NetError::Resolve { host: host.to_owned(), message };
    let mut found: Vec<SocketAddr> = within(timing::RESOLVE, "resolving a name", async {
        let found = tokio::net::lookup_host(host).await.map_err(|e| failed(e.to_string()))?;
        Ok(found.collect())
    })
    .await?;
    found.sort_by_key(SocketAddr::is_ipv6);
    if found.is_empty() { Err(failed("it has no address".into())) } else { Ok(found) }
}

/// Opens the socket with large buffers; also returns the stream window that they allow.
fn open_socket(addr: SocketAddr) -> io::Result<(std::net::UdpSocket, u32)> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    // Refusals are not errors: the kernel grants what it grants.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    let received = socket.recv_buffer_size()?;
    let sent = socket.send_buffer_size()?;
    tracing::debug!(%addr, recv_buffer_bytes = received, send_buffer_bytes = sent, "UDP socket");
    // What is in flight must fit into the receive buffer, with room for the kernel's overhead.
    let window = u32::try_from(received / 2).unwrap_or(u32::MAX);
    Ok((socket.into(), window.clamp(PUBLIC_STREAM_WINDOW / 4, MEMBER_STREAM_WINDOW)))
}

fn server_config(tls: &ServerTls, mut transport: TransportConfig) -> quinn::ServerConfig {
    if tls.public {
        transport.receive_window(VarInt::from_u32(UNPROVEN_WINDOW));
    }
    let mut config = quinn::ServerConfig::with_crypto(tls.config.clone());
    config.transport_config(Arc::new(transport)).max_incoming(MAX_WAITING).migration(tls.public);
    config
}

/// Settings of a connection; `window` is the largest stream window that the socket allows.
fn transport(public: bool, loopback: bool, window: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(timing::IDLE_TIMEOUT)
        .expect("invariant: ten seconds fit into a variable-length integer");
    config
        .keep_alive_interval(Some(timing::KEEP_ALIVE))
        .max_idle_timeout(Some(idle))
        .send_fairness(false)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    let stream_window = if public { PUBLIC_STREAM_WINDOW.min(window) } else { window };
    // Unread stage frames must not use up the window that control messages need.
    config
        .stream_receive_window(VarInt::from_u32(stream_window))
        .receive_window(VarInt::from_u32(stream_window.saturating_mul(4)))
        .send_window(u64::from(stream_window).saturating_mul(2));
    if public {
        config.max_concurrent_bidi_streams(VarInt::from_u32(PUBLIC_STREAMS));
    } else {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(MEMBER_INITIAL_WINDOW);
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(10));
        config
            .max_concurrent_bidi_streams(VarInt::from_u32(MEMBER_STREAMS))
            .congestion_controller_factory(Arc::new(cubic))
            .ack_frequency_config(Some(acks));
    }
    if loopback {
        config.initial_mtu(LOOPBACK_MTU).mtu_discovery_config(None);
    } else {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(LAN_MTU);
        config.mtu_discovery_config(Some(discovery));
    }
    config
}
