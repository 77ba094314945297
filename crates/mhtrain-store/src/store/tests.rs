use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use mhtrain_job::event::JournalError;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::job::Order;
use crate::observations::OBSERVATIONS_KEPT;
use crate::series::SAMPLES_KEPT;
use crate::testing::{failed, life, new_job, record};

fn open(dir: &TempDir) -> Store {
    Store::open(dir.path()).unwrap()
}

fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    (dir, store)
}

/// Submits a job and takes it through `events` of the life.
fn live(store: &mut Store, events: usize) -> JobId {
    let id = store.submit(&new_job(None)).unwrap().id;
    for record in &life()[1..events] {
        store.append(id, record).unwrap();
    }
    id
}

fn states(records: &[Record]) -> JobState {
    JobState::fold(records.iter().map(|record| &record.event)).unwrap()
}

/// Opens the files of a store without the store.
fn raw(dir: &TempDir) -> Connection {
    Connection::open(dir.path().join(crate::directory::DATABASE)).unwrap()
}

#[test]
fn a_life_is_the_same_after_opening_again_whenever_that_is() {
    for events in 1..=life().len() {
        let (dir, mut store) = store();
        let id = live(&mut store, events);
        let before = (store.events(id).unwrap(), store.state(id).unwrap(), store.job(id).unwrap());
        drop(store);
        let store = open(&dir);
        assert_eq!(before, (store.events(id).unwrap(), store.state(id).unwrap(), store.job(id).unwrap()));
        assert_eq!(before.0, life()[..events]);
        assert_eq!(before.1, states(&life()[..events]));
        let row = store.job(id).unwrap().row;
        assert_eq!((row.state.as_str(), row.reason), (before.1.name(), before.1.reason()));
        assert_eq!(
            (row.attempts, row.device.as_deref(), row.is_final),
            (before.1.attempts(), Some("6"), events == 11)
        );
        assert_eq!(store.unfinished().unwrap().len(), usize::from(events < 11));
    }
}

#[test]
fn an_illegal_event_changes_nothing_and_does_not_lose_the_others() {
    let (dir, mut store) = store();
    let (a, b) = (live(&mut store, 1), live(&mut store, 3));
    let unknown = JobId::new(99).unwrap();
    let events = [
        (a, life()[1].clone()),
        (a, life()[4].clone()),
        (unknown, life()[1].clone()),
        (b, life()[3].clone()),
        (b, life()[4].clone()),
        (a, life()[2].clone()),
    ];
    let results = store.append_all(&events).unwrap();
    let names: Vec<_> =
        results.iter().map(|result| result.as_ref().map_or("refused", JobState::name)).collect();
    assert_eq!(names, ["queued", "refused", "refused", "starting", "running", "waiting"]);
    assert!(matches!(results[1], Err(StoreError::Illegal { id, .. }) if id == a));
    assert!(matches!(results[2], Err(StoreError::NoSuchJob { id }) if id == unknown));
    drop(store);
    let store = open(&dir);
    assert_eq!(store.events(a).unwrap(), life()[..3]);
    assert_eq!(store.events(b).unwrap(), life()[..5]);

    let mut later = life()[3].clone();
    later.v = 2;
    let mut store = store;
    assert!(matches!(store.append(a, &later), Err(StoreError::RecordVersion { found: 2 })));
    assert_eq!(store.events(a).unwrap().len(), 3);
}

#[test]
fn a_job_that_is_over_takes_no_event() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 11);
    let error = store.append(id, &failed()).unwrap_err();
    assert!(matches!(error, StoreError::Illegal { .. }), "{error:?}");
    assert_eq!(store.state(id).unwrap().name(), "succeeded");
    assert!(store.known.is_empty(), "what is over is not kept in memory");
}

#[test]
fn the_same_key_is_the_same_job_of_that_owner_also_after_opening_again() {
    let (dir, mut store) = store();
    let first = store.submit(&new_job(Some("k"))).unwrap();
    assert!(!first.existed);
    drop(store);
    let mut store = open(&dir);
    assert_eq!(store.submit(&new_job(Some("k"))).unwrap(), Submitted { id: first.id, existed: true });
    let other = NewJob { record: record(&json!({"event": "submitted", "spec": {}})), ..new_job(Some("k")) };
    let error = store.submit(&other).unwrap_err();
    assert!(matches!(&error, StoreError::KeyReused { id, .. } if *id == first.id), "{error}");
    let mut theirs = new_job(Some("k"));
    theirs.owner.uid = 1001;
    assert!(!store.submit(&theirs).unwrap().existed);
    assert!(!store.submit(&new_job(None)).unwrap().existed);
    assert!(!store.submit(&new_job(None)).unwrap().existed);
    assert_eq!(store.jobs(&Filter::default()).unwrap().len(), 4);

    // Twice in one transaction: the second sees the first.
    let new = new_job(Some("both"));
    let results = store.write_all(&[Write::Submit(&new), Write::Submit(&new)]).unwrap();
    let existed: Vec<_> = results
        .iter()
        .map(|result| matches!(result, Ok(Written::Submitted(Submitted { existed: true, .. }))))
        .collect();
    assert_eq!(existed, [false, true]);
}

