//! Commands that only touch the cluster's folder: its making, tokens, keys, backups.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand};
use millrace_shared::dirs;
use millrace_shared::names::env;
use millrace_shared::wire::admin::{KeyInfo, KeyLimits, NewKey, Scope, TokenInfo};

use super::{duration, host};
use crate::config::{DEFAULT_HTTP_PORT, DEFAULT_QUIC_PORT, host_port, own_address};
use crate::gate::Invitations;
use crate::state::{ClusterDir, unix_now};

/// The cluster's folder.
#[derive(Clone, Debug, Args)]
pub struct DirArg {
    /// The cluster's folder [default: the XDG data folder millrace]
    #[arg(long, value_name = "DIR", env = env::DIR)]
    pub dir: Option<PathBuf>,
}

impl DirArg {
    /// The folder.
    ///
    /// # Errors
    /// If none is given and there is no home.
    pub fn resolve(&self) -> anyhow::Result<PathBuf> {
        self.dir
            .clone()
            .or_else(|| dirs::data(&|name| std::env::var_os(name)))
            .ok_or_else(|| anyhow!("no --dir given and $HOME is not set"))
    }
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Host under which others reach this machine [default: its address]
    #[arg(long, value_name = "HOST", value_parser = host)]
    advertise: Option<String>,
}

/// Flags of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    #[command(flatten)]
    dir: DirArg,
    /// The file to write. It holds the CA's private key: keep it like one
    file: PathBuf,
}

/// Flags of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    dir: DirArg,
    /// What `backup` wrote
    file: PathBuf,
    /// Where clients will find the QUIC API [default: where they found it]
    #[arg(long, value_name = "HOST:PORT")]
    quic: Option<String>,
    /// Where clients will find the HTTP API [default: where they found it]
    #[arg(long, value_name = "URL")]
    http: Option<String>,
}

/// Commands about join tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a join token
    Create {
        #[command(flatten)]
        dir: DirArg,
        #[command(flatten)]
        token: TokenArgs,
    },
    /// List join tokens
    List {
        #[command(flatten)]
        dir: DirArg,
    },
    /// Make a join token invalid; nodes that joined with it stay
    Revoke {
        #[command(flatten)]
        dir: DirArg,
        /// As `list` shows it
        id: String,
    },
}

/// What a new join token is to be.
#[derive(Clone, Copy, Debug, Args)]
pub struct TokenArgs {
    /// Nodes that may join with it, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub uses: u32,
    /// How long it is valid: 30m, 24h, 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub expires: Duration,
}

/// Commands about API keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Print a new key; it is shown this once
    Create {
        #[command(flatten)]
        dir: DirArg,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// List keys
    List {
        #[command(flatten)]
        dir: DirArg,
    },
    /// Make a key invalid
    Revoke {
        #[command(flatten)]
        dir: DirArg,
        /// As `list` shows it
        id: String,
    },
}

/// What a new key is to be.
#[derive(Clone, Debug, Args)]
pub struct KeyArgs {
    /// Whose it is
    #[arg(long, alias = "label", default_value = "client")]
    name: String,
    /// What its holder may do: read (models, state, metrics), generate (that, and run the model) or
    /// admin (that, and change the cluster)
    #[arg(long, value_name = "SCOPE", default_value = "generate")]
    scope: Scope,
    /// The same as --scope admin
    #[arg(long, conflicts_with = "scope")]
    admin: bool,
    /// How long it is valid: 12h, 90d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    expires: Option<Duration>,
    /// Requests a minute: continuations, scorings, vectors, texts to tokens and back
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens_per_minute: Option<u32>,
    /// Requests at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrent: Option<u32>,
}

impl KeyArgs {
    /// The key that is asked for.
    pub fn key(&self) -> NewKey {
        NewKey {
            name: self.name.clone(),
            scope: if self.admin { Scope::Admin } else { self.scope },
            limits: KeyLimits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                concurrent: self.concurrent,
            },
            expires: self.expires.map(|time| unix_now().saturating_add(time.as_secs())),
        }
    }
}

/// Makes the folder.
///
/// # Errors
/// If it cannot be written.
pub fn init(args: &InitArgs) -> anyhow::Result<String> {
    let path = args.dir.resolve()?;
    let host = args.advertise.clone().unwrap_or_else(|| own_address().to_string());
    let quic = host_port(&host, DEFAULT_QUIC_PORT);
    let http = format!("http://127.0.0.1:{DEFAULT_HTTP_PORT}");
    let dir = ClusterDir::open_or_init(&path, &quic, &http)?;
    let what = if dir.created { "made" } else { "is there already" };
    Ok(format!(
        "The cluster's folder {} {what}.\nNext: millrace-coordinator serve --dir {} --model MODEL",
        path.display(),
        path.display()
    ))
}

