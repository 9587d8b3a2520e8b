//! Puts a coordinator together and runs it in the current actix system.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use actix::{Actor, Addr};
use anyhow::{Context as _, anyhow};
use millrace_net::certs::LiveIdentity;
use millrace_net::client::ClientConfig;
use millrace_net::join::JoinDesk;
use millrace_net::{Alpn, Endpoint, timing, tls, ulimits};
use millrace_shared::model::ModelFiles;
use millrace_shared::wire::rpc::ModelCard;
use tokio::sync::watch;

use crate::actors::batcher::GetCounters;
use crate::actors::cluster::{GetStatus, Readiness, Shutdown};
use crate::actors::{Batcher, Cluster, member};
use crate::api;
use crate::api::http::{HttpConfig, HttpServerHandle};
use crate::blobs::Blobs;
use crate::collect::About;
use crate::config::{Config, host_port};
use crate::gate::{Accounts, Gate, Invitations, keep_uses};
use crate::journal::{Journal, begin_life};
use crate::metrics::Metrics;
use crate::models::{ConsoleProgress, NoProgress, Progress, cache_dir, hash_manifest};
use crate::plan::{Deployment, check_stages};
use crate::security::Certs;
use crate::service::{Counted, Service};
use crate::serving::{Prompts, Serving};
use crate::spans::Spans;
use crate::state::{ClusterDir, unix_now};
use crate::text::TextModel;

/// A running coordinator.
#[derive(Debug)]
pub struct Running {
    /// The cluster's folder.
    pub dir: ClusterDir,
    /// Where clients and joining nodes connect.
    pub quic: SocketAddr,
    /// Where members connect.
    pub cluster: SocketAddr,
    /// Where the HTTP API listens.
    pub http: Option<SocketAddr>,
    /// Whether requests are served.
    pub readiness: watch::Receiver<Readiness>,
    /// Name that clients use.
    pub served_name: String,
    own_https: bool,
    public: Endpoint,
    members: Endpoint,
    server: Option<HttpServerHandle>,
    actor: Addr<Cluster>,
}

impl Running {
    /// What a client needs.
    pub fn client(&self) -> &ClientConfig {
        &self.dir.client
    }

    /// The CA's file, where HTTPS shows a certificate of the cluster's own.
    pub fn own_ca(&self) -> Option<std::path::PathBuf> {
        self.own_https.then(|| self.dir.path.join("ca.pem"))
    }

    /// Waits until requests are served for the first time.
    ///
    /// # Errors
    /// If the coordinator is shutting down.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let mut readiness = self.readiness.clone();
        readiness.wait_for(|r| r.ready).await.context("the coordinator stopped")?;
        Ok(())
    }

    /// Begins to shut down: lets HTTP answers finish, and takes what happens to nodes from now on
    /// for granted.
    pub async fn drain(&self) {
        if let Some(server) = &self.server {
            server.stop().await;
        }
        if let Err(e) = self.dir.keys.save_uses() {
            tracing::warn!("when keys were used is not written: {e}");
        }
        let _ = self.actor.send(Shutdown).await;
    }

    /// Drains, then closes the endpoints.
    pub async fn stop(self) {
        self.drain().await;
        self.public.close("the coordinator is shutting down");
        self.members.close("the coordinator is shutting down");
        tokio::join!(self.public.drain(), self.members.drain());
    }
}

