//! Validated settings of a coordinator.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;

use crate::journal::JournalConfig;
use crate::plan::Deployment;
use crate::security::Security;
use crate::text::rules::TextRules;

/// HTTP, TCP.
pub const DEFAULT_HTTP_PORT: u16 = 8000;
/// Clients and joining nodes, UDP.
pub const DEFAULT_QUIC_PORT: u16 = 8001;
/// Members, UDP.
pub const DEFAULT_CLUSTER_PORT: u16 = 8002;
/// Sequences with KV blocks at once, where nothing else is said.
pub const DEFAULT_MAX_NUM_SEQS: u32 = 64;
/// Requests that may wait, where nothing else is said: minutes of work; more would only time out.
pub const DEFAULT_MAX_WAITING: u32 = 256;
/// Seconds that requests outlive their pipeline: a supervisor has restarted a node by then, and no
/// client has given up.
pub const DEFAULT_RECOVERY_SECONDS: u32 = 30;

/// Everything a coordinator needs to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster's folder; made where missing.
    pub dir: PathBuf,
    /// The model file.
    pub model: PathBuf,
    /// Name that clients use.
    pub served_name: String,
    /// Stages to wait for; `None` for however many nodes come.
    pub stages: Option<u16>,
    /// Cut, limits and types.
    pub deployment: Deployment,
    /// HTTP API; `None` for none.
    pub http: Option<SocketAddr>,
    /// Host names that HTTP answers to besides loopback and the bound address.
    pub http_hosts: Vec<String>,
    /// How HTTP is protected.
    pub security: Security,
    /// QUIC endpoint of clients and joining nodes.
    pub quic: SocketAddr,
    /// QUIC endpoint of members.
    pub cluster: SocketAddr,
    /// Host under which others reach this machine; found out where not given.
    pub advertise: Option<String>,
    /// What is kept of requests, and where.
    pub journal: JournalConfig,
    /// What is done to prompts and answers.
    pub rules: TextRules,
    /// Collector of traces.
    pub otlp_endpoint: Option<String>,
    /// Bars on stderr while the model is read.
    pub show_progress: bool,
}

impl Config {
    /// The host that tokens and `client.toml` name.
    pub fn advertised_host(&self) -> String {
        match &self.advertise {
            Some(host) => host.clone(),
            None if self.quic.ip().is_unspecified() => own_address().to_string(),
            None => self.quic.ip().to_string(),
        }
    }
}

/// `host:port`, with brackets where the host is an IPv6 address.
pub fn host_port(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V6(_)) => format!("[{host}]:{port}"),
        _ => format!("{host}:{port}"),
    }
}

/// The address that this machine uses towards others, by asking the routing table: connecting a UDP
/// socket sends nothing. Loopback where there is no route.
pub fn own_address() -> IpAddr {
    // A documentation address (RFC 5737): never a real peer.
    let probe = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        Ok(socket.local_addr()?.ip())
    };
    probe().ok().filter(|ip| !ip.is_unspecified()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}
