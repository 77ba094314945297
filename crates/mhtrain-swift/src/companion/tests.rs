//! Over telemetry that the companion wrote inside real ms-swift (`tests/fixtures/companion/`: tiny Qwen2 on CPU, 320
//! rows, 8 x 4, two epochs; the out-of-memory errors are the demo plugin's; the output directory is written `/out`).

use super::*;

fn telemetry(text: &str) -> Telemetry {
    let mut telemetry = Telemetry::new();
    telemetry.push_bytes(text.as_bytes());
    telemetry
}

/// Returns each line's recordings with its versions: an OOM in step 17, its resume, a preflight OOM, a stop.
fn recorded(name: &str) -> [(Telemetry, Dialect, BTreeMap<String, String>); 2] {
    let texts = match name {
        "oom" => [
            include_str!("../../tests/fixtures/companion/3.12.6/oom.jsonl"),
            include_str!("../../tests/fixtures/companion/4.6.0/oom.jsonl"),
        ],
        "resumed" => [
            include_str!("../../tests/fixtures/companion/3.12.6/resumed.jsonl"),
            include_str!("../../tests/fixtures/companion/4.6.0/resumed.jsonl"),
        ],
        "preflight-oom" => [
            include_str!("../../tests/fixtures/companion/3.12.6/preflight-oom.jsonl"),
            include_str!("../../tests/fixtures/companion/4.6.0/preflight-oom.jsonl"),
        ],
        "stopped" => [
            include_str!("../../tests/fixtures/companion/3.12.6/stopped.jsonl"),
            include_str!("../../tests/fixtures/companion/4.6.0/stopped.jsonl"),
        ],
        other => panic!("no recording `{other}`"),
    };
    let pairs = [("3.12.6", "4.57.6"), ("4.6.0", "5.19.0")];
    std::array::from_fn(|i| {
        let (swift, transformers) = pairs[i];
        let versions = [("ms-swift", swift), ("transformers", transformers), ("swanlab", "0.6")]
            .map(|(name, version)| (name.to_owned(), version.to_owned()));
        (
            telemetry(texts[i]),
            Dialect::for_versions(Some(swift), Some(transformers)).0,
            BTreeMap::from(versions),
        )
    })
}

#[test]
fn a_run_out_of_memory_tells_rows_steps_and_its_rescue() {
    for (telemetry, ..) in recorded("oom") {
        assert_eq!(telemetry.rows(), Some(320));
        let begin = telemetry.begin().unwrap();
        assert_eq!((begin.micro_batch, begin.accumulation, begin.max_steps), (8, 4, 20));
        assert_eq!(
            telemetry.rescue(),
            Some(&Rescue::Saved { step: 16, path: "/out/oom/checkpoint-16".into() })
        );
        assert_eq!((telemetry.times().step, telemetry.times().steps), (16, 16));
        assert!(matches!(telemetry.preflight(), Some(Preflight::Passed { rows: 8, peaks: None, .. })));
        assert_eq!((telemetry.peaks(), telemetry.saved_step()), (None, Some(15)));
        assert_eq!((telemetry.skipped_lines(), telemetry.errors().len()), (0, 0));
    }
}

#[test]
fn the_companion_takes_less_than_half_a_percent() {
    for (telemetry, ..) in recorded("oom") {
        let time = telemetry.own_time().unwrap();
        assert!(time.own_seconds < 0.005 * time.step_seconds, "{time:?}");
    }
}

#[test]
fn a_resumed_run_begins_where_the_rescue_ended_with_the_new_micro_batch() {
    for (telemetry, ..) in recorded("resumed") {
        let begin = telemetry.begin().unwrap();
        assert_eq!((begin.step, begin.micro_batch, begin.accumulation), (16, 4, 8));
        assert_eq!((telemetry.times().step, telemetry.times().steps), (20, 4));
    }
}

#[test]
fn a_preflight_out_of_memory_ends_before_the_first_step() {
    for (telemetry, ..) in recorded("preflight-oom") {
        assert_eq!(telemetry.preflight(), Some(&Preflight::OutOfMemory));
        assert_eq!(telemetry.rescue(), Some(&Rescue::Needless { step: 0 }));
        assert_eq!(telemetry.times().steps, 0);
    }
}

#[test]
fn a_stop_is_told_from_an_end() {
    for (telemetry, ..) in recorded("stopped") {
        assert_eq!((telemetry.stopped_at(), telemetry.saved_step()), (Some(1), Some(1)));
    }
    for (telemetry, ..) in recorded("resumed") {
        assert_eq!(telemetry.stopped_at(), None);
    }
}

#[test]
fn the_row_order_is_trusted_where_the_cure_was_alive_in_the_same_versions() {
    let [(three, old, versions), (four, new, new_versions)] = recorded("oom");
    assert!(replays_first_epoch(&old, &versions, []), "nobody has seen the cure yet");
    assert!(!replays_first_epoch(&old, &versions, [&three]));
    assert!(replays_first_epoch(&old, &versions, [&four]), "that was another trainer");
    let mut other = versions.clone();
    other.insert("transformers".to_owned(), "4.56.0".to_owned());
    assert!(replays_first_epoch(&old, &other, [&three]));
    assert!(!replays_first_epoch(&new, &new_versions, []), "4.6.0 needs no cure");
    // Loaded, and never heard of again: the wrap may have failed.
    let loaded = include_str!("../../tests/fixtures/companion/3.12.6/oom.jsonl").lines().next().unwrap();
    assert!(replays_first_epoch(&old, &versions, [&telemetry(&format!("{loaded}\n"))]));
}

