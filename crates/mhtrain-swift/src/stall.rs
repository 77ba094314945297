//! What does a trainer wait for that does nothing any more?
//!
//! Ranks that wait for each other, or a data loader that nothing comes from, end nothing and print nothing. What is left to
//! look at are the stacks of its threads.

use std::time::Duration;

use mhtrain_job::diagnosis::{Answer, Diagnosis, Evidence, Kind};

/// A trainer that stood still.
#[derive(Clone, Debug, PartialEq)]
pub struct Stall {
    /// For how long there was no step, no output and no work on the card.
    pub still: Duration,
    /// Median time of a step before that.
    pub step: Duration,
    /// The last step.
    pub last_step: u64,
    /// Stacks of its threads, as faulthandler or py-spy print them; empty where none could be had.
    pub stacks: String,
}

/// Names of functions and files in which a thread waits for other ranks: torch.distributed, NCCL and gloo.
const COMMUNICATION: [&str; 10] = [
    "all_reduce",
    "allreduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "barrier",
    "rendezvous",
    "c10d",
    "distributed_c10d",
    "nccl",
];

/// The same for the data loader.
const DATA: [&str; 4] = ["_try_get_data", "multiprocessing/queues", "dataloader.py", "_data_worker"];

/// Returns why a trainer stood still. It was ended by us, so nothing in its last words says so.
pub fn diagnose(stall: &Stall) -> Diagnosis {
    let wait = |names: &[&str]| {
        let mut lines = stall.stacks.lines().map(str::trim);
        lines.find(|line| names.iter().any(|name| line.contains(name))).map(str::to_owned)
    };
    let (kind, answer, place) = match (wait(&COMMUNICATION), wait(&DATA)) {
        (Some(place), _) => (Kind::Communication, Answer::NewPort, Some(place)),
        (None, place) => (Kind::Interrupted, Answer::Resume, place),
    };
    let mut line = format!(
        "no step, no output and an idle card for {} s after step {}, where a step took {:.1} s",
        stall.still.as_secs(),
        stall.last_step,
        stall.step.as_secs_f64()
    );
    if let Some(place) = place {
        line.push_str(&format!("; it waits in: {place}"));
    }
    let evidence = Evidence { line, ..Evidence::default() };
    Diagnosis { kind, fatal: true, certain: false, phase: None, evidence, answer }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stalled(stacks: &str) -> Diagnosis {
        let (still, step) = (Duration::from_secs(905), Duration::from_millis(6200));
        diagnose(&Stall { still, step, last_step: 12, stacks: stacks.to_owned() })
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_told_from_a_data_loader() {
        let ranks = stalled(
            "Thread 0x7f (most recent call first):\n  File \"torch/distributed/distributed_c10d.py\", line 2810 in all_reduce",
        );
        assert_eq!((ranks.kind, ranks.answer), (Kind::Communication, Answer::NewPort));
        let loader = stalled("  File \"torch/utils/data/dataloader.py\", line 1243 in _try_get_data");
        assert_eq!((loader.kind, loader.answer), (Kind::Interrupted, Answer::Resume));
        assert!(loader.evidence.line.contains("_try_get_data"), "{}", loader.evidence.line);
        let unknown = stalled("");
        assert_eq!(unknown.kind, Kind::Interrupted);
        assert_eq!(
            unknown.evidence.line,
            "no step, no output and an idle card for 905 s after step 12, where a step took 6.2 s"
        );
        assert!(unknown.fatal && !unknown.certain);
    }
}
