use super::*;

fn read(text: &str) -> Diagnosis {
    diagnose(text.as_bytes(), ExitFacts::default())
}

#[test]
fn every_known_wording_is_sorted_under_its_cause() {
    let table = include_str!("../../tests/fixtures/wordings.txt");
    let mut wrong = Vec::new();
    let mut count = 0;
    for row in table.lines().filter(|row| !row.starts_with('#')) {
        let (kind, line) = row.split_once('\t').unwrap();
        let kind: Kind = serde_json::from_value(kind.into()).unwrap();
        let found = read(&line.replace("\\n", "\n"));
        count += 1;
        if found.kind != kind {
            wrong.push(format!("{kind:?} found as {:?}: {line}", found.kind));
        }
    }
    assert!(count > 350, "only {count} wordings were read");
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
}

fn exited(text: &str, code: i32) -> Diagnosis {
    diagnose(text.as_bytes(), ExitFacts { code: Some(code), ..ExitFacts::default() })
}

fn traceback(frames: &[&str], exception: &str) -> String {
    let frames: String = frames
        .iter()
        .map(|name| format!("  File \"/x/trainer.py\", line 1, in {name}\n    {name}()\n"))
        .collect();
    format!("Traceback (most recent call last):\n{frames}{exception}\n")
}

const OOM: &str = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity \
                   of 24.00 GiB of which 20.00 MiB is free. Including non-PyTorch memory, this process has 23.90 GiB \
                   memory in use. Of the allocated memory 22.00 GiB is allocated by PyTorch, and 1.20 GiB is reserved by \
                   PyTorch but unallocated.";
const STEP: &str = "{'loss': 1.5, 'grad_norm': 0.5, 'global_step/max_steps': '3/10'}\n";
const END: &str = "{'train_runtime': 9.5, 'train_loss': 1.5, 'global_step/max_steps': '10/10'}\n\
                   [INFO:swift] End time of running main: 2025-01-02 03:04:05\n";

#[test]
fn the_first_cause_over_all_ranks_wins() {
    let text = format!(
        "[rank1]: Traceback (most recent call last):\n[rank1]:   File \"a.py\", line 1, in training_step\n[rank1]: {OOM}\n\
         [rank0]: Traceback (most recent call last):\n[rank0]:   File \"a.py\", line 1, in backward\n[rank0]: \
         RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242\n\
         torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nRoot Cause (first observed failure):\n  \
         exitcode  : 1 (pid: 12)\n[1]:\n  exitcode  : -15 (pid: 13)\n"
    );
    let found = exited(&text, 1);
    assert_eq!(
        (found.kind, found.answer, found.evidence.rank),
        (Kind::DeviceOom, Answer::LowerTier, Some(1))
    );
    assert_eq!(found.phase, Some(Phase::Train));
    assert_eq!(found.evidence.line, format!("[rank1]: {OOM}"));
}

#[test]
fn words_that_a_full_disk_took_are_a_full_disk_and_words_that_are_there_count_more() {
    let full = |code| ExitFacts {
        code: Some(code),
        full_log: Some("/j/trainer.log".into()),
        ..ExitFacts::default()
    };
    // Python's own code for "standard output could not be flushed", after all of the training.
    for (text, code) in [(format!("{STEP}{END}"), 120), (STEP.to_owned(), 1), (String::new(), 1)] {
        let found = diagnose(text.as_bytes(), full(code));
        assert_eq!(
            (found.kind, found.answer, found.certain),
            (Kind::DiskFull, Answer::Stop, false),
            "{text}"
        );
        assert!(found.evidence.line.contains("/j/trainer.log"), "{}", found.evidence.line);
        assert_eq!(exited(&text, code).kind, Kind::Unknown);
    }
    let died = traceback(&["training_step"], OOM);
    assert_eq!(diagnose(died.as_bytes(), full(1)).kind, Kind::DeviceOom);
    assert_eq!(diagnose(END.as_bytes(), full(0)).kind, Kind::Success);
}

#[test]
fn of_causes_that_weigh_the_same_the_first_one_holds() {
    let full = "OSError: [Errno 28] No space left on device: 'x'";
    let raised = |rank: u32, what: &str| {
        format!("[rank{rank}]: Traceback (most recent call last):\n[rank{rank}]: {what}\n")
    };
    for (first, second, kind) in [(OOM, full, Kind::DeviceOom), (full, OOM, Kind::DiskFull)] {
        let found = exited(&format!("{}{}", raised(1, first), raised(0, second)), 1);
        assert_eq!((found.kind, found.evidence.rank), (kind, Some(1)), "{first}");
    }
}

