//! Which cluster a command talks to: a running one, or one started for it in this process. Either
//! way the SDK talks over QUIC, so a command cannot tell the difference.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use millrace_cli::embedded::{EmbeddedCluster, EmbeddedOptions};
use millrace_coordinator::models::ModelOptions;
use millrace_coordinator::state::CLIENT_FILE;
use millrace_net::client::{Client, ClientConfig, GenerateStream};
use millrace_shared::dirs;
use millrace_shared::names::env;
use millrace_shared::options::EngineOptions;
use millrace_shared::wire::admin::{AdminReply, AdminRequest};
use millrace_shared::wire::rpc::{
    ClusterStatus, EmbedRequest, Embedded, GenerateEvent, GenerateRequest, ModelCard,
    PositionScore, Prompt, ScoreRequest, TokenizeRequest,
};

use crate::error::{Interrupted, usage};
use crate::{output, serving};

/// A model to start here, or a running cluster.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// Start a cluster in this process with this model: a GGUF file, a model's
    /// folder, a catalogue name, or org/name:file of the hub
    #[arg(
        long,
        short,
        value_name = "MODEL",
        help_heading = "Cluster",
        conflicts_with_all = ["cluster", "connect", "ca", "system_ca", "server_name", "api_key_file"]
    )]
    model: Option<String>,
    /// Stages of the cluster that --model starts [default: 1]
    #[arg(
        long,
        value_name = "N",
        help_heading = "Cluster",
        requires = "model",
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    stages: Option<u32>,
    #[command(flatten)]
    model_options: ModelOptions,
    #[command(flatten)]
    running: RunningArgs,
    #[command(flatten)]
    engine: EngineOptions,
}

impl TargetArgs {
    /// As `--model MODEL` alone.
    pub(crate) fn of_model(model: &str) -> Self {
        Self {
            model: Some(model.to_owned()),
            stages: None,
            model_options: ModelOptions::default(),
            running: RunningArgs::default(),
            engine: EngineOptions::default(),
        }
    }
}

/// Where a running cluster is.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct RunningArgs {
    /// Talk to the running cluster of this client.toml [env: MILLRACE_CLUSTER]
    /// [default: client.toml in $MILLRACE_DIR or the XDG data folder]
    #[arg(long, global = true, value_name = "FILE")]
    cluster: Option<PathBuf>,
    /// Address of the QUIC API, instead of the one in client.toml
    #[arg(long, global = true, value_name = "HOST:PORT")]
    connect: Option<String>,
    /// PEM file of the cluster's CA, instead of the one in client.toml
    #[arg(long, global = true, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Trust whom this system trusts, where the coordinator shows its company's certificate
    #[arg(long, global = true, conflicts_with = "ca")]
    system_ca: bool,
    /// Name in the coordinator's certificate, where it is its company's [default: the host of --connect]
    #[arg(long, global = true, value_name = "NAME")]
    server_name: Option<String>,
    /// File that holds the API key, instead of $MILLRACE_API_KEY or the one in client.toml
    #[arg(long, global = true, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

/// What a command needs of a cluster that is started for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Requests at once.
    pub(crate) requests: u32,
    /// KV positions of all of them; `None` for requests of any length.
    pub(crate) positions: Option<u32>,
}

impl Needs {
    pub(crate) fn one_request() -> Self {
        Self { requests: 1, positions: None }
    }
}

/// Opens a session, works with it, and closes it however the work ended. Ctrl-C ends the work.
///
/// # Errors
/// If there is no cluster, it cannot be started, or the work fails.
pub(crate) async fn with_session<T>(
    target: &TargetArgs,
    needs: Needs,
    work: impl AsyncFnOnce(&Session) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let session = Session::open(target, needs).await?;
    let result = tokio::select! {
        result = work(&session) => result,
        _ = tokio::signal::ctrl_c() => Err(Interrupted.into()),
    };
    session.close().await;
    result
}

/// Engine options do nothing to a cluster that runs already; saying so beats ignoring them.
fn refuse_engine_options(engine: &EngineOptions) -> anyhow::Result<()> {
    // What may come from the environment is meant for other commands.
    let plain = EngineOptions {
        threads: engine.threads,
        wake_latency: engine.wake_latency,
        ..EngineOptions::default()
    };
    if *engine == plain {
        return Ok(());
    }
    Err(usage(
        "engine options belong to the nodes of a cluster: give --model MODEL too, or set them where the cluster is started",
    ))
}

/// The folder of CA, keys and `client.toml`: `$MILLRACE_DIR`, else in the XDG data folder.
///
/// # Errors
/// If neither is set and there is no home folder.
fn default_dir() -> anyhow::Result<PathBuf> {
    dirs::data(&|name| std::env::var_os(name)).ok_or_else(|| {
        usage(format!("no folder for the cluster's files: set {} or HOME", env::DIR))
    })
}