/// Makes, lists or revokes join tokens.
///
/// # Errors
/// If the folder is not a cluster's, or no token has the id.
pub fn token(command: &TokenCommand) -> anyhow::Result<String> {
    match command {
        TokenCommand::Create { dir, token } => {
            create_token(&ClusterDir::open(&dir.resolve()?)?, token.uses, token.expires)
        }
        TokenCommand::List { dir } => {
            let tokens = invitations(&ClusterDir::open(&dir.resolve()?)?).list(unix_now())?;
            let mut table =
                format!("{:<14}  {:>4}  {:>6}  expires (Unix time)", "id", "left", "joined");
            for TokenInfo { id, left, nodes, expires } in tokens {
                table.push_str(&format!("\n{id:<14}  {left:>4}  {:>6}  {expires}", nodes.len()));
            }
            Ok(table)
        }
        TokenCommand::Revoke { dir, id } => {
            let path = dir.resolve()?;
            if invitations(&ClusterDir::open(&path)?).revoke(id).context("cannot revoke")? {
                return Ok(format!("nobody joins with the token {id} any more"));
            }
            Err(anyhow!(
                "no join token has the id '{id}': 'millrace-coordinator token list --dir {}' shows them",
                path.display()
            ))
        }
    }
}

/// Those of the address in `client.toml`.
fn invitations(dir: &ClusterDir) -> Invitations {
    Invitations::of(dir, &dir.client.quic)
}

/// Makes a join token for the address in `client.toml`.
///
/// # Errors
/// If it cannot be written.
pub fn create_token(dir: &ClusterDir, uses: u32, expires: Duration) -> anyhow::Result<String> {
    Ok(invitations(dir).create(uses, expires.as_secs(), unix_now())?.to_string())
}

/// Writes a backup.
///
/// # Errors
/// If the folder is not a cluster's, or the file cannot be written.
pub fn backup(args: &BackupArgs) -> anyhow::Result<String> {
    let dir = ClusterDir::open(&args.dir.resolve()?)?;
    crate::backup::write(&dir.path, &args.file)?;
    Ok(format!(
        "{} holds the CA's key, API keys (hashed), revocations and client.toml of {}",
        args.file.display(),
        dir.path.display()
    ))
}

/// Makes a folder from a backup.
///
/// # Errors
/// If the file is no backup, or the folder is not empty.
pub fn restore(args: &RestoreArgs) -> anyhow::Result<String> {
    let path = args.dir.resolve()?;
    crate::backup::restore(&args.file, &path)?;
    let mut dir = ClusterDir::open(&path)?;
    let quic = args.quic.clone().unwrap_or_else(|| dir.client.quic.clone());
    let http = args.http.clone().unwrap_or_else(|| dir.client.http.clone());
    dir.set_addresses(&quic, &http)?;
    let host = quic.rsplit_once(':').map_or(quic.as_str(), |(host, _)| host);
    Ok(format!(
        "{0} was restored.\nNext: millrace-coordinator serve --dir {0} --model MODEL --advertise {host}\n\
         Where its address has changed, start each node once with --coordinator {quic} (no token \
         is needed), and give clients the new client.toml or --connect {quic}.\n\
         API keys and nodes that were revoked after the backup have to be revoked again.",
        path.display(),
    ))
}

/// Makes, lists or revokes keys.
///
/// # Errors
/// If the folder is not a cluster's, or no key has the id.
pub fn key(command: &KeyCommand) -> anyhow::Result<String> {
    match command {
        KeyCommand::Create { dir, key } => {
            let dir = ClusterDir::open(&dir.resolve()?)?;
            let (_, secret) = dir.keys.create(&key.key(), unix_now())?;
            Ok(secret)
        }
        KeyCommand::List { dir } => {
            let keys = ClusterDir::open(&dir.resolve()?)?.keys.list()?;
            let mut table =
                format!("{:<14}  {:<20}  {:<8}  created (Unix time)", "id", "name", "scope");
            for KeyInfo { id, key, created, .. } in keys {
                let scope = key.scope.as_str();
                table.push_str(&format!("\n{id:<14}  {:<20}  {scope:<8}  {created}", key.name));
            }
            Ok(table)
        }
        KeyCommand::Revoke { dir, id } => {
            let path = dir.resolve()?;
            let revoked = ClusterDir::open(&path)?.keys.revoke(id).context("cannot revoke")?;
            if revoked {
                return Ok(format!("key {id} is no longer valid"));
            }
            Err(anyhow!(
                "no key has the id '{id}': 'millrace-coordinator key list --dir {}' shows them",
                path.display()
            ))
        }
    }
}
