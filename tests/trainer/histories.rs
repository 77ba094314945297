//! Trainings that die several times, and are in the end the same as one that did not.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use mhtrain_swift::companion::Rescue;

use crate::lab::trainer;
use crate::warm::{Case, Left, Warm};

/// Passes over the data.
const EPOCHS: u32 = 3;

/// Steps between regular checkpoints (`warm.rs`).
const SAVE_STEPS: u64 = 5;

/// Steps between evaluations.
const EVAL_STEPS: u64 = 4;

/// Micro-batch and accumulation of each rung: the recipe's two ladders.
const LADDERS: [&[(u32, u32)]; 2] = [&[(8, 4), (4, 8), (2, 16), (1, 32)], &[(6, 6), (3, 12), (1, 36)]];

/// Where an attempt dies.
#[derive(Copy, Clone, Debug)]
enum Place {
    /// In a backward pass of this step.
    Step,
    /// In the save after it.
    Save,
    /// In the evaluation after it.
    Eval,
}

/// How an attempt dies.
#[derive(Copy, Clone, Debug)]
struct Death {
    /// Out of memory, which the companion sees and the next attempt answers with a lower rung; else SIGKILL.
    oom: bool,
    place: Place,
    step: u64,
}

fn oom(place: Place, step: u64) -> Death {
    Death { oom: true, place, step }
}

fn kill(place: Place, step: u64) -> Death {
    Death { oom: false, place, step }
}

/// Returns the deaths of each history, for epochs of so many steps.
fn histories(epoch: u64) -> [(&'static str, Vec<Death>); 4] {
    [
        (
            "OOM before the first save, on the epoch's boundary, in epoch 3",
            vec![oom(Place::Step, 3), oom(Place::Step, epoch + 1), oom(Place::Step, 2 * epoch + 3)],
        ),
        (
            "kill before the first save, OOM mid epoch, kill in epoch 2",
            vec![kill(Place::Step, 3), oom(Place::Step, 7), kill(Place::Step, epoch + 4)],
        ),
        (
            "OOM in a save, kill in a save, OOM in an evaluation",
            vec![
                oom(Place::Save, 5),
                kill(Place::Save, 15),
                oom(Place::Eval, 2 * epoch / EVAL_STEPS * EVAL_STEPS),
            ],
        ),
        (
            "kill in an evaluation, kill on the boundary, OOM in the last step",
            vec![kill(Place::Eval, 8), kill(Place::Step, epoch + 1), oom(Place::Step, 3 * epoch)],
        ),
    ]
}

/// Trains a history to its end. Returns how many steps were trained twice, and the largest difference of a loss.
fn live(
    warm: &mut Warm,
    name: &str,
    case: &Case<'_>,
    whole: &Left,
    rungs: &[(u32, u32)],
    deaths: &[Death],
) -> (u64, f64) {
    let every = EVAL_STEPS.to_string();
    let eval = ["--val_dataset", "train.jsonl#32", "--eval_steps", &every];
    let (mut rung, mut resume, mut from, mut again) = (0, None, 0, 0);
    let case = Case { plugins: &["raise_oom.py"], args: &eval, ..case.clone() };
    for (number, death) in deaths.iter().enumerate() {
        let at = match death.place {
            Place::Step => "backward",
            Place::Save => "save",
            Place::Eval => "eval",
        };
        let step = death.step.to_string();
        let how = if death.oom { "oom" } else { "kill" };
        let env = [("RAISE_OOM_AT", at), ("RAISE_OOM_STEP", step.as_str()), ("RAISE_OOM_AS", how)];
        let (micro_batch, accumulation) = rungs[rung];
        let here = Case { micro_batch, accumulation, resume: resume.clone(), env: &env, ..case.clone() };
        let died = warm.train(&format!("{name}-{number}"), &here);
        assert_eq!(died.code, death.oom.then_some(1), "{name}, {death:?}: {}", died.output);
        let done = if matches!(death.place, Place::Step) { death.step - 1 } else { death.step };
        for step in from + 1..=done {
            assert_eq!(died.trained[&step], whole.trained[&step], "{name}, {death:?}, step {step}");
        }
        let saved = if death.oom {
            match died.telemetry.rescue() {
                Some(Rescue::Saved { step, path }) if *step == done => Some((done, path.clone())),
                Some(Rescue::Needless { step }) if *step == done => Some((done, checkpoint(&died.dir, done))),
                other => panic!("{name}, {death:?}: {other:?}\n{}", died.output),
            }
        } else {
            newest(&died.dir, done)
        };
        // Nothing new was saved: what the attempt before it began with is still the newest.
        if let Some((step, path)) = saved {
            (from, resume) = (step, Some(path));
        }
        again += done - from;
        rung = (rung + usize::from(death.oom)).min(rungs.len() - 1);
    }
    let (micro_batch, accumulation) = rungs[rung];
    let last = Case { micro_batch, accumulation, resume, plugins: &[], ..case };
    let largest = warm.train(&format!("{name}-last"), &last).assert_continues(whole, from);
    (again, largest)
}

fn checkpoint(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("checkpoint-{step}"))
}

