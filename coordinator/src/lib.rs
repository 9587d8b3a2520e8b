//! The Millrace coordinator: membership, planning, scheduling, client APIs.
//!
//! [`start()`] runs one inside the current actix system, for the `millrace-coordinator` binary and
//! for programs that embed it. Layout: [`actors`] translate between the machines of
//! `millrace-shared` and the world; [`plan`] turns a cut into assignments; [`request`] is one
//! request's way; [`serving`] implements the [`service`] that [`api`] offers over QUIC and HTTP,
//! and [`gate`] stands in front of it;
//! [`text`] tokenises; [`models`] finds and hashes model files; [`blobs`] hands weights to nodes;
//! [`chronicle`] remembers what happened; [`whereabouts`] says what requests wait for; [`state`] is the cluster's folder, [`journal`] what is kept of requests there.
#![forbid(unsafe_code)]

pub mod actors;
pub mod api;
pub mod backup;
pub mod blobs;
pub mod chronicle;
pub mod cli;
pub mod collect;
pub mod config;
pub mod gate;
pub mod journal;
pub mod metrics;
pub mod models;
pub mod names;
pub mod paste;
pub mod plan;
pub mod recut;
pub mod request;
pub mod security;
pub mod service;
pub mod serving;
pub mod spans;
pub mod start;
pub mod state;
pub mod text;
pub mod whereabouts;

pub use config::Config;
pub use start::{Running, start};
