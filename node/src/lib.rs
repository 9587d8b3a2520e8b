//! A Millrace node: joins a cluster, loads a stage, passes activations on.
//!
//! [`start()`] runs one inside the current actix system or arbiter, for the `millrace-node` binary
//! and for programs that embed nodes. No maths here: `millrace-engine` computes, on its own thread.
#![forbid(unsafe_code)]

pub mod actors;
pub mod cli;
pub mod config;
mod engines;
pub mod enrol;
pub mod hardware;
pub mod loader;
pub mod probe;
mod profiles;
mod progress;
pub mod ring;
pub mod several;

use std::net::SocketAddr;
use std::rc::Rc;

use actix::{Actor, Addr};
use anyhow::Context as _;
use millrace_engine::Isa;
use millrace_engine::mock::MockConfig;
use millrace_engine::thread::EngineHandle;
use millrace_net::certs::LiveIdentity;
use millrace_net::{Endpoint, PeerName, timing, tls, ulimits};
use millrace_shared::wire::WIRE_VERSION;
use millrace_shared::wire::control::Hello;
use tokio::sync::oneshot;

use actors::link::{self, LinkParts};
use actors::node::{Drain, Leave, Parts};
pub use config::Config;
use enrol::Membership;
use hardware::Hardware;

/// Steps that may wait for the engine: the credits of an edge, which is one more than the most
/// micro-batches in flight (1,025).
const ENGINE_QUEUE: usize = 1040;

/// A running node.
#[derive(Debug)]
pub struct Running {
    /// Where it listens.
    pub listen: SocketAddr,
    endpoint: Endpoint,
    node: Addr<actors::Node>,
    refused: Option<oneshot::Receiver<String>>,
    drain: Option<oneshot::Receiver<()>>,
}

impl Running {
    /// Completes when the coordinator refuses the node for good, with its reason.
    pub async fn refused(&mut self) -> String {
        match self.refused.as_mut() {
            Some(refused) => refused.await.unwrap_or_else(|_| "the link task ended".into()),
            None => std::future::pending().await,
        }
    }

