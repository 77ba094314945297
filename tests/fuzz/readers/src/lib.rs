//! What reads bytes that somebody else wrote, and what must hold whatever they are?
//!
//! A function for each reader. None of them may panic; what they assert is what the rest of the product takes for granted.
//! `cargo fuzz` calls them with bytes that it makes up, the test below with those that it found worth keeping.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a broken promise is to be a panic")]

#[path = "../../../../crates/mhtraind/src/config.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "the binary has no library: its readers are compiled here once more"
)]
mod config;
#[path = "../../../../crates/mhtraind/src/failure.rs"]
#[allow(dead_code, unreachable_pub, reason = "as above")]
mod failure;
#[path = "../../../../crates/mhtraind/src/api/types.rs"]
#[allow(dead_code, unreachable_pub, reason = "as above")]
mod types;

use std::path::Path;

use mhtrain_job::event::{JobEvent, Record, read_journal};
use mhtrain_job::receipt::{Receipt, render};
use mhtrain_job::spec::JobSpec;
use mhtrain_job::state::JobState;
use mhtrain_sizing::estimate_request::EstimateRequest;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::units::Bytes;
use mhtrain_supervisor::record::RecordDir;
use mhtrain_swift::checkpoint::TrainerState;
use mhtrain_swift::companion::Telemetry;
use mhtrain_swift::conversation::RowForm;
use mhtrain_swift::diagnosis::{Diagnoser, ExitFacts, diagnose};
use mhtrain_swift::import::import;
use mhtrain_swift::progress::{StderrWatch, TrainerLog};
use mhtrain_swift::template::{SpecialTokens, TemplateBook};
use mhtrain_swift::{oom_message, proof};
use serde_json::{Value, json};

/// A reader, as a function of what it reads.
pub type Reader = fn(&[u8]);

/// Every reader, by the name of its fuzz target.
pub const READERS: [(&str, Reader); 12] = [
    ("api_request", api_request),
    ("companion_report", companion_report),
    ("config_json", config_json),
    ("data_row", data_row),
    ("job_json", job_json),
    ("journal_and_receipt", journal_and_receipt),
    ("oom_message", oom_message),
    ("record_files", record_files),
    ("settings", settings),
    ("shell_block", shell_block),
    ("trainer_log", trainer_log),
    ("trainer_state", trainer_state),
];

/// The body of `POST /v1/jobs`, and an answer of the daemon as a client reads it.
pub fn api_request(bytes: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<types::SubmitRequest>(bytes) {
        check_job(JobSpec::from_value(&request.job));
    }
    let Ok(answer) = serde_json::from_slice::<Value>(bytes) else { return };
    if let Some(failure) = failure::Failure::from_json(&answer) {
        assert_eq!(
            failure::Failure::from_json(&failure.to_json()).map(|it| it.message),
            Some(failure.message)
        );
    }
    let _ = serde_json::from_value::<types::JobList>(answer.clone());
    let _ = serde_json::from_value::<types::SubmitAnswer>(answer);
}

/// job.json.
pub fn job_json(bytes: &[u8]) {
    check_job(JobSpec::parse(bytes));
}

fn check_job(read: Result<JobSpec, mhtrain_job::spec::SpecError>) {
    match read {
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.code().is_empty(), "{:?}", error.help())
        }
        Ok(spec) => {
            // The daemon stores a job as it was understood, and reads it again when it starts.
            let stored = spec.to_json();
            let again = JobSpec::from_value(&stored).expect("a job that was taken can be read again");
            assert_eq!(again.to_json(), stored);
            let _ = (spec.check_supported(), spec.check_foreground(), spec.max_steps());
        }
    }
}

