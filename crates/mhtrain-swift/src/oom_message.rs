//! Which amounts does an out-of-memory message name?
//!
//! torch has worded this message in many ways since 0.4, its forks for other cards in some more, and terminals and
//! boxed tracebacks wrap it at any column, in the middle of a number too. So blanks carry no meaning here: they
//! are removed first, and the patterns are written without them.

use std::sync::LazyLock;

use mhtrain_job::diagnosis::Evidence;
use mhtrain_sizing::units::Bytes;
use regex::{Captures, Regex};

/// Larger amounts are a driver's nonsense: some Windows drivers report 2^64 bytes in use.
const LARGEST_BELIEVED: f64 = (1u64 << 50) as f64;

/// What the CUDA context of a process takes beside torch's own memory, where the message does not count it.
///
/// Source: 300-500 MiB on the cards of 2016-2025; used only to judge messages before torch 2.1.
const CONTEXT: Bytes = Bytes::from_mib(400);

/// A request may fail although so much more was free: the driver rounds up, and the amounts are read afterwards.
const BOOKKEEPING: Bytes = Bytes::from_mib(512);

/// Three amounts that are each rounded to 0.01 GiB can differ by this much though nobody else is there.
const ROUNDING: Bytes = Bytes::from_mib(16);

/// Others are to blame when they hold at least this share of the card, our context already taken off; where it is not
/// known what they held before.
const NEIGHBOUR_SHARE: f64 = 0.20;

/// Where it is known: when they hold so much more. The two figures come from two sources, and a rung is lowered for what
/// is less.
const NEIGHBOUR_GROWTH: f64 = 0.05;

/// The amounts of one message, as far as it names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OomMessage {
    /// What was asked for.
    pub tried: Option<Bytes>,
    /// Capacity of the card.
    pub total: Option<Bytes>,
    /// What was free.
    pub free: Option<Bytes>,
    /// A limit that the user set for this process, below the capacity.
    pub allowed: Option<Bytes>,
    /// What this process held, memory outside torch included.
    pub this_process: Option<Bytes>,
    /// What torch had allocated.
    pub allocated: Option<Bytes>,
    /// What torch had reserved in all.
    pub reserved_total: Option<Bytes>,
    /// What torch had reserved beyond what was allocated.
    pub reserved_unallocated: Option<Bytes>,
    /// What each process that the message lists by its id held. Inside a container ours is among them.
    pub processes: Vec<Bytes>,
    /// The card was judged before anything of ours was on it (start-up check of an inference engine).
    pub before_start: bool,
}

/// An amount in a text without blanks, in lower case.
const AMOUNT: &str = r"(\d+(?:[.,]\d+)*)(bytes|byte|[kmgt]i?b|b)";

struct Patterns {
    tried: Regex,
    total: Regex,
    free: Regex,
    allowed: Regex,
    this_process: Regex,
    process: Regex,
    allocated: Regex,
    reserved_total: Regex,
    reserved_unallocated: Regex,
    vllm_start: Regex,
    vllm_cache: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let of = |pattern: &str| {
        Regex::new(&pattern.replace("{A}", AMOUNT)).expect("the patterns of this file are well-formed")
    };
    Patterns {
        tried: of(concat!(
            r"(?:tri(?:ed|es)|trying)toallocate(?:memoryofsize)?{A}|outofmemoryallocating{A}|requested:{A}",
            r"|cannotallocate{A}(?:memory)?ongpu"
        )),
        total: of(r"totalcapac(?:i)?tyof{A}|{A}totalcapac(?:i)?ty|devicelimit:{A}"),
        free: of(
            r"ofwhich{A}isfree|{A}free[;)]|free\(accordingtocuda\):{A}|availablememoryisonly{A}|{A}isfree",
        ),
        allowed: of(r"{A}allowed;|maxallowed:{A}|user-suppliedmemoryfraction\):{A}"),
        this_process: of(r"thisprocesshas{A}memoryinuse"),
        process: of(r"process\d+has{A}memoryinuse"),
        allocated: of(
            r"oftheallocatedmemory{A}isallocatedbypytorch|{A}alreadyallocated|mpsallocated:{A}|currentlyallocated:{A}",
        ),
        reserved_total: of(r"{A}reservedintotalbypytorch|{A}reservedintotal"),
        // "cached" (torch 1.0-1.3) printed what was cached and not allocated: the same quantity.
        reserved_unallocated: of(r"{A}isreservedbypytorchbutunallocated|{A}cached\)?"),
        vllm_start: of(concat!(
            r"freememoryondevice(?:[a-z]+:?\d+)?\((\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)gib\)onstartupislessthandesired",
            r"gpumemoryutilization\([\d.]+,{A}\)"
        )),
        vllm_cache: of(r"{A}kvcacheisneeded,whichislargerthantheavailablekvcachememory\({A}\)"),
    }
});

