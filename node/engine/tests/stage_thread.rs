//! The engine's thread: bounded, unharmed by panics, ends when told to.

mod common;

use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use millrace_engine::mock::{Fault, MockConfig, expected_tokens, factory};
use millrace_engine::stage::StageError;
use millrace_engine::thread::{CONTROL_SLOTS, EngineHandle, Job, LoadJob, SubmitError};
use millrace_engine::{LoadError, LoadedStage};
use millrace_shared::id::{Epoch, SequenceId};
use millrace_shared::model::{Dtype, TensorType};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::control::{ProfileSpec, VoidRows};
use millrace_shared::wire::data::{OpenMeta, ResultMeta, RowOutcome, Want};
use millrace_shared::wire::frame::Frame;

const WAIT: Duration = Duration::from_secs(20);
type Stepped = Result<Frame, StageError>;

fn load_job(done: impl FnOnce(Result<LoadedStage, LoadError>) + Send + 'static) -> Job {
    Job::Load(Box::new(LoadJob {
        spec: spec(0..LAYERS, true, true, Dtype::F32),
        place: place(0),
        tensors: Vec::new(),
        progress: Box::new(|_| {}),
        done: Box::new(done),
    }))
}

fn loaded(capacity: usize, mock: MockConfig) -> EngineHandle {
    let handle = EngineHandle::spawn("engine-test", capacity, factory(mock)).expect("a thread");
    let (tx, rx) = channel();
    handle.try_submit(load_job(move |r| tx.send(r).expect("waits"))).expect("empty queue");
    rx.recv_timeout(WAIT).expect("answers").expect("loads");
    open_prompt(&handle);
    handle
}

fn open_prompt(handle: &EngineHandle) {
    let (tx, rx) = channel();
    let opens = OpenMeta { opens: vec![open(0, &[1, 2, 3], SamplingParams::greedy())] };
    let done = Box::new(move |r| tx.send(r).expect("waits"));
    handle.try_submit(Job::Open { epoch: Epoch(1), opens, done }).expect("room");
    rx.recv_timeout(WAIT).expect("answers").expect("opens");
}

fn prompt_step() -> Frame {
    let mut meta = one_row(0, 0, 3, Want::Sample);
    meta.tables = blocks(0, 0, 3);
    step_frame(1, &meta, &[1, 2, 3])
}

fn step_job() -> (Job, Receiver<Stepped>) {
    let (tx, rx) = channel();
    let done = Box::new(move |result| drop(tx.send(result)));
    (Job::Step { frame: prompt_step(), done }, rx)
}

fn outcome(result: Stepped) -> RowOutcome {
    let results: ResultMeta = result.expect("a good frame").meta().expect("results");
    results.rows[0].outcome.clone()
}

fn run(handle: &EngineHandle) -> RowOutcome {
    let (job, rx) = step_job();
    handle.try_submit(job).expect("room");
    outcome(rx.recv_timeout(WAIT).expect("answers"))
}

#[test]
fn computes_and_counts() {
    let mock = MockConfig { step_latency: Duration::from_millis(5), ..MockConfig::default() };
    let handle = loaded(4, mock);
    let token = expected_tokens(&config(), &[1, 2, 3], 1)[0];
    for _ in 0..3 {
        assert_eq!(run(&handle), RowOutcome::Token { token, logprobs: None });
    }
    assert_eq!(handle.steps(), 3);
    assert!(handle.busy() >= Duration::from_millis(15));
    assert_eq!(handle.queued_steps(), 0);
}