/// mhtraind.toml and tiers.toml.
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = config::Config::parse(text, Path::new("fuzz.toml")) {
        assert!(config.sizing.oom_risk > 0.0 && config.sizing.oom_risk < 1.0);
        assert!(!config.trainer.command.is_empty());
    }
    match TierBook::from_toml(text) {
        Err(error) => assert!(!error.to_string().is_empty(), "{:?}", error.help()),
        Ok(book) => {
            let model =
                Model::resolve("Qwen/Qwen2.5-7B-Instruct", None, None).expect("it is in the catalogue");
            let _ = (book.class_of(&model), book.run_advice(&model, 8));
        }
    }
}

/// config.json of a model, and a line of `mhtraind estimate`.
pub fn config_json(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(request) = EstimateRequest::parse(text) {
        let _ = request.answer(None);
    }
    let Ok(config) = serde_json::from_str::<Value>(text) else { return };
    if let Ok(model) = Model::resolve("fuzz", Some(&config), None) {
        let line = json!({"config_object": config, "micro_batch": 3, "max_length": 777, "attn_impl": "sdpa"})
            .to_string();
        if let Ok(answer) = EstimateRequest::parse(&line).and_then(|request| request.answer(None)) {
            let estimate = answer.estimate;
            assert!(estimate.low_bytes <= estimate.device_peak_bytes);
            assert!(estimate.device_peak_bytes <= estimate.high_bytes);
        }
        let _ = model.parameters();
    }
}

/// What a trainer prints, and logging.jsonl. The first byte says where the text is cut: how it comes must not matter.
pub fn trainer_log(bytes: &[u8]) {
    let Some((cut, text)) = bytes.split_first() else { return };
    let (first, second) = text.split_at(usize::from(*cut).min(text.len()));
    let exit = ExitFacts { code: Some(i32::from(*cut & 3)), ..ExitFacts::default() };
    let mut diagnoser = Diagnoser::new();
    diagnoser.push_bytes(first);
    let _ = diagnoser.diverged_for_good();
    diagnoser.push_bytes(second);
    assert_eq!(diagnoser.finish(exit.clone()), diagnose(text, exit));

    let (mut log, mut whole) = (TrainerLog::new(), TrainerLog::new());
    log.push_bytes(first);
    log.push_bytes(second);
    whole.push_bytes(text);
    assert_eq!(format!("{log:?}"), format!("{whole:?}"));
    let _ = (log.latest(), log.summary(), log.last_finite_step(), log.not_finite_in_a_row());

    let (mut watch, mut whole) = (StderrWatch::new(), StderrWatch::new());
    watch.push_bytes(first);
    watch.push_bytes(second);
    whole.push_bytes(text);
    assert_eq!(format!("{watch:?}"), format!("{whole:?}"));
    let rows = watch.train_rows().unwrap_or(1);
    let _ = (watch.bar(), watch.rows_dropped(), proof::steps_per_epoch(rows, 8, 4, 1));
}

/// The last line of an out-of-memory error of torch.
pub fn oom_message(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Some(message) = oom_message::parse(&text) else { return };
    for before in [None, Some(Bytes::ZERO), Some(Bytes::from_gib(40))] {
        let _ = message.neighbour_is_to_blame(before);
    }
    let _ = (message.others(), message.is_fragmented(), message.figures());
    let diagnosis = diagnose(bytes, ExitFacts { code: Some(1), ..ExitFacts::default() });
    assert!(diagnosis.evidence.line.len() <= 8 << 10, "evidence is short");
}

/// trainer_state.json of a checkpoint, and its repair.
pub fn trainer_state(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(state) = TrainerState::parse(text) else { return };
    if let Ok(repaired) = state.with_train_batch_size(7) {
        let again = TrainerState::parse(&repaired).expect("a repaired state can be read");
        assert_eq!(again.train_batch_size, Some(7));
        assert_eq!((again.global_step, again.max_steps), (state.global_step, state.max_steps));
    }
}