/// Reads the amounts of the first out-of-memory message in `text`, which may be wrapped over lines.
/// Returns `None` when no amount is named.
pub fn parse(text: &str) -> Option<OomMessage> {
    let compact = without_blanks(text);
    let compact = first_message(&compact);
    let p = &*PATTERNS;
    let mut message = OomMessage {
        tried: first(&p.tried, compact),
        total: first(&p.total, compact),
        free: first(&p.free, compact),
        allowed: first(&p.allowed, compact),
        this_process: first(&p.this_process, compact),
        allocated: first(&p.allocated, compact),
        reserved_total: first(&p.reserved_total, compact),
        reserved_unallocated: first(&p.reserved_unallocated, compact),
        processes: p.process.captures_iter(compact).filter_map(|found| amount(&found)).collect(),
        before_start: false,
    };
    if let Some(found) = p.vllm_start.captures(compact) {
        message.free = scaled(&found[1], "gib");
        message.total = scaled(&found[2], "gib");
        message.tried = scaled(&found[3], &found[4]);
        message.before_start = true;
    }
    if let Some(found) = p.vllm_cache.captures(compact) {
        message.tried = scaled(&found[1], &found[2]);
        message.free = scaled(&found[3], &found[4]);
    }
    (message != OomMessage::default()).then_some(message)
}

impl OomMessage {
    /// Returns what other processes held: as listed, else as the difference between the card and us.
    pub fn others(&self) -> Option<Bytes> {
        if self.before_start {
            return self.total?.checked_sub(self.free?);
        }
        // A user's own limit, or a request above the whole card, has nothing to do with others.
        let total = self.total?;
        let listed = self.listed_others(total);
        let rest = |ours| total.checked_sub(self.free.unwrap_or_default())?.checked_sub(ours);
        let by_arithmetic =
            self.ours().and_then(rest).map(|rest| if rest < ROUNDING { Bytes::ZERO } else { rest });
        match (listed, self.this_process) {
            // What the message lists is better than a difference, but processes of other containers are not listed.
            (Some(listed), Some(_)) => Some(by_arithmetic.map_or(listed, |rest| rest.max(listed))),
            (Some(listed), None) => Some(listed),
            (None, _) => by_arithmetic,
        }
    }

    /// Returns whether others are the reason: without what they took the request would have fitted, and that is a good
    /// part of the card. `before` is what they held when the trainer started: it was planned beside that, so to wait
    /// for it would be to wait for nothing. `None`: nobody looked.
    pub fn neighbour_is_to_blame(&self, before: Option<Bytes>) -> bool {
        let (Some(tried), Some(total), Some(others)) = (self.tried, self.total, self.others()) else {
            return false;
        };
        // Free memory above the request was refused for another reason: a limit, or address space.
        let refused_despite_room =
            !self.before_start && self.free.is_some_and(|free| free > tried.saturating_add(BOOKKEEPING));
        if self.allowed.is_some_and(|allowed| allowed < total) || refused_despite_room || self.free.is_none()
        {
            return false;
        }
        let ours = if self.before_start { Bytes::ZERO } else { self.ours().unwrap_or_default() };
        let least = if before.is_some() { NEIGHBOUR_GROWTH } else { NEIGHBOUR_SHARE };
        let before = before.unwrap_or(Bytes::ZERO);
        let would_have_fitted = ours.saturating_add(tried).saturating_add(before) <= total;
        would_have_fitted && others.saturating_sub(before).as_f64() >= least * total.as_f64()
    }

    /// Returns whether memory that torch holds but cannot use would have covered the request.
    pub fn is_fragmented(&self) -> bool {
        let unallocated =
            self.reserved_unallocated.or_else(|| self.reserved_total?.checked_sub(self.allocated?));
        matches!((unallocated, self.tried), (Some(idle), Some(tried)) if tried > Bytes::ZERO && idle >= tried)
    }