#[test]
fn a_full_queue_gives_the_job_back_and_lets_control_in() {
    let mock = MockConfig { step_latency: Duration::from_millis(300), ..MockConfig::default() };
    let handle = loaded(2, mock);
    let mut waiting = Vec::new();
    let mut shed = 0;
    for _ in 0..8 {
        let (job, rx) = step_job();
        match handle.try_submit(job) {
            Ok(()) => waiting.push(rx),
            Err(SubmitError::Full(Job::Step { .. })) => shed += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    // One may have left the queue for the engine.
    assert!((2..=3).contains(&waiting.len()), "{} taken", waiting.len());
    assert_eq!(shed, 8 - waiting.len());
    let (tx, rx) = channel();
    handle.try_submit(load_job(move |r| drop(tx.send(r)))).expect("control has its own slots");
    for rx in waiting {
        outcome(rx.recv_timeout(WAIT).expect("what was taken is computed"));
    }
    rx.recv_timeout(WAIT).expect("answers").expect("loads");
    let mut taken = 0;
    let (block, blocked) = sync_channel::<()>(0);
    let wait = load_job(move |_| blocked.recv().unwrap_or_default());
    handle.try_submit(wait).expect("room");
    while handle.try_submit(Job::Unload).is_ok() {
        taken += 1;
        assert!(taken <= CONTROL_SLOTS + 1, "control jobs are bounded, too");
    }
    drop(block);
}

/// What is void overtakes the steps that wait.
#[test]
fn void_rows_overtake_the_queue() {
    let handle = loaded(4, MockConfig::default());
    let (begun, first) = channel();
    let (block, blocked) = sync_channel::<()>(0);
    let done = Box::new(move |result: Stepped| {
        drop(begun.send(result));
        blocked.recv().unwrap_or_default();
    });
    handle.try_submit(Job::Step { frame: prompt_step(), done }).expect("room");
    let computed = first.recv_timeout(WAIT).expect("answers");
    assert!(matches!(outcome(computed), RowOutcome::Token { .. }));
    let (job, second) = step_job();
    handle.try_submit(job).expect("room");
    handle.void(Epoch(1), &[VoidRows { sequence: SequenceId(0), epoch: 0 }]);
    drop(block);
    let frame = second.recv_timeout(WAIT).expect("answers").expect("a good frame");
    assert!(frame.meta::<ResultMeta>().expect("results").rows.is_empty());
    let deadline = Instant::now() + WAIT;
    while handle.rows_left_out() != 1 {
        assert!(Instant::now() < deadline, "counted");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn panics_are_reported_and_the_next_step_works() {
    let faults = vec![(0, Fault::Panic), (1, Fault::Fail)];
    let handle = loaded(4, MockConfig { faults, ..MockConfig::default() });
    let RowOutcome::Failed(cause) = run(&handle) else { panic!("step 0 panics") };
    assert_eq!(cause.message, "stage 0, layers 0..6: the engine panicked: fault in step 0");
    assert_eq!(cause.stage, Some(0));
    let RowOutcome::Failed(cause) = run(&handle) else { panic!("step 1 fails") };
    assert_eq!(cause.message, "stage 0, layers 0..6: fault in step 1");
    assert!(matches!(run(&handle), RowOutcome::Token { .. }));
    // A callback that panics harms nobody either.
    let done = Box::new(|_: Stepped| panic!("callback"));
    handle.try_submit(Job::Step { frame: prompt_step(), done }).expect("room");
    assert!(matches!(run(&handle), RowOutcome::Token { .. }));
}

#[test]
fn an_engine_that_cannot_be_built_fails_every_job() {
    let handle =
        EngineHandle::spawn("engine-test", 1, Box::new(|| panic!("no device"))).expect("a thread");
    let (tx, rx) = channel();
    handle.try_submit(load_job(move |r| drop(tx.send(r)))).expect("room");
    let error = rx.recv_timeout(WAIT).expect("answers").expect_err("no engine");
    assert!(error.to_string().contains("no device"), "{error}");
    let (job, rx) = step_job();
    handle.try_submit(job).expect("room");
    assert!(matches!(rx.recv_timeout(WAIT).expect("answers"), Err(StageError::Panic(_))));
}

#[test]
fn profiles_and_unloads() {
    let mock = MockConfig { layer_seconds: 0.25, ..MockConfig::default() };
    let handle = loaded(4, mock);
    let (tx, rx) = channel();
    let spec = Box::new(ProfileSpec {
        sharing: 1,
        config: config(),
        layer_type: TensorType::Q4_0,
        head_type: TensorType::F16,
    });
    let done = Box::new(move |r| drop(tx.send(r)));
    handle.try_submit(Job::Profile { spec, threads: 1, done }).expect("room");
    let profile = rx.recv_timeout(WAIT).expect("answers").expect("measures");
    assert_eq!(profile.layer_seconds, [0.25; 4]);
    handle.try_submit(Job::Unload).expect("room");
    let (job, rx) = step_job();
    handle.try_submit(job).expect("room");
    assert!(matches!(rx.recv_timeout(WAIT).expect("answers"), Err(StageError::NotLoaded)));
}

#[test]
fn drop_answers_what_waits_and_does_not_hang() {
    let mock = MockConfig { step_latency: Duration::from_millis(200), ..MockConfig::default() };
    let handle = loaded(8, mock);
    let receivers: Vec<_> = (0..8)
        .map(|_| {
            let (job, rx) = step_job();
            handle.try_submit(job).expect("room");
            rx
        })
        .collect();
    let began = Instant::now();
    drop(handle);
    assert!(began.elapsed() < Duration::from_millis(1500), "only the step at hand is waited for");
    let closed = receivers
        .iter()
        .filter(|rx| matches!(rx.try_recv().expect("answered"), Err(StageError::Closed)))
        .count();
    assert!(closed >= 6, "{closed} were refused");
}

/// The last owner may be a callback on the engine's own thread.
#[test]
fn drop_from_a_callback_does_not_deadlock() {
    let handle = Arc::new(Mutex::new(Some(loaded(4, MockConfig::default()))));
    let (tx, rx) = channel();
    let inner = Arc::clone(&handle);
    let done = Box::new(move |_: Stepped| {
        drop(inner.lock().expect("unpoisoned").take());
        tx.send(()).expect("waits");
    });
    let job = Job::Step { frame: prompt_step(), done };
    handle.lock().expect("unpoisoned").as_ref().expect("there").try_submit(job).expect("room");
    rx.recv_timeout(WAIT).expect("no deadlock");
}

/// A step that takes for ever is left behind.
#[test]
fn drop_leaves_a_stuck_step_behind() {
    let mock = MockConfig { step_latency: Duration::from_secs(6), ..MockConfig::default() };
    let handle = loaded(4, mock);
    let (job, _rx) = step_job();
    handle.try_submit(job).expect("room");
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    drop(handle);
    assert!(began.elapsed() < Duration::from_secs(4));
}