/// What the companion reports. The first byte says where the text is cut.
pub fn companion_report(bytes: &[u8]) {
    let Some((cut, text)) = bytes.split_first() else { return };
    let (first, second) = text.split_at(usize::from(*cut).min(text.len()));
    let (mut telemetry, mut whole) = (Telemetry::new(), Telemetry::new());
    telemetry.push_bytes(first);
    telemetry.push_bytes(second);
    whole.push_bytes(text);
    assert_eq!(format!("{telemetry:?}"), format!("{whole:?}"));
    let _ = (telemetry.median_step_seconds(), telemetry.why_silent(), telemetry.cures_row_order());
    let _ = (telemetry.times(), telemetry.peaks(), telemetry.preflight(), telemetry.rescue());
    if let Some(rows) = telemetry.rows() {
        let _ = proof::steps_per_epoch(rows, 8, 4, 1);
    }
}

/// The files by which recorder and daemon know of each other. The first byte says which of them.
pub fn record_files(bytes: &[u8]) {
    let Some((which, content)) = bytes.split_first() else { return };
    let names = ["launch.json", "recorder.json", "trainer.json", "exit.json", "recorder.log"];
    let name = names[usize::from(*which) % names.len()];
    // On a disk in memory where there is one: this runs very often.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    std::fs::write(dir.path().join(name), content).unwrap();
    let record = RecordDir::open(dir.path()).unwrap();
    let _ = (record.launch(), record.exit(), record.complaints());
    if let Ok(Some(recorder)) = record.recorder() {
        let _ = recorder.is_alive();
    }
    if let Ok(Some(trainer)) = record.trainer() {
        let _ = trainer.identity.is_alive();
    }
}

/// journal.jsonl, the events of the store, and receipt.json.
pub fn journal_and_receipt(bytes: &[u8]) {
    if let Ok(receipt) = serde_json::from_slice::<Receipt>(bytes) {
        let _ = render(&receipt);
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(records) = read_journal(text) else { return };
    let lines: String = records.iter().map(Record::to_line).collect();
    let again = read_journal(&lines).expect("what was read can be written and read again");
    assert_eq!(again, records);
    let events: Vec<&JobEvent> = records.iter().map(|record| &record.event).collect();
    if JobState::fold(events.iter().copied()).is_ok() {
        let _ = render(&Receipt::from_events(Some(7), &records));
        let _ = mhtrain_job::take_over::goes_on(&records);
    }
}

/// A shell block that calls `swift sft`.
pub fn shell_block(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for pin in [false, true] {
        match import(text, pin) {
            Err(error) => assert!(!error.to_string().is_empty(), "{:?}", error.help()),
            Ok(imported) => drop(JobSpec::from_value(&imported.job)),
        }
    }
}

/// A row of a data set.
pub fn data_row(bytes: &[u8]) {
    let Ok(Value::Object(row)) = serde_json::from_slice::<Value>(bytes) else { return };
    let form = RowForm::of_columns(row.keys().map(String::as_str));
    let Ok(conversation) = form.conversation(&Value::Object(row)) else { return };
    let _ = conversation.rounds();
    if let Some(template) = TemplateBook::builtin().named("qwen2_5") {
        let _ = template.render(&conversation, &SpecialTokens::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_worth_keeping_is_still_read() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("corpus");
        let mut bytes_of_all = 0;
        for (name, reader) in READERS {
            let files = std::fs::read_dir(corpus.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut count = 0;
            for file in files {
                let bytes = std::fs::read(file.unwrap().path()).unwrap();
                bytes_of_all += bytes.len();
                reader(&bytes);
                // Cut off anywhere, as by a crash.
                reader(&bytes[..bytes.len() / 2]);
                count += 1;
            }
            assert!(count > 0, "{name} has a corpus");
        }
        assert!(bytes_of_all < 300 << 10, "the corpus is small: {bytes_of_all} bytes");
    }

    #[test]
    fn each_reader_has_a_target() {
        let targets = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz_targets");
        for (name, _) in READERS {
            assert!(targets.join(format!("{name}.rs")).exists(), "{name}");
        }
        assert_eq!(std::fs::read_dir(targets).unwrap().count(), READERS.len());
    }
}
