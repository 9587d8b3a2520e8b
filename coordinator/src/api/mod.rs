//! The doors for clients: HTTP as OpenAI's clients speak it, and Millrace's own calls over QUIC.
//!
//! Both know only [`crate::service::Service`]; neither holds state of a request beyond the stream
//! it is forwarding. Dropping that stream is how a client that went away cancels its request.

pub mod http;
pub mod quic;
