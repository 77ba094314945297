//! What does a trainer do, what does it print, and of what does it die? (ms-swift, played)

use std::fmt::Write as _;

use mhtrain_job::event::ProcessIdentity;
use mhtrain_sizing::tier::Tier;
use mhtrain_swift::proof::steps_per_epoch;

use crate::disk::{AttemptFiles, AttemptId, Checkpoint, Ended, Launch, Lineage};
use crate::script::{Death, JobScript, Script};
use crate::sizing::needs;
use crate::world::World;

/// Seconds of one step.
const STEP_S: u64 = 7;

/// A trainer that lives.
#[derive(Clone, Debug)]
pub(crate) struct Trainer {
    pub(crate) identity: ProcessIdentity,
    pub(crate) card: usize,
    /// GiB that it holds.
    pub(crate) held: u64,
    pub(crate) asked_to_end: bool,
    script: usize,
    /// Rows of one pass, as it really takes them.
    micro_batch: u32,
    stage: Stage,
    begun_at: u64,
    step: u64,
    steps_per_epoch: u64,
    max_steps: u64,
    lineage: Lineage,
    hangs: bool,
    from: Option<Checkpoint>,
    stable: bool,
    expandable: bool,
    small_eval: bool,
    /// GiB that its passes take.
    need: u64,
    /// Steps whose loss was no number.
    bad_steps: u64,
}

/// What it does next.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Stage {
    Load,
    Train,
    /// Weights and optimizer are written, `trainer_state.json` is not.
    AmidSave,
    Saved,
    EndLine,
    Exit,
}

impl Trainer {
    pub(crate) fn new(identity: ProcessIdentity, launch: &Launch, script: &Script) -> Trainer {
        let job = &script.jobs[launch.script];
        let tier = launch.tier.clone();
        // transformers 4.x takes the micro-batch of the checkpoint, whatever the command line says.
        let restored = launch.from.as_ref().filter(|_| script.three && !launch.weights_only);
        let micro_batch = restored.map_or(tier.micro_batch, |from| from.micro_batch);
        let steps_per_epoch = steps_per_epoch(job.rows, micro_batch, tier.accumulation, tier.world_size);
        let effective_batch = u64::from(micro_batch) * u64::from(tier.accumulation);
        let own = Lineage {
            whole: true,
            effective_batch,
            max_length: tier.max_length,
            packing: tier.packing,
            spoilt: false,
        };
        let begun_at = launch.from.as_ref().map_or(0, |from| from.step);
        let lineage = launch.from.as_ref().map_or(own, |from| {
            let replays =
                script.three && begun_at > steps_per_epoch && !begun_at.is_multiple_of(steps_per_epoch);
            let same = Lineage { whole: true, spoilt: false, ..from.lineage } == own;
            let whole = from.lineage.whole && (launch.weights_only || (same && !replays));
            Lineage { whole, spoilt: from.lineage.spoilt, ..own }
        });
        Trainer {
            identity,
            card: launch.card,
            held: 0,
            asked_to_end: false,
            script: launch.script,
            micro_batch,
            stage: Stage::Load,
            begun_at,
            step: begun_at,
            steps_per_epoch,
            max_steps: steps_per_epoch * u64::from(job.wish.epochs),
            lineage,
            hangs: false,
            from: launch.from.clone(),
            stable: launch.stable,
            expandable: launch.expandable,
            small_eval: launch.small_eval,
            need: needs(&job.wish, &Tier { micro_batch, ..tier }, job.truth_percent),
            bad_steps: 0,
        }
    }

    /// Returns whether it does something by itself.
    pub(crate) fn acts(&self) -> bool {
        !self.hangs || self.asked_to_end
    }

    /// Returns whether it lives and does nothing.
    pub(crate) fn hangs(&self) -> bool {
        self.hangs
    }

    /// Returns what happens to it now, by the script.
    fn death(&self, job: &JobScript, attempt: u32) -> Option<Death> {
        let now = |death: Death| match death {
            Death::Network | Death::Corrupt | Death::Data | Death::LoadOom => self.stage == Stage::Load,
            _ => self.stage == Stage::Train,
        };
        let mut own = job.misfortunes.iter().filter(|misfortune| misfortune.attempt == attempt);
        let due = own.find(|misfortune| {
            now(misfortune.death)
                && (self.stage == Stage::Load || self.step - self.begun_at == misfortune.after_steps)
        });
        due.map(|misfortune| misfortune.death)
    }
}

