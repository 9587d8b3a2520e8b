//! How the binaries are told to end.

use tokio::signal::unix::{SignalKind, signal};

/// Completes at Ctrl-C or SIGTERM, each time it is awaited anew.
pub async fn terminated() {
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without the handler the default one ends the process, which serves as well.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}