#[test]
fn a_job_begins_with_its_submission() {
    let (_dir, mut store) = store();
    let error = store.submit(&NewJob { record: failed(), ..new_job(None) }).unwrap_err();
    assert!(matches!(error, StoreError::BadBeginning { .. }), "{error}");
    assert_eq!(store.jobs(&Filter::default()).unwrap(), []);
}

#[test]
fn only_what_is_over_can_be_removed_and_its_number_is_not_used_again() {
    let (dir, mut store) = store();
    let id = live(&mut store, 3);
    let error = store.remove(id).unwrap_err();
    assert_eq!(error.to_string(), "job 1 is waiting: only jobs that are over can be removed");
    store.note_samples(id, 1, &[Sample::default()]).unwrap();
    store.append(id, &failed()).unwrap();
    store.remove(id).unwrap();
    assert!(matches!(store.job(id), Err(StoreError::NoSuchJob { .. })));
    assert!(matches!(store.remove(id), Err(StoreError::NoSuchJob { .. })));
    for table in ["jobs", "events", "contexts", "samples"] {
        let sql = format!("SELECT count(*) FROM {table}");
        let rows: i64 = store.database.connection().query_row(&sql, (), |row| row.get(0)).unwrap();
        assert_eq!(rows, 0, "{table}");
    }
    drop(store);
    assert_eq!(live(&mut open(&dir), 1).get(), 2);
}

#[test]
fn listings_filter_and_page_in_both_orders() {
    let (_dir, mut store) = store();
    for events in [11, 3, 11, 1] {
        live(&mut store, events);
    }
    let mut theirs = new_job(None);
    theirs.owner.uid = 1001;
    store.submit(&theirs).unwrap();
    let list = |filter: Filter| -> Vec<u64> {
        store.jobs(&filter).unwrap().iter().map(|row| row.id.get()).collect()
    };
    let all = Filter::default();
    assert_eq!(list(all.clone()), [1, 2, 3, 4, 5]);
    assert_eq!(list(Filter { order: Order::NewestFirst, limit: 2, ..all.clone() }), [5, 4]);
    assert_eq!(
        list(Filter { order: Order::NewestFirst, limit: 2, after: JobId::new(4), ..all.clone() }),
        [3, 2]
    );
    assert_eq!(list(Filter { after: JobId::new(3), ..all.clone() }), [4, 5]);
    assert_eq!(list(Filter { owner_uid: Some(1001), ..all.clone() }), [5]);
    let states = vec!["succeeded".to_owned(), "waiting".to_owned()];
    assert_eq!(list(Filter { states: states.clone(), ..all.clone() }), [1, 2, 3]);
    assert_eq!(list(Filter { states, owner_uid: Some(1001), ..all }), [0_u64; 0]);
}

#[test]
fn the_device_is_the_wish_until_another_is_noted() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 1);
    store.set_device(id, Some("GPU-6a")).unwrap();
    assert_eq!(store.job(id).unwrap().row.device.as_deref(), Some("GPU-6a"));
    store.set_device(id, None).unwrap();
    assert_eq!(store.job(id).unwrap().row.device.as_deref(), Some("6"));
}

#[test]
fn flags_are_remembered() {
    let (dir, mut store) = store();
    assert_eq!(store.get_flag("drained").unwrap(), None);
    store.set_flag("drained", Some("maintenance")).unwrap();
    drop(store);
    let mut store = open(&dir);
    assert_eq!(store.get_flag("drained").unwrap().as_deref(), Some("maintenance"));
    store.set_flag("drained", None).unwrap();
    assert_eq!(store.get_flag("drained").unwrap(), None);
}

#[test]
fn the_environment_of_a_job_is_not_in_its_debug_text() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 1);
    let text = format!("{:?} {:?} {:?}", new_job(None), store.job(id).unwrap(), store.unfinished().unwrap());
    assert!(!text.contains("HF_HOME"), "{text}");
    assert_eq!(store.job(id).unwrap().context, new_job(None).context);
}

