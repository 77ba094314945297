//! Values that the tests of several modules need.

use mhtrain_sizing::estimate::{Estimate, Terms};
use mhtrain_sizing::observation::{Fingerprint, Versions};
use mhtrain_sizing::plan::{Plan, Rung};
use mhtrain_sizing::reserve::Group;
use mhtrain_sizing::tier::{Profile, Steps, Tier};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::{AttnImpl, Dtype, TrainType};

use crate::diagnosis::{Answer, Diagnosis, Evidence, Kind};

/// Returns a rung's tier of the profile that its numbers fit.
pub(crate) fn tier(name: Profile, micro_batch: u32, accumulation: u32) -> Tier {
    let emergency = name == Profile::Emergency;
    Tier {
        name,
        micro_batch,
        accumulation,
        world_size: 1,
        max_length: if matches!(name, Profile::Standard | Profile::Long) { 3072 } else { 2048 },
        packing: !emergency,
        attn_impl: if emergency { AttnImpl::Sdpa } else { AttnImpl::FlashAttn },
        torch_dtype: Dtype::Bfloat16,
        gradient_checkpointing: true,
        liger_kernel: false,
        learning_rate: if emergency { 1e-4 } else { 2e-4 },
        warmup_ratio: 0.1,
        max_grad_norm: None,
        num_train_epochs: 1.0,
        save_steps: Steps::Count(200),
        save_total_limit: 3,
        logging_steps: Steps::Count(20),
        router_aux_loss_coef: None,
        quant_bits: None,
        adapters: None,
    }
}

/// Returns a rung that is predicted to take so many GiB.
pub(crate) fn rung(tier: Tier, gib: u64) -> Rung {
    let peak = Bytes::from_gib(gib);
    Rung {
        tier,
        predicted_peak_bytes: peak,
        admission_bytes: peak.saturating_add(Bytes::from_gib(1)),
        fits: true,
        worth_it: true,
        why: format!("needs {peak}"),
        estimate: Estimate {
            allocated_peak_bytes: peak,
            device_peak_bytes: peak,
            low_bytes: peak,
            high_bytes: peak,
            terms: Terms { weights: Bytes::from_gib(gib.min(14)), ..Terms::default() },
            reserve_bytes: Bytes::ZERO,
        },
        relative_time: 1.0,
        row_tokens: None,
        full_rows_peak_bytes: None,
    }
}

/// Returns a ladder of six rungs, from 60 GiB down to 16 GiB.
pub(crate) fn plan() -> Plan {
    Plan {
        chosen: 0,
        rungs: vec![
            rung(tier(Profile::Standard, 8, 4), 60),
            rung(tier(Profile::Standard, 4, 8), 40),
            rung(tier(Profile::Standard, 2, 16), 28),
            rung(tier(Profile::Standard, 1, 32), 22),
            rung(tier(Profile::Shorter, 1, 32), 19),
            rung(tier(Profile::Emergency, 1, 32), 16),
        ],
        effective_batch: 32,
        fingerprint: fingerprint(),
        notes: Vec::new(),
        can_quantise: true,
        step_time: None,
        longest_row: None,
    }
}

/// Returns what a job of the tests has in common with others.
pub(crate) fn fingerprint() -> Fingerprint {
    Fingerprint {
        model: "Qwen/Qwen2.5-7B-Instruct".to_owned(),
        family: "qwen2".to_owned(),
        method: TrainType::Lora,
        group: Group::Equal,
        versions: Versions::default(),
        card: "Simulated GPU".to_owned(),
    }
}

/// Returns a certain, fatal diagnosis without amounts.
pub(crate) fn diagnosis(kind: Kind) -> Diagnosis {
    Diagnosis {
        kind,
        fatal: kind != Kind::Success,
        certain: true,
        phase: None,
        evidence: Evidence { line: format!("a line that says {kind}"), ..Evidence::default() },
        answer: Answer::None,
    }
}
