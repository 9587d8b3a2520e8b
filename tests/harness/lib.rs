//! What the whole-cluster tests share: the model, fixtures, clusters in this process and as
//! processes, clients.
//!
//! No test sleeps where it can wait for something, every wait has a deadline, every cluster has a
//! folder and ports of its own.

pub mod ask;
pub mod chaos;
pub mod collector;
pub mod fixtures;
pub mod frames;
pub mod fuzz;
pub mod hostile;
pub mod http;
pub mod local;
pub mod mocked;
pub mod processes;
pub mod relay;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use millrace_coordinator::models::{NoProgress, resolve};

/// For anything that a healthy cluster does in seconds, on a slow and busy machine.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// The catalogue name of the model under test.
const MODEL: &str = "smollm2:135m";

/// The real model: `$MILLRACE_TEST_MODEL`, else from the cache, fetched if it is not there.
///
/// # Panics
/// If there is none; the tests prove nothing without it.
pub fn model() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let given = std::env::var("MILLRACE_TEST_MODEL").ok().filter(|v| !v.is_empty());
        let name = given.unwrap_or_else(|| MODEL.to_owned());
        let found = resolve(&name, &mut NoProgress).map(|path| path.canonicalize().unwrap_or(path));
        found.unwrap_or_else(|e| {
            panic!(
                "these tests run a real model and there is none: {e}\n\
                 Fetch it where a network is ('millrace pull {MODEL}' prints its path), and set \
                 MILLRACE_TEST_MODEL to the file."
            )
        })
    })
}

/// The model's path as an argument; absolute.
pub fn model_arg() -> &'static str {
    model().to_str().expect("the model's path is UTF-8")
}

/// A program of this workspace: Cargo puts it beside the tests' folder.
///
/// # Panics
/// If it has not been built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} has not been built: run 'cargo build' or test the whole workspace",
        path.display()
    );
    path
}

/// One cluster at a time: tests of one file run in threads, and each wants the whole machine.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a future on this thread, within [`DEADLINE`].
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(soon(work))
}

/// Fails the test, instead of hanging it, when something never comes.
pub async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("an answer within the deadline")
}

/// Looks again and again until `look` finds something; `what` names it in the failure.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "no {what} within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