#[test]
fn samples_are_thinned_out_evenly_and_the_ends_stay() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 5);
    let sample =
        |step: u64| Sample { at_ms: 7, step, loss: Some(1.0), vram_bytes: Some(step), ..Sample::default() };
    let total = 3 * SAMPLES_KEPT as u64 + 7;
    for first in (0..total).step_by(50) {
        let samples: Vec<_> = (first..total.min(first + 50)).map(sample).collect();
        store.note_samples(id, 1, &samples).unwrap();
        let steps: Vec<_> =
            store.series(id, Some(1)).unwrap().iter().map(|point| point.sample.step).collect();
        assert!(steps.len() <= SAMPLES_KEPT);
        assert_eq!((steps[0], steps[steps.len() - 1]), (0, samples[samples.len() - 1].step));
    }
    let steps: Vec<_> = store.series(id, None).unwrap().iter().map(|point| point.sample.step).collect();
    assert!(steps.len() > SAMPLES_KEPT / 3, "{}", steps.len());
    // Up to the last thinning all distances are one power of two; after it they are 1.
    let gaps: Vec<_> = steps.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let widest = gaps[0];
    assert!(widest.is_power_of_two() && widest > 1);
    let even = gaps.iter().take_while(|gap| **gap == widest).count();
    assert!(gaps[even + 1..].iter().all(|gap| *gap == 1), "{:?}", &gaps[even..]);
    assert!(even > SAMPLES_KEPT / 3, "{even}");

    store.note_samples(id, 2, &[Sample { loss: Some(f64::NAN), ..sample(1) }]).unwrap();
    assert_eq!(store.series(id, Some(2)).unwrap()[0].sample.loss, None);
    let unknown = JobId::new(99).unwrap();
    assert!(matches!(store.note_samples(unknown, 1, &[sample(1)]), Err(StoreError::NoSuchJob { .. })));
}

#[test]
fn events_are_written_with_fsync_also_after_samples() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 5);
    let level = |store: &Store| -> i64 {
        store.database.connection().query_row("PRAGMA synchronous", (), |row| row.get(0)).unwrap()
    };
    store.note_samples(id, 1, &[Sample::default()]).unwrap();
    assert_eq!(level(&store), 1);
    store.append(id, &life()[5]).unwrap();
    assert_eq!(level(&store), 2);
}

#[test]
fn a_log_whose_fsync_failed_is_begun_anew_before_anything_else_is_written() {
    let (dir, mut store) = store();
    let id = live(&mut store, 3);
    let log = || fs::metadata(dir.path().join("mhtraind.db-wal")).unwrap().len();
    let before = log();
    store.database.distrust_log();
    store.append(id, &life()[3]).unwrap();
    assert!(log() < before / 2, "{before} bytes before, {}: what was there is in the database", log());
    store.append(id, &life()[4]).unwrap();
    assert_eq!(store.events(id).unwrap(), life()[..5]);
    let reader = raw(&dir);
    let mut statement = reader.prepare("SELECT count(*) FROM events").unwrap();
    let mut rows = statement.query(()).unwrap();
    // Somebody reads from the log that would have to be cut.
    assert!(rows.next().unwrap().is_some());
    store.database.distrust_log();
    assert!(matches!(store.append(id, &life()[5]), Err(StoreError::Locked { .. })));
    drop(rows);
    store.append(id, &life()[5]).unwrap();
}

#[test]
fn a_failed_fsync_of_the_database_is_seen_and_not_taken_for_a_copy_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().canonicalize().unwrap().join("state");
    let library = std::env::current_exe().unwrap();
    let library = library.ancestors().map(|dir| dir.join("libdisk_sim.so")).find(|path| path.exists());
    let mut child = child_process(&state, "database-fsync-fails");
    child.env("LD_PRELOAD", library.expect("cargo builds it with these tests"));
    child.env("DISK_SIM_FILE", state.with_file_name("faults"));
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("all as expected"), "{text}");
}

#[test]
fn the_log_does_not_grow_without_end() {
    let (dir, mut store) = store();
    let log = || fs::metadata(dir.path().join("mhtraind.db-wal")).unwrap().len();
    let mut most = 0;
    for _ in 0..150 {
        live(&mut store, 3);
        most = most.max(log());
    }
    assert!((2 << 20..6 << 20).contains(&most), "{most} bytes");
}

#[test]
fn files_are_private_under_any_umask() {
    // The umask belongs to the whole process, so another one is asked.
    let dir = tempfile::tempdir().unwrap();
    for (name, umask) in [("open", "000"), ("closed", "077")] {
        let state = dir.path().join(name).join("deep/state");
        let mut child = child_process(&state, "submit-once");
        let status = sh(&mut child, &format!("umask {umask}")).status().unwrap();
        assert!(status.success());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&state), 0o700);
        let files: Vec<_> = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 4, "the child leaves its -wal and -shm behind: {files:?}");
        for file in files {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
            fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        let _store = Store::open(&state).unwrap();
        for file in fs::read_dir(&state).unwrap() {
            assert_eq!(mode(&file.unwrap().path()), 0o600, "made private again");
        }
    }
}