/// Starts a coordinator: reads the model, binds, serves. Nodes may join as soon as it returns.
///
/// # Errors
/// If the model cannot be served, the folder cannot be used, or a port is taken.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    config.security.check(config.http)?;
    ulimits::prepare();
    let files = ModelFiles::open(&config.model)
        .with_context(|| format!("cannot serve {}", config.model.display()))?;
    let model_config = files.config.clone();
    files.check_supported_types().context("cannot serve this model")?;
    check_stages(&model_config, &config.deployment, config.stages).map_err(|e| anyhow!(e))?;
    let text = TextModel::of(&files.description).context("cannot serve this model")?;
    text.tokenizer.check_rows(model_config.vocab).context("cannot serve this model")?;
    let mut console = ConsoleProgress::new();
    let progress: &mut dyn Progress =
        if config.show_progress { &mut console } else { &mut NoProgress };
    let cache = cache_dir().ok();
    let manifest = hash_manifest(&files, &config.served_name, cache.as_deref(), progress)?;
    let manifest = Arc::new(manifest);
    let blobs = Arc::new(Blobs::open(&files.paths, &manifest)?);

    let host = config.advertised_host();
    let scheme = config.security.scheme();
    let (quic, http) = (host_port(&host, config.quic.port()), http_url(scheme, config.http));
    let mut dir = ClusterDir::open_or_init(&config.dir, &quic, &http)?;
    let own = LiveIdentity::new(&dir.identity)?;
    let certs = Certs::new(&config.security, &dir.ca, own, web_names(&config, &host))?;
    // The same in the next life, unless the certificate is renewed: then peers wait a little longer.
    let secret = &dir.identity.key_der;
    let public = tls::public_server_of(&certs.own, certs.files.as_ref())?;
    let public = Endpoint::bind_lasting(config.quic, public, secret).context("--quic")?;
    let members = tls::cluster_server_of(&certs.own, Some(Arc::clone(&dir.revoked)))?;
    let members = Endpoint::bind_lasting(config.cluster, members, secret).context("--cluster")?;
    let (quic_addr, cluster_addr) = (public.local_addr()?, members.local_addr()?);

    let spans = Spans::to(config.otlp_endpoint.as_deref(), &config.served_name)?;
    let metrics = Arc::new(Metrics::new(&config.served_name).with_spans(spans));
    let (readiness, watching) = watch::channel(Readiness::default());
    let life = begin_life(&dir.path).context("cannot count the starts of this coordinator")?;
    let (journal, entries) = Journal::open(config.journal, &dir.path, &metrics)?;
    let batcher = Batcher::new(
        Arc::clone(&text.tokenizer),
        Arc::clone(&metrics),
        config.deployment.recovery_timeout,
        (journal, manifest.content_hash, entries),
    );
    let batcher = if life > 1 { batcher.after_a_life() } else { batcher };
    let accounts = Arc::new(Accounts::default());
    let batcher = batcher.counting(|head| accounts.resumed(head.client, head.choices)).start();
    let about = Arc::new(About::new(&config));
    let card = ModelCard {
        id: config.served_name.clone(),
        created: unix_now(),
        max_model_len: config.deployment.max_model_len(&model_config),
        vocab: model_config.vocab,
        weight_bytes: manifest.weight_bytes(),
        hidden: model_config.hidden,
    };
    let deployment = Deployment { stages: config.stages, ..config.deployment };
    let cluster = Cluster::new(manifest, deployment, config.stages, batcher.clone(), readiness);
    let actor = cluster.in_life(life).telling(metrics.chronicle());
    let actor = actor.saving(&metrics, &dir.path).start();
    // What fails below drops the runtime; an actor that has not run by then would set its timers up
    // while it is dropped, where there are none. An answer proves that it runs.
    batcher.send(GetCounters).await.context("the batcher")?;
    actor.send(GetStatus).await.context("the cluster's actor")?;
    let serving = Serving {
        batcher,
        cluster: actor.clone(),
        prompts: Arc::new(Prompts { text, card, rules: config.rules }),
        metrics: Arc::clone(&metrics),
        about,
        draws: AtomicU64::new(0),
    };
    let (keys, revoked) = (Arc::clone(&dir.keys), Arc::clone(&dir.revoked));
    let invitations = Invitations::of(&dir, &host_port(&host, quic_addr.port()));
    let gate = Gate::new(Arc::new(serving), keys, revoked, accounts, invitations);
    actix_rt::spawn(keep_uses(Arc::clone(&dir.keys)));
    let service: Arc<dyn Service> = Arc::new(Counted::new(Arc::new(gate), Arc::clone(&metrics)));

    let server = match config.http {
        None => None,
        Some(bind) => {
            let mut http = HttpConfig::new(bind);
            http.allowed_hosts = config.http_hosts;
            http.tls = certs.https();
            http.public_metrics = config.security.public_metrics;
            Some(api::http::start(http, Arc::clone(&service), metrics)?)
        }
    };
    let http_addr = server.as_ref().map(|s| s.addr);
    dir.set_addresses(&host_port(&host, quic_addr.port()), &http_url(scheme, http_addr))?;
    actix_rt::spawn(certs.keep(dir.path.clone(), Arc::clone(&dir.ca)));

    actix_rt::spawn(member::accept_members(
        members.clone(),
        actor.clone(),
        blobs,
        Arc::clone(&dir.revoked),
    ));
    let desk = JoinDesk::new(Arc::clone(&dir.ca), Arc::clone(&dir.tokens), cluster_addr.port());
    let desk = desk.keeping_out(Arc::clone(&dir.revoked));
    actix_rt::spawn(accept_public(public.clone(), Arc::new(desk), service));
    Ok(Running {
        dir,
        quic: quic_addr,
        cluster: cluster_addr,
        http: http_addr,
        readiness: watching,
        served_name: config.served_name,
        own_https: config.security.https,
        public,
        members,
        server,
        actor,
    })
}

/// Hosts and addresses under which HTTPS is reached.
fn web_names(config: &Config, host: &str) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1", host].map(str::to_owned).into();
    let bound = config.http.map(|addr| addr.ip()).filter(|ip| !ip.is_unspecified());
    names.extend(bound.map(|ip| ip.to_string()));
    names.extend(
        config
            .http_hosts
            .iter()
            .map(|name| name.rsplit_once(':').map_or(name.as_str(), |(host, _)| host).to_owned()),
    );
    names.sort();
    names.dedup();
    names
}

fn http_url(scheme: &str, addr: Option<SocketAddr>) -> String {
    match addr {
        None => String::new(),
        Some(addr) if addr.ip().is_unspecified() => format!("{scheme}://127.0.0.1:{}", addr.port()),
        Some(addr) => format!("{scheme}://{addr}"),
    }
}

/// Accepts clients and joining nodes until the endpoint closes.
async fn accept_public(endpoint: Endpoint, desk: Arc<JoinDesk>, service: Arc<dyn Service>) {
    while let Some(incoming) = endpoint.accept().await {
        let (desk, service) = (Arc::clone(&desk), Arc::clone(&service));
        actix_rt::spawn(async move {
            let connection = match incoming.handshake(timing::HANDSHAKE).await {
                Ok(connection) => connection,
                Err(e) => return tracing::warn!("refused on the public endpoint: {e}"),
            };
            match connection.alpn() {
                Alpn::Join => match desk.serve(&connection, unix_now()).await {
                    Ok(Some(node)) => tracing::info!(%node, "a node enrolled"),
                    Ok(None) => {}
                    Err(e) => tracing::warn!(peer = %connection.remote_address(), "join: {e}"),
                },
                Alpn::Client => api::quic::serve_connection(connection, service).await,
                Alpn::Cluster => connection.close("members connect to the cluster endpoint"),
            }
        });
    }
}
