//! What becomes of a job whose end was asked for, and when does its time limit ask?
//!
//! ```text
//!   asked by its time limit   ──> failed: it did not do what it was to do, and a larger limit lets it go on
//!   asked by anybody else     ──> cancelled
//! ```

use std::time::Duration;

use crate::event::{JobEvent, Record};

/// How the events name a time limit that asks for the end.
pub const TIME_LIMIT: &str = "its time limit";

/// How the events name `mhtraind cancel`.
pub const CANCEL: &str = "cancel";

/// Returns the end of a job that was stopped, for whoever writes it down. `by`: who asked, as the events name it; `limit`: the
/// job's own.
pub fn end(by: &str, limit: Option<Duration>) -> JobEvent {
    if by != TIME_LIMIT {
        return cancelled(by);
    }
    let seconds = limit.unwrap_or_default().as_secs();
    let help = "it can go on: `mhtraind retry` gives a job of the daemon as much time again, and a foreground run goes on with \
                a higher `time_limit` and --continue";
    let reason = format!("its time limit of {seconds} s is over");
    JobEvent::Failed { reason, help: Some(help.to_owned()) }
}

/// Returns the end of a job that anybody but its time limit stopped. `by`: who asked, as the events name it.
fn cancelled(by: &str) -> JobEvent {
    let reason =
        if by == CANCEL { "stopped as asked (cancel)".to_owned() } else { format!("stopped by {by}") };
    JobEvent::Cancelled { reason }
}

/// Returns when the time of a job began, as its events have it: at the start of its first attempt; `None` before that.
///
/// Every attempt counts, and so does what lies between them, whichever process was there.
pub fn time_began(records: &[Record]) -> Option<&str> {
    let first = records.iter().find(|record| matches!(record.event, JobEvent::AttemptStarting(_)))?;
    Some(first.at.as_str())
}

/// Returns what is left of a limit when so much is used; `None` without a limit.
pub fn time_left(limit: Option<Duration>, used: Duration) -> Option<Duration> {
    limit.map(|limit| limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use mhtrain_sizing::tier::Profile;

    use super::*;
    use crate::event::AttemptStart;
    use crate::testing::tier;

    #[test]
    fn a_time_limit_is_a_failure_and_everything_else_that_stops_a_job_a_cancel() {
        let limit = Some(Duration::from_secs(90));
        assert!(
            matches!(end(TIME_LIMIT, limit), JobEvent::Failed { reason, help: Some(_) } if reason.contains("90 s"))
        );
        for (by, words) in [
            (CANCEL, "stopped as asked (cancel)"),
            ("SIGTERM", "stopped by SIGTERM"),
            ("its stop file", "stopped by its stop file"),
        ] {
            assert_eq!(end(by, limit), JobEvent::Cancelled { reason: words.to_owned() });
        }
    }

    #[test]
    fn time_begins_with_the_first_attempt_and_not_again_with_the_next() {
        let at = |at: &str, event| Record::new(at.to_owned(), event);
        let start = |attempt| {
            let tier = tier(Profile::Standard, 4, 8);
            JobEvent::AttemptStarting(AttemptStart {
                attempt,
                rung: 0,
                tier,
                resume: None,
                adjustments: Vec::new(),
            })
        };
        let waiting = JobEvent::Waiting { reason: "a device".to_owned() };
        let mut records = vec![at("10:00", waiting)];
        assert_eq!(time_began(&records), None);
        records.extend([at("11:00", start(1)), at("12:00", start(2))]);
        assert_eq!(time_began(&records), Some("11:00"));
        let hour = Duration::from_secs(3600);
        assert_eq!(time_left(Some(hour), hour * 2), Some(Duration::ZERO));
        assert_eq!(time_left(Some(hour), hour / 4), Some(hour / 4 * 3));
        assert_eq!(time_left(None, hour), None);
    }
}