    /// Completes when the coordinator wants this process to end.
    pub fn told_to_drain(&mut self) -> impl Future<Output = ()> + use<> {
        let drain = self.drain.take();
        async move {
            let told = match drain {
                Some(drain) => drain.await.is_ok(),
                None => false,
            };
            if !told {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Asks the coordinator to give this node's layers to others, and waits until they have them:
    /// requests run on. What stands against it, where nobody can take them or it takes longer than
    /// `limit`.
    pub async fn drain(&self, limit: std::time::Duration) -> Option<String> {
        let drained = match self.node.send(Drain).await {
            Ok(drained) => drained,
            Err(_) => return Some("the node has stopped".to_owned()),
        };
        match tokio::time::timeout(limit, drained).await {
            Ok(Ok(trouble)) => trouble,
            Ok(Err(_)) => Some("there is no link to the coordinator".to_owned()),
            Err(_) => Some(format!("nobody has taken its layers over within {limit:?}")),
        }
    }

    /// Says good-bye and closes the endpoint.
    pub async fn stop(self) {
        let _ = self.node.send(Leave).await;
        // The farewell leaves with the close frame's packets, if at all; the lease covers the rest.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        self.endpoint.close("the node is shutting down");
        self.endpoint.drain().await;
    }
}

/// Starts a node that is a member already.
///
/// # Errors
/// If the endpoint cannot be bound or the engine's thread cannot be started.
pub async fn start(config: Config, membership: Membership) -> anyhow::Result<Running> {
    start_with(config, membership, MockConfig::default()).await
}

/// The same; where the engine is the mock, it behaves as told.
///
/// # Errors
/// The same.
pub async fn start_with(
    config: Config,
    membership: Membership,
    mock: MockConfig,
) -> anyhow::Result<Running> {
    ulimits::prepare();
    let isa = Isa::detect().map_err(anyhow::Error::msg)?;
    let engine = engines::of(&config, &mock)?;
    let hardware = engine.hardware(Hardware::probe(), isa);
    let live = LiveIdentity::new(&membership.identity)?;
    let server = tls::cluster_server_of(&live, None)?;
    let endpoint = if config.next_free_port {
        Endpoint::bind_next_free(config.listen, config::PORT_TRIES, Some(&server))
    } else {
        Endpoint::bind(config.listen, Some(server))
    }
    .context("--listen")?;
    let listen = endpoint.local_addr()?;
    let threads = config.threads.unwrap_or(hardware.cores).max(1);
    let numerics = engine.numerics;
    let hello = hello(&config, &hardware, listen, threads, numerics.clone(), &membership);
    let client = tls::cluster_client_of(&live)?;
    if let Some(renewal) = membership.renewal {
        actix_rt::spawn(renewal.keep(membership.identity, live));
    }
    if config.show_progress {
        announce(&config, &hardware, &hello, listen);
    }
    let machine = format!("{}\n{}\n{}", hello.hardware, hello.engine, hello.numerics_revision);
    let link = LinkParts {
        endpoint: endpoint.clone(),
        tls: client.clone(),
        coordinator: membership.coordinator,
        hello,
    };
    let parts = Parts {
        config,
        endpoint: endpoint.clone(),
        tls: client,
        mock,
        spawn_engine: |config, mock| {
            let engine = engines::of(config, mock).map_err(std::io::Error::other)?;
            EngineHandle::spawn("engine", ENGINE_QUEUE, engine.factory)
        },
        numerics,
        cores: hardware.cores,
        machine,
    };
    let (telling, drain) = oneshot::channel();
    let node = actors::Node::new(Rc::new(parts)).telling(telling).start();
    actix_rt::spawn(accept_neighbours(endpoint.clone(), node.clone()));
    let (sender, refused) = oneshot::channel();
    let linked = node.clone();
    actix_rt::spawn(async move {
        let _ = sender.send(link::run(link, linked).await);
    });
    Ok(Running { listen, endpoint, node, refused: Some(refused), drain: Some(drain) })
}

fn hello(
    config: &Config,
    hardware: &Hardware,
    listen: SocketAddr,
    threads: usize,
    numerics_revision: String,
    membership: &Membership,
) -> Hello {
    Hello {
        wire_version: WIRE_VERSION,
        numerics_revision,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        name: config.name.clone(),
        advertise: advertise(config, listen, &membership.coordinator),
        host: hardware.host.clone(),
        engine: config.engine.as_str().to_owned(),
        threads: threads as u32,
        memory_bytes: config
            .memory_bytes
            .map_or(hardware.memory_bytes, |m| m.min(hardware.memory_bytes)),
        hardware: hardware.processor.clone(),
        torch: engines::kept(config),
        drains: config.drains,
    }
}

/// `host:port` for neighbours: as told, else the bound address, else the one that this machine uses
/// towards the coordinator.
fn advertise(config: &Config, listen: SocketAddr, coordinator: &str) -> String {
    match &config.advertise {
        Some(told) if told.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) => {
            told.clone()
        }
        Some(host) => format!("{host}:{}", listen.port()),
        None if !listen.ip().is_unspecified() => listen.to_string(),
        None => {
            let towards = || {
                let socket =
                    std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)).ok()?;
                // Connecting a UDP socket sends nothing; it asks the routing table.
                socket.connect(coordinator).ok()?;
                Some(socket.local_addr().ok()?.ip())
            };
            let ip = towards().unwrap_or(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
            SocketAddr::new(ip, listen.port()).to_string()
        }
    }
}

fn announce(config: &Config, hardware: &Hardware, hello: &Hello, listen: SocketAddr) {
    let why = match config.threads {
        Some(_) => "as --threads says".to_owned(),
        None => format!("{}, shared among the stages on this host", hardware.cores_reason),
    };
    tracing::info!(
        name = %hello.name, listen = %listen, advertise = %hello.advertise,
        "millrace-node {}: {} threads ({why}), {}, numerics {}",
        hello.version, hello.threads, hello.hardware, hello.numerics_revision
    );
}

/// Accepts neighbours until the endpoint closes.
async fn accept_neighbours(endpoint: Endpoint, node: Addr<actors::Node>) {
    while let Some(incoming) = endpoint.accept().await {
        let node = node.clone();
        actix_rt::spawn(async move {
            match incoming.handshake(timing::HANDSHAKE).await {
                Ok(connection) => match connection.peer_name() {
                    Ok(PeerName::Node(_)) => {
                        let end = link::accept_edges(&connection, &node).await;
                        tracing::debug!("a neighbour's connection ended: {end}");
                    }
                    _ => connection.close("only nodes connect here"),
                },
                Err(e) => tracing::warn!("refused: {e}"),
            }
        });
    }
}
