//! What is settled before the rungs are listed, and what is said about it?
//!
//! Batch, lengths, attention, precision and adapters follow from the job, its class and the card, one function each. Each
//! adds a sentence for what differs from the recipe or from what the job asked.

use super::PlanError;
use crate::data::LengthProfile;
use crate::gpu::ComputeCapability;
use crate::ladder::{Class, TierBook};
use crate::model::ShapeSource;
use crate::request::{Learning, Length, Request};
use crate::tier::Adapters;
use crate::workload::{AttnImpl, Dtype, TrainType};

/// Which factors of the effective batch may be tried.
#[derive(Clone, Debug)]
pub(super) struct Batches {
    /// The presumption.
    pub(super) own: u32,
    /// To try, largest first.
    pub(super) micro: Vec<u32>,
    /// Nothing to choose: a factor is pinned.
    pub(super) pinned: bool,
}

/// Which lengths may be tried.
#[derive(Copy, Clone, Debug)]
pub(super) struct Lengths {
    pub(super) long: Option<u32>,
    /// Longer rows than the job asks for, because its data has them.
    pub(super) long_for_data: Option<u32>,
    pub(super) standard: Option<u32>,
    pub(super) shorter: Option<u32>,
    pub(super) emergency: u32,
}

/// Attention and packing of the standard rungs and of the emergency rung.
#[derive(Copy, Clone, Debug)]
pub(super) struct Attention {
    pub(super) attn_impl: AttnImpl,
    pub(super) packing: bool,
    pub(super) emergency_attn_impl: AttnImpl,
    pub(super) emergency_packing: bool,
}

pub(super) fn check_numbers(request: &Request) -> Result<(), PlanError> {
    let pins = &request.pins;
    let counts = [
        ("per_device_train_batch_size", pins.micro_batch),
        ("gradient_accumulation_steps", pins.accumulation),
        ("max_length", pins.max_length),
        ("length", if let Length::Tokens(tokens) = request.length { Some(tokens) } else { None }),
    ];
    for (what, count) in counts {
        if count.is_some_and(|count| count == 0 || count > COUNT_MAX) {
            let found = count.unwrap_or(0).to_string();
            return Err(PlanError::Unusable { what, found, expected: "a whole number from 1 to 16777216" });
        }
    }
    if request.min_effective_batch == 0 || request.min_effective_batch > COUNT_MAX {
        let found = request.min_effective_batch.to_string();
        return Err(PlanError::Unusable {
            what: "min_effective_batch",
            found,
            expected: "a whole number from 1 to 16777216",
        });
    }
    if !(request.oom_risk > 0.0 && request.oom_risk < 1.0) {
        let found = request.oom_risk.to_string();
        return Err(PlanError::Unusable { what: "oom_risk", found, expected: "above 0 and below 1" });
    }
    Ok(())
}

/// Largest batch or length that is planned for: beyond any trainer, and far from any overflow.
const COUNT_MAX: u32 = 1 << 24;

/// Largest micro-batch that is tried beside those of the class.
const MICRO_BATCH_MAX: u32 = 64;

/// Returns the effective batch and the micro-batches to try.
///
/// The effective batch is the class's own; if the job asks for more, the next multiple of the class's own micro-batch,
/// so that the presumption stays. Under it a job may go, and need not.
pub(super) fn settle_batch(
    request: &Request,
    class: &Class,
    notes: &mut Vec<String>,
) -> Result<(u64, Batches), PlanError> {
    let min = request.min_effective_batch;
    let wanted = if min > class.effective_batch {
        min.next_multiple_of(class.micro_batch)
    } else {
        class.effective_batch
    };
    let fixed = |micro: u32| Batches { own: micro, micro: vec![micro], pinned: true };
    match (request.pins.micro_batch, request.pins.accumulation) {
        (Some(micro_batch), Some(accumulation)) => {
            let product = u64::from(micro_batch) * u64::from(accumulation);
            if product < u64::from(min) {
                let min_effective_batch = min;
                return Err(PlanError::PinnedBatchTooSmall {
                    micro_batch,
                    accumulation,
                    product,
                    min_effective_batch,
                });
            }
            Ok((product, fixed(micro_batch)))
        }
        (Some(micro), None) => {
            let passes = wanted.div_ceil(micro);
            let product = u64::from(micro) * u64::from(passes);
            notes.push(format!(
                "micro-batch {micro} is pinned: accumulation {passes} makes an effective batch of {product}, at least \
                 {wanted}"
            ));
            Ok((product, fixed(micro)))
        }
        (None, Some(accumulation)) => {
            let micro = wanted.div_ceil(accumulation);
            let product = u64::from(micro) * u64::from(accumulation);
            notes.push(format!(
                "accumulation {accumulation} is pinned: micro-batch {micro} makes an effective batch of {product}, at \
                 least {wanted}"
            ));
            Ok((product, fixed(micro)))
        }
        (None, None) => {
            let micro = if wanted == class.effective_batch {
                class.micro_batches.clone()
            } else {
                notes.push(format!(
                    "`min_effective_batch` is {min}: the effective batch is {wanted} instead of {}",
                    class.effective_batch
                ));
                let largest = class.micro_batches.first().copied().unwrap_or(1).min(MICRO_BATCH_MAX);
                (1..=largest).rev().filter(|micro| wanted.is_multiple_of(*micro)).collect()
            };
            Ok((u64::from(wanted), Batches { own: class.micro_batch, micro, pinned: false }))
        }
    }
}