#[test]
fn a_second_opener_is_told_who_was_first() {
    let (dir, store) = store();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Busy { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
    drop(store);
    open(&dir);
}

#[test]
fn nothing_is_accepted_once_a_file_was_removed_or_replaced() {
    for name in ["mhtraind.db", "mhtraind.db-wal", "lock"] {
        let (dir, mut store) = store();
        let id = live(&mut store, 2);
        let (path, aside) = (dir.path().join(name), dir.path().join("aside"));
        fs::rename(&path, &aside).unwrap();
        let refused = |result: Result<JobState, StoreError>| {
            assert!(
                matches!(result, Err(StoreError::Replaced { path: ref found }) if *found == path.canonicalize().unwrap_or(path.clone()))
            );
        };
        refused(store.append(id, &life()[2]));
        // The same bytes are another file.
        fs::copy(&aside, &path).unwrap();
        refused(store.append(id, &life()[2]));
        assert!(matches!(store.submit(&new_job(None)), Err(StoreError::Replaced { .. })));
        // Put back, it goes on.
        fs::rename(&aside, &path).unwrap();
        assert_eq!(store.append(id, &life()[2]).unwrap().name(), "waiting");
    }
}

#[test]
fn a_replaced_store_leaves_the_log_of_the_new_one_alone_when_it_is_closed() {
    let (dir, mut old) = store();
    live(&mut old, 2);
    for entry in fs::read_dir(dir.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let mut new = open(&dir);
    live(&mut new, 3);
    drop(old);
    assert!(dir.path().join("mhtraind.db-wal").exists());
    let id = live(&mut new, 3);
    drop(new);
    assert_eq!(open(&dir).events(id).unwrap(), life()[..3]);
}

#[test]
fn a_log_that_is_not_ours_is_left_alone_when_the_store_is_closed() {
    // SQLite itself leaves it alone only where the database has moved as well.
    let (dir, mut store) = store();
    live(&mut store, 2);
    let log = dir.path().join("mhtraind.db-wal");
    fs::rename(&log, dir.path().join("aside")).unwrap();
    fs::write(&log, "somebody else's").unwrap();
    drop(store);
    assert_eq!(fs::read(&log).unwrap(), b"somebody else's");
}

#[test]
fn files_are_looked_at_before_the_transaction_and_after_it() {
    let (dir, mut store) = store();
    let (lock, aside) = (dir.path().join("lock"), dir.path().join("aside"));
    let replaced_meanwhile = store.database.write(Durability::PowerCut, |_| {
        fs::rename(&lock, &aside).unwrap();
        Ok(())
    });
    assert!(matches!(replaced_meanwhile, Err(StoreError::Replaced { .. })));
    let mut tried = false;
    let replaced_before = store.database.write(Durability::PowerCut, |_| {
        tried = true;
        Ok(())
    });
    assert!(matches!(replaced_before, Err(StoreError::Replaced { .. })) && !tried);
}

#[test]
fn after_an_error_the_disk_says_what_was_written() {
    let (dir, mut store) = store();
    let id = live(&mut store, 5);
    // As when only the fsync of the commit fails: the event is there, and nobody was told.
    let known = store.known[&id].clone();
    append(store.database.connection(), id, &known, &life()[5]).unwrap();
    let (lock, aside) = (dir.path().join("lock"), dir.path().join("aside"));
    fs::rename(&lock, &aside).unwrap();
    store.append(id, &life()[5]).unwrap_err();
    fs::rename(&aside, &lock).unwrap();
    assert_eq!(store.state(id).unwrap(), states(&life()[..6]));
    store.append(id, &life()[6]).unwrap();
}

fn observation(name: &str) -> ObservationOf {
    let text = json!({"name": name, "predicted": 1 << 30, "seen": {"kind": "more_than", "limit": 2_u64 << 30},
        "fingerprint": {"model": "m", "family": "qwen2", "method": "lora", "group": "equal", "versions": {}, "card": "c"}});
    ObservationOf { owner_uid: 7, observation: serde_json::from_value(text).unwrap() }
}

#[test]
fn observations_outlive_their_job_and_a_database_of_version_1_learns_to_keep_them() {
    let (dir, store) = store();
    drop(store);
    // As version 1 left it.
    let old = raw(&dir);
    old.execute_batch("DROP TABLE observations").unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    drop(old);
    let mut store = Store::open(dir.path()).unwrap();
    let id = store.submit(&new_job(None)).unwrap().id;
    for event in &life()[1..] {
        store.append(id, event).unwrap();
    }
    store.note_observation(id, 1, &observation("first")).unwrap();
    store.note_observation(id, 1, &observation("again")).unwrap();
    store.note_observation(id, 2, &observation("second")).unwrap();
    store.remove(id).unwrap();
    drop(store);
    let mut store = Store::open(dir.path()).unwrap();
    assert_eq!(store.observations().unwrap(), [observation("again"), observation("second")]);
    for attempt in 3..OBSERVATIONS_KEPT + 10 {
        store.note_observation(id, attempt, &observation("more")).unwrap();
    }
    let kept = store.observations().unwrap();
    assert_eq!(kept.len(), OBSERVATIONS_KEPT as usize);
    assert!(kept.iter().all(|kept| kept.observation.name == "more"));
}

#[test]
fn what_is_not_a_store_is_refused_by_name() {
    let (dir, store) = store();
    drop(store);
    raw(&dir).pragma_update(None, "user_version", 7).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(error.to_string().ends_with("has schema version 7, this program knows up to 2"), "{error}");

    let foreign = tempfile::tempdir().unwrap();
    raw(&foreign).execute_batch("CREATE TABLE songs (title)").unwrap();
    assert!(matches!(Store::open(foreign.path()), Err(StoreError::NotAStore { .. })));

    let text = tempfile::tempdir().unwrap();
    fs::write(text.path().join(crate::directory::DATABASE), "dear diary ".repeat(1000)).unwrap();
    let error = Store::open(text.path()).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(error.help().is_some());
}

#[test]
fn damage_is_an_error_wherever_it_is() {
    let (dir, mut store) = store();
    for _ in 0..20 {
        live(&mut store, 11);
        live(&mut store, 5);
    }
    drop(store);
    let path = dir.path().join(crate::directory::DATABASE);
    let whole = fs::read(&path).unwrap();
    let mut refused = 0;
    for page in 0..whole.len() / 4096 {
        let mut damaged = whole.clone();
        damaged[page * 4096..][..4096].fill(0xa5);
        fs::write(&path, &damaged).unwrap();
        // Whatever is read, nothing panics, and what cannot be read is said to be damaged.
        let result = Store::open(dir.path()).and_then(|store| {
            let ids: Vec<_> = store.jobs(&Filter::default())?.iter().map(|row| row.id).collect();
            ids.iter().try_for_each(|id| store.events(*id).and(store.job(*id)).map(drop))
        });
        if let Err(error) = result {
            refused += 1;
            assert!(matches!(error, StoreError::Damaged { .. }), "page {page}: {error:?}");
        }
    }
    assert!(refused > 3, "{refused}");
}

#[test]
fn after_a_crash_the_listing_is_checked() {
    let (dir, mut store) = store();
    live(&mut store, 11);
    let index = "SELECT rootpage FROM sqlite_schema WHERE name = 'jobs_by_owner'";
    let page: usize = store.database.connection().query_row(index, (), |row| row.get(0)).unwrap();
    drop(store);
    let path = dir.path().join(crate::directory::DATABASE);
    let mut bytes = fs::read(&path).unwrap();
    bytes[(page - 1) * 4096..][..4096].fill(0xa5);
    fs::write(&path, &bytes).unwrap();
    drop(open(&dir));
    // A log that holds no whole transaction: it changes nothing, and it was not removed by closing.
    fs::write(dir.path().join("mhtraind.db-wal"), "x").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
}

#[test]
fn a_store_can_be_given_to_its_thread() {
    fn is_send<T: Send>(_: &T) {}
    is_send(&store().1);
}

#[test]
fn brief_events_are_the_events_without_what_was_sized() {
    let (dir, mut store) = store();
    let id = live(&mut store, 1);
    let mut planned = life()[1].clone();
    let set = |planned: &mut Record, value: Option<Value>| match &mut planned.event {
        JobEvent::Planned { sized, .. } => *sized = value,
        event => panic!("{}", event.name()),
    };
    let odd = json!({"sized": "\u{0}\"\\ \u{1f600}", "peak": u64::MAX, "risk": 1e-7, "gone": null});
    set(&mut planned, Some(odd));
    store.append(id, &planned).unwrap();
    store
        .append(id, &record(&json!({"event": "warned", "warning": "\"sized\": 7.10, \u{1f600}\n"})))
        .unwrap();
    let mut brief = store.events(id).unwrap();
    assert_eq!(brief[1], planned);
    set(&mut brief[1], None);
    assert_eq!(store.brief_events(id).unwrap(), brief);
    assert!(matches!(store.brief_events(JobId::new(9).unwrap()), Err(StoreError::NoSuchJob { .. })));
    raw(&dir).execute("UPDATE events SET record = substr(record, 1, 40) WHERE number = 2", ()).unwrap();
    assert!(matches!(
        store.brief_events(id).unwrap_err(),
        StoreError::Events { source: JournalError::NotARecord { line: 2, .. }, .. }
    ));
}

#[test]
fn an_event_of_a_later_version_is_named() {
    let (dir, mut store) = store();
    let (over, open_job) = (live(&mut store, 11), live(&mut store, 5));
    let later = r#"{"v":2,"at":"2027-01-01T00:00:00Z","event":"teleported"}"#;
    let write = |id: JobId| {
        raw(&dir)
            .execute("UPDATE events SET record = ?2 WHERE job_id = ?1 AND number = 3", params![id, later])
            .unwrap();
    };
    write(over);
    let too_new = |error: StoreError, of: JobId| {
        assert!(
            matches!(error, StoreError::Events { id, source: JournalError::TooNew { line: 3, found: 2 } } if id == of)
        );
    };
    too_new(store.events(over).unwrap_err(), over);
    // It does not lose what is written together with it.
    let results = store.append_all(&[(over, failed()), (open_job, life()[5].clone())]).unwrap();
    assert!(results[0].is_err() && results[1].is_ok());
    drop(store);
    write(open_job);
    too_new(Store::open(dir.path()).unwrap_err(), open_job);
}

#[test]
fn a_summary_that_disagrees_with_the_events_is_damage() {
    let (dir, mut store) = store();
    live(&mut store, 5);
    drop(store);
    raw(&dir).execute("UPDATE jobs SET state = 'waiting'", ()).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(error.to_string().ends_with("job 1 is noted as waiting, its events say running"), "{error}");
}

#[test]
fn a_full_database_refuses_and_goes_on_when_there_is_room() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 5);
    let limit = |store: &Store, pages: i64| {
        let _: i64 = store
            .database
            .connection()
            .query_row(&format!("PRAGMA max_page_count = {pages}"), (), |row| row.get(0))
            .unwrap();
    };
    limit(&store, 1);
    let big = NewJob { context: json!("x".repeat(100_000)), ..new_job(None) };
    let end = life()[5].clone();
    for _ in 0..3 {
        let error = store.write_all(&[Write::Append(id, &end), Write::Submit(&big)]).unwrap_err();
        assert!(matches!(error, StoreError::DiskFull { .. }), "{error:?}");
        assert!(store.database.connection().is_autocommit());
        assert_eq!(store.state(id).unwrap().name(), "running");
        assert_eq!(store.events(id).unwrap(), life()[..5]);
    }
    limit(&store, 1_000_000);
    assert_eq!(store.append(id, &end).unwrap().name(), "recovering");
    store.submit(&big).unwrap();
}

