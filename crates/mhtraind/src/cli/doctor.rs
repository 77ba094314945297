//! `mhtraind doctor`: is everything here that a job needs?

use std::path::PathBuf;

use clap::Args;
use mhtrain_probe::doctor::{CheckState, DoctorReport, examine};
use mhtrain_probe::probe::probe;

use super::{output, probe as probe_command};
use crate::config::Config;
use crate::failure::{Failure, Status};

/// Check everything that a job needs, and say what to do about what is missing
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mhtraind doctor
  mhtraind doctor --json | jq '.checks[] | select(.state != \"ok\")'

Exit code 0: nothing failed (warnings are allowed); 1: something failed, and no job can run until it is mended.")]
pub struct DoctorArgs {
    /// The checks as JSON
    #[arg(long)]
    pub json: bool,
    /// Directory whose free space is checked; it need not exist
    #[arg(long, value_name = "DIR", default_value = "output")]
    pub output_dir: PathBuf,
}

/// Runs the command.
pub fn run(args: &DoctorArgs, config: &Config) -> Result<Status, Failure> {
    let report = examine(&probe(&probe_command::query(config, &args.output_dir)));
    if args.json {
        output::json(&report)?;
    } else {
        output::line(render_doctor(&report))?;
    }
    Ok(if report.healthy { Status::Done } else { Status::Failed })
}

/// Returns the checks for people: one line each, and what to do below those that are not well.
pub fn render_doctor(report: &DoctorReport) -> String {
    let mut lines = Vec::new();
    for check in &report.checks {
        let mark = match check.state {
            CheckState::Ok => "ok  ",
            CheckState::Warn => "warn",
            CheckState::Fail => "FAIL",
        };
        lines.push(format!("{mark}  {:<13} {}", check.name, check.what));
        if let Some(help) = check.help.as_ref().filter(|_| check.state != CheckState::Ok) {
            lines.push(format!("      help: {help}"));
        }
    }
    let count = |state| report.checks.iter().filter(|check| check.state == state).count();
    lines.push(String::new());
    lines.push(format!("{} failed, {} warnings", count(CheckState::Fail), count(CheckState::Warn)));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use mhtrain_probe::doctor::Check;

    use super::*;

    #[test]
    fn each_check_is_a_line_and_help_stands_below_what_is_not_well() {
        let check = |name: &str, state, help: Option<&str>| Check {
            name: name.to_owned(),
            state,
            what: "found so".to_owned(),
            help: help.map(str::to_owned),
        };
        let report = DoctorReport {
            healthy: false,
            checks: vec![
                check("driver", CheckState::Ok, None),
                check("liger-kernel", CheckState::Ok, Some("not shown")),
                check("flash-attn", CheckState::Warn, Some("install it")),
                check("trainer", CheckState::Fail, Some("make one")),
            ],
        };
        insta::assert_snapshot!(render_doctor(&report));
    }
}