impl World<'_> {
    /// Lets a trainer do its next thing.
    pub(crate) fn train(&mut self, id: AttemptId) {
        let Some(mut trainer) = self.trainers.remove(&id) else { return };
        let Some(mut files) = self.disk.attempts.remove(&id) else { return };
        let ended = self.next_stage(id, &mut trainer, &mut files);
        self.disk.attempts.insert(id, files);
        self.trainers.insert(id, trainer);
        if let Some(ended) = ended {
            self.tell(|| format!("trainer of {id:?}: ends with {ended:?}"));
            self.trainer_ends(id, ended, false);
        }
    }

    fn next_stage(
        &mut self,
        id: AttemptId,
        trainer: &mut Trainer,
        files: &mut AttemptFiles,
    ) -> Option<Ended> {
        let script = self.script;
        let job = &script.jobs[trainer.script];
        if trainer.asked_to_end {
            if trainer.hangs {
                // It does not even hear the signal.
                trainer.asked_to_end = false;
                return None;
            }
            return Some(Ended::Signal(15));
        }
        if self.cards[trainer.card].broken {
            let _ = writeln!(files.output, "RuntimeError: CUDA error: uncorrectable ECC error encountered");
            return Some(Ended::Code(1));
        }
        if self.disk.full && matches!(trainer.stage, Stage::Saved | Stage::AmidSave) {
            let _ = writeln!(files.output, "OSError: [Errno 28] No space left on device: 'optimizer.pt'");
            return Some(Ended::Code(1));
        }
        if trainer.stage == Stage::Train && job.killed_each == Some(trainer.step - trainer.begun_at) {
            return Some(Ended::Signal(9));
        }
        if let Some(death) = trainer.death(job, id.1)
            && let Some(ended) = self.suffer(death, id, trainer, files)
        {
            return ended;
        }
        match trainer.stage {
            Stage::Load => self.load(trainer, files, job),
            Stage::Train => self.step(id, trainer, files, job),
            Stage::AmidSave => {
                if let Some(newest) = files.checkpoints.last_mut() {
                    newest.has_state = true;
                }
                // Older ones are deleted when the newest is whole.
                let surplus = files.checkpoints.len().saturating_sub(3);
                files.checkpoints.drain(..surplus);
                trainer.stage = Stage::Saved;
                None
            }
            Stage::Saved => {
                let over = trainer.step >= trainer.max_steps;
                trainer.stage = if over { Stage::EndLine } else { Stage::Train };
                None
            }
            Stage::EndLine => {
                let _ = writeln!(
                    files.metrics,
                    "{{\"train_runtime\": 5.0, \"train_loss\": 1.0, \"global_step/max_steps\": \"{}/{}\"}}",
                    trainer.step, trainer.max_steps
                );
                // One loss alone that is no number is an overflow, which mixed precision skips.
                let spoilt = trainer.lineage.spoilt && trainer.bad_steps > 1;
                self.truth.finished(id, trainer.step, Lineage { spoilt, ..trainer.lineage });
                trainer.stage = Stage::Exit;
                None
            }
            Stage::Exit => {
                let _ = writeln!(
                    files.metrics,
                    "{{\"last_model_checkpoint\": \"checkpoint-{}\", \"train_dataset\": \"1.0±0.0, size={}\", \
                     \"global_step\": {}}}",
                    trainer.step, job.rows, trainer.step
                );
                Some(Ended::Code(0))
            }
        }
    }

    /// Returns what a trainer may hold in all. While it does something it is not among the others, who hold the rest.
    fn room(&self, trainer: &Trainer) -> u64 {
        self.free(trainer.card)
    }

    fn load(&mut self, trainer: &mut Trainer, files: &mut AttemptFiles, job: &JobScript) -> Option<Ended> {
        if trainer.from.as_ref().is_some_and(|from| from.corrupt || !from.has_optimizer || !from.has_state) {
            let _ = writeln!(files.output, "{CORRUPT}");
            return Some(Ended::Code(1));
        }
        let room = self.room(trainer);
        let weights = trainer.need.div_ceil(3);
        if weights > room {
            let _ = writeln!(files.output, "{LOADING}");
            self.out_of_memory(trainer, files, weights, false);
            return Some(Ended::Code(1));
        }
        trainer.held = weights;
        if job.rows_known {
            let _ = writeln!(
                files.output,
                "[INFO:swift] Dataset Token Length: 158.8±32.2, min=105.0, max=217.0, size={}",
                job.rows
            );
        }
        trainer.stage = if trainer.step >= trainer.max_steps { Stage::EndLine } else { Stage::Train };
        None
    }

    fn step(
        &mut self,
        id: AttemptId,
        trainer: &mut Trainer,
        files: &mut AttemptFiles,
        job: &JobScript,
    ) -> Option<Ended> {
        let at_peak = trainer.step - trainer.begun_at + 1 >= job.peak_step;
        let need = trainer.need;
        let need = if at_peak { need } else { need.div_ceil(2).max(trainer.held) };
        if need > self.room(trainer) {
            self.truth.ran_out(id, need);
            if job.vague {
                let _ = writeln!(files.output, "{VAGUE}");
            } else {
                let _ = writeln!(files.output, "{TRAINING}");
                self.out_of_memory(trainer, files, need, false);
            }
            return Some(Ended::Code(1));
        }
        trainer.held = trainer.held.max(need);
        trainer.step += 1;
        self.truth.reached(id, trainer.step);
        self.truth.held(id, trainer.held);
        self.note_late_step(id.0);
        trainer.bad_steps += u64::from(trainer.lineage.spoilt);
        self.now += STEP_S;
        let (step, max) = (trainer.step, trainer.max_steps);
        let loss = if trainer.lineage.spoilt { "NaN" } else { "1.2" };
        let percent = step * 100 / max.max(1);
        let _ =
            writeln!(files.output, "Train: {percent:3}%|####      | {step}/{max} [00:05<00:05,  7.00s/it]");
        let _ = writeln!(files.output, "{{'loss': {loss}, 'global_step/max_steps': '{step}/{max}'}}");
        // What the allocator reserved is all but the CUDA context.
        let memory = trainer.held - 1;
        let _ = writeln!(
            files.metrics,
            "{{\"loss\": {loss}, \"global_step/max_steps\": \"{step}/{max}\", \"memory(GiB)\": {memory}.5}}"
        );
        let save = step >= max || step.is_multiple_of(u64::from(job.wish.save_steps));
        if save && self.disk.full {
            let _ = writeln!(files.output, "OSError: [Errno 28] No space left on device: 'optimizer.pt'");
            return Some(Ended::Code(1));
        }
        if save {
            files.checkpoints.push(Checkpoint {
                step,
                max_steps: max,
                steps_per_epoch: trainer.steps_per_epoch,
                micro_batch: trainer.micro_batch,
                has_state: false,
                has_optimizer: true,
                corrupt: false,
                synced: false,
                lineage: trainer.lineage,
            });
            trainer.stage = Stage::AmidSave;
        }
        None
    }

    /// Lets a misfortune happen; `None` when it does not, `Some(None)` when the trainer goes on living.
    fn suffer(
        &mut self,
        death: Death,
        id: AttemptId,
        trainer: &mut Trainer,
        files: &mut AttemptFiles,
    ) -> Option<Option<Ended>> {
        let mut print = |text: &str| {
            let _ = writeln!(files.output, "{text}");
        };
        let ended = match death {
            Death::Network => {
                print(NETWORK);
                Ended::Code(1)
            }
            Death::Port => {
                print(PORT);
                Ended::Code(1)
            }
            Death::Worker => {
                print(WORKER);
                Ended::Code(1)
            }
            Death::Corrupt => {
                let from = trainer.from.as_ref()?;
                let step = from.step;
                print(CORRUPT);
                // It stays so, wherever it lies.
                let all = self.disk.attempts.iter_mut().filter(|((job, _), _)| *job == id.0);
                let same = all.flat_map(|(_, files)| &mut files.checkpoints);
                same.filter(|checkpoint| checkpoint.step == step).for_each(|it| it.corrupt = true);
                Ended::Code(1)
            }
            Death::Code => {
                print(CODE);
                Ended::Code(1)
            }
            Death::Data => {
                print(DATA);
                Ended::Code(1)
            }
            Death::Silent => Ended::Code(1),
            Death::EarlyExit => Ended::Code(0),
            Death::LostSteps => {
                // The end claims that everything was trained.
                trainer.max_steps = trainer.max_steps.min(trainer.step + 1);
                return None;
            }
            Death::Diverges => {
                trainer.lineage.spoilt = trainer.lineage.spoilt || !trainer.stable;
                return None;
            }
            Death::Hang => {
                trainer.hangs = true;
                self.truth.hung(id, self.now);
                self.tell(|| format!("trainer of {id:?}: hangs"));
                return Some(None);
            }
            Death::LoadOom => {
                print(LOADING);
                self.out_of_memory(trainer, files, self.free(trainer.card) + 2, false);
                Ended::Code(1)
            }
            Death::Fragmented => {
                if trainer.expandable {
                    return None;
                }
                print(TRAINING);
                // What is free does not do for it in one piece, nor does what is reserved.
                let need = self.room(trainer).max(trainer.held) + 1;
                self.truth.ran_out(id, need);
                self.out_of_memory(trainer, files, need, true);
                Ended::Code(1)
            }
            Death::EvalOom | Death::SaveOom => {
                if trainer.small_eval && death == Death::EvalOom {
                    return None;
                }
                print(if death == Death::EvalOom { EVALUATING } else { SAVING });
                // More than the card can give: nobody else is to blame.
                self.out_of_memory(trainer, files, trainer.held + self.free(trainer.card) + 1, false);
                Ended::Code(1)
            }
        };
        Some(Some(ended))
    }

    /// Prints torch's words for a pass that would have needed so much.
    fn out_of_memory(&self, trainer: &Trainer, files: &mut AttemptFiles, need: u64, in_pieces: bool) {
        let (total, held) = (self.cards[trainer.card].total, trainer.held);
        let free = self.room(trainer).saturating_sub(held);
        let asked = need.saturating_sub(held).max(1);
        let unallocated = if in_pieces { asked + 1 } else { 0 };
        let allocated = held.saturating_sub(unallocated + 1);
        let _ = writeln!(
            files.output,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked}.00 GiB. GPU 0 has a total capacity of \
             {total}.00 GiB of which {free}.00 GiB is free. Including non-PyTorch memory, this process has {held}.00 GiB \
             memory in use. Of the allocated memory {allocated}.00 GiB is allocated by PyTorch, and {unallocated}.00 GiB \
             is reserved by PyTorch but unallocated."
        );
    }
}

