//! `mhtraind install-trainer`: a pinned ms-swift in an environment of its own.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::output;
use crate::engine::prepare::chain;
use crate::engine::signals::StopSignals;
use crate::failure::{Failure, Status};
use crate::trainer_install::{
    InstallError, InstallProgress, InstallRequest, InstalledTrainer, TrainerRelease, data_dir, install,
};

/// Install ms-swift, pinned, into an environment of its own
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind install-trainer                          # prints the environment's directory at the end
  mhtraind install-trainer --ms-swift 3.12.6 --dir /opt/ms-swift

Takes uv where it is on the PATH, else fetches it into a private place. An environment that is complete and matches
its lock is used as it is. Then set [trainer] command = [\"DIR/bin/swift\", \"sft\"], or put DIR/bin on the PATH.")]
pub struct InstallTrainerArgs {
    /// Which ms-swift
    #[arg(long, value_name = "VERSION", default_value = "4.6.0", value_parser = ["4.6.0", "3.12.6"])]
    ms_swift: String,
    /// Where [default: ~/.local/share/mhtraind/trainers/ms-swift-VERSION]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &InstallTrainerArgs) -> Result<Status, Failure> {
    let trainer = install_with_bar(&args.ms_swift, args.dir.clone())?;
    output::line(trainer.dir.display())?;
    Ok(Status::Done)
}

/// Seconds between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Installs a trainer, or finds it installed, with progress on standard error. Ctrl-C removes what is half-made.
///
/// # Errors
/// It cannot be installed; or it was interrupted, with the status of that.
pub fn install_with_bar(version: &str, dir: Option<PathBuf>) -> Result<InstalledTrainer, Failure> {
    let release = TrainerRelease::from_version(version)
        .ok_or_else(|| Failure::bad_input("no_lock", format!("there is no lock for ms-swift {version}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Status::Bug, "no_runtime", e))?;
    runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let cancel = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancel);
        let mut work = tokio::task::spawn_blocking(move || install_here(release, dir, &flag));
        let mut stopped = None;
        let installed = loop {
            tokio::select! {
                cause = signals.next() => {
                    cancel.store(true, Ordering::Relaxed);
                    stopped.get_or_insert(cause);
                }
                done = &mut work => break done.map_err(|e| Failure::new(Status::Bug, "bug", e))?,
            }
        };
        match (installed, stopped) {
            (Ok(trainer), None) => Ok(trainer),
            (_, Some(cause)) => Err(Failure::new(
                cause.status(),
                "interrupted",
                format!("{cause}: the install was ended, and nothing half-made is left"),
            )),
            (Err(error), None) => Err(Failure::failed("install_failed", chain(&error)).help(error.help())),
        }
    })
}

fn install_here(
    release: TrainerRelease,
    dir: Option<PathBuf>,
    cancel: &AtomicBool,
) -> Result<InstalledTrainer, InstallError> {
    let mut request = match (&dir, data_dir()) {
        // A named place needs no home, but for the private uv.
        (Some(dir), None) => {
            InstallRequest { release, dir: dir.clone(), tools_dir: dir.join(".tools"), cancel }
        }
        _ => InstallRequest::in_default_place(release, cancel)?,
    };
    if let Some(dir) = dir {
        request.dir = std::path::absolute(&dir).unwrap_or(dir);
    }
    let mut teller = Teller::new(release.version());
    let installed = install(&request, &mut |progress| teller.tell(&progress));
    teller.end();
    installed
}

/// Tells how far an install is: a bar on a terminal, a line now and then elsewhere.
struct Teller {
    version: &'static str,
    bar: Option<ProgressBar>,
    said: Option<(Instant, &'static str)>,
}

impl Teller {
    fn new(version: &'static str) -> Teller {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:28}] {percent:>3} %  {msg}  ({elapsed_precise})",
            )
            .expect("the template is valid: drawn by every interactive install")
            .progress_chars("=> ");
            let bar = ProgressBar::new(1000).with_style(style).with_prefix(format!("ms-swift {version}"));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Teller { version, bar, said: None }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction from 0 to 1")]
    fn tell(&mut self, progress: &InstallProgress) {
        let label = progress.phase.label();
        if let Some(bar) = &self.bar {
            bar.set_position((progress.fraction() * 1000.0) as u64);
            bar.set_message(format!("{label} {}", progress.detail));
            return;
        }
        let due = self.said.is_none_or(|(at, phase)| phase != label || at.elapsed() >= LINE_EVERY);
        if due {
            let percent = progress.fraction() * 100.0;
            output::note(
                format!("ms-swift {}: {percent:>3.0} %  {label} {}", self.version, progress.detail)
                    .trim_end(),
            );
            self.said = Some((Instant::now(), label));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