#[test]
fn a_database_that_became_read_only_is_named_and_goes_on_when_it_is_not() {
    let (_dir, mut store) = store();
    let id = live(&mut store, 5);
    store.database.connection().pragma_update(None, "query_only", true).unwrap();
    let error = store.append(id, &life()[5]).unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly { .. }), "{error:?}");
    store.database.connection().pragma_update(None, "query_only", false).unwrap();
    store.append(id, &life()[5]).unwrap();
}

#[test]
fn another_programs_lock_is_named() {
    let (dir, mut store) = store();
    let id = live(&mut store, 5);
    store.database.connection().busy_timeout(std::time::Duration::from_millis(10)).unwrap();
    let other = raw(&dir);
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = store.append(id, &life()[5]).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error:?}");
    other.execute_batch("ROLLBACK").unwrap();
    store.append(id, &life()[5]).unwrap();
}

/// A file system of its own; `None`, with the reason printed, where this process may not mount one.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(dir: &TempDir, options: &str) -> Option<Mount> {
        let path = dir.path().join("mount");
        fs::create_dir(&path).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&path).output();
        match status {
            Ok(output) if output.status.success() => Some(Mount(path)),
            Ok(output) => {
                println!("skipped: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: cannot start mount: {error}");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_named_and_the_store_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::tmpfs(&dir, "size=1m,mode=0700") else { return };
    let state = mount.0.join("state");
    let mut store = Store::open(&state).unwrap();
    let id = live(&mut store, 5);
    let big = NewJob { context: json!("x".repeat(20_000)), ..new_job(None) };
    let mut accepted = 0;
    let error = loop {
        match store.submit(&big) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error:?}");
    assert!(error.to_string().starts_with("the disk is full: cannot write "), "{error}");
    assert!(store.submit(&big).is_err());
    assert_eq!(store.jobs(&Filter { limit: 1000, ..Filter::default() }).unwrap().len(), accepted + 1);
    mount.remount("size=16m");
    store.submit(&big).unwrap();
    store.append(id, &life()[5]).unwrap();
    drop(store);

    mount.remount("ro");
    let error = Store::open(&state).unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly { .. }), "{error:?}");
    mount.remount("rw");
    assert_eq!(
        Store::open(&state).unwrap().jobs(&Filter { limit: 1000, ..Filter::default() }).unwrap().len(),
        accepted + 2
    );
}

