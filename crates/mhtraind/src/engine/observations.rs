//! What did earlier attempts on this machine show about memory, and whose word counts?
//!
//! A daemon keeps them in its store, a foreground run in a file of its user. They correct the predictions of that user
//! alone: what a trainer reports and what it holds on a card are its user's to choose, and must not keep others from theirs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mhtrain_job::diagnosis::Diagnosis;
use mhtrain_sizing::known::{Known, OBSERVATIONS_KEPT, ObservationOf};
use mhtrain_sizing::observation::{Observation, Seen, Versions};
use mhtrain_sizing::pace::Pace;
use mhtrain_sizing::plan::History;
use mhtrain_swift::environment::TrainerEnvironment;
use mhtrain_swift::showed::{self, STEPS_MIN, Showed};

use super::directory::{Lasting, write_whole};
use super::follow::Follower;

/// Returns what decides about memory in an environment.
pub fn versions(environment: &TrainerEnvironment) -> Versions {
    let version = |name: &str| environment.version(name).map(str::to_owned);
    Versions {
        torch: version("torch"),
        transformers: version("transformers"),
        ms_swift: version("ms-swift"),
        flash_attn: version("flash-attn"),
    }
}

/// Returns what an attempt that began after `from_step` showed about memory; `None` when it says nothing about what it needed.
pub fn seen(follower: &Follower, diagnosis: &Diagnosis, from_step: u64) -> Option<Seen> {
    showed::seen(&Showed {
        diagnosis,
        from_step,
        step: follower.glance(None).step,
        logged: follower.log.latest(),
        peaks: follower.telemetry.peaks(),
        device: follower.peak,
    })
}

/// Returns how fast an attempt trained; `None` when it did too few steps to say.
///
/// The companion times steps alone. The trainer's log has a mean over its whole life, evaluations and the slow first step
/// among it.
pub fn pace(follower: &Follower) -> Option<Pace> {
    let timed = follower.telemetry.times();
    let median = follower.telemetry.median_step_seconds().filter(|_| timed.steps >= STEPS_MIN);
    let logged = follower.log.latest().filter(|logged| logged.step >= STEPS_MIN);
    let (seconds_per_step, steps) = match (median, logged) {
        (Some(median), _) => (median, timed.steps),
        (None, Some(logged)) => (logged.seconds_per_step?, logged.step),
        (None, None) => return None,
    };
    let is_a_time = seconds_per_step > 0.0 && seconds_per_step.is_finite();
    is_a_time.then_some(Pace { seconds_per_step, steps, row_tokens: None })
}

/// Whoever keeps observations.
pub trait Observer: std::fmt::Debug + Send {
    /// Keeps what an attempt showed. Nothing follows on it, so it cannot fail.
    fn observe(&self, attempt: u32, observation: Observation);
}

/// What is known. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Observations(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    known: Known,
    /// By user and versions, because it is asked for at every look at the queue.
    histories: BTreeMap<(u32, String), Arc<History>>,
}

impl Observations {
    /// Returns these, oldest first.
    pub fn new(noted: Vec<ObservationOf>) -> Observations {
        let mut kept = Kept::default();
        noted.into_iter().for_each(|new| kept.known.add(new));
        Observations(Arc::new(Mutex::new(kept)))
    }

    /// Adds one.
    pub fn add(&self, new: ObservationOf) {
        let mut kept = self.kept();
        kept.known.add(new);
        kept.histories.clear();
    }

