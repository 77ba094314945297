//! What did an attempt show about memory?

use mhtrain_job::diagnosis::{Diagnosis, Kind, Phase};
use mhtrain_sizing::observation::Seen;
use mhtrain_sizing::units::Bytes;

use crate::companion::AllocatorPeaks;
use crate::progress::Progress;

/// Optimizer steps after which a peak is one: the first has the moments made, the second everything at once.
pub const STEPS_MIN: u64 = 2;

/// What was read of an attempt that is over.
#[derive(Clone, Debug)]
pub struct Showed<'a> {
    /// Why it ended.
    pub diagnosis: &'a Diagnosis,
    /// The step after which it began.
    pub from_step: u64,
    /// The last step that it made.
    pub step: u64,
    /// The last line of progress that it logged.
    pub logged: Option<&'a Progress>,
    /// What its companion said of the allocator.
    pub peaks: Option<AllocatorPeaks>,
    /// What NVML showed for its processes at most.
    pub device: Option<Bytes>,
}

/// Returns what an attempt showed about memory; `None` when it says nothing about what it needed.
pub fn seen(showed: &Showed<'_>) -> Option<Seen> {
    let Showed { diagnosis, from_step, step, logged, peaks, device } = showed;
    if matches!(diagnosis.kind, Kind::DeviceOom | Kind::DeviceOomByNeighbour) {
        // Whoever had the rest of the card: it did not get what it needed, so what it held is no peak. An evaluation, a load and
        // a save take other memory than what is predicted.
        if !diagnosis.certain || !matches!(diagnosis.phase, None | Some(Phase::Train)) {
            return None;
        }
        let evidence = &diagnosis.evidence;
        // It held this much, there was this much more, and that was not enough.
        let held = evidence.this_process_bytes?;
        return Some(Seen::MoreThan {
            limit: held.saturating_add(evidence.free_bytes.unwrap_or(Bytes::ZERO)),
        });
    }
    if *step < from_step + STEPS_MIN {
        return None;
    }
    // Without the companion there is the trainer's own figure, at each line that it logs.
    let logged = logged.filter(|logged| logged.step >= from_step + STEPS_MIN);
    let seen = Seen::Peak {
        allocated: peaks.map(|peaks| peaks.allocated),
        reserved: peaks.map(|peaks| peaks.reserved).or_else(|| logged?.memory),
        device: device.filter(|peak| *peak > Bytes::ZERO),
    };
    (seen != Seen::Peak { allocated: None, reserved: None, device: None }).then_some(seen)
}

#[cfg(test)]
mod tests {
    use mhtrain_job::diagnosis::Evidence;

    use super::*;

    fn of(kind: Kind, phase: Option<Phase>, certain: bool) -> Option<Seen> {
        let evidence = Evidence {
            this_process_bytes: Some(Bytes::from_gib(9)),
            free_bytes: Some(Bytes::from_gib(1)),
            ..Evidence::default()
        };
        let diagnosis = Diagnosis { kind, phase, certain, evidence, ..Diagnosis::interrupted() };
        let logged = Progress { step: 7, memory: Some(Bytes::from_gib(8)), ..Progress::default() };
        seen(&Showed {
            diagnosis: &diagnosis,
            from_step: 4,
            step: 7,
            logged: Some(&logged),
            peaks: None,
            device: None,
        })
    }

    #[test]
    fn what_a_trainer_held_that_ran_out_of_memory_is_no_peak_whoever_had_the_rest() {
        let more = Some(Seen::MoreThan { limit: Bytes::from_gib(10) });
        for kind in [Kind::DeviceOom, Kind::DeviceOomByNeighbour] {
            assert_eq!(of(kind, Some(Phase::Train), true), more, "{kind}");
            assert_eq!(
                of(kind, Some(Phase::Eval), true),
                None,
                "{kind}: an evaluation is not what is predicted"
            );
            assert_eq!(of(kind, None, false), None, "{kind}: a guess");
        }
        let peak = Seen::Peak { allocated: None, reserved: Some(Bytes::from_gib(8)), device: None };
        assert_eq!(of(Kind::Interrupted, None, true), Some(peak));
    }
}