impl RunningArgs {
    /// The file to read and whether somebody asked for it by name.
    fn config_path(&self) -> anyhow::Result<(PathBuf, bool)> {
        if let Some(path) = &self.cluster {
            return Ok((path.clone(), true));
        }
        if let Some(path) = std::env::var_os(env::CLUSTER).filter(|v| !v.is_empty()) {
            return Ok((path.into(), true));
        }
        Ok((default_dir()?.join(CLIENT_FILE), false))
    }

    /// Asks or orders something as an administrator, on a connection of its own.
    ///
    /// # Errors
    /// If there is no cluster, or what it says.
    pub(crate) async fn admin(&self, request: AdminRequest) -> anyhow::Result<AdminReply> {
        let client = Client::connect(&self.config()?).await?;
        let reply = client.admin(request).await;
        client.close().await;
        Ok(reply?)
    }

    /// The API key that is used.
    ///
    /// # Errors
    /// If there is no cluster.
    pub(crate) fn secret(&self) -> anyhow::Result<String> {
        Ok(self.config()?.api_key)
    }

    fn config(&self) -> anyhow::Result<ClientConfig> {
        let (path, named) = self.config_path()?;
        let mut config = if path.exists() || named {
            ClientConfig::load(&path).map_err(|e| usage(e.to_string()))?
        } else {
            self.without_file(&path)?
        };
        if let Some(address) = &self.connect {
            config.quic = address.clone();
        }
        if let Some(ca) = &self.ca {
            config.ca_pem = read(ca)?;
        }
        if self.system_ca {
            config.ca_pem.clear();
        }
        if let Some(name) = &self.server_name {
            config.server_name = Some(name.clone());
        }
        match (&self.api_key_file, std::env::var(env::API_KEY)) {
            (Some(file), _) => read(file)?.trim().clone_into(&mut config.api_key),
            (None, Ok(key)) if !key.is_empty() => config.api_key = key,
            _ => {}
        }
        Ok(config)
    }

    /// A cluster known from the command line alone.
    fn without_file(&self, expected: &Path) -> anyhow::Result<ClientConfig> {
        let trusted = self.ca.is_some() || self.system_ca;
        if self.connect.is_some() && trusted && self.api_key_file.is_some() {
            let empty = String::new;
            return Ok(ClientConfig {
                quic: empty(),
                http: empty(),
                api_key: empty(),
                ca_pem: empty(),
                server_name: None,
            });
        }
        Err(usage(format!(
            "no cluster to talk to: there is no {}\n  \
             start one for this command alone: add --model smollm2:135m\n  \
             start one that stays:             millrace up --model smollm2:135m\n  \
             or name one:                      --cluster FILE, or --connect, --ca or --system-ca, and \
             --api-key-file",
            expected.display()
        )))
    }
}

/// The description of the running cluster's members, in TOML.
///
/// # Errors
/// If there is no cluster, or none of its nodes was measured yet.
pub(crate) async fn live_cluster() -> anyhow::Result<String> {
    match RunningArgs::default().admin(AdminRequest::Describe).await? {
        AdminReply::Description(text) if !text.is_empty() => Ok(text),
        AdminReply::Description(_) => Err(anyhow::anyhow!(
            "no node of the cluster has been measured yet; try again when it is ready"
        )),
        other => Err(anyhow::anyhow!("the cluster's answer makes no sense: {other:?}")),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|e| usage(format!("cannot read {}: {e}", path.display())))
}

/// A connection to a cluster, and the cluster itself where it was started for this.
#[derive(Debug)]
pub(crate) struct Session {
    caller: Caller,
    config: ClientConfig,
    embedded: Option<EmbeddedCluster>,
}