/// Returns the newest checkpoint that is whole: its state is written last.
fn newest(dir: &Path, done: u64) -> Option<(u64, PathBuf)> {
    let steps = (1..=done).rev().filter(|step| step % SAVE_STEPS == 0);
    let mut saved = steps.map(|step| (step, checkpoint(dir, step)));
    saved.find(|(_, path)| path.join("trainer_state.json").exists())
}

/// Two of the histories; all of them, on both ladders, with `cargo xtask test --full`.
#[test]
fn a_training_that_died_three_times_is_the_same_as_one_that_did_not() {
    let Some(mut warm) = Warm::start() else { return };
    for (train_type, rows, ladder, history) in [("lora", 320, 1, 1), ("full", 310, 0, 2)] {
        let table = lives(&mut warm, train_type, rows, LADDERS[ladder], &[history]);
        println!("{table}");
    }
}

#[test]
fn all_histories() {
    if std::env::var_os("MHTRAIND_TEST_FULL").is_none() {
        println!("skipped: `cargo xtask test --full` runs it");
        return;
    }
    let Some(mut warm) = Warm::start() else { return };
    let (_, version) = trainer().expect("the warm one runs in it");
    let mut table = format!(
        "# Trainings that died three times, ms-swift {version}\n\nWritten by `cargo xtask test --full` \
         (`tests/trainer/histories.rs`, `all_histories`); the surroundings are those of `companion.md`. Three epochs, a regular \
         checkpoint every five steps. Each attempt is compared with the run that did not die: rows and learning rate of every \
         step. After an OOM the next attempt is one rung lower and begins where the companion saved; after a kill at the same \
         rung, at the newest whole checkpoint: those are the steps that are trained twice.\n\n\
         | method | rows | rungs | history | steps | rows and rates | steps trained twice | largest difference of a loss |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for train_type in ["lora", "full"] {
        for rows in [320, 310] {
            for ladder in LADDERS {
                table.push_str(&lives(&mut warm, train_type, rows, ladder, &[0, 1, 2, 3]));
            }
        }
    }
    println!("{table}");
    if let Some(file) = std::env::var_os("MHTRAIND_TEST_TABLE") {
        std::fs::write(Path::new(&file).with_file_name(format!("histories-{version}.md")), table).unwrap();
    }
}

/// Trains these histories beside one whole run, and returns their lines of the table.
fn lives(warm: &mut Warm, train_type: &str, rows: u32, rungs: &[(u32, u32)], chosen: &[usize]) -> String {
    let (micro_batch, accumulation) = rungs[0];
    let effective_batch = u64::from(micro_batch * accumulation);
    let epoch = u64::from(rows).div_ceil(effective_batch);
    let case = Case { train_type, rows, epochs: EPOCHS, ..Case::default() };
    let name = format!("{train_type}-{rows}-{effective_batch}");
    let whole = warm.train(&name, &Case { micro_batch, accumulation, ..case.clone() });
    let steps = epoch * u64::from(EPOCHS);
    assert_eq!((whole.code, whole.logged.len() as u64), (Some(0), steps), "{}", whole.output);
    let mut table = String::new();
    for index in chosen {
        let (what, deaths) = &histories(epoch)[*index];
        let (again, largest) = live(warm, &format!("{name}-{index}"), &case, &whole, rungs, deaths);
        let rungs: Vec<String> = rungs.iter().map(|(micro, passes)| format!("{micro}x{passes}")).collect();
        writeln!(
            table,
            "| {train_type} | {rows} | {} | {what} | {steps} | all as planned | {again} | {largest:.1e} |",
            rungs.join(", ")
        )
        .unwrap();
    }
    table
}
