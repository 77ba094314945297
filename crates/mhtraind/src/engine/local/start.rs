//! How is an attempt started: with which checkpoint, command and environment, and what if the disk takes no record of it?

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mhtrain_failpoint::reach;
use mhtrain_job::diagnosis::{Diagnosis, Kind};
use mhtrain_job::event::{AttemptStart, Exit, JobEvent, Resume, ResumeKind};
use mhtrain_job::receipt::AttemptNote;
use mhtrain_job::rerun::{Adjustment, ResumeWish, Wait};
use mhtrain_job::take_over::unreadable_steps;
use mhtrain_sizing::tier::Tier;
use mhtrain_supervisor::attempt::{Attempt, LaunchSpec};
use mhtrain_supervisor::log_tail::LogTail;
use mhtrain_supervisor::record::Extent;
use mhtrain_swift::beginning::{self, Saved, Wanted, begin};
use mhtrain_swift::command::{AttemptFlags, TrainerStart, exact_command};
use mhtrain_swift::progress::TrainerLog;
use mhtrain_swift::proof;

use super::watch::until;
use super::{DEVICE_GIVEN_BACK, Job, Next, OldAttempt, Step};
use crate::engine::follow::Follower;
use crate::engine::journal::now;
use crate::engine::memory::{Waited, pause};
use crate::engine::prepare::chain;
use crate::engine::resume::{checkpoints_in, repaired_view};
use crate::engine::secrets;
use crate::engine::signals::StopCause;
use crate::failure::{Failure, Status, unreadable, unwritable};

/// How often is tried whether the disk takes the record of an attempt now; twice as seldom after each that it refused all the
/// same, down to a 32nd.
const DISK_LOOK: Duration = Duration::from_secs(2);

/// How often in a row the disk may refuse the record of an attempt after it took a trial.
const REFUSED_MAX: u32 = 10;

/// What a trial writes: many times the files of a record before its trainer runs.
const TRIAL_BYTES: usize = 256 << 10;

/// Why an attempt did not come up.
#[derive(Debug)]
enum Unlaunched {
    /// Somebody killed its recorder: another attempt can be made.
    Killed(String),
    /// The disk does not take its record now.
    Unwritable(Failure),
    /// It cannot be started.
    Failed(Failure),
}

impl From<Failure> for Unlaunched {
    fn from(failure: Failure) -> Unlaunched {
        Unlaunched::Failed(failure)
    }
}

/// From where an attempt goes on, and the checkpoint that its trainer is shown.
type Beginning = (Option<Resume>, Option<PathBuf>);