pub(super) fn settle_lengths(
    request: &Request,
    book: &TierBook,
    class: &Class,
) -> Result<Lengths, PlanError> {
    let asked = match request.length {
        Length::Tokens(tokens) => Some(tokens),
        Length::Standard | Length::Long | Length::Short => None,
    };
    if let (Some(asked), Some(pinned)) = (asked, request.pins.max_length)
        && asked != pinned
    {
        return Err(PlanError::Conflict(
            format!("`length` is {asked} and `args.max_length` is {pinned}"),
            "give one of the two".to_owned(),
        ));
    }
    if let Some(pinned) = request.pins.max_length.or(asked) {
        return Ok(Lengths {
            long: None,
            long_for_data: None,
            standard: Some(pinned),
            shorter: None,
            emergency: pinned,
        });
    }
    let profiles = &book.profiles;
    let standard = class.max_length.unwrap_or(profiles.standard.max_length);
    let (long, whole) = match request.length {
        Length::Long => (Some(profiles.long.max_length), standard),
        Length::Short => (None, profiles.shorter.max_length.min(standard)),
        Length::Standard | Length::Tokens(_) => (None, standard),
    };
    let first = long.unwrap_or(whole);
    if !request.allow.shorter_max_length {
        let standard = if long.is_some() { None } else { Some(whole) };
        return Ok(Lengths { long, long_for_data: None, standard, shorter: None, emergency: first });
    }
    let shorter = Some(profiles.shorter.max_length).filter(|shorter| *shorter < whole);
    // A class with a length of its own has it for its memory.
    let may_be_longer = request.length == Length::Standard && class.max_length.is_none();
    // Rows that even the longer length leaves out gain nothing.
    let gains = |long: u32, data: &LengthProfile| data.rows_over(whole) > data.rows_over(long);
    let long_for_data = Some(profiles.long.max_length).filter(|long| {
        may_be_longer && *long > whole && request.data.as_ref().is_some_and(|data| gains(*long, data))
    });
    let emergency = profiles.emergency.max_length.min(whole);
    Ok(Lengths { long, long_for_data, standard: Some(whole), shorter, emergency })
}

