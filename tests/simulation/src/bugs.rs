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
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 9] = [
        Bug::LostAck,
        Bug::DoubleStart,
        Bug::LowerTierOnKill,
        Bug::SmallBatchAfterOom,
        Bug::TwoJobsOnADevice,
        Bug::SuccessWithoutRows,
        Bug::PidAlone,
        Bug::ForgottenCancel,
        Bug::EffectBeforeIntention,
    ];
}