#[test]
fn a_bug_on_one_rank_is_not_the_broken_connection_of_the_other() {
    let text = "[rank0]: RuntimeError: gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4242\n\
                [rank1]: Traceback (most recent call last):\n[rank1]: ZeroDivisionError: division by zero\n";
    assert_eq!(exited(text, 1).kind, Kind::CodeError);
}

#[test]
fn exit_0_and_the_end_of_training_are_success_whatever_was_printed() {
    let text = format!("{}{STEP}{END}", traceback(&["encode"], OOM));
    for found in [exited(&text, 0), read(&text)] {
        assert_eq!((found.kind, found.fatal, found.answer), (Kind::Success, false, Answer::None));
    }
}

#[test]
fn exit_0_never_asks_for_a_lower_tier() {
    let found = exited(&traceback(&["training_step"], OOM), 0);
    assert_eq!((found.kind, found.fatal, found.answer), (Kind::DeviceOom, false, Answer::None));
}

#[test]
fn nan_with_exit_0_is_diverged() {
    let nan = "{'loss': nan, 'grad_norm': nan, 'global_step/max_steps': '9/10'}\n";
    let found = exited(&format!("{STEP}{nan}{nan}{END}"), 0);
    assert_eq!((found.kind, found.fatal, found.answer), (Kind::Diverged, false, Answer::RecipeStable));
}

#[test]
fn a_kill_is_memory_only_when_somebody_counted_it() {
    let by = |oom_kill| ExitFacts { signal: Some(9), oom_kill, ..ExitFacts::default() };
    let verdict = |exit| {
        let found = diagnose(STEP.as_bytes(), exit);
        (found.kind, found.certain, found.answer)
    };
    assert_eq!(verdict(by(None)), (Kind::HostOom, false, Answer::Resume));
    assert_eq!(verdict(by(Some(true))), (Kind::HostOom, true, Answer::FewerWorkers));
    assert_eq!(verdict(by(Some(false))), (Kind::Interrupted, true, Answer::Resume));
    for code in [247, 137, -9] {
        let exit = ExitFacts { code: Some(code), ..ExitFacts::default() };
        assert_eq!(verdict(exit), (Kind::HostOom, false, Answer::Resume), "{code}");
    }
    for code in [241, 254, 143, 130, 129, -15, 75] {
        let exit = ExitFacts { code: Some(code), ..ExitFacts::default() };
        assert_eq!(verdict(exit), (Kind::Interrupted, true, Answer::Resume), "{code}");
    }
    let ours = ExitFacts { signal: Some(15), we_stopped_it: true, ..ExitFacts::default() };
    assert_eq!(verdict(ours), (Kind::Interrupted, true, Answer::None));
}

#[test]
fn an_oom_before_a_kill_is_an_oom() {
    let exit = ExitFacts { signal: Some(9), ..ExitFacts::default() };
    assert_eq!(diagnose(traceback(&["training_step"], OOM).as_bytes(), exit).kind, Kind::DeviceOom);
}

#[test]
fn text_of_the_data_is_no_evidence() {
    let samples = [
        format!(
            "[INFO:swift] [INPUT] <|im_start|>user\nWhy?\n{}\n[INFO:swift] [LABELS] [-100 * 3]x\n[INFO:swift] model: x\n",
            traceback(&["f"], OOM)
        ),
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{OOM}\"}}]}}\n"),
        format!("{{'query': '{OOM}'}}\n"),
        format!(
            "training example:\ninput_ids:\n[1, 2]\ninputs:\n{OOM}\n[INFO|a.py:1] 2025-01-02 03:04:05,678 >> ok\n"
        ),
        format!("run sh: `python sft.py --system {OOM}`\n"),
    ];
    for sample in samples {
        let found = exited(
            &format!("{sample}{}", traceback(&["forward"], "TypeError: forward() got an odd thing")),
            1,
        );
        assert_eq!(found.kind, Kind::CodeError, "{sample}");
        let found = read(&format!("{sample}{STEP}"));
        assert_eq!((found.kind, found.fatal), (Kind::Unknown, false), "{sample}");
    }
}

