//! What files, clients and peers may get wrong, or do on purpose: each gets a clear message, and
//! everything else goes on unharmed.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod cluster;
mod crowds;
mod files;
mod kept;
mod machine;
mod members;
mod peers;
mod requests;
mod signals;
mod templates;
mod trust;