    /// Copies the amounts into the evidence of a diagnosis.
    pub fn fill(&self, evidence: &mut Evidence) {
        evidence.tried_bytes = self.tried;
        evidence.total_bytes = self.total;
        evidence.free_bytes = self.free;
        evidence.this_process_bytes = self.this_process;
        evidence.allocated_bytes = self.allocated;
        evidence.reserved_total_bytes = self.reserved_total;
        evidence.reserved_unallocated_bytes = self.reserved_unallocated;
        evidence.others_bytes = self.others();
    }

    /// Returns how many amounts the message names.
    pub fn figures(&self) -> usize {
        let amounts = [
            self.tried,
            self.total,
            self.free,
            self.this_process,
            self.allocated,
            self.reserved_total,
            self.reserved_unallocated,
        ];
        amounts.iter().flatten().count()
    }

    /// What torch holds, without the context of the process.
    fn torch_reserved(&self) -> Option<Bytes> {
        self.reserved_total
            .or_else(|| Some(self.allocated?.saturating_add(self.reserved_unallocated.unwrap_or_default())))
    }

    /// What our process holds. `0 bytes` beside gigabytes of torch's own is a driver that cannot tell.
    fn ours(&self) -> Option<Bytes> {
        let torch = self.torch_reserved();
        match (self.this_process, torch) {
            (Some(this), Some(torch)) if this < torch => Some(torch.saturating_add(CONTEXT)),
            (Some(this), _) => Some(this),
            (None, Some(torch)) => Some(torch.saturating_add(CONTEXT)),
            (None, None) => None,
        }
    }

    /// The sum of the listed processes that are not ours.
    fn listed_others(&self, total: Bytes) -> Option<Bytes> {
        let mut listed: Vec<Bytes> = self.processes.clone();
        if listed.is_empty() {
            return None;
        }
        if self.this_process.is_none() {
            // No "this process": the message counts from inside a container, where our own id is another one.
            // The entry nearest above what torch holds is ours, unless it is far above it.
            let torch = self.torch_reserved()?;
            let slack = Bytes::from_gib(2).max(Bytes::from_f64(0.15 * total.as_f64()));
            let ours = listed
                .iter()
                .enumerate()
                .filter(|(_, held)| **held <= torch.saturating_add(slack))
                .filter(|(_, held)| held.saturating_add(Bytes::from_mib(64)) >= torch)
                .min_by_key(|(_, held)| **held)
                .map(|(index, _)| index);
            if let Some(index) = ours {
                listed.remove(index);
            }
        }
        Some(listed.into_iter().filter(|held| *held <= total).sum())
    }
}

/// Removes blanks and the lines of boxed tracebacks, and lowers the case.
fn without_blanks(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, '│' | '┃' | '║' | '╭' | '╮' | '╰' | '╯' | '─' | '❱'))
        .flat_map(char::to_lowercase)
        .collect()
}

/// Cuts what follows the first message: a second one has amounts of its own.
fn first_message(compact: &str) -> &str {
    // Only "tried to allocate" opens a message; hints speak of allocating too.
    match compact.match_indices("triedtoallocate").nth(1) {
        Some((second, _)) => &compact[..second],
        None => compact,
    }
}

fn first(pattern: &Regex, compact: &str) -> Option<Bytes> {
    pattern.captures_iter(compact).find_map(|found| amount(&found))
}

/// Reads the first amount among the groups of a match.
fn amount(found: &Captures<'_>) -> Option<Bytes> {
    let mut groups = found.iter().skip(1).flatten();
    let number = groups.next()?;
    let unit = groups.next()?;
    scaled(number.as_str(), unit.as_str())
}

