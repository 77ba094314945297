//! Which mistakes can be planted, to see that they are caught?
//!
//! Each stands where the daemon's shell takes an answer of the pure crates and does something else with it.

/// A mistake.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A submit is acknowledged before it is on disk.
    LostAck,
    /// A daemon that starts takes a live trainer for dead.
    DoubleStart,
    /// A signal 9 that nothing explains goes down the ladder.
    LowerTierOnKill,
    /// After an out-of-memory error the accumulation stays what it was while the micro-batch is halved.
    SmallBatchAfterOom,
    /// Who has a device is not looked at.
    TwoJobsOnADevice,
    /// Exit code 0 is taken for a success.
    SuccessWithoutRows,
    /// A trainer is known by its process id alone.
    PidAlone,
    /// A cancel is acknowledged and not written down.
    ForgottenCancel,
    /// A trainer is started before that is written down.
    EffectBeforeIntention,
    /// A daemon that starts gives every job its whole time again.
    TimeBeginsAgain,
    /// What a daemon before used of a job's time counts twice.
    TimeCountedTwice,
    /// A daemon that starts takes a job that its time limit stops for one that its user cancelled.
    TimeLimitCancels,
    /// The time of a job stands still while it waits for another card.
    QueueStopsTime,
    /// A job fails at once whose record the disk refuses.
    RefusedRecordFails,
    /// Whether the disk takes a record is not tried again.
    DiskWaitedForForEver,
    /// How many jobs of a user wait is not looked at.
    NoLimitPerUser,
    /// How many jobs of a user may wait is compared with those of all.
    LimitOfAllUsers,
    /// A key is looked up without its user.
    KeyOfAnybody,
    /// Whose job it is is not looked at by a cancel.
    CancelByAnybody,
    /// What anybody's attempts showed counts for everybody.
    LearnedFromOthers,
    /// What an attempt held that ran out of memory is taken for all that it needs.
    CensoredAsPeak,
    /// An end that is judged again is learned from again.
    LearnedTwice,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 22] = [
        Bug::LostAck,
        Bug::DoubleStart,
        Bug::LowerTierOnKill,
        Bug::SmallBatchAfterOom,
        Bug::TwoJobsOnADevice,
        Bug::SuccessWithoutRows,
        Bug::PidAlone,
        Bug::ForgottenCancel,
        Bug::EffectBeforeIntention,
        Bug::TimeBeginsAgain,
        Bug::TimeCountedTwice,
        Bug::TimeLimitCancels,
        Bug::QueueStopsTime,
        Bug::RefusedRecordFails,
        Bug::DiskWaitedForForEver,
        Bug::NoLimitPerUser,
        Bug::LimitOfAllUsers,
        Bug::KeyOfAnybody,
        Bug::CancelByAnybody,
        Bug::LearnedFromOthers,
        Bug::CensoredAsPeak,
        Bug::LearnedTwice,
    ];
}
