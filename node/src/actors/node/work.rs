//! The long parts of an assignment: loading it, and connecting the edge out.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use millrace_engine::stage::StagePlace;
use millrace_engine::thread::{EngineHandle, Job, LoadJob};
use millrace_engine::{Isa, PackingReport, StageSpec};
use millrace_net::{Connection, EdgeSender, FramePool, NetError, timing};
use millrace_shared::options::EngineKind;
use millrace_shared::wire::control::{Assignment, LoadReport, Peer, WayMeasured};
use millrace_shared::wire::{Edge, node_name};
use tokio::sync::oneshot;

use super::Parts;
use crate::loader::Loader;
use crate::progress::LoadProgress;

/// Fetches the tensors, then loads the engine.
pub(super) async fn load(
    parts: Rc<Parts>,
    engine: Arc<EngineHandle>,
    assignment: Arc<Assignment>,
    connection: Connection,
) -> Result<LoadReport, String> {
    let started = Instant::now();
    let total: u64 = assignment.tensors.iter().map(|t| t.bytes).sum();
    let fetching = LoadProgress::new(parts.config.show_progress, "tensors", total);
    let loader = Loader::new(parts.config.weights.clone(), &parts.config.cache, connection);
    // The mock engine computes from its configuration alone.
    let wanted = match parts.config.engine {
        EngineKind::Mock => &[][..],
        EngineKind::Cpu | EngineKind::Torch => &assignment.tensors[..],
    };
    let (tensors, mut report) =
        loader.fetch(wanted, |done| fetching.set(done)).await.map_err(|e| e.to_string())?;
    fetching.finish(&report);
    let threads = parts.threads_among(assignment.host_stages);
    let spec = StageSpec {
        config: assignment.config.clone(),
        layers: assignment.first_layer..assignment.end_layer,
        embed: assignment.previous.is_none(),
        head: assignment.next.is_none(),
        settings: assignment.settings.clone(),
        threads,
        host_threads: threads * parts.processes_among(assignment.host_stages),
        isa: Isa::detect()?,
        packed_cache: Some(parts.config.cache.join("packed")),
    };
    let place = StagePlace {
        pipeline: assignment.pipeline,
        epoch: assignment.epoch,
        stage: assignment.stage,
    };
    let loading = LoadProgress::new(parts.config.show_progress, "weights", total);
    let (sender, receiver) = oneshot::channel();
    let job = LoadJob {
        spec,
        place,
        tensors,
        progress: Box::new(move |done| loading.set(done)),
        done: Box::new(move |result| {
            let _ = sender.send(result);
        }),
    };
    engine.try_submit(Job::Load(Box::new(job))).map_err(|e| e.to_string())?;
    let stage =
        receiver.await.map_err(|_| "the engine stopped".to_owned())?.map_err(|e| e.to_string())?;
    report.weight_bytes = stage.weight_bytes;
    report.kv_bytes = stage.kv_bytes;
    report.threads = threads as u32;
    report.seconds = started.elapsed().as_secs_f64();
    let why = parts.why_threads(assignment.host_stages);
    let weights = describe(stage.weight_bytes, &stage.packing);
    let stage = assignment.stage;
    tracing::info!("stage {stage} loaded: {weights}; {threads} compute threads ({why})");
    Ok(report)
}

/// Where the weights came from and what that took.
fn describe(bytes: u64, packing: &PackingReport) -> String {
    let PackingReport { cached_bytes, packed_bytes, mapped, seconds, saved_seconds } = *packing;
    if cached_bytes == 0 {
        return format!("{} repacked in {seconds:.2} s", HumanBytes(bytes));
    }
    let how = if mapped { "mapped" } else { "read" };
    let cached = format!(
        "{} {how} from the repacked cache in {seconds:.2} s (repacking took {saved_seconds:.2} s)",
        HumanBytes(cached_bytes)
    );
    // Small vectors are never kept.
    match packed_bytes {
        0..1_000_000 => cached,
        more => format!("{cached}, {} repacked in the same time", HumanBytes(more)),
    }
}

/// Connects to a member and lets go again, after a burst where one is asked for. A handshake's first
/// datagrams are as large as any that QUIC sends before it has found out more.
pub(super) async fn reach(
    parts: &Parts,
    peer: &Peer,
    burst: bool,
) -> Result<WayMeasured, NetError> {
    let name = node_name(peer.node_id);
    let connection =
        parts.endpoint.connect_host(&peer.address, &name, &parts.tls, timing::HANDSHAKE).await?;
    let round_trip = connection.rtt().as_secs_f64();
    let bytes_per_second = match burst {
        // An open way stays one whatever becomes of the burst.
        true => millrace_net::burst::measure(&connection).await.unwrap_or_else(|e| {
            tracing::debug!(%peer.node_id, "a way could not be measured: {e}");
            None
        }),
        false => None,
    };
    connection.close("the way is open");
    Ok(WayMeasured { round_trip, bytes_per_second })
}

pub(super) async fn edge_out(
    parts: &Parts,
    assignment: &Assignment,
    coordinator: &Connection,
    pool: FramePool,
) -> Result<EdgeSender, NetError> {
    let (pipeline, epoch) = (assignment.pipeline, assignment.epoch);
    match &assignment.next {
        None => {
            let plane = (pipeline, epoch, Edge::Results);
            let credits = assignment.credits_of(Edge::Results);
            EdgeSender::open(coordinator, plane, credits, Some(pool)).await
        }
        Some(peer) => {
            let name = node_name(peer.node_id);
            let connection = parts
                .endpoint
                .connect_host(&peer.address, &name, &parts.tls, timing::HANDSHAKE)
                .await?;
            let plane = (pipeline, epoch, Edge::Activations);
            EdgeSender::open(&connection, plane, assignment.credits, Some(pool)).await
        }
    }
}

impl Parts {
    /// What helps to find out what went wrong; nothing secret.
    pub(super) fn about(&self, lease: Duration) -> String {
        let Self { config, numerics, cores, machine, .. } = self;
        format!(
            "version {}\nname {}\nengine {}\nnumerics {numerics}\ncores {cores}\nthreads {:?}\n\
             memory {:?}\nlisten {}\nadvertise {:?}\nweights {:?}\nlease {lease:?}\n{machine}\n",
            env!("CARGO_PKG_VERSION"),
            config.name,
            config.engine.as_str(),
            config.threads,
            config.memory_bytes,
            config.listen,
            config.advertise,
            config.weights,
        )
    }
}