#[test]
fn talk_about_memory_is_no_shortage_of_memory() {
    for talk in [
        "If you see CUDA out of memory, reduce per_device_train_batch_size",
        "WARNING: this may lead to CUDA out of memory errors",
        "[WARNING:swift] Using eager attention might cause CUDA out of memory.",
        "The documentation says: to avoid CUDA out of memory lower the batch.",
        "Tip: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to prevent CUDA out of memory",
        " * fixes CUDA out of memory when resuming",
        "CUDA out of memory handler installed",
        "/x/a.py:12: UserWarning: device out of memory is possible with this batch",
        "user: I got torch.OutOfMemoryError: CUDA out of memory",
    ] {
        for code in [None, Some(3)] {
            let exit = ExitFacts { code, ..ExitFacts::default() };
            assert_eq!(diagnose(talk.as_bytes(), exit).kind, Kind::Unknown, "{talk}");
        }
        let text = format!("{talk}\n{}", traceback(&["f"], "NameError: name 'q' is not defined"));
        assert_eq!(exited(&text, 1).kind, Kind::CodeError, "{talk}");
    }
    for real in [
        "CUDA out of memory on rank 3",
        "ERROR: CUDA out of memory. Tried to allocate 2.00 GiB, could not go on",
        "When training: CUDA out of memory. Tried to allocate 2.00 GiB",
    ] {
        assert_eq!(exited(real, 1).kind, Kind::DeviceOom, "{real}");
    }
}

#[test]
fn an_exception_about_a_row_is_judged_without_the_row() {
    let row = "AssertionError: messages: [{'role': 'user', 'content': 'CUDA out of memory. Tried to allocate 2.00 GiB'}]";
    let found = exited(&traceback(&["_check_messages"], row), 1);
    assert_eq!((found.kind, found.answer), (Kind::BadData, Answer::Stop));
}

#[test]
fn noise_is_no_diagnosis() {
    // A small generator with a fixed seed: the same bytes on every machine.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let noise: Vec<u8> = (0..3_000_000)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect();
    for short in [&b"\x01\x02\xffxid: 7 \x03\x9c\x1e"[..], b"\x05^C\x02", b"\x02\x03ENOSPC\x01", &noise] {
        let found = diagnose(short, ExitFacts::default());
        assert_eq!((found.kind, found.fatal), (Kind::Unknown, false), "{:?}", found.evidence.line);
    }
}

#[test]
fn fragmentation_is_answered_with_segments_only_where_they_were_off() {
    let text = traceback(&["training_step"], OOM);
    for (segments, answer) in [
        (Some(false), Answer::SameTierExpandable),
        (Some(true), Answer::LowerTier),
        (None, Answer::LowerTier),
    ] {
        let exit = ExitFacts { code: Some(1), expandable_segments: segments, ..ExitFacts::default() };
        assert_eq!(diagnose(text.as_bytes(), exit).answer, answer, "{segments:?}");
    }
}

#[test]
fn the_frames_tell_the_phase_and_the_phase_the_answer() {
    for (frames, phase, answer) in [
        (&["from_pretrained", "_load_pretrained_model"][..], Phase::Load, Answer::QuantizeOrStop),
        (&["_inner_training_loop", "training_step"][..], Phase::Train, Answer::LowerTier),
        (&["_inner_training_loop", "evaluate", "prediction_step"][..], Phase::Eval, Answer::LowerEvalBatch),
        (&["_inner_training_loop", "_save_checkpoint"][..], Phase::Save, Answer::Stop),
        (&["_inner_training_loop", "_load_from_checkpoint"][..], Phase::Train, Answer::LowerTier),
    ] {
        let found = exited(&traceback(frames, OOM), 1);
        assert_eq!((found.phase, found.answer), (Some(phase), answer), "{frames:?}");
    }
}

#[test]
fn the_drivers_words_under_a_pinning_frame_mean_host_memory() {
    let text = "Traceback (most recent call last):\n  File \"a.py\", line 1, in f\n    torch.empty(9, pin_memory=True)\n\
                RuntimeError: CUDA error: out of memory\n";
    assert_eq!(exited(text, 1).kind, Kind::HostOom);
}