impl Job<'_> {
    /// Starts an attempt; returns a step instead when that ends the job.
    pub(super) fn launch(&mut self, next: &Next) -> Result<Result<(AttemptStart, Attempt), Step>, Failure> {
        if !self.screen.has_device() {
            // Somebody took the checkpoint away by which success was proven, before that could be written down.
            let what =
                "what proved the job's success is not there any more, and others may have its device by now";
            let help = "`mhtraind retry` goes on from the last checkpoint".to_owned();
            return Err(Failure::failed(DEVICE_GIVEN_BACK, what).help(help));
        }
        let number = self.receipt.attempts.len() as u64 + 1;
        let number = u32::try_from(number).expect("attempts are bounded by the policy");
        let tier = self.prepared.plan.rungs[next.rung].tier.clone();
        let (resume, checkpoint) = match self.choose_resume(next, &tier)? {
            Ok(chosen) => chosen,
            Err(step) => return Ok(Err(step)),
        };
        let start = AttemptStart {
            attempt: number,
            rung: next.rung,
            tier,
            resume,
            adjustments: next.adjustments.clone(),
        };
        self.announce(&start);
        self.journal.record(JobEvent::AttemptStarting(start.clone()))?;
        self.receipt.attempts.push(AttemptNote::begun(&start, now()));
        match self.spawn(&start, checkpoint) {
            Ok(attempt) => Ok(Ok((start, attempt))),
            Err(Unlaunched::Killed(why)) => {
                let diagnosis = self.never_ran(number, &why)?;
                self.answer(&diagnosis, None).map(Err)
            }
            // Whoever starts a job by hand is told at once.
            Err(Unlaunched::Unwritable(failure)) if self.receipt.id.is_some() || number > 1 => {
                self.never_ran(number, &failure.message)?;
                Ok(Err(Step::WaitForDisk(next.clone(), failure)))
            }
            Err(Unlaunched::Unwritable(failure) | Unlaunched::Failed(failure)) => {
                let exit = Exit::SpawnFailed { error: failure.message.clone() };
                let diagnosis = Diagnosis { kind: Kind::Unknown, certain: true, ..Diagnosis::interrupted() };
                self.note_end(&exit, &diagnosis, None);
                self.journal.record(JobEvent::AttemptEnded {
                    attempt: number,
                    exit,
                    diagnosis: Box::new(diagnosis),
                    last_step: None,
                })?;
                self.failed(failure.message, failure.help).map(Err)
            }
        }
    }

    /// Writes down that an attempt ended before there was a trainer.
    fn never_ran(&mut self, number: u32, why: &str) -> Result<Diagnosis, Failure> {
        self.screen.say(format!("attempt {number} was interrupted: {why}"));
        let mut diagnosis = Diagnosis::interrupted();
        why.clone_into(&mut diagnosis.evidence.line);
        self.note_end(&Exit::Lost, &diagnosis, None);
        self.journal.record(JobEvent::AttemptEnded {
            attempt: number,
            exit: Exit::Lost,
            diagnosis: Box::new(diagnosis.clone()),
            last_step: None,
        })?;
        Ok(diagnosis)
    }

    /// Waits until the disk takes the record of an attempt, and starts one then.
    pub(super) async fn wait_for_disk(&mut self, next: Next, failure: Failure) -> Result<Step, Failure> {
        self.set_deadline();
        self.refused += 1;
        if self.refused > REFUSED_MAX {
            return self.failed(failure.message, failure.help);
        }
        let error = &failure.message;
        let job = self.receipt.id;
        tracing::error!(job, error, "the next attempt waits until its record can be written");
        let help = failure.help.map_or(String::new(), |help| format!("; {help}"));
        self.waiting(format!("its record cannot be written: {error}{help}"))?;
        let rest = DISK_LOOK * (1 << (self.refused - 1).min(5));
        let number = u32::try_from(self.receipt.attempts.len() + 1).unwrap_or(u32::MAX);
        let record = self.directory.record(number);
        loop {
            let waited = tokio::select! {
                waited = pause(rest, &mut self.signals) => waited,
                () = until(self.deadline) => Waited::Stopped(StopCause::TimeLimit),
            };
            if let Waited::Stopped(cause) = waited {
                return self.cancelled(cause);
            }
            if can_be_written(&record) {
                return Ok(Step::Start(Next { wait: Wait::None, ..next }));
            }
        }
    }

    fn announce(&self, start: &AttemptStart) {
        let from = match &start.resume {
            None => String::new(),
            Some(Resume { kind: ResumeKind::Restart, .. }) => ", from the beginning".to_owned(),
            Some(Resume { kind: ResumeKind::Exact, from_step, steps_repeated, .. }) => {
                let again = match steps_repeated {
                    0 => String::new(),
                    n => format!("; {n} unsaved steps are trained again"),
                };
                format!(
                    ", resumed at step {from_step}: the next row is the one that would have followed{again}"
                )
            }
            Some(Resume { kind: ResumeKind::WeightsOnly, from_step, .. }) => {
                format!(", with the weights of step {from_step}")
            }
        };
        self.screen.say(format!("attempt {}: {}{from}", start.attempt, start.tier));
    }

    /// Decides from where an attempt goes on. Returns the checkpoint to show to the trainer, repaired where it must be.
    fn choose_resume(&mut self, next: &Next, tier: &Tier) -> Result<Result<Beginning, Step>, Failure> {
        let saved = self.saved(next.wish)?;
        let wanted = Wanted {
            tier,
            wish: next.wish,
            steps_done: self.history().steps_done,
            restores_train_batch_size: self.prepared.dialect.restores_checkpoint_batch(),
            replays_first_epoch: self.replays_first_epoch(),
            steps_per_epoch: self.steps_per_epoch(tier),
            allow_restart: self.prepared.spec.allow.restart,
            corrupt_steps: &unreadable_steps(self.journal.records()),
        };
        match begin(&saved, &wanted) {
            beginning::Beginning::FirstRow { resume, why } => {
                if let Some(why) = why.filter(|_| resume.is_some()) {
                    self.warn(format!("training starts again: {why}"))?;
                }
                Ok(Ok((resume, None)))
            }
            beginning::Beginning::Checkpoint { resume, path, repair, passed_over } => {
                for passed in &passed_over {
                    self.warn(format!("{} is not resumed: {}", passed.path.display(), passed.why))?;
                }
                let shown = match repair {
                    None => path,
                    Some(state) => {
                        let parent = self
                            .directory
                            .private()
                            .join(format!("resume-{}", self.receipt.attempts.len() + 1));
                        repaired_view(&path, &state, &parent).map_err(|e| unwritable(&parent, &e))?
                    }
                };
                Ok(Ok((Some(resume), Some(shown))))
            }
            beginning::Beginning::Refused { why, help } => self.failed(why.to_string(), help).map(Err),
        }
    }

    /// Returns what earlier attempts saved, oldest first.
    pub(super) fn saved(&self, wish: ResumeWish) -> Result<Vec<Saved>, Failure> {
        let own = OldAttempt::all_of(self.journal.records(), |attempt| self.directory.attempt(attempt));
        let saved = |OldAttempt { directory, tier, diverged }: OldAttempt| {
            let checkpoints = checkpoints_in(&directory).map_err(|e| unreadable(&directory, &e))?;
            let asked = diverged || wish == ResumeWish::LastGoodWeights;
            let last_good_step = if asked { last_good_step(&directory)? } else { None };
            Ok(Saved { tier, checkpoints, diverged, last_good_step })
        };
        self.earlier.iter().cloned().chain(own).map(saved).collect()
    }

    pub(super) fn steps_per_epoch(&self, tier: &Tier) -> Option<u64> {
        let rows = self.known_rows()?;
        Some(proof::steps_per_epoch(rows, tier.micro_batch, tier.accumulation, tier.world_size))
    }

    /// Returns whether the next trainer, resumed inside a later epoch, would replay the rows of the first.
    fn replays_first_epoch(&self) -> bool {
        let records = self.receipt.attempts.iter().map(|note| self.directory.record(note.attempt));
        self.companion.replays_first_epoch(&self.prepared.dialect, &self.environment, records)
    }

    /// Returns the rows of the train set as an earlier attempt's log told them.
    fn known_rows(&self) -> Option<u64> {
        let mut follower = Follower::new(&self.output_of(self.last_start()?.attempt), Path::new("."));
        follower.look_to_the_end().ok()?;
        follower.telemetry.rows().or_else(|| follower.watch.train_rows())
    }

    /// Returns the file that holds an attempt's standard output and standard error.
    pub(super) fn output_of(&self, attempt: u32) -> PathBuf {
        self.directory.record(attempt).join("trainer.log")
    }

    fn spawn(&mut self, start: &AttemptStart, checkpoint: Option<PathBuf>) -> Result<Attempt, Unlaunched> {
        let output_dir = self.directory.attempt(start.attempt);
        std::fs::create_dir_all(&output_dir).map_err(|e| unwritable(&output_dir, &e))?;
        reach("attempt.directory_made", "");
        if let Some(index) = self.card.index() {
            self.prepared.candidate.card.index = Some(index);
        }
        let still_ours = self.card.used_by(&self.waited_for).unwrap_or_default();
        self.others_before = self.card.used().map(|used| used.saturating_sub(still_ours));
        let new_port = start.adjustments.contains(&Adjustment::NewPort);
        let flags = AttemptFlags {
            output_dir,
            resume_only_model: matches!(&start.resume, Some(resume) if resume.kind == ResumeKind::WeightsOnly),
            resume_from: checkpoint,
            companion: self.companion.launch(&self.directory.record(start.attempt)),
            expandable_segments: true,
            master_port: if new_port { free_port() } else { None },
            adjustments: start.adjustments.clone(),
        };
        let how = match &self.environment.sft_script {
            Some(script) => {
                TrainerStart::Script { python: self.environment.python.clone(), script: script.clone() }
            }
            None => TrainerStart::Command(self.config.trainer.command.clone()),
        };
        let request = self.prepared.command_request(start.rung);
        let invocation = exact_command(&request, &flags, &how)
            .map_err(|e| Failure::bad_input("bad_command", chain(&e)).help(e.help()))?;
        let env = self.trainer_environment(&invocation.env)?;
        let record = self.directory.record(start.attempt);
        let output = self.output_of(start.attempt);
        let spec = LaunchSpec {
            argv: invocation.argv,
            cwd: self.origin.cwd.clone(),
            stdout: output.clone(),
            stderr: output,
            grace: Duration::from_secs(u64::from(self.config.attempt.grace_s)),
            umask: self.origin.umask,
            log_cap_bytes: Some(u64::from(self.config.attempt.log_cap_mib) << 20),
            identity: self.origin.identity.clone(),
            extent: Extent::Cgroup,
        };
        Attempt::launch(&own_exe()?, &record, &spec, &env).map_err(|error| {
            let failure = || Failure::failed("cannot_start", chain(&error)).help(error.help());
            match error.is_recorder_killed() {
                true => Unlaunched::Killed(chain(&error)),
                false if error.is_unwritable() => Unlaunched::Unwritable(failure()),
                false => failure().into(),
            }
        })
    }

    /// Returns the whole environment of a trainer: ours, the job's, and the secrets that the job names.
    fn trainer_environment(
        &self,
        set: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<OsString, OsString>, Failure> {
        let mut env = self.origin.env.clone();
        // Without bytecode an import of torch costs three times as much, at every attempt.
        env.remove(&OsString::from("PYTHONDONTWRITEBYTECODE"));
        if !self.environment.bytecode
            && let Some(cache) = &self.origin.cache
        {
            env.entry("PYTHONPYCACHEPREFIX".into()).or_insert_with(|| cache.join("pycache").into());
        }
        // Output and errors share a file: unbuffered, their lines come in the order in which they were written.
        env.insert("PYTHONUNBUFFERED".into(), "1".into());
        env.extend(set.iter().map(|(name, value)| (name.into(), value.into())));
        let secrets = secrets::find(&self.prepared.spec.secrets, &self.origin.secrets)?;
        env.extend(secrets.iter().map(|(name, value)| (name.into(), value.to_owned())));
        Ok(env)
    }
}

