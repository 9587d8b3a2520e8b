//! What the `millrace` command shares with programs that embed a whole cluster, such as the tests.
#![forbid(unsafe_code)]

pub mod embedded;
