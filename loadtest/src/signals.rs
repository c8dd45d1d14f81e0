//! SIGINT and SIGTERM, as a token that is cancelled.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// At the first signal everything is to be ended in order; at the second the process ends at once, and the guard cleans up.
pub async fn cancel(interrupted: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return; // then they end the process at once, as they do by default
    };
    for is_last in [false, true] {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if is_last {
            std::process::exit(3);
        }
        interrupted.cancel();
    }
}