const TRAINING: &str = "Traceback (most recent call last):\n  File \"/env/transformers/trainer.py\", line 3579, in training_step\n    loss = self.compute_loss(model, inputs)";
const EVALUATING: &str = "Traceback (most recent call last):\n  File \"/env/transformers/trainer.py\", line 4250, in evaluate\n    output = eval_loop(dataloader)";
const SAVING: &str = "Traceback (most recent call last):\n  File \"/env/transformers/trainer.py\", line 3100, in _save_checkpoint\n    self.save_model(output_dir)";
const LOADING: &str = "Traceback (most recent call last):\n  File \"/env/transformers/modeling_utils.py\", line 4200, in from_pretrained\n    return model";
const VAGUE: &str =
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`";
const NETWORK: &str = "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /api/models/org/m (Caused by NewConnectionError('Failed to establish a new connection'))";
const PORT: &str = "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use";
const WORKER: &str = "RuntimeError: DataLoader worker (pid 8127) is killed by signal: Killed. ";
const CORRUPT: &str =
    "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer";
const CODE: &str = "Traceback (most recent call last):\n  File \"/env/transformers/trainer.py\", line 3579, in training_step\n    loss = self.compute_loss(model, inputs)\nTypeError: compute_loss() got an unexpected keyword argument 'num_items_in_batch'";
const DATA: &str =
    "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset";

#[cfg(test)]
mod tests {
    use mhtrain_job::diagnosis::Kind;
    use mhtrain_swift::diagnosis::{ExitFacts, diagnose};

    use super::*;

    #[test]
    fn what_is_printed_means_what_the_simulation_means_by_it() {
        let words = [
            (NETWORK, Kind::Network),
            (PORT, Kind::Communication),
            (WORKER, Kind::HostOom),
            (CORRUPT, Kind::CheckpointCorrupt),
            (CODE, Kind::CodeError),
            (DATA, Kind::BadData),
            (VAGUE, Kind::DeviceOom),
        ];
        for (text, kind) in words {
            let facts = ExitFacts { code: Some(1), ..ExitFacts::default() };
            assert_eq!(diagnose(text.as_bytes(), facts).kind, kind, "{text}");
        }
    }
}