#[test]
fn bytes_may_be_cut_anywhere_and_a_torn_last_line_waits() {
    let text = include_str!("../../tests/fixtures/companion/4.6.0/oom.jsonl");
    let whole = telemetry(text);
    let mut piecewise = Telemetry::new();
    for piece in text.as_bytes().chunks(7) {
        piecewise.push_bytes(piece);
    }
    assert_eq!(piecewise.times(), whole.times());
    let torn = telemetry(&text[..text.len() - 9]);
    assert_eq!((torn.own_time(), torn.skipped_lines()), (None, 0));
    assert_eq!(torn.rescue(), whole.rescue());
}

#[test]
fn unknown_lines_are_ignored() {
    let telemetry = telemetry(
        "{\"v\": 1, \"kind\": \"weather\", \"step\": 3}\n\
         {\"v\": 2, \"kind\": \"begin\", \"step\": 0}\n\
         not json\n[1]\n\n\
         {\"v\": 1, \"kind\": \"step\"}\n\
         {\"v\": 1, \"kind\": \"saved\", \"step\": 5, \"more\": true}\n",
    );
    assert_eq!((telemetry.saved_step(), telemetry.begin()), (Some(5), None));
    assert_eq!(telemetry.skipped_lines(), 4);
    assert_eq!(telemetry.why_silent(), "it said nothing");
}

/// Written by hand: no machine of ours has CUDA.
#[test]
fn peaks_and_retries_are_read_where_there_are_any() {
    let telemetry = telemetry(
        "{\"v\": 1, \"kind\": \"step\", \"step\": 2, \"steps\": 2, \"seconds\": 1.5, \"allocated_peak\": 1048576, \
         \"reserved_peak\": 2097152, \"retries\": 3}\n\
         {\"v\": 1, \"kind\": \"step\", \"step\": 3, \"steps\": 1, \"seconds\": 1.0}\n",
    );
    let peaks = telemetry.peaks().unwrap();
    assert_eq!((peaks.allocated, peaks.reserved, peaks.retries), (Bytes::from_mib(1), Bytes::from_mib(2), 3));
    assert_eq!(telemetry.times(), StepTimes { step: 3, steps: 3, seconds: 2.5 });
}

#[test]
fn an_error_is_why_it_is_silent_and_another_ranks_rescue_stands() {
    let broken = telemetry(
        "{\"v\": 1, \"kind\": \"error\", \"where\": \"install\", \"error\": \"RuntimeError: no\", \"lines\": [3]}\n",
    );
    assert_eq!(broken.why_silent(), "install: RuntimeError: no");
    let two = telemetry(
        "{\"v\": 1, \"kind\": \"rescued\", \"step\": 6, \"path\": \"/out/checkpoint-6\", \"rank\": 1}\n\
         {\"v\": 1, \"kind\": \"rescue_begin\", \"step\": 6, \"bytes\": 9, \"rank\": 0}\n\
         {\"v\": 1, \"kind\": \"rescue_failed\", \"step\": 6, \"error\": \"OSError: not empty\", \"rank\": 0}\n",
    );
    assert!(matches!(two.rescue(), Some(Rescue::Saved { step: 6, .. })));
}

#[test]
fn the_text_speaks_of_the_same_names_and_version() {
    for name in [TELEMETRY_VARIABLE, STOP_VARIABLE, OFF_VARIABLE, ROW_ORDER] {
        assert!(SOURCE.contains(name), "{name}");
    }
    assert!(SOURCE.contains(&format!("\nPROTOCOL = {PROTOCOL}\n")));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_without_a_panic(text in "(\\PC|\n){0,200}") {
        let _ = telemetry(&text).times();
    }
}

#[test]
fn the_time_of_a_step_is_the_median_and_leaves_the_first_line_out() {
    let line = |steps: u64, seconds: f64| {
        format!("{{\"v\": 1, \"kind\": \"step\", \"step\": 1, \"steps\": {steps}, \"seconds\": {seconds}}}\n")
    };
    let first = line(1, 90.0);
    assert_eq!(telemetry(&first).median_step_seconds(), None);
    // Eight steps of 2 s, one of 40 s in the middle, two of 3 s.
    let text = first + &line(4, 8.0) + &line(1, 40.0) + &line(2, 6.0) + &line(4, 8.0);
    assert_eq!(telemetry(&text).median_step_seconds(), Some(2.0));
}

#[test]
fn counts_that_no_trainer_can_have_are_no_panic() {
    let line =
        "{\"v\": 1, \"kind\": \"step\", \"step\": 1, \"steps\": 18446744073709551615, \"seconds\": 1e308}\n";
    let mut telemetry = Telemetry::new();
    telemetry.push_bytes(line.repeat(3).as_bytes());
    assert_eq!(telemetry.times().steps, u64::MAX);
}
