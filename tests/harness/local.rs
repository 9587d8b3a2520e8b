//! A whole cluster inside the test's process, on a thread of its own.

use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use millrace_cli::embedded::{EmbeddedCluster, EmbeddedOptions};
use millrace_coordinator::journal::JournalConfig;
use millrace_coordinator::security::Security;
use millrace_coordinator::text::rules::TextRules;
use millrace_net::client::ClientConfig;
use millrace_shared::model::Dtype;
use millrace_shared::options::{EngineKind, EngineOptions, MicroBatches};
use tokio::sync::oneshot;

use crate::{DEADLINE, model};

/// What may differ without changing a token, and by what is computed.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes in the pipeline.
    pub stages: u32,
    /// Compute threads of each.
    pub threads: usize,
    /// Prompt tokens of a request in one micro-batch.
    pub prefill_chunk: u32,
    /// Micro-batches in flight.
    pub micro_batches: MicroBatches,
    /// Positions of KV cache.
    pub kv_cache_tokens: u32,
    /// What computes.
    pub engine: EngineKind,
    /// What keys and values are kept as.
    pub kv_cache_dtype: Dtype,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            stages: 1,
            threads: 1,
            prefill_chunk: 64,
            micro_batches: MicroBatches::Auto,
            kv_cache_tokens: 8192,
            engine: EngineKind::Cpu,
            kv_cache_dtype: Dtype::F16,
        }
    }
}

/// A running cluster; dropping it stops it.
#[derive(Debug)]
pub struct Local {
    config: ClientConfig,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Local {
    /// Starts a cluster with the real model and waits until it serves.
    ///
    /// # Panics
    /// If it does not.
    pub fn start(shape: Shape) -> Self {
        Self::serve(model(), shape)
    }

    /// Starts a cluster with this model and waits until it serves.
    ///
    /// # Panics
    /// If it does not.
    pub fn serve(model: &Path, shape: Shape) -> Self {
        let options = options(model, shape);
        let (started, starting) = mpsc::channel();
        let (stop, stopping) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            actix_rt::System::new().block_on(async {
                let cluster = Box::pin(EmbeddedCluster::start(options, |_| {})).await;
                match cluster {
                    Err(e) => {
                        let _ = started.send(Err(e));
                    }
                    Ok(cluster) => {
                        let _ = started.send(Ok(cluster.client_config().clone()));
                        let _ = stopping.await;
                        cluster.stop().await;
                    }
                }
            });
        });
        let config = starting
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|e| panic!("no cluster of {shape:?}: {e}"))
            .unwrap_or_else(|e| panic!("no cluster of {shape:?}: {e:#}"));
        Self { config, stop: Some(stop), thread: Some(thread) }
    }

    /// What a client needs.
    pub fn client(&self) -> &ClientConfig {
        &self.config
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn options(model: &Path, shape: Shape) -> EmbeddedOptions {
    EmbeddedOptions {
        model: model.to_owned(),
        model_name: "model".to_owned(),
        stages: shape.stages,
        engine: EngineOptions {
            threads: Some(shape.threads),
            prefill_chunk: shape.prefill_chunk,
            micro_batches: shape.micro_batches,
            engine: shape.engine,
            kv_cache_dtype: shape.kv_cache_dtype,
            ..EngineOptions::default()
        },
        dir: None,
        quic: None,
        http: None,
        http_hosts: Vec::new(),
        security: Security::default(),
        max_model_len: Some(2048),
        max_num_seqs: 16,
        kv_cache_tokens: Some(shape.kv_cache_tokens),
        journal: JournalConfig::default(),
        rules: TextRules::default(),
        otlp_endpoint: None,
    }
}
