//! What does the service manager hear from us?
//!
//! Messages of sd_notify(3): that we serve or end, that we do not hang, and how many jobs there are. Without a service
//! manager there is no socket to send them to, and nothing is sent.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;

use super::Daemon;

/// How long after an event the status line is made: events that come together make one, and the queue, which changes
/// a moment after the event, is counted as it is then.
const SETTLE: Duration = Duration::from_millis(200);

/// Tells the service manager something.
pub fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Pings the watchdog from the one thread that does everything: when that hangs, the pings end.
pub async fn keep_watchdog_quiet() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut tick = tokio::time::interval(limit / 3);
    loop {
        tick.tick().await;
        tell(NotifyState::Watchdog);
    }
}

/// Keeps the line that `systemctl status` shows true.
pub async fn keep_status(daemon: Arc<Daemon>) {
    let mut happenings = daemon.store.happenings();
    let mut told = String::new();
    loop {
        let line = status_line(daemon.live().len(), daemon.queued().len(), daemon.is_drained());
        if line != told {
            tell(NotifyState::Status(&line));
            told = line;
        }
        if happenings.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(SETTLE).await;
    }
}

fn status_line(running: usize, waiting: usize, drained: bool) -> String {
    let drained = if drained { "; drained: nothing new starts" } else { "" };
    format!("{running} running, {waiting} waiting{drained}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_line_counts_and_says_drained() {
        assert_eq!(status_line(2, 3, false), "2 running, 3 waiting");
        assert_eq!(status_line(0, 1, true), "0 running, 1 waiting; drained: nothing new starts");
    }
}
