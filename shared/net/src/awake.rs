//! Keeps idle processors from sleeping deeply while frames pass.
//!
//! A frame wakes three threads on its way from one engine to the next. Where an idle processor has
//! halted, each of these wake-ups costs tens of microseconds (in virtual machines, and from deep
//! sleep states of real ones), which is most of what a hop takes. Linux has an interface for programs
//! that know better than its governor: a latency written to `/dev/cpu_dma_latency` holds for all
//! processors for as long as the file is open (`Documentation/power/pm_qos_interface.rst`). An
//! [`Awake`] holds it from a frame until a second after the last one, so that an idle node saves
//! power as before. Nothing but speed depends on it: where the file cannot be opened, a line in the
//! log says so once.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use millrace_shared::options::WakeLatency;
use tokio::time::Instant;

/// Held for so long after the last frame.
const REST: Duration = Duration::from_secs(1);
/// Where Linux takes requests.
const DEVICE: &str = "/dev/cpu_dma_latency";
/// What puts idle processors to sleep.
const IDLE_DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
/// Allows a halted processor (2 to 10 microseconds away), and no deeper sleep.
const SHALLOW_MICROS: i32 = 10;
/// No request.
const NONE: i32 = -1;
/// Not decided yet: the machine is asked at the first frame.
const UNDECIDED: i32 = -2;

static LATENCY: AtomicI32 = AtomicI32::new(UNDECIDED);

/// Sets what this process asks for; edges that are open follow with their next request.
pub fn set(latency: WakeLatency) {
    let micros = match latency {
        WakeLatency::Auto => UNDECIDED,
        WakeLatency::Off => NONE,
        WakeLatency::Micros(micros) => i32::try_from(micros).unwrap_or(i32::MAX),
    };
    LATENCY.store(micros, Ordering::Relaxed);
}

/// Microseconds to ask for, or [`NONE`].
fn latency() -> i32 {
    match LATENCY.load(Ordering::Relaxed) {
        UNDECIDED => {
            let micros = automatic(Path::new(IDLE_DRIVER));
            LATENCY.store(micros, Ordering::Relaxed);
            micros
        }
        micros => micros,
    }
}

/// A guest's processor that halts goes back to the host, however short the sleep is said to be: it
/// must not halt at all. A real one may.
fn automatic(driver: &Path) -> i32 {
    match std::fs::read_to_string(driver).as_deref().map(str::trim) {
        Ok("haltpoll") => 0,
        Ok("none") | Err(_) => NONE,
        Ok(_) => SHALLOW_MICROS,
    }
}

/// One edge's request. See the module's documentation.
#[derive(Debug)]
pub struct Awake {
    device: PathBuf,
    held: Option<File>,
    last: Instant,
    /// It cannot be opened: not tried again.
    refused: bool,
}

impl Default for Awake {
    fn default() -> Self {
        Self::at(DEVICE.into())
    }
}

impl Awake {
    fn at(device: PathBuf) -> Self {
        Self { device, held: None, last: Instant::now(), refused: false }
    }

    /// A frame passes.
    pub fn touch(&mut self) {
        self.last = Instant::now();
        if self.held.is_none() && !self.refused {
            self.hold(latency());
        }
    }

    fn hold(&mut self, micros: i32) {
        if micros < 0 {
            return;
        }
        let request = |device: &Path| -> std::io::Result<File> {
            let mut file = OpenOptions::new().write(true).open(device)?;
            file.write_all(&micros.to_ne_bytes())?;
            Ok(file)
        };
        match request(&self.device) {
            Ok(file) => self.held = Some(file),
            Err(e) => {
                self.refused = true;
                static SAID: Once = Once::new();
                SAID.call_once(|| {
                    tracing::info!(
                        "processors may sleep between micro-batches, which makes hops slower: {}: \
                         {e}. Let this user write to it (a udev rule, or the service unit in \
                         deploy/systemd), or say --wake-latency off",
                        self.device.display()
                    );
                });
            }
        }
    }

    /// Completes when it has let go of its request, a second after the last frame; never where it
    /// holds none. Cancel-safe.
    pub async fn rest(&mut self) {
        if self.held.is_none() {
            return std::future::pending().await;
        }
        tokio::time::sleep_until(self.last + REST).await;
        self.held = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_request_lasts_as_long_as_frames_pass() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut awake = Awake::at(file.path().to_owned());
        assert!(tokio::time::timeout(10 * REST, awake.rest()).await.is_err(), "nothing to give up");
        awake.hold(7);
        for _ in 0..3 {
            awake.touch();
            assert!(tokio::time::timeout(REST / 2, awake.rest()).await.is_err());
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), 7_i32.to_ne_bytes());
        assert!(awake.held.is_some());
        assert!(tokio::time::timeout(REST, awake.rest()).await.is_ok());
        assert!(awake.held.is_none());
    }

    #[tokio::test]
    async fn without_permission_or_wish_nothing_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let mut awake = Awake::at(folder.path().join("missing"));
        awake.hold(0);
        assert!(awake.held.is_none() && awake.refused);
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut awake = Awake::at(file.path().to_owned());
        awake.hold(NONE);
        assert!(awake.held.is_none() && !awake.refused);
    }

    #[test]
    fn guests_do_not_halt_and_real_processors_may() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |driver: &str| {
            std::fs::write(file.path(), driver).unwrap();
            automatic(file.path())
        };
        assert_eq!((of("haltpoll\n"), of("none\n")), (0, NONE));
        assert_eq!((of("intel_idle\n"), of("acpi_idle\n")), (SHALLOW_MICROS, SHALLOW_MICROS));
        assert_eq!(automatic(Path::new("/no/such/file")), NONE);
    }
}