#[test]
fn a_failing_write_is_an_io_error_and_the_store_goes_on_after_it() {
    // A file size limit makes write(2) fail in earnest; it belongs to a process, so another one has it.
    let dir = tempfile::tempdir().unwrap();
    let mut child = child_process(dir.path(), "file-size-limit");
    let output = sh(&mut child, "trap '' XFSZ").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("all as expected"), "{text}");
}

#[test]
fn whatever_is_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: HashMap<u64, usize> = HashMap::new();
    for round in 0..12 {
        let mut child = child_process(dir.path(), "append-for-ever").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut read = 0;
        for line in lines {
            read += usize::from(acknowledge(&mut acknowledged, &line.unwrap()));
            // Another moment each round; what was said before the signal arrives counts too.
            if read == 5 + 13 * round {
                child.kill().unwrap();
            }
        }
        reap(child);
        let store = open(&dir);
        let check: String =
            store.database.connection().query_row("PRAGMA integrity_check", (), |row| row.get(0)).unwrap();
        assert_eq!(check, "ok");
        for (id, events) in &acknowledged {
            let found = store.events(JobId::new(*id).unwrap()).unwrap();
            assert!(found.len() >= *events, "job {id}: {} of {events}", found.len());
            assert_eq!(found, life()[..found.len()]);
        }
    }
    assert!(acknowledged.len() > 12, "{}", acknowledged.len());
}

fn reap(mut child: Child) {
    assert!(!child.wait().unwrap().success(), "it is killed, it does not end by itself");
}