impl Session {
    /// Starts a cluster in this process and connects to it. Ctrl-C ends the start.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) async fn start(options: EmbeddedOptions) -> anyhow::Result<Self> {
        let start = EmbeddedCluster::start(options, output::remark);
        let cluster = tokio::select! {
            cluster = start => cluster?,
            _ = tokio::signal::ctrl_c() => return Err(Interrupted.into()),
        };
        let config = cluster.client_config().clone();
        match Caller::connect(&config).await {
            Ok(caller) => Ok(Self { caller, config, embedded: Some(cluster) }),
            Err(e) => {
                cluster.stop().await;
                Err(e)
            }
        }
    }

    /// Starts a cluster with `--model`, or connects to the running one.
    ///
    /// # Errors
    /// If there is no cluster, or it cannot be started.
    pub(crate) async fn open(target: &TargetArgs, needs: Needs) -> anyhow::Result<Self> {
        let Some(model) = &target.model else {
            refuse_engine_options(&target.engine)?;
            return Self::connect(&target.running).await;
        };
        let stages = serving::stages(target.stages, &target.engine, serving::DEFAULT_STAGES)?;
        let options =
            serving::private_cluster(model, target.model_options, stages, &target.engine)?;
        let max_num_seqs = options.max_num_seqs.max(needs.requests);
        let kv_cache_tokens =
            needs.positions.or_else(|| serving::kv_cache_for(&options, needs.requests));
        Self::start(EmbeddedOptions { max_num_seqs, kv_cache_tokens, ..options }).await
    }

    /// Connects to a running cluster.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub(crate) async fn connect(running: &RunningArgs) -> anyhow::Result<Self> {
        let config = running.config()?;
        let caller = Caller::connect(&config).await?;
        Ok(Self { caller, config, embedded: None })
    }

    /// The cluster of this process.
    pub(crate) fn embedded(&self) -> Option<&EmbeddedCluster> {
        self.embedded.as_ref()
    }

    /// One more client, with a connection of its own.
    ///
    /// # Errors
    /// If the cluster cannot be reached.
    pub(crate) async fn caller(&self) -> anyhow::Result<Caller> {
        Caller::connect(&self.config).await
    }

    /// URL of the HTTP API, and the key.
    pub(crate) fn http(&self) -> (&str, &str) {
        (&self.config.http, &self.config.api_key)
    }

    pub(crate) async fn generate(&self, request: GenerateRequest) -> anyhow::Result<Events> {
        self.caller.generate(request).await
    }

    pub(crate) async fn score(&self, request: ScoreRequest) -> anyhow::Result<Vec<PositionScore>> {
        Ok(self.caller.0.score(request).await?)
    }

    pub(crate) async fn embed(&self, request: EmbedRequest) -> anyhow::Result<Vec<Embedded>> {
        Ok(self.caller.0.embed(request).await?)
    }

    /// Ids of a prompt: special tokens are parsed, none are added.
    pub(crate) async fn tokenize(&self, prompt: Prompt) -> anyhow::Result<Vec<u32>> {
        Ok(self.caller.0.tokenize(TokenizeRequest { model: String::new(), prompt }).await?)
    }

    /// The model that is served.
    pub(crate) async fn model(&self) -> anyhow::Result<ModelCard> {
        let models = self.caller.0.models().await?;
        models.into_iter().next().ok_or_else(|| anyhow::anyhow!("the cluster serves no model yet"))
    }

    pub(crate) async fn status(&self) -> anyhow::Result<ClusterStatus> {
        Ok(self.caller.0.status().await?)
    }

    /// The same, for those who would rather hear nothing than wait longer.
    pub(crate) async fn status_within(&self, limit: Duration) -> anyhow::Result<ClusterStatus> {
        Ok(self.caller.0.with_deadline(limit).status().await?)
    }

    /// Where it is.
    pub(crate) fn address(&self) -> &str {
        &self.config.quic
    }

    /// Disconnects, and stops the cluster if it was started for this one command.
    pub(crate) async fn close(self) {
        // Each waits for its own farewells: nobody needs to wait for both.
        let stop = async {
            if let Some(cluster) = self.embedded {
                cluster.stop().await;
            }
        };
        tokio::join!(self.caller.0.close(), stop);
    }
}

/// A client.
#[derive(Debug)]
pub(crate) struct Caller(Client);

impl Caller {
    async fn connect(config: &ClientConfig) -> anyhow::Result<Self> {
        Ok(Self(Client::connect(config).await?))
    }

    pub(crate) async fn generate(&self, request: GenerateRequest) -> anyhow::Result<Events> {
        Ok(Events(self.0.generate(request).await?))
    }
}

/// The events of a continuation. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Events(GenerateStream);

impl Events {
    /// The next event; `None` after the last. Cancel-safe.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<GenerateEvent>> {
        Ok(self.0.next().await.transpose()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(dir: &Path) -> RunningArgs {
        RunningArgs {
            cluster: Some(dir.join(CLIENT_FILE)),
            connect: None,
            ca: None,
            system_ca: false,
            server_name: None,
            api_key_file: None,
        }
    }

    #[test]
    fn flags_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let config = ClientConfig {
            quic: "a:1".to_owned(),
            http: "http://a:2".to_owned(),
            api_key: "file".to_owned(),
            ca_pem: "PEM".to_owned(),
            server_name: None,
        };
        config.save(&dir.path().join(CLIENT_FILE)).unwrap();
        let mut args = running(dir.path());
        assert_eq!(args.config().unwrap(), config);
        let key = dir.path().join("key");
        std::fs::write(&key, "flag\n").unwrap();
        args.connect = Some("b:3".to_owned());
        args.api_key_file = Some(key);
        let changed = args.config().unwrap();
        assert_eq!((changed.quic.as_str(), changed.api_key.as_str()), ("b:3", "flag"));
        assert_eq!(changed.ca_pem, "PEM");
    }

    #[test]
    fn a_missing_file_is_named_and_alternatives_are_given() {
        let dir = tempfile::tempdir().unwrap();
        let args = running(dir.path());
        let named = args.config().unwrap_err().to_string();
        assert!(named.contains("client.toml"), "{named}");
        let advice = args.without_file(Path::new("/x/client.toml")).unwrap_err().to_string();
        assert!(advice.contains("millrace up") && advice.contains("--connect"), "{advice}");
    }

    #[test]
    fn engine_options_need_a_model() {
        let threads = EngineOptions { threads: Some(3), ..EngineOptions::default() };
        assert!(refuse_engine_options(&threads).is_ok());
        let chunk = EngineOptions { prefill_chunk: 7, ..EngineOptions::default() };
        assert!(refuse_engine_options(&chunk).is_err());
    }
}
