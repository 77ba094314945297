//! What does a recorder do? (`mhtrain-supervisor`, played)
//!
//! It writes down who its trainer is before that may begin, and how it ended. One that took over from a dead one knows the
//! end but not the status.

use crate::disk::{AttemptId, Ended};
use crate::trainer::Trainer;
use crate::world::World;

/// Seconds between SIGTERM and SIGKILL.
const GRACE_S: u64 = 30;

/// A recorder that lives.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    /// Whether it is to start a trainer that it has not started yet.
    at_the_gate: bool,
    /// Whether the trainer is its child.
    is_parent: bool,
    /// What it saw of the end.
    seen: Option<(Ended, Option<bool>)>,
    /// When it kills a trainer that it asked to end.
    pub(crate) kill_at: Option<u64>,
}

impl Recorder {
    /// Returns one that is to start a trainer.
    pub(crate) fn new() -> Recorder {
        Recorder { at_the_gate: true, is_parent: true, seen: None, kill_at: None }
    }

    /// Returns one that takes over.
    pub(crate) fn adopting() -> Recorder {
        Recorder { at_the_gate: false, is_parent: false, ..Recorder::new() }
    }

    /// Lets it see that its trainer ended.
    pub(crate) fn saw(&mut self, ended: Ended, oom_kill: Option<bool>) {
        if self.is_parent {
            self.seen = Some((ended, oom_kill));
        }
    }

    pub(crate) fn is_ready(&self, id: AttemptId, world: &World<'_>) -> bool {
        let files = world.disk.attempts.get(&id);
        let gone = files.and_then(|files| files.trainer.as_ref()).is_none_or(|trainer| !world.lives(trainer));
        let asked = files.is_some_and(|files| files.stop) && self.kill_at.is_none();
        self.at_the_gate || gone || asked || self.kill_at.is_some_and(|at| at <= world.now)
    }
}

impl World<'_> {
    /// Lets a recorder do its next thing.
    pub(crate) fn record(&mut self, id: AttemptId) {
        let (Some(mut recorder), Some(files)) = (self.recorders.remove(&id), self.disk.attempts.get(&id))
        else {
            return;
        };
        let known = files.trainer.clone();
        if recorder.at_the_gate {
            if files.abandoned {
                self.tell(|| format!("recorder of {id:?}: it was given up before it began"));
                return;
            }
            let launch = files.launch.clone();
            let identity = self.new_process();
            let trainer = Trainer::new(identity.clone(), &launch, self.script);
            self.tell(|| format!("recorder of {id:?}: the trainer is pid {}, {}", identity.pid, launch.tier));
            if let Some(files) = self.disk.attempts.get_mut(&id) {
                files.trainer = Some(identity);
            }
            self.truth.began(id);
            self.trainers.insert(id, trainer);
            recorder.at_the_gate = false;
        } else if known.as_ref().is_none_or(|trainer| !self.lives(trainer)) {
            let exit = recorder.seen.unwrap_or((Ended::StatusLost, None));
            self.tell(|| format!("recorder of {id:?}: it ended, {exit:?}"));
            if let Some(files) = self.disk.attempts.get_mut(&id) {
                files.exit = Some(exit);
            }
            return;
        } else if let Some(at) = recorder.kill_at {
            if at <= self.now && self.trainers.contains_key(&id) {
                self.tell(|| format!("recorder of {id:?}: it does not end by itself and is killed"));
                self.recorders.insert(id, recorder);
                self.trainer_ends(id, Ended::Signal(9), false);
                return;
            }
        } else {
            recorder.kill_at = Some(self.now + GRACE_S);
            if let Some(trainer) = self.trainers.get_mut(&id) {
                trainer.asked_to_end = true;
            }
        }
        self.recorders.insert(id, recorder);
    }

    /// Ends everything of an attempt, as `kill_everything` does.
    pub(crate) fn end_attempt(&mut self, id: AttemptId) {
        self.recorders.remove(&id);
        self.trainer_ends(id, Ended::Signal(9), false);
    }
}