#[test]
fn a_caught_oom_counts_once_something_died_of_it() {
    let caught = "| WARNING: ran out of memory, skipping batch\n";
    let next = "{'loss': 1.4, 'grad_norm': 0.5, 'global_step/max_steps': '4/10'}\n";
    let found = read(&format!("{STEP}{caught}{next}"));
    assert_eq!((found.kind, found.fatal, found.answer), (Kind::DeviceOom, false, Answer::None));
    let found = exited(&format!("{caught}AttributeError: 'NoneType' object has no attribute 'data'\n"), 1);
    assert_eq!((found.kind, found.fatal), (Kind::DeviceOom, true));
}

#[test]
fn an_assert_is_the_programs_fault_and_a_lost_card_is_the_cards() {
    assert_eq!(exited("RuntimeError: CUDA error: device-side assert triggered", 1).answer, Answer::Stop);
    assert_eq!(
        exited("RuntimeError: CUDA error: uncorrectable ECC error encountered", 1).answer,
        Answer::OtherDevice
    );
}

#[test]
fn a_death_that_nothing_explains_shows_the_last_line() {
    let found = exited("starting\n\u{1b}[31mthe very last words\u{1b}[0m\n\n", 3);
    assert_eq!(
        (found.kind, found.fatal, found.certain, found.answer),
        (Kind::Unknown, true, false, Answer::Stop)
    );
    assert_eq!(found.evidence.line, "the very last words");
    let found = read("");
    assert_eq!((found.kind, found.fatal), (Kind::Unknown, false));
}

#[test]
fn a_line_of_any_length_is_read_in_bounded_memory() {
    let mut diagnoser = Diagnoser::new();
    for _ in 0..64 {
        diagnoser.push_bytes(&[b'x'; 1 << 16]);
    }
    assert!(diagnoser.head.len() + diagnoser.tail.len() <= LONGEST_LINE);
    diagnoser.push_bytes(b"\rRuntimeError: CUDA error: out of memory\n");
    let found = diagnoser.finish(ExitFacts::default());
    assert_eq!(found.kind, Kind::DeviceOom);
    assert!(found.evidence.line.len() <= LONGEST_EVIDENCE);
}

#[test]
fn a_wrapped_message_keeps_its_amounts() {
    let wrapped: Vec<String> =
        OOM.chars().collect::<Vec<_>>().chunks(98).map(|line| line.iter().collect()).collect();
    let found = exited(&format!("{}\nsteps:   0%|   | 0/10 [00:09<?, ?it/s]\n", wrapped.join("\n")), 1);
    assert_eq!(found.evidence.free_bytes, Some(mhtrain_sizing::units::Bytes::from_mib(20)));
    assert_eq!(found.evidence.total_bytes, Some(mhtrain_sizing::units::Bytes::from_gib(24)));
}

/// Pieces that make the states of the reader change.
fn pieces() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(OOM.as_bytes().to_vec()),
        Just(STEP.as_bytes().to_vec()),
        Just(END.as_bytes().to_vec()),
        Just(b"Traceback (most recent call last):\n".to_vec()),
        Just(b"  File \"a.py\", line 1, in evaluate\n".to_vec()),
        Just(b"[rank3]: KeyError: 'x'\n".to_vec()),
        Just(b"[INFO:swift] [INPUT] text\n".to_vec()),
        Just(b"\rTrain:  20%|##   | 2/10 [00:05<00:23,  2.94s/it]".to_vec()),
        Just(b"\x1b[31m\n".to_vec()),
        Just("\u{2502} wrapped 11.9\n".as_bytes().to_vec()),
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest::proptest! {
    #[test]
    fn any_bytes_in_any_chunks_give_one_verdict(
        bytes in pieces(),
        cuts in proptest::collection::vec(0usize..4000, 0..6),
        code in proptest::option::of(-40i32..300),
    ) {
        let exit = ExitFacts { code, ..ExitFacts::default() };
        let whole = diagnose(&bytes, exit.clone());
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.sort_unstable();
        let mut diagnoser = Diagnoser::new();
        let mut start = 0;
        for cut in cuts {
            diagnoser.push_bytes(&bytes[start..cut]);
            start = cut;
        }
        diagnoser.push_bytes(&bytes[start..]);
        proptest::prop_assert_eq!(diagnoser.finish(exit), whole);
    }
}
