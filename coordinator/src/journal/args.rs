//! Flags of commands that serve for long.

use std::time::Duration;

use clap::Args;

use super::{DEFAULT_MAX_BYTES, JournalConfig, JournalMode};
use crate::cli::duration;

/// What is kept of requests.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Journal")]
pub struct JournalArgs {
    /// Where requests and their tokens are kept: disk (the cluster's folder; a client is sent
    /// nothing that is not there, and requests go on after a crash), memory, or off
    #[arg(long, value_name = "WHERE", default_value = "disk")]
    pub journal: JournalMode,
    /// How long an ended request can still be asked for, before it is erased: 30s, 10m, 2h
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub retain: Duration,
    /// Most MiB of requests that are kept; ended ones make room for new ones. Running ones are
    /// promised room as they grow; while they need it all, new ones are refused, to come again
    /// later. None that runs is cut off for it: their answers may take more, each as much as its
    /// most tokens do
    #[arg(long, value_name = "MIB", default_value_t = DEFAULT_MAX_BYTES >> 20, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub journal_size: u64,
}

impl JournalArgs {
    /// As the coordinator wants it.
    pub fn config(&self) -> JournalConfig {
        JournalConfig {
            mode: self.journal,
            retain: self.retain,
            max_bytes: self.journal_size << 20,
        }
    }
}