/// Reads `ack JOB EVENTS`. Returns whether the line is one: the test harness writes others.
fn acknowledge(acknowledged: &mut HashMap<u64, usize>, line: &str) -> bool {
    let Some((_, words)) = line.split_once("ack ") else { return false };
    // The last line of a killed child may be cut off.
    let numbers: Vec<_> = words.split(' ').filter_map(|word| word.parse().ok()).collect();
    if let [id, events] = numbers[..] {
        acknowledged.insert(id as u64, events);
    }
    true
}

#[test]
fn a_log_that_ends_anywhere_is_a_shorter_history() {
    let (dir, mut store) = store();
    for _ in 0..3 {
        live(&mut store, 11);
    }
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let (database, log) = (read("mhtraind.db"), read("mhtraind.db-wal"));
    let mut seen = 0;
    for length in (0..=log.len()).step_by(1009).chain([log.len()]) {
        let copy = tempfile::tempdir().unwrap();
        fs::write(copy.path().join("mhtraind.db"), &database).unwrap();
        fs::write(copy.path().join("mhtraind.db-wal"), &log[..length]).unwrap();
        let store = open(&copy);
        let jobs = store.jobs(&Filter::default()).unwrap();
        let mut events = 0;
        for row in &jobs {
            let found = store.events(row.id).unwrap();
            assert_eq!(found, life()[..found.len()]);
            assert_eq!(row.state, states(&found).name());
            events += found.len();
        }
        assert!(events >= seen, "a longer log tells more");
        seen = events;
    }
    assert_eq!(seen, 3 * life().len());
}

/// Returns the pages that `work` wrote to the log: what it costs, whatever the clock says.
fn pages_written(store: &mut Store, work: impl FnOnce(&mut Store)) -> i64 {
    let checkpoint = |store: &Store, mode: &str| -> i64 {
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        store.database.connection().query_row(&sql, (), |row| row.get(1)).unwrap()
    };
    checkpoint(store, "TRUNCATE");
    work(store);
    checkpoint(store, "PASSIVE")
}

fn add_finished(store: &mut Store, jobs: usize) {
    let (new, life) = (new_job(None), life());
    for _ in 0..jobs.div_ceil(500) {
        let submits = vec![Write::Submit(&new); 500.min(jobs)];
        let ids: Vec<_> = store
            .write_all(&submits)
            .unwrap()
            .into_iter()
            .map(|written| match written {
                Ok(Written::Submitted(submitted)) => submitted.id,
                other => panic!("{other:?}"),
            })
            .collect();
        let events: Vec<_> = life[1..]
            .iter()
            .flat_map(|record| ids.iter().map(move |id| Write::Append(*id, record)))
            .collect();
        assert!(store.write_all(&events).unwrap().iter().all(Result::is_ok));
    }
}