/// torch's units are powers of 1024 whatever they are called; a comma groups thousands.
fn scaled(number: &str, unit: &str) -> Option<Bytes> {
    let number: f64 = number.replace(',', "").parse().ok()?;
    let scale = match unit.as_bytes().first()? {
        b'b' => 1.0,
        b'k' => 1024.0,
        b'm' => 1024f64.powi(2),
        b'g' => 1024f64.powi(3),
        b't' => 1024f64.powi(4),
        _ => return None,
    };
    let bytes = number * scale;
    (bytes.is_finite() && bytes < LARGEST_BELIEVED).then(|| Bytes::from_f64(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mib(amount: f64) -> Option<Bytes> {
        Some(Bytes::from_f64(amount * 1024.0 * 1024.0))
    }

    const TODAY: &str = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 3 has a total \
        capacity of 23.50 GiB of which 310.25 MiB is free. Process 77 has 9.00 GiB memory in use. Including \
        non-PyTorch memory, this process has 14.00 GiB memory in use. Of the allocated memory 13.00 GiB is allocated \
        by PyTorch, and 512.00 KiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is \
        large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.";

    #[test]
    fn the_wording_of_today_is_read_in_full() {
        let message = parse(TODAY).unwrap();
        assert_eq!(message.tried, mib(1536.0));
        assert_eq!(message.total, mib(24064.0));
        assert_eq!(message.free, mib(310.25));
        assert_eq!(message.this_process, mib(14.0 * 1024.0));
        assert_eq!(message.allocated, mib(13.0 * 1024.0));
        assert_eq!(message.reserved_unallocated, mib(0.5));
        assert_eq!(message.processes, vec![Bytes::from_gib(9)]);
        assert!(message.neighbour_is_to_blame(None));
    }

    #[test]
    fn every_generation_names_its_amounts() {
        // (text, tried, total, free, allocated, reserved in total, reserved but unallocated), in MiB
        type Row =
            (&'static str, Option<f64>, Option<f64>, Option<f64>, Option<f64>, Option<f64>, Option<f64>);
        let rows: [Row; 9] = [
            (
                "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 1; 8.00 GiB total capacity; 6.50 GiB already \
                 allocated; 12.50 MiB free; 100.00 MiB cached)",
                Some(20.0),
                Some(8192.0),
                Some(12.5),
                Some(6656.0),
                None,
                Some(100.0),
            ),
            (
                "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 16.00 GiB total capacity; 10.00 GiB already \
                 allocated; 0 bytes free; 12.00 GiB reserved in total by PyTorch)",
                Some(2048.0),
                Some(16384.0),
                Some(0.0),
                Some(10240.0),
                Some(12288.0),
                None,
            ),
            (
                "GPU 0 has a total capacty of 40.00 GiB of which 1.00 GiB is free. Tried to allocate 3.00 GiB",
                Some(3072.0),
                Some(40960.0),
                Some(1024.0),
                None,
                None,
                None,
            ),
            (
                "NPU out of memory. Tried to allocate 4.00 GiB (NPU 0; 60.00 GiB total capacity; 50.00 GiB already \
                 allocated; 50.00 GiB current active; 1.00 GiB free; 58.00 GiB reserved in total by PyTorch)",
                Some(4096.0),
                Some(61440.0),
                Some(1024.0),
                Some(51200.0),
                Some(59392.0),
                None,
            ),
            (
                "NPU out of memory. NPUWorkspaceAllocator tried to allocate 2.00 GiB(NPU 0; 32.00 GiB total \
                 capacity; 1.00 GiB free).",
                Some(2048.0),
                Some(32768.0),
                Some(1024.0),
                None,
                None,
                None,
            ),
            (
                "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 20.00 KB, max allowed: 18.00 \
                 GB). Tried to allocate 256 bytes on private pool.",
                Some(256.0 / 1048576.0),
                None,
                None,
                Some(9216.0),
                None,
                None,
            ),
            (
                "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated     : 5.00 \
                 GiB\nRequested               : 1.00 GiB\nDevice limit            : 6.00 GiB\nFree (according to \
                 CUDA): 0 bytes",
                Some(1024.0),
                Some(6144.0),
                Some(0.0),
                Some(5120.0),
                None,
                None,
            ),
            (
                "ValueError: Free memory on device (10.00/24.00 GiB) on startup is less than desired GPU memory \
                 utilization (0.9, 21.60 GiB).",
                Some(21.6 * 1024.0),
                Some(24576.0),
                Some(10240.0),
                None,
                None,
                None,
            ),
            (
                "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 1,048,576 bytes (allocated so far: 0 \
                 bytes).",
                Some(1.0),
                None,
                None,
                None,
                None,
                None,
            ),
        ];
        for (text, tried, total, free, allocated, reserved_total, reserved_unallocated) in rows {
            let message = parse(text).unwrap();
            let of = |amount: Option<f64>| amount.and_then(mib);
            assert_eq!(message.tried, of(tried), "{text}");
            assert_eq!(message.total, of(total), "{text}");
            assert_eq!(message.free, of(free), "{text}");
            assert_eq!(message.allocated, of(allocated), "{text}");
            assert_eq!(message.reserved_total, of(reserved_total), "{text}");
            assert_eq!(message.reserved_unallocated, of(reserved_unallocated), "{text}");
        }
    }

    #[test]
    fn a_wrap_at_any_column_changes_nothing() {
        let whole = parse(TODAY);
        for width in 7..TODAY.len() {
            let letters: Vec<char> = TODAY.chars().collect();
            let wrapped: Vec<String> = letters
                .chunks(width)
                .map(|line| format!("│ {} │", line.iter().collect::<String>()))
                .collect();
            assert_eq!(parse(&wrapped.join("\n")), whole, "wrapped at {width}");
        }
    }

    #[test]
    fn amounts_of_a_second_message_are_not_mixed_in() {
        let text = "Tried to allocate 1.00 GiB. cut CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total \
                    capacity of 8.00 GiB of which 0 bytes is free.";
        let message = parse(text).unwrap();
        assert_eq!((message.tried, message.total), (mib(1024.0), None));
    }

    #[test]
    fn a_little_more_free_than_asked_does_not_acquit_the_neighbour() {
        let text = "Tried to allocate 20.00 MiB (GPU 0; 8.00 GiB total capacity; 2.50 GiB already allocated; 22.00 MiB \
                    free; 3.00 GiB reserved in total by PyTorch)";
        assert!(parse(text).unwrap().neighbour_is_to_blame(None));
        let text = "Tried to allocate 20.00 MiB (GPU 0; 8.00 GiB total capacity; 8.50 MiB already allocated; 5.00 GiB \
                    free; 4.00 MiB cached)";
        assert!(!parse(text).unwrap().neighbour_is_to_blame(None));
    }

    #[test]
    fn nonsense_of_a_driver_is_not_an_amount_and_no_neighbour() {
        let text = "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 24.00 GiB of which 0 bytes is free. \
                    Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. Process 5 has \
                    17179869184.00 GiB memory in use. Of the allocated memory 23.10 GiB is allocated by PyTorch, and \
                    100.00 MiB is reserved by PyTorch but unallocated.";
        let message = parse(text).unwrap();
        assert_eq!(message.this_process, None);
        assert!(message.processes.is_empty());
        assert!(!message.neighbour_is_to_blame(None));
    }

    #[test]
    fn the_only_listed_process_in_a_container_is_ourselves() {
        let text = "Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 20.00 MiB is free. \
                    Process 4242 has 79.90 GiB memory in use. Of the allocated memory 77.00 GiB is allocated by \
                    PyTorch, and 900.00 MiB is reserved by PyTorch but unallocated.";
        let message = parse(text).unwrap();
        assert_eq!(message.others(), Some(Bytes::ZERO));
        assert!(!message.neighbour_is_to_blame(None));
        assert!(message.is_fragmented());
    }

    #[test]
    fn a_listed_process_far_above_ours_is_a_neighbour() {
        let text = "Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 80.00 GiB of which 20.00 MiB is free. \
                    Process 4242 has 70.00 GiB memory in use. Of the allocated memory 9.00 GiB is allocated by \
                    PyTorch, and 10.00 MiB is reserved by PyTorch but unallocated.";
        assert!(parse(text).unwrap().neighbour_is_to_blame(None));
    }

    #[test]
    fn a_neighbour_that_holds_what_it_held_before_is_not_to_blame() {
        let text = "Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 100.00 MiB is free. \
                    Process 4242 has 50.00 GiB memory in use. Including non-PyTorch memory, this process has \
                    29.90 GiB memory in use.";
        let message = parse(text).unwrap();
        let blamed = |gib| message.neighbour_is_to_blame(Some(Bytes::from_gib(gib)));
        assert!(message.neighbour_is_to_blame(None), "nobody looked before");
        assert!(!blamed(50) && !blamed(49), "it grew by nothing, or by less than counts");
        assert!(blamed(10) && blamed(0), "it took what the request would have fitted in");
        assert!(!message.neighbour_is_to_blame(Some(Bytes::from_gib(60))), "it even gave some back");
    }

    #[test]
    fn a_request_above_the_whole_card_is_nobodys_fault() {
        let text = "Tried to allocate 100.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 20.00 GiB is \
                    free. Process 4242 has 50.00 GiB memory in use. Including non-PyTorch memory, this process has \
                    10.00 GiB memory in use.";
        assert!(!parse(text).unwrap().neighbour_is_to_blame(None));
    }

    #[test]
    fn text_without_an_amount_is_none() {
        for text in ["", "CUDA error: out of memory", "RuntimeError: something else", "12 GiB of data"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,400}") {
            let _ = parse(&text).map(|message| (message.others(), message.neighbour_is_to_blame(None)));
        }
    }
}