/// Returns attention and packing.
///
/// Packing needs a flash implementation, and flash attention needs Ampere; ms-swift refuses the first without the second.
pub(super) fn settle_attention(
    request: &Request,
    book: &TierBook,
    notes: &mut Vec<String>,
) -> Result<Attention, PlanError> {
    let supported = &request.model.attention;
    let obstacle = flash_obstacle(request);
    let without_flash = || supported.iter().copied().find(|attn| !attn.is_flash()).unwrap_or(AttnImpl::Eager);
    let pins = &request.pins;
    let attn_impl = match pins.attn_impl {
        Some(pinned) => {
            warn_about_pinned_attention(request, pinned, obstacle.as_deref(), notes);
            pinned
        }
        None if obstacle.is_none() => {
            supported.iter().copied().find(|attn| attn.is_flash()).unwrap_or(AttnImpl::FlashAttn)
        }
        None => without_flash(),
    };
    let reason = match (pins.attn_impl, &obstacle) {
        (Some(pinned), _) => format!("`attn_impl` is pinned to {pinned}"),
        (None, Some(obstacle)) => obstacle.clone(),
        (None, None) => String::new(),
    };
    let packing = match pins.packing {
        Some(true) if !attn_impl.is_flash() => {
            return Err(PlanError::Conflict(
                format!("packing is pinned and needs flash attention, but {reason}"),
                "unpin `packing` or `attn_impl`, or install flash-attn on an Ampere card".to_owned(),
            ));
        }
        Some(pinned) => pinned,
        None => book.profiles.standard.packing && attn_impl.is_flash(),
    };
    if book.profiles.standard.packing && !packing && pins.packing.is_none() {
        if !request.allow.no_packing {
            return Err(PlanError::Conflict(
                format!("packing needs flash attention, but {reason}, and `allow.no_packing` is false"),
                "allow it (`allow.no_packing`), or install flash-attn on an Ampere card".to_owned(),
            ));
        }
        notes.push(format!("attention is {attn_impl} and rows are not packed: {reason}"));
    }
    let emergency = &book.profiles.emergency;
    let may_unpack = pins.packing.is_none() && (request.allow.no_packing || !packing);
    let emergency_packing = if may_unpack { emergency.packing && packing } else { packing };
    let emergency_attn_impl = match pins.attn_impl {
        Some(pinned) => pinned,
        None if emergency_packing => attn_impl,
        None if supported.contains(&emergency.attn_impl) => emergency.attn_impl,
        None => without_flash(),
    };
    Ok(Attention { attn_impl, packing, emergency_attn_impl, emergency_packing })
}

/// Returns why flash attention cannot be used; `None` when it can.
fn flash_obstacle(request: &Request) -> Option<String> {
    let capability = request.card.compute_capability.unwrap_or(ComputeCapability::AMPERE);
    if !request.model.attention.iter().any(|attn| attn.is_flash()) {
        let name = &request.model.shape.model_type;
        return Some(format!("transformers has no general flash attention for {name}"));
    }
    if capability < ComputeCapability::AMPERE {
        return Some(format!("flash attention needs compute capability 8.0, and this card has {capability}"));
    }
    (!request.features.flash_attn)
        .then(|| "flash-attn is not installed in the trainer environment".to_owned())
}

fn warn_about_pinned_attention(
    request: &Request,
    pinned: AttnImpl,
    obstacle: Option<&str>,
    notes: &mut Vec<String>,
) {
    if let Some(obstacle) = obstacle.filter(|_| pinned.is_flash()) {
        notes.push(format!("`attn_impl` is pinned to {pinned}, which may fail: {obstacle}"));
    } else if pinned == AttnImpl::Sdpa && !request.model.attention.contains(&pinned) {
        let name = &request.model.shape.model_type;
        notes.push(format!("`attn_impl` is pinned to {pinned}, which transformers does not have for {name}"));
    }
}

/// Returns the type of weights and activations: bf16, or fp16 below Ampere, which has no bf16.
pub(super) fn settle_dtype(request: &Request, notes: &mut Vec<String>) -> Result<Dtype, PlanError> {
    let capability = request.card.compute_capability.unwrap_or(ComputeCapability::AMPERE);
    let lacks_bf16 = capability < ComputeCapability::AMPERE;
    match request.pins.torch_dtype {
        Some(Dtype::Bfloat16) if lacks_bf16 => {
            notes.push(format!(
                "`torch_dtype` is pinned to bfloat16, which a card of compute capability {capability} only imitates"
            ));
            Ok(Dtype::Bfloat16)
        }
        Some(pinned) => Ok(pinned),
        None if !lacks_bf16 => Ok(Dtype::Bfloat16),
        None if request.allow.lower_precision => {
            let how = if request.train_type == TrainType::Full {
                ", with fp32 weights under fp16 autocast"
            } else {
                ""
            };
            notes.push(format!(
                "float16 instead of bfloat16{how}: this card has compute capability {capability}, and bf16 needs 8.0"
            ));
            Ok(Dtype::Float16)
        }
        None => Err(PlanError::Conflict(
            format!(
                "bfloat16 needs compute capability 8.0, this card has {capability}, and `allow.lower_precision` is false"
            ),
            "allow it (`allow.lower_precision`), pin `torch_dtype`, or take an Ampere card".to_owned(),
        )),
    }
}

