//! Is the memory that an attempt needs free yet?
//!
//! A driver gives memory back up to seconds after a process died, so what is held right after a death is ours for a
//! while; only what is still held after a bounded wait belongs to somebody else.

use std::time::{Duration, Instant};

use mhtrain_probe::nvml::Gpus;
use mhtrain_sizing::units::Bytes;

use super::screen::Screen;
use super::signals::{StopCause, StopSignals};

/// How often NVML is asked while a dead attempt's memory comes back.
const RETURN_LOOK: Duration = Duration::from_millis(250);

/// How long the free memory must stand still, while less is free than was, until nothing more is waited for: a neighbour has
/// grown.
const REST: Duration = Duration::from_secs(1);

/// How often NVML is asked while a neighbour holds what is needed.
const NEIGHBOUR_LOOK: Duration = Duration::from_secs(1);

/// How often the wait for a neighbour says that it still waits.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Utilization up to which a card counts as idle: a display or a monitoring agent.
const IDLE_PERCENT: u32 = 3;

/// One card, watched.
#[derive(Debug)]
pub struct WatchedCard {
    gpus: Gpus,
    uuid: Option<String>,
}

/// How a wait ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Waited {
    /// What was waited for is there.
    Free,
    /// The time is up; so much was free at the end, where that can be read.
    TimeUp(Option<Bytes>),
    /// Somebody asked us to stop.
    Stopped(StopCause),
}

impl WatchedCard {
    /// Returns the card with this UUID; without one nothing can be read, and waits for memory end at once.
    pub fn new(gpus: Gpus, uuid: Option<String>) -> WatchedCard {
        WatchedCard { gpus, uuid }
    }

    /// Returns what is free, or `None` where it cannot be read now.
    pub fn free(&self) -> Option<Bytes> {
        Some(self.gpus.memory(self.uuid.as_deref()?).ok()?.free)
    }

    /// Returns what all processes hold, or `None` where it cannot be read now.
    pub fn used(&self) -> Option<Bytes> {
        Some(self.gpus.memory(self.uuid.as_deref()?).ok()?.used)
    }

    /// Returns what these processes hold.
    pub fn used_by(&self, pids: &[u32]) -> Option<Bytes> {
        self.gpus.used_by(self.uuid.as_deref()?, pids).ok().flatten()
    }

    /// Returns whether the card computes, for whomever; `None` where it cannot be read.
    pub fn is_busy(&self) -> Option<bool> {
        Some(self.gpus.utilization(self.uuid.as_deref()?).ok()? > IDLE_PERCENT)
    }

    /// Returns the card's index now; it can change when another card is lost.
    pub fn index(&self) -> Option<u32> {
        self.gpus.index_of(self.uuid.as_deref()?).ok()
    }

    /// Returns who holds memory there, for people: `pid 4121 holds 6.00 GiB`.
    pub fn holders(&self) -> Vec<String> {
        let Some(uuid) = self.uuid.clone() else { return Vec::new() };
        let report = self.gpus.report();
        let device = report.devices().iter().find(|device| device.uuid.as_ref() == Some(&uuid));
        let processes = device.and_then(|device| device.processes.as_deref()).unwrap_or_default();
        processes
            .iter()
            .map(|process| {
                let owner = process.owner.as_ref().map_or(String::new(), |owner| format!(" of {owner}"));
                let amount = process.used.map_or("some memory".to_owned(), |used| used.to_string());
                format!("pid {}{owner} holds {amount}", process.pid)
            })
            .collect()
    }

    /// Returns whether none of `pids` is listed and as much is free as `was` before them.
    pub fn is_back(&self, pids: &[u32], was: Bytes) -> bool {
        let still_ours = || self.used_by(pids).is_some_and(|used| used > Bytes::ZERO);
        pids.is_empty() || (!still_ours() && self.free().is_some_and(|free| free >= was))
    }

    /// Waits until none of `pids` is listed and as much is free as `was` before them, or the free memory has come to rest; at
    /// most `limit`.
    pub async fn wait_for_return(
        &self,
        pids: &[u32],
        was: Bytes,
        limit: Duration,
        signals: &mut StopSignals,
    ) -> Waited {
        let until = Instant::now() + limit;
        let (mut before, mut since) = (None, Instant::now());
        loop {
            let free = self.free();
            let still_ours = self.used_by(pids).is_some_and(|used| used > Bytes::ZERO);
            if free != before {
                (before, since) = (free, Instant::now());
            }
            let is_back = free.is_none_or(|free| free >= was) || since.elapsed() >= REST;
            if !still_ours && is_back {
                return Waited::Free;
            }
            if Instant::now() >= until {
                return Waited::TimeUp(free);
            }
            tokio::select! {
                cause = signals.next() => return Waited::Stopped(cause),
                () = tokio::time::sleep(RETURN_LOOK) => {}
            }
        }
    }

    /// Waits until `need` is free, at most `limit`, and says who holds it.
    pub async fn wait_for(
        &self,
        need: Bytes,
        limit: Duration,
        signals: &mut StopSignals,
        screen: &Screen,
    ) -> Waited {
        let until = Instant::now() + limit;
        let mut said: Option<Instant> = None;
        loop {
            let free = self.free();
            if free.is_none_or(|free| free >= need) {
                return Waited::Free;
            }
            if Instant::now() >= until {
                return Waited::TimeUp(free);
            }
            if said.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
                let free = free.map_or("an unknown amount is".to_owned(), |free| format!("{free} are"));
                let holders = self.holders().join(", ");
                let holders = if holders.is_empty() { String::new() } else { format!(" ({holders})") };
                screen.say(format!("waiting for memory: {need} are needed, {free} free{holders}"));
                said = Some(Instant::now());
            }
            tokio::select! {
                cause = signals.next() => return Waited::Stopped(cause),
                () = tokio::time::sleep(NEIGHBOUR_LOOK) => {}
            }
        }
    }
}

/// Waits some time, or until somebody asks us to stop.
pub async fn pause(time: Duration, signals: &mut StopSignals) -> Waited {
    tokio::select! {
        cause = signals.next() => Waited::Stopped(cause),
        () = tokio::time::sleep(time) => Waited::Free,
    }
}