#[test]
fn ten_thousand_finished_jobs_cost_a_new_one_nothing() {
    let (dir, mut store) = store();
    add_finished(&mut store, 10);
    let costs = |store: &mut Store| {
        let new = new_job(None);
        let submit = pages_written(store, |store| assert!(!store.submit(&new).unwrap().existed));
        let id = store.jobs(&Filter { order: Order::NewestFirst, ..Filter::default() }).unwrap()[0].id;
        let append = pages_written(store, |store| drop(store.append(id, &life()[1]).unwrap()));
        store.append(id, &failed()).unwrap();
        (submit, append)
    };
    let few = costs(&mut store);
    add_finished(&mut store, 10_000);
    let many = costs(&mut store);
    println!("pages of the log for a submission and an event: {few:?} after 10 jobs, {many:?} after 10,000");
    // A page of each table and index that is touched; trees that are one level deeper split no more often.
    assert!(many.0 <= few.0 + 2 && many.1 <= few.1 + 2, "few: {few:?}, many: {many:?}");

    drop(store);
    let store = open(&dir);
    assert!(store.known.is_empty());
    let steps = |filter: &Filter| {
        let (sql, values) = job::select(filter);
        let mut statement = store.database.connection().prepare(&sql).unwrap();
        let mut rows = statement.query(rusqlite::params_from_iter(values)).unwrap();
        let mut count = 0;
        while rows.next().unwrap().is_some() {
            count += 1;
        }
        drop(rows);
        (count, statement.get_status(rusqlite::StatementStatus::VmStep))
    };
    for filter in [
        Filter { order: Order::NewestFirst, ..Filter::default() },
        Filter { owner_uid: Some(1000), ..Filter::default() },
        Filter { after: JobId::new(5000), ..Filter::default() },
        Filter { states: vec!["running".to_owned()], ..Filter::default() },
    ] {
        let (rows, steps) = steps(&filter);
        assert!(steps < 100 + 60 * rows, "{filter:?} takes {steps} steps for {rows} rows");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_history_folds_in_the_store_as_in_memory(choices in prop::collection::vec((0_usize..3, 0_usize..13), 1..60)) {
        let (dir, mut store) = store();
        let mut events = life();
        events.push(failed());
        events.push(record(&json!({"event": "stop_requested", "by": "Ctrl-C"})));
        let mut memory: Vec<Vec<Record>> = vec![vec![events[0].clone()]; 3];
        let ids: Vec<_> = memory.iter().map(|_| live(&mut store, 1)).collect();
        for batch in choices.chunks(7) {
            let writes: Vec<_> = batch.iter().map(|(job, event)| (ids[*job], events[*event].clone())).collect();
            let results = store.append_all(&writes).unwrap();
            for ((job, event), result) in batch.iter().zip(results) {
                let legal = states(&memory[*job]).next(&events[*event].event);
                prop_assert_eq!(result.as_ref().ok(), legal.as_ref().ok());
                if legal.is_ok() {
                    memory[*job].push(events[*event].clone());
                }
            }
        }
        drop(store);
        let store = open(&dir);
        for (id, memory) in ids.iter().zip(&memory) {
            prop_assert_eq!(&store.events(*id).unwrap(), memory);
            prop_assert_eq!(&store.brief_events(*id).unwrap(), memory);
            prop_assert_eq!(store.state(*id).unwrap(), states(memory));
            prop_assert_eq!(store.job(*id).unwrap().row.state, states(memory).name());
        }
    }
}

const CHILD_DOES: &str = "MHTRAIN_STORE_TEST_CHILD_DOES";
const CHILD_IN: &str = "MHTRAIN_STORE_TEST_CHILD_IN";

/// Returns this test binary again, as a process that does `what` in the directory `state`.
fn child_process(state: &Path, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", "--test-threads", "1", "store::tests::in_a_child_process"])
        .env(CHILD_DOES, what)
        .env(CHILD_IN, state);
    command
}

/// Returns a shell that does `first` and then becomes `command`.
fn sh(command: &mut Command, first: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("{first}; exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        shell.env(name, value.unwrap());
    }
    shell
}

/// Does nothing as a test: it is what `child_process` runs.
#[test]
fn in_a_child_process() {
    let Ok(what) = std::env::var(CHILD_DOES) else { return };
    let state = PathBuf::from(std::env::var_os(CHILD_IN).unwrap());
    let mut store = Store::open(&state).unwrap();
    match what.as_str() {
        "submit-once" => {
            store.submit(&new_job(None)).unwrap();
            // Without closing it, so that all files are still there.
            std::mem::forget(store);
        }
        "append-for-ever" => append_for_ever(&mut store),
        "file-size-limit" => meet_the_file_size_limit(&mut store),
        "database-fsync-fails" => meet_a_failed_fsync_of_the_database(&mut store, &state),
        other => panic!("{other}"),
    }
}

fn append_for_ever(store: &mut Store) {
    let life = life();
    let mut out = std::io::stdout();
    loop {
        let id = store.submit(&new_job(None)).unwrap().id;
        writeln!(out, "\nack {id} 1").unwrap();
        for (before, record) in life[1..].iter().enumerate() {
            store.append(id, record).unwrap();
            writeln!(out, "\nack {id} {}", before + 2).unwrap();
        }
    }
}

/// The log's fsync works, that of the file into which it is copied does not.
fn meet_a_failed_fsync_of_the_database(store: &mut Store, state: &Path) {
    let faults = state.with_file_name("faults");
    let database = state.join(crate::directory::DATABASE);
    let id = live(store, 3);
    fs::write(&faults, format!("fsync-fails {}\n", database.display())).unwrap();
    let accepted = (0..2000).take_while(|_| store.submit(&new_job(None)).is_ok()).count();
    let hits = fs::read_to_string(state.with_file_name("faults.hits")).unwrap_or_default();
    assert!((50..1000).contains(&accepted), "{accepted} submits, then one that was refused");
    assert!(hits.contains("mhtraind.db"), "{hits}");
    assert!(matches!(store.append(id, &life()[3]), Err(StoreError::Io { .. })));
    fs::remove_file(&faults).unwrap();
    store.append(id, &life()[3]).unwrap();
    let log = fs::metadata(state.join("mhtraind.db-wal")).unwrap().len();
    assert!(log < 1 << 20, "{log} bytes: it was begun anew");
    let all = store.jobs(&Filter { limit: 10_000, ..Filter::default() }).unwrap().len();
    assert_eq!(all, accepted + 1, "what was acknowledged, and nothing else");
    println!("all as expected");
}

fn meet_the_file_size_limit(store: &mut Store) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Fsize);
    let id = live(store, 5);
    let limit = |current| setrlimit(Resource::Fsize, Rlimit { current, ..before }).unwrap();
    // The log has more than that already, so the next page does not fit.
    limit(Some(8192));
    for _ in 0..3 {
        let error = store.append(id, &life()[5]).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
        assert!(error.to_string().starts_with("cannot use "), "{error}");
        assert_eq!(store.events(id).unwrap().len(), 5);
    }
    limit(before.current);
    assert_eq!(store.append(id, &life()[5]).unwrap().name(), "recovering");
    println!("all as expected");
}