/// Returns the adapters of the job, and those of its most frugal rungs: on fewer layers where the job allows it, pins no
/// layers, and the model has the ones that the book names.
pub(super) fn settle_adapters(
    request: &Request,
    book: &TierBook,
    notes: &mut Vec<String>,
) -> (Option<Adapters>, Option<Adapters>) {
    if request.train_type == TrainType::Full {
        return (None, None);
    }
    let pins = &request.pins;
    let own = Adapters {
        lora_rank: pins.lora_rank.unwrap_or(book.lora.rank),
        target_modules: pins.target_modules.clone().unwrap_or_else(|| book.lora.target_modules.clone()),
    };
    if !request.allow.fewer_targets || pins.target_modules.is_some() {
        return (Some(own.clone()), Some(own));
    }
    let fewer = book.profiles.fewer_targets.target_modules.clone();
    let shape = &request.model.shape;
    let found = shape.adapter_parameters(own.lora_rank, &fewer);
    if found == 0 || found >= shape.adapter_parameters(own.lora_rank, &own.target_modules) {
        notes.push(format!(
            "`allow.fewer_targets` changes nothing: {fewer} are not fewer layers of this model"
        ));
        return (Some(own.clone()), Some(own));
    }
    (Some(own.clone()), Some(Adapters { target_modules: fewer, ..own }))
}

pub(super) fn settle_liger(request: &Request, notes: &mut Vec<String>) -> bool {
    match (request.pins.liger_kernel, request.allow.liger, request.features.liger) {
        (Some(pinned), _, installed) => {
            if pinned && !installed {
                notes.push("`use_liger_kernel` is pinned, and liger-kernel is not installed".to_owned());
            }
            pinned
        }
        (None, true, true) => {
            notes.push(
                "Liger's fused loss is on (`allow.liger`); its memory is not measured, so margins are wide"
                    .to_owned(),
            );
            true
        }
        (None, true, false) => {
            notes.push("`allow.liger` is true, but liger-kernel is not installed".to_owned());
            false
        }
        (None, false, _) => false,
    }
}

/// Returns whether the last rungs pack the base weights into 4 bits.
pub(super) fn settle_quantising(request: &Request, notes: &mut Vec<String>) -> bool {
    if !request.allow.quantize || request.train_type != TrainType::Lora {
        // Weights that are trained in full cannot be packed, and those of qlora are.
        return false;
    }
    if !request.model.can_be_packed() {
        notes.push(
            "`allow.quantize` is true, but bitsandbytes cannot pack the weights of this model".to_owned(),
        );
        return false;
    }
    if !request.features.bitsandbytes {
        notes.push("`allow.quantize` is true, but bitsandbytes is not installed".to_owned());
        return false;
    }
    true
}

pub(super) fn note_environment(request: &Request, notes: &mut Vec<String>) {
    if request.train_type == TrainType::Qlora && !request.features.bitsandbytes {
        notes.push("qlora needs bitsandbytes, which is not installed in the trainer environment".to_owned());
    }
    if request.train_type == TrainType::Qlora && !request.model.can_be_packed() {
        notes.push(match &request.model.quantised {
            Some(quantised) => format!(
                "the weights are quantised already ({}), and bitsandbytes does not pack them again: `train_type` lora \
                 says the same",
                quantised.method
            ),
            None => "nobody tried bitsandbytes on gpt-oss: its experts stay as they are, and only attention is packed"
                .to_owned(),
        });
    }
    if request.train_type == TrainType::Full
        && request.learning == Learning::Standard
        && request.pins.learning_rate.is_none()
    {
        notes.push(
            "the learning rate is the recipe's for every train type (section 4.1), and it was chosen for adapters: full \
             fine-tuning usually takes 1e-5 to 2e-5 (pin `learning_rate`, or `learning` stable for 1e-4)"
                .to_owned(),
        );
    }
    if request.card.compute_capability.is_none() {
        notes
            .push("the compute capability of the card is not known: it is taken for Ampere (8.0)".to_owned());
    }
    if request.model.source == ShapeSource::Name {
        notes.push(
            "the interval of every prediction is wide, because only the model's name is known".to_owned(),
        );
    }
}
