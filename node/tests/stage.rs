//! What a stage makes of frames that come again, too late, or from another life, on an edge that
//! works.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::Actor as _;
use millrace_engine::mock::{MockConfig, factory, model_config};
use millrace_engine::stage::StagePlace;
use millrace_engine::thread::{EngineHandle, Job, LoadJob};
use millrace_engine::{Isa, StageSpec};
use millrace_net::pump::pump_in;
use millrace_net::{EdgeReceiver, EdgeSender, FramePool, local_stream_pair};
use millrace_node::actors::stage::{Inbound, Loss, Stage};
use millrace_shared::id::{Epoch, MicroBatchId, NodeId, PipelineId, StageIndex};
use millrace_shared::model::Dtype;
use millrace_shared::wire::Edge;
use millrace_shared::wire::control::{Assignment, EngineSettings, Peer};
use millrace_shared::wire::data::{FrameHeader, FrameKind, MaskMeta, StepMeta};
use millrace_shared::wire::frame::Frame;
use millrace_shared::wire::stamp::Stamp;

use tokio::sync::mpsc;

const PIPELINE: PipelineId = PipelineId(3);
const EPOCH: Epoch = Epoch(7);
const CREDITS: u32 = 2;
const LAYERS: u32 = 4;
/// For what takes milliseconds, on a slow and busy machine.
const WAIT: Duration = Duration::from_secs(20);

/// A stage with the mock engine, an edge into it, and what leaves it.
struct Rig {
    edge: EdgeSender,
    kind: Edge,
    out: mpsc::Receiver<Frame>,
    losses: mpsc::Receiver<Loss>,
    stale: Arc<AtomicU64>,
    engine: Arc<EngineHandle>,
    _folder: tempfile::TempDir,
}

fn settings() -> EngineSettings {
    EngineSettings {
        kv_blocks: 8,
        kv_block_size: 16,
        kv_dtype: Dtype::F32,
        activation_dtype: Dtype::F32,
        max_batch_tokens: 64,
        max_num_seqs: 4,
        max_model_len: 128,
    }
}

/// The first of two stages, or the last.
fn assignment(last: bool) -> Assignment {
    let peer = NodeId(uuid::Uuid::nil());
    Assignment {
        pipeline: PIPELINE,
        epoch: EPOCH,
        stage: StageIndex(u16::from(last)),
        stages: 2,
        first_layer: if last { LAYERS / 2 } else { 0 },
        end_layer: if last { LAYERS } else { LAYERS / 2 },
        config: model_config(LAYERS, 300),
        tensors: Vec::new(),
        previous: last.then_some(peer),
        next: (!last).then(|| Peer { node_id: peer, address: "127.0.0.1:9".into() }),
        settings: settings(),
        content_hash: [0; 32],
        numerics_id: [0; 32],
        in_flight: 8,
        credits: CREDITS,
        host_stages: 1,
    }
}

/// The mock engine with the stage loaded.
async fn engine(assignment: &Assignment) -> Arc<EngineHandle> {
    let engine = EngineHandle::spawn("stage-test", 32, factory(MockConfig::default())).unwrap();
    let (done, loaded) = tokio::sync::oneshot::channel();
    let job = LoadJob {
        spec: StageSpec {
            config: assignment.config.clone(),
            layers: assignment.first_layer..assignment.end_layer,
            embed: assignment.previous.is_none(),
            head: assignment.next.is_none(),
            settings: settings(),
            threads: 1,
            host_threads: 1,
            isa: Isa::Scalar,
            packed_cache: None,
        },
        place: StagePlace { pipeline: PIPELINE, epoch: EPOCH, stage: assignment.stage },
        tensors: Vec::new(),
        progress: Box::new(|_| {}),
        done: Box::new(move |result| drop(done.send(result))),
    };
    engine.try_submit(Job::Load(Box::new(job))).unwrap();
    loaded.await.unwrap().unwrap();
    Arc::new(engine)
}

impl Rig {
    async fn start(kind: Edge) -> Self {
        let assignment = Arc::new(assignment(kind != Edge::Steps));
        let engine = engine(&assignment).await;
        let (into, out) = mpsc::channel(16);
        let (lose, losses) = mpsc::channel(4);
        let stale = Arc::new(AtomicU64::new(0));
        let folder = tempfile::tempdir().unwrap();
        let ring = (Arc::default(), Arc::new(millrace_node::ring::Ring::new(folder.path())));
        let stage =
            Stage::new(assignment, Arc::clone(&engine), into, lose, Arc::clone(&stale), ring);
        let stage = stage.start();
        let ((send, recv), (back, comes)) = local_stream_pair(8);
        let incoming = EdgeReceiver::new(back, comes, CREDITS, FramePool::new(4), 1 << 20);
        actix_rt::spawn(async move {
            let deliver = |frame, ticket| {
                let stage = stage.clone();
                async move { stage.send(Inbound { edge: kind, frame, ticket }).await.is_ok() }
            };
            let _ = pump_in(incoming, CREDITS, deliver).await;
        });
        let edge = EdgeSender::new(send, recv, CREDITS, None);
        Self { edge, kind, out, losses, stale, engine, _folder: folder }
    }

