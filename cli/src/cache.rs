//! `millrace cache`: what the cache folder holds, and removing what is not needed.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use millrace_coordinator::models;
use millrace_engine::cache::{self, Cache, Kind, Rule, Thing};
use millrace_shared::options::byte_size;
use serde::Serialize;

use crate::input::{self, ago};
use crate::output::{self, TableOrJson};
use crate::table::Align::{Left, Right};
use crate::table::{Table, bytes};

/// Subcommands of `cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Show what the cache folder holds: how much of what, and when it was used last
    List(ListArgs),
    /// Remove what was not used for long; nothing that a running process uses
    Prune(PruneArgs),
}

/// Flags of `cache list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// A table for people, or one JSON object
    #[arg(long, short, default_value = "table")]
    output: TableOrJson,
}

const PRUNE_RULE: &str = "\
Without --older-than and --to the rule is the one that always holds: what can be made again here and
was not used for 60 days goes, and what is beyond --cache-limit of servers and nodes
(MILLRACE_CACHE_LIMIT).";

/// Flags of `cache prune`.
#[derive(Debug, Args)]
#[command(after_help = PRUNE_RULE)]
pub(crate) struct PruneArgs {
    /// Remove everything that was not used for so long, models too: 30d, 12h
    #[arg(long, value_name = "TIME", value_parser = age)]
    older_than: Option<Duration>,
    /// Remove what was not used for the longest time, models too, until so much is left: 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    to: Option<u64>,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
}

fn age(s: &str) -> Result<Duration, String> {
    let wrong = || format!("'{s}' is not a time such as 30d, 12h or 90m");
    let unit_at = s.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let n: u64 = s[..unit_at].parse().map_err(|_| wrong())?;
    let seconds = match &s[unit_at..] {
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    n.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// As for limits, and nothing at all.
fn size(s: &str) -> Result<u64, String> {
    if s == "0" { Ok(0) } else { byte_size(s) }
}

pub(crate) fn run(command: &CacheCommand) -> anyhow::Result<()> {
    let cache = Cache::new(&models::cache_dir().map_err(input::failed)?);
    match command {
        CacheCommand::List(args) => list(&cache, args),
        CacheCommand::Prune(args) => prune(&cache, args),
    }
}

#[derive(Serialize)]
struct Contents {
    folder: String,
    bytes: u64,
    limit: Option<u64>,
    kinds: Vec<Row>,
}

/// All things of a kind.
#[derive(Serialize)]
struct Row {
    kind: &'static str,
    things: usize,
    bytes: u64,
    in_use_bytes: u64,
    last_used_seconds_ago: u64,
    longest_unused_seconds: u64,
}

/// The kinds that there are.
fn rows(things: &[Thing]) -> Vec<Row> {
    let now = SystemTime::now();
    let unused = |t: &Thing| now.duration_since(t.last_used).unwrap_or_default().as_secs();
    let row = |kind: Kind| {
        let of_kind = || things.iter().filter(|t| t.kind == kind);
        Some(Row {
            kind: kind.as_str(),
            things: of_kind().count(),
            bytes: of_kind().map(|t| t.bytes).sum(),
            in_use_bytes: of_kind().filter(|t| t.in_use).map(|t| t.bytes).sum(),
            last_used_seconds_ago: of_kind().map(unused).min()?,
            longest_unused_seconds: of_kind().map(unused).max()?,
        })
    };
    Kind::ALL.into_iter().filter_map(row).collect()
}

fn list(cache: &Cache, args: &ListArgs) -> anyhow::Result<()> {
    let things = cache.things();
    let contents = Contents {
        folder: cache.folder().display().to_string(),
        bytes: things.iter().map(|t| t.bytes).sum(),
        limit: cache::limit(),
        kinds: rows(&things),
    };
    if args.output == TableOrJson::Json {
        return output::json(&contents);
    }
    if things.is_empty() {
        return output::write(format_args!("{} holds nothing.\n", contents.folder));
    }
    let limit = match contents.limit {
        Some(limit) => format!(" of at most {}", bytes(limit)),
        None => String::new(),
    };
    output::write(format_args!("{}: {}{limit}\n\n", contents.folder, bytes(contents.bytes)))?;
    output::write(table(&contents.kinds))?;
    if contents.limit.is_none() {
        output::write(
            "\nNo limit is set (--cache-limit, MILLRACE_CACHE_LIMIT): what was fetched stays.\n",
        )?;
    }
    Ok(())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        ("what", Left),
        ("things", Right),
        ("size", Right),
        ("in use", Right),
        ("last used", Left),
        ("longest unused", Left),
    ]);
    for row in rows {
        let used = |seconds| ago(Duration::from_secs(seconds));
        let in_use = match row.in_use_bytes {
            0 => "-".to_owned(),
            n => bytes(n),
        };
        table.row([
            row.kind.to_owned(),
            row.things.to_string(),
            bytes(row.bytes),
            in_use,
            used(row.last_used_seconds_ago),
            used(row.longest_unused_seconds),
        ]);
    }
    table
}

fn prune(cache: &Cache, args: &PruneArgs) -> anyhow::Result<()> {
    let rule = match (args.older_than, args.to) {
        (None, None) => Rule::usual(cache::limit(), 0),
        (unused, limit) => Rule { limit, unused, ..Rule::default() },
    };
    let gone = cache.prune(&rule, args.dry_run);
    let (would, will) = if args.dry_run { ("would go", "would be") } else { ("went", "are") };
    for row in rows(&gone) {
        let (size, kind) = (bytes(row.bytes), row.kind);
        output::write(format_args!("{kind}: {} {would}, {size}\n", row.things))?;
    }
    let freed: u64 = gone.iter().map(|t| t.bytes).sum();
    let left: u64 = cache.things().iter().map(|t| t.bytes).sum();
    let left = left - if args.dry_run { freed } else { 0 };
    output::write(format_args!("{} {will} free again, {} stay\n", bytes(freed), bytes(left)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        assert_eq!(age("30d"), Ok(Duration::from_hours(720)));
        assert_eq!(age("2w"), Ok(Duration::from_hours(336)));
        assert_eq!(age("0h"), Ok(Duration::ZERO));
        for bad in ["", "30", "d", "1.5d", "3y", "-1d"] {
            assert!(age(bad).is_err_and(|e| e.contains("30d")), "{bad}");
        }
        assert_eq!((size("0"), size("1K")), (Ok(0), Ok(1024)));
    }
}
