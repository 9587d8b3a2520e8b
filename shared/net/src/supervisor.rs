//! What systemd (`Type=notify`) hears of a program: that it is ready, what it does, that it stops, and
//! that its main loop still turns. Under another supervisor, or none, all of this does nothing.
//!
//! "Ready" means that ports are bound and the others may come, not that a model is served: that needs
//! other machines, and `/ready` says it.

use std::time::Duration;

use sd_notify::{NotifyState, notify};

/// How systemd is found. A process that is not the unit's own is started without these.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Ports are bound.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// What the program does now, as `systemctl status` shows it.
pub fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

/// The program was told to end.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Tells the watchdog of the unit (`WatchdogSec=`) that the loop it runs on still turns; returns at
/// once where there is none.
pub async fn keep_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else {
        return;
    };
    let mut turns = tokio::time::interval((limit / 3).max(Duration::from_millis(10)));
    loop {
        turns.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(e) = notify(states) {
        tracing::debug!("systemd does not listen: {e}");
    }
}