/// Returns the last step whose loss was a number in the attempt that trained in this directory.
fn last_good_step(output_dir: &Path) -> Result<Option<u64>, Failure> {
    let (path, mut log) = (output_dir.join("logging.jsonl"), TrainerLog::new());
    LogTail::new(&path).drain(|bytes| log.push_bytes(bytes)).map_err(|e| unreadable(&path, &e))?;
    Ok(log.last_finite_step())
}

/// Returns whether a directory like this one, with something in it, can be made. Nothing is left of it.
fn can_be_written(record: &Path) -> bool {
    let trial = record.with_extension("trial");
    let file = trial.join("trial");
    let made = std::fs::create_dir(&trial).or_else(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(e),
    });
    let written = made.and_then(|()| std::fs::write(&file, vec![0; TRIAL_BYTES]));
    let _not_made = std::fs::remove_file(&file);
    let _not_made = std::fs::remove_dir(&trial);
    written.is_ok()
}

/// Returns a path that executes this program, even after an upgrade put another version at its path.
pub(super) fn own_exe() -> Result<PathBuf, Failure> {
    let path = std::env::current_exe().map_err(|e| Failure::new(Status::Bug, "no_exe", e))?;
    // The kernel adds " (deleted)" to the path of a file that was replaced. It is still there under this name, which
    // is not the first choice because process lists would then call a recorder "exe".
    Ok(if path.exists() { path } else { PathBuf::from("/proc/self/exe") })
}

/// Returns a port that nobody listens on now.
fn free_port() -> Option<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).ok()?;
    Some(listener.local_addr().ok()?.port())
}
