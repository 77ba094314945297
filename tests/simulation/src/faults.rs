//! What can go wrong, beside what a job brings upon itself?

use std::fmt;

/// Something that happens to the host.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of the daemon.
    KillDaemon,
    /// `kill -9` of the recorder of the job that was submitted as this one of the script.
    KillRecorder(usize),
    /// `kill -9` of its trainer.
    KillTrainer(usize),
    /// `kill -9` of both at once.
    KillAttempt(usize),
    /// The kernel's memory killer takes its trainer.
    OomKill(usize),
    /// `kill -9` of everything of ours at once.
    KillEverything,
    /// Power is lost: what was not synced may be gone, and another boot begins.
    PowerCut,
    /// The disk is full for so many events.
    DiskFull(u32),
    /// The disk refuses the records of new attempts, and nothing else, for so many events.
    RecordsRefused(u32),
    /// NVML does not answer for so many events.
    NvmlLost(u32),
    /// Somebody else takes so many GiB of a card, for so many events.
    Neighbour {
        /// The card.
        card: usize,
        /// How much.
        gib: u64,
        /// For how long.
        events: u32,
    },
    /// A card fails.
    CardFails(usize),
    /// The clock on the wall is set, by so many seconds.
    ClockJump(i64),
    /// A stranger gets the process id that a dead trainer of this job had.
    PidReused(usize),
    /// The user cancels the job.
    Cancel(usize),
    /// Another user asks for its end.
    CancelByAnother(usize),
    /// The user asks for it once more.
    Retry(usize),
    /// Somebody drains the daemon, for so many events.
    Drain(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillDaemon => f.write_str("kill -9 of the daemon"),
            Fault::KillRecorder(job) => write!(f, "kill -9 of the recorder of {}", name(*job)),
            Fault::KillTrainer(job) => write!(f, "kill -9 of the trainer of {}", name(*job)),
            Fault::KillAttempt(job) => write!(f, "kill -9 of recorder and trainer of {}", name(*job)),
            Fault::OomKill(job) => {
                write!(f, "the kernel's memory killer takes the trainer of {}", name(*job))
            }
            Fault::KillEverything => f.write_str("kill -9 of daemon, recorders and trainers"),
            Fault::PowerCut => f.write_str("power cut"),
            Fault::DiskFull(events) => write!(f, "the disk is full, for {events} events"),
            Fault::RecordsRefused(events) => {
                write!(f, "the disk takes no record of an attempt, for {events} events")
            }
            Fault::NvmlLost(events) => write!(f, "NVML is lost, for {events} events"),
            Fault::Neighbour { card, gib, events } => {
                write!(f, "a neighbour takes {gib} GiB of GPU {card}, for {events} events")
            }
            Fault::CardFails(card) => write!(f, "GPU {card} fails"),
            Fault::ClockJump(seconds) => write!(f, "the clock jumps by {seconds} s"),
            Fault::PidReused(job) => {
                write!(f, "a stranger gets the process id of the trainer of {}", name(*job))
            }
            Fault::Cancel(job) => write!(f, "the user cancels {}", name(*job)),
            Fault::CancelByAnother(job) => write!(f, "another user wants to cancel {}", name(*job)),
            Fault::Retry(job) => write!(f, "the user retries {}", name(*job)),
            Fault::Drain(events) => write!(f, "the daemon is drained, for {events} events"),
        }
    }
}

/// Returns the name of a job of the script: `a`, `b`.
pub fn name(job: usize) -> String {
    let letter = u8::try_from(job).ok().and_then(|job| b'a'.checked_add(job));
    letter.map_or_else(|| job.to_string(), |letter| char::from(letter).to_string())
}
