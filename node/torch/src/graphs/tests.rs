//! Sizes; keys that run, are recorded and replayed, by a recorder that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use millrace_engine::model::Backend as _;
use millrace_shared::model::Dtype;
use millrace_shared::options::{Device as At, TorchDtype};
use millrace_shared::wire::control::EngineSettings;
use millrace_shared::wire::data::{Row, StepMeta, TableUpdate, Want};

use super::*;
use crate::{Place, TorchBackend};

#[test]
fn sizes_grow_in_steps() {
    for (rows, positions, expected) in [
        (1, 1, (1, 64)),
        (3, 64, (4, 64)),
        (4, 65, (4, 96)),
        (5, 97, (8, 128)),
        (64, 129, (64, 192)),
        (64, 8000, (64, 8192)),
    ] {
        let key = Key::of(rows, positions);
        assert_eq!((key.rows, key.positions), expected);
        assert_eq!(Key::of(key.rows, key.positions), key, "sizes are their own");
    }
}

/// Says that it does the work of a replay, and counts.
#[derive(Debug, Default)]
struct Counting {
    counts: Arc<[AtomicUsize; 3]>,
    refuses: bool,
}

impl Recorder for Counting {
    fn begin(&mut self) -> Result<(), String> {
        self.counts[0].fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn end(&mut self) -> Result<Box<dyn Recording>, String> {
        self.counts[1].fetch_add(1, Ordering::Relaxed);
        if self.refuses {
            return Err("not this".to_owned());
        }
        Ok(Box::new(Self { counts: Arc::clone(&self.counts), refuses: false }))
    }

    fn replays(&self) -> bool {
        true
    }

    fn copy(&mut self, to: &Tensor, from: &Tensor) -> Result<(), String> {
        Rehearsal.copy(to, from)
    }

    fn staging(&self, like: &Tensor) -> Result<Tensor, TchError> {
        Rehearsal.staging(like)
    }
}

impl Recording for Counting {
    fn replay(&mut self) -> Result<(), String> {
        self.counts[2].fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

const SETTINGS: EngineSettings = EngineSettings {
    kv_blocks: 8,
    kv_block_size: 16,
    kv_dtype: Dtype::F32,
    activation_dtype: Dtype::F32,
    max_batch_tokens: 64,
    max_num_seqs: 8,
    max_model_len: 128,
};

/// A backend of one layer, and a step of so many rows at a position.
fn stage(refuses: bool) -> (TorchBackend, Arc<[AtomicUsize; 3]>) {
    let mut b = TorchBackend::new(Place::open(At::Cpu, TorchDtype::F32).unwrap(), 1);
    b.layers = 1;
    b.geometry = Geometry { block_size: 16, nowhere: 128, windows: vec![usize::MAX], hidden: 4 };
    let recorder = Counting { refuses, ..Counting::default() };
    let counts = Arc::clone(&recorder.counts);
    b.record(Box::new(recorder));
    (b, counts)
}

/// One step as the decoder makes it: input, an operation, the looks. Returns what comes out, and
/// whether it is to run again.
fn step(b: &mut TorchBackend, rows: usize, position: u32, value: f32) -> (Vec<f32>, bool) {
    let row = |i: usize| Row {
        sequence: millrace_shared::id::SequenceId(i as u64),
        sequence_epoch: 0,
        position,
        count: 1,
        want: Want::Sample,
    };
    let table = |i: usize| TableUpdate {
        sequence: millrace_shared::id::SequenceId(i as u64),
        first: 0,
        blocks: (0..8).collect(),
    };
    let meta = StepMeta {
        rows: (0..rows).map(row).collect(),
        tables: (0..rows).map(table).collect(),
        ..StepMeta::default()
    };
    let mut tables = BlockTables::new(&SETTINGS);
    tables.apply(&meta);
    let mut batch = Batch::new(&SETTINGS);
    batch.fill(&meta, &tables).unwrap();
    let mut x = b.tensor(rows, 4, false).unwrap();
    let mut out = vec![0.0; rows * 4];
    b.begin_step();
    b.begin_graph(&batch, &tables, (&[], true));
    b.upload(&vec![value; rows * 4], &mut x);
    assert_eq!(b.settle(&mut x, Dtype::F32), None);
    b.scale(&mut x, 2.0);
    assert_eq!(b.settle(&mut x, Dtype::F32), None);
    b.download(&x, &mut out);
    let again = b.end_graph();
    assert!(b.end_step().is_none() || again);
    (out, again)
}

fn counted(counts: &[AtomicUsize; 3]) -> [usize; 3] {
    [0, 1, 2].map(|i| counts[i].load(Ordering::Relaxed))
}

#[test]
fn a_key_runs_is_recorded_and_replayed() {
    let (mut b, counts) = stage(false);
    assert_eq!(step(&mut b, 3, 5, 1.0), (vec![2.0; 12], false));
    assert_eq!(counted(&counts), [0, 0, 0]);
    // What is recorded is done by a replay; here nobody does it but the operations themselves.
    assert_eq!(step(&mut b, 3, 6, 2.0), (vec![4.0; 12], false));
    assert_eq!(counted(&counts), [1, 1, 1]);
    // From here on they do nothing: what was left then is what comes out.
    assert_eq!(step(&mut b, 3, 7, 3.0), (vec![4.0; 12], false));
    assert_eq!(step(&mut b, 4, 40, 3.0).0.len(), 16, "rows of their own, in the same sizes");
    assert_eq!(counted(&counts), [1, 1, 3]);
    // Other sizes are another key.
    assert_eq!(step(&mut b, 3, 70, 1.0), (vec![2.0; 12], false));
    assert_eq!(step(&mut b, 5, 5, 1.0), (vec![2.0; 20], false));
    assert_eq!(counted(&counts), [1, 1, 3]);
}

#[test]
fn a_step_that_cannot_be_recorded_runs_again() {
    let (mut b, counts) = stage(true);
    assert!(!step(&mut b, 1, 0, 1.0).1);
    assert!(step(&mut b, 1, 1, 1.0).1, "to run again");
    assert_eq!(counted(&counts), [1, 1, 0]);
    for _ in 0..3 {
        assert_eq!(step(&mut b, 1, 1, 1.5), (vec![3.0; 4], false));
    }
    assert_eq!(counted(&counts), [1, 1, 0], "and none after it is recorded");
}