    /// Sends a frame without rows; a stage passes such on, or reports them, like any other.
    async fn send(&mut self, pipeline: PipelineId, epoch: Epoch, micro_batch: u64) {
        let (kind, dtype) = match self.kind {
            Edge::Steps => (FrameKind::Step, Dtype::U32),
            Edge::Activations => (FrameKind::Activations, Dtype::F32),
            Edge::Sequences | Edge::Results => (FrameKind::Masks, Dtype::U32),
        };
        let header = FrameHeader {
            kind,
            dtype,
            pipeline,
            epoch,
            micro_batch: MicroBatchId(micro_batch),
            rows: 0,
            meta_len: 0,
            payload_len: 0,
            crc: 0,
            ready: Stamp::NONE,
        };
        let frame = match kind {
            FrameKind::Masks => Frame::build(header, &MaskMeta::default(), 0),
            _ => Frame::build(header, &StepMeta::default(), 0),
        };
        let sent = tokio::time::timeout(WAIT, self.edge.send(frame.unwrap().seal())).await;
        sent.expect("its credits come back").unwrap();
    }

    async fn send_sound(&mut self, micro_batch: u64) {
        self.send(PIPELINE, EPOCH, micro_batch).await;
    }

    /// The number of the frame that leaves next.
    async fn next(&mut self) -> u64 {
        let frame = tokio::time::timeout(WAIT, self.out.recv()).await.expect("a frame");
        frame.unwrap().header().micro_batch.0
    }

    async fn loss(&mut self) -> String {
        tokio::time::timeout(WAIT, self.losses.recv()).await.expect("a loss").unwrap().0
    }
}

fn on_an_arbiter(test: impl Future<Output = ()>) {
    actix_rt::System::new().block_on(test);
}

#[test]
fn a_replayed_frame_ends_the_epoch_and_is_not_run() {
    on_an_arbiter(async {
        for kind in [Edge::Steps, Edge::Activations] {
            // The newest once more, and one that was overtaken.
            for (again, of) in [(5, 5), (4, 5)] {
                let mut rig = Rig::start(kind).await;
                rig.send_sound(2).await;
                // Numbers may leave some out: those of other epochs.
                rig.send_sound(of).await;
                assert_eq!((rig.next().await, rig.next().await), (2, of));
                assert!(rig.losses.try_recv().is_err(), "nothing was wrong so far");
                rig.send_sound(again).await;
                assert_eq!(rig.loss().await, format!("micro-batch {again} came after {of}"));
                // What comes behind it shows that the stage left it out, and did not only report it.
                rig.send_sound(6).await;
                assert_eq!(rig.next().await, 6);
                assert_eq!(rig.engine.steps(), 3);
            }
        }
    });
}

#[test]
fn frames_of_another_epoch_or_pipeline_are_dropped() {
    let (older, newer) = (Epoch(EPOCH.0 - 1), Epoch(EPOCH.0 + 1));
    let others = [(PIPELINE, older), (PIPELINE, newer), (PipelineId(PIPELINE.0 + 1), EPOCH)];
    on_an_arbiter(async {
        for kind in [Edge::Steps, Edge::Activations] {
            let mut rig = Rig::start(kind).await;
            rig.send_sound(1).await;
            // More than the edge has credits: each gives its own back.
            for number in 50..54 {
                for (pipeline, epoch) in others {
                    rig.send(pipeline, epoch, number).await;
                }
            }
            // Nor do they count in the order.
            rig.send_sound(2).await;
            assert_eq!((rig.next().await, rig.next().await), (1, 2), "{kind:?}");
            assert_eq!(rig.stale.load(Ordering::Relaxed), 12);
            assert_eq!(rig.engine.steps(), 2, "the engine never saw them");
            assert!(rig.losses.try_recv().is_err(), "they harm nothing");
        }
    });
}

#[test]
fn masks_of_another_epoch_are_dropped() {
    on_an_arbiter(async {
        let mut rig = Rig::start(Edge::Sequences).await;
        for epoch in [EPOCH.0 - 1, EPOCH.0, EPOCH.0 + 1, EPOCH.0] {
            rig.send(PIPELINE, Epoch(epoch), 0).await;
        }
        // The credits of all four are back when two more can be sent: they have been seen.
        rig.send(PIPELINE, EPOCH, 0).await;
        rig.send(PIPELINE, EPOCH, 0).await;
        assert_eq!(rig.stale.load(Ordering::Relaxed), 2);
        assert!(rig.losses.try_recv().is_err());
    });
}

#[test]
fn a_frame_on_the_wrong_edge_ends_the_epoch() {
    on_an_arbiter(async {
        let mut rig = Rig::start(Edge::Activations).await;
        rig.kind = Edge::Steps;
        rig.send_sound(1).await;
        assert_eq!(rig.loss().await, "a Step frame on the Activations edge");
        assert_eq!(rig.engine.steps(), 0);
    });
}