    /// Returns what corrects the predictions for a user.
    pub fn history(&self, uid: u32, versions: &Versions) -> Arc<History> {
        let mut kept = self.kept();
        let key = (uid, format!("{versions:?}"));
        if let Some(history) = kept.histories.get(&key) {
            return Arc::clone(history);
        }
        let observations = kept.known.of(uid).cloned().collect();
        let history = Arc::new(History { observations, versions: versions.clone() });
        kept.histories.insert(key, Arc::clone(&history));
        history
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file in which foreground runs of a user keep what they saw, an observation a line.
#[derive(Clone, Debug)]
pub struct ObservationFile(PathBuf);

impl ObservationFile {
    /// Returns the user's file; `None` without a home.
    pub fn of_this_user() -> Option<ObservationFile> {
        crate::config::state_home().map(|home| ObservationFile(home.join("observations.jsonl")))
    }

    /// Returns what is in it. A line that cannot be read says nothing, and neither does a missing file.
    pub fn read(&self) -> Observations {
        let owner_uid = rustix::process::geteuid().as_raw();
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        Observations::new(lines.map(|observation| ObservationOf { owner_uid, observation }).collect())
    }

    fn append(&self, observation: &Observation) -> std::io::Result<()> {
        if let Some(parent) = self.0.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut line = serde_json::to_vec(observation)?;
        line.push(b'\n');
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&self.0);
        // In one write: another run may append at the same time.
        file?.write_all(&line)?;
        self.forget_the_oldest()
    }

    /// Keeps the newest when there are twice as many as are wanted.
    fn forget_the_oldest(&self) -> std::io::Result<()> {
        let text = fs::read_to_string(&self.0)?;
        let lines: Vec<&str> = text.lines().collect();
        let wanted = OBSERVATIONS_KEPT as usize;
        if lines.len() < 2 * wanted {
            return Ok(());
        }
        let kept: String = lines[lines.len() - wanted..].iter().map(|line| format!("{line}\n")).collect();
        write_whole(&self.0, kept.as_bytes(), Lasting::UntilPowerCut)
    }
}

impl Observer for ObservationFile {
    fn observe(&self, _: u32, observation: Observation) {
        if let Err(error) = self.append(&observation) {
            tracing::debug!(%error, path = %self.0.display(), "an observation is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mhtrain_sizing::observation::Fingerprint;
    use mhtrain_sizing::reserve::Group;
    use mhtrain_sizing::units::Bytes;
    use mhtrain_sizing::workload::TrainType;

    fn noted(owner_uid: u32, seen: Seen) -> ObservationOf {
        let fingerprint = Fingerprint {
            model: "m".to_owned(),
            family: "qwen2".to_owned(),
            method: TrainType::Lora,
            group: Group::Equal,
            versions: Versions::default(),
            card: "c".to_owned(),
        };
        let predicted = Bytes::from_gib(10);
        ObservationOf {
            owner_uid,
            observation: Observation {
                name: format!("of {owner_uid}"),
                fingerprint,
                tier: None,
                predicted,
                sized_row: None,
                seen,
                pace: None,
            },
        }
    }

    #[test]
    fn what_others_ran_changes_nothing_for_a_user() {
        let gib = |n| Some(Bytes::from_gib(n));
        let peak = Seen::Peak { allocated: gib(10), reserved: gib(40), device: gib(12) };
        let observations =
            Observations::new(vec![noted(1, peak), noted(1, Seen::MoreThan { limit: Bytes::from_gib(50) })]);
        assert_eq!(observations.history(1, &Versions::default()).observations.len(), 2);
        assert_eq!(observations.history(2, &Versions::default()).observations.len(), 0);
        // A new one is in the next answer.
        observations.add(noted(2, Seen::MoreThan { limit: Bytes::from_gib(20) }));
        assert_eq!(observations.history(2, &Versions::default()).observations.len(), 1);
    }

    #[test]
    fn a_file_keeps_the_newest_and_skips_what_it_cannot_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = ObservationFile(dir.path().join("below/observations.jsonl"));
        let one = noted(0, Seen::MoreThan { limit: Bytes::from_gib(20) }).observation;
        file.observe(1, one.clone());
        assert_eq!(file.read().kept().known.all().len(), 1);
        let wanted = OBSERVATIONS_KEPT as usize;
        let of_model = |n: usize| {
            let mut other = one.clone();
            other.fingerprint.model = format!("model-{n}");
            format!("{}\n", serde_json::to_string(&other).unwrap())
        };
        let many: String = (0..2 * wanted).map(of_model).collect();
        fs::write(&file.0, format!("not JSON\n{many}")).unwrap();
        file.observe(1, one);
        assert_eq!(file.read().kept().known.all().len(), wanted);
    }
}
