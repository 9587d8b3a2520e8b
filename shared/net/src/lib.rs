//! QUIC endpoints, cluster identities, framing and the client SDK of Millrace.
//!
//! The only crate that names quinn, rustls and rcgen: everybody else sees [`Endpoint`],
//! [`Connection`], [`SendStream`] and [`RecvStream`], and gets the same types over QUIC or inside
//! one process. It moves bytes and checks who sent them; it decides nothing about models,
//! sequences or schedules.
//!
//! # Layout
//! [`identity`] makes the cluster's CA and certificates, [`tls`] turns them into configurations;
//! [`endpoint`] binds sockets and shakes hands; [`transport`] opens and accepts typed streams;
//! [`framed`] puts messages and stage frames on them; [`edge`] adds credits; [`awake`] keeps processors
//! from sleeping while frames pass; [`burst`] measures ways; [`join`] enrols nodes;
//! [`certs`] changes certificates in use, [`revoked`] keeps nodes out, [`keys`] keeps API keys; [`client`] and [`rpc_server`] are the two halves of the client API;
//! [`budget`] bounds how often, [`room`] how much;
//! [`timing`] holds every deadline; [`telemetry`] sets logging up.
//!
//! # Invariants
//! No byte of the cluster planes moves without mutual TLS 1.3 under the cluster's own CA; every
//! connecting side checks the name it expects. Every length is checked before memory is allocated
//! for it; every wait for a peer has a deadline or is a wait for work.
#![forbid(unsafe_code)]

mod admission;
pub mod awake;
pub mod budget;
pub mod burst;
pub mod certs;
pub mod client;
pub mod cpu_time;
pub mod edge;
pub mod endpoint;
mod error;
pub mod framed;
pub mod identity;
pub mod join;
pub mod keys;
pub mod private_file;
pub mod pump;
mod resets;
pub mod revoked;
pub mod room;
pub mod rpc_server;
pub mod seats;
pub mod signals;
pub mod supervisor;
pub mod telemetry;
pub mod timing;
pub mod tls;
pub mod transport;
pub mod ulimits;

pub use edge::{EdgeReceiver, EdgeSender};
pub use endpoint::{Connection, Endpoint, Incoming};
pub use error::NetError;
pub use framed::{FramePool, FrameReceiver, FrameSender, MessageReceiver, MessageSender};
pub use identity::{ClusterCa, Identity, NodeKey, PeerName};
pub use tls::{Alpn, ClientTls, ServerTls};
pub use transport::{IncomingStream, RecvStream, SendStream, local_stream_pair};
