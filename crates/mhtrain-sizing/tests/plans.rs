//! What the engine arrives at for the recipe's models, and the promises that hold for every request.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod recipe;

use mhtrain_sizing::data::LengthProfile;
use mhtrain_sizing::explain::{bars, what_would_change};
use mhtrain_sizing::gpu::ComputeCapability;
use mhtrain_sizing::ladder::TierBook;
use mhtrain_sizing::observation::{Observation, Seen};
use mhtrain_sizing::plan::{History, Plan, PlanError, Rung, after_oom, plan, plan_learned};
use mhtrain_sizing::request::{Learning, Length, Pins, Request, Save};
use mhtrain_sizing::tier::{Profile, Steps, Tier};
use mhtrain_sizing::units::Bytes;
use mhtrain_sizing::workload::{AttnImpl, Dtype, Targets, TrainType};
use proptest::prelude::*;
use recipe::request;

/// An idle 80 GiB card, less what the driver keeps.
fn idle(model: &str) -> Request {
    request(model, Bytes::from_mib(80_600))
}

fn planned(request: &Request) -> Plan {
    plan(request, &TierBook::builtin()).unwrap()
}

fn chosen(request: &Request) -> Tier {
    planned(request).chosen_rung().tier.clone()
}

fn shape_of(tier: &Tier) -> (u32, u32, u32, bool, AttnImpl) {
    (tier.micro_batch, tier.accumulation, tier.max_length, tier.packing, tier.attn_impl)
}

#[test]
fn models_of_6_to_7b_get_8x4_packed_on_an_idle_80_gib_card() {
    for model in [
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen-7B-Chat",
        "meta-llama/Llama-2-7b-hf",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "01-ai/Yi-1.5-6B-Chat",
        "internlm/internlm2_5-7b-chat",
        "baichuan-inc/Baichuan2-7B-Chat",
        "THUDM/chatglm3-6b",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    ] {
        assert_eq!(shape_of(&chosen(&idle(model))), (8, 4, 3072, true, AttnImpl::FlashAttn), "{model}");
    }
}

#[test]
fn models_of_8_to_9b_get_6x6_packed_on_an_idle_80_gib_card() {
    for model in [
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "Qwen/Qwen3-8B",
        "01-ai/Yi-9B",
        "ZhipuAI/glm-4-9b-chat",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "mistralai/Ministral-8B-Instruct-2410",
    ] {
        assert_eq!(shape_of(&chosen(&idle(model))), (6, 6, 3072, true, AttnImpl::FlashAttn), "{model}");
    }
}

#[test]
fn internlm_20b_gets_2x16_packed_on_an_idle_80_gib_card() {
    for model in
        ["Shanghai_AI_Laboratory/internlm-chat-20b", "internlm/internlm2-chat-20b", "internlm2_5-20b-chat"]
    {
        assert_eq!(shape_of(&chosen(&idle(model))), (2, 16, 3072, true, AttnImpl::FlashAttn), "{model}");
    }
}

#[test]
fn gpt_oss_20b_gets_recipe_8_3_with_an_effective_batch_of_32() {
    let plan = planned(&idle("openai/gpt-oss-20b"));
    let tier = &plan.chosen_rung().tier;
    assert_eq!(shape_of(tier), (1, 32, 2048, false, AttnImpl::Eager));
    assert_eq!((tier.warmup_ratio, tier.save_steps, tier.save_total_limit), (0.05, Steps::Count(50), 2));
    assert_eq!((tier.logging_steps, tier.router_aux_loss_coef), (Steps::Count(5), Some(1e-3)));
    assert!(plan.notes.iter().any(|note| note.contains("recipe 8.3")), "{:?}", plan.notes);
    assert!(plan.notes.iter().any(|note| note.contains("sinks")), "{:?}", plan.notes);
}

#[test]
fn the_standard_profile_carries_the_recipes_values() {
    let tier = chosen(&idle("Qwen/Qwen2.5-7B-Instruct"));
    assert_eq!((tier.learning_rate, tier.warmup_ratio, tier.num_train_epochs), (2e-4, 0.1, 1.0));
    assert_eq!((tier.save_steps, tier.save_total_limit), (Steps::Count(200), 3));
    assert_eq!((tier.logging_steps, tier.torch_dtype), (Steps::Count(20), Dtype::Bfloat16));
    assert!(
        tier.gradient_checkpointing && tier.max_grad_norm.is_none() && tier.router_aux_loss_coef.is_none()
    );
}

#[test]
fn the_emergency_profile_is_the_last_rung_and_carries_the_recipes_values() {
    let plan = planned(&idle("Qwen/Qwen2.5-7B-Instruct"));
    let tier = &plan.rungs.last().unwrap().tier;
    assert_eq!(tier.name, Profile::Emergency);
    assert_eq!(shape_of(tier), (1, 32, 2048, false, AttnImpl::Sdpa));
    assert_eq!((tier.learning_rate, tier.warmup_ratio), (1e-4, 0.1));
    assert_eq!((tier.save_steps, tier.save_total_limit), (Steps::Count(100), 2));
    assert_eq!(tier.logging_steps, Steps::Count(50));
}

#[test]
fn the_emergency_rung_keeps_the_effective_batch_of_the_class() {
    let plan = planned(&idle("Qwen/Qwen3-8B"));
    assert_eq!(plan.effective_batch, 36);
    assert!(plan.rungs.iter().all(|rung| rung.tier.effective_batch() == 36));
    assert_eq!(plan.rungs.last().unwrap().tier.micro_batch, 1);
}

#[test]
fn less_memory_takes_a_smaller_micro_batch_before_shorter_rows() {
    let tight = chosen(&request("Qwen/Qwen2.5-7B", Bytes::from_gib(40)));
    assert_eq!((tight.name, tight.max_length, tight.micro_batch), (Profile::Standard, 3072, 2));
    let tighter = chosen(&request("Qwen/Qwen2.5-7B", Bytes::from_mib(23_000)));
    assert_eq!((tighter.name, tighter.max_length, tighter.micro_batch), (Profile::Shorter, 2048, 1));
}

#[test]
fn when_nothing_fits_the_emergency_rung_is_tried_once() {
    let plan = planned(&request("Qwen/Qwen2.5-7B", Bytes::from_gib(18)));
    assert_eq!(plan.chosen, plan.rungs.len() - 1);
    assert!(!plan.chosen_rung().fits);
    assert!(plan.chosen_rung().why.contains("tried once"));
}

#[test]
fn a_pinned_batch_or_length_that_cannot_fit_is_an_error_that_says_what_the_pins_cost() {
    let refused = |pins: Pins| {
        let request = Request { pins, ..request("Qwen/Qwen2.5-7B", Bytes::from_gib(24)) };
        let error = plan(&request, &TierBook::builtin()).unwrap_err();
        assert!(matches!(error, PlanError::NothingFits { .. }), "{error}");
        error.to_string()
    };
    let both = refused(Pins { micro_batch: Some(64), max_length: Some(8192), ..Pins::default() });
    assert!(both.contains("micro-batch 64 instead of 1 (pinned) costs"), "{both}");
    assert!(both.contains("max_length 8192 instead of 2048 (pinned) costs"), "{both}");
    assert!(both.contains("24.00 GiB are free"), "{both}");
    refused(Pins { micro_batch: Some(16), ..Pins::default() });
    refused(Pins { max_length: Some(16_384), ..Pins::default() });
    refused(Pins { accumulation: Some(1), ..Pins::default() });
}

#[test]
fn pins_of_no_more_than_the_emergency_profile_leave_it_a_last_resort() {
    let pins = Pins { micro_batch: Some(1), max_length: Some(2048), ..Pins::default() };
    let plan = planned(&Request { pins, ..request("Qwen/Qwen2.5-7B", Bytes::from_gib(16)) });
    assert!(plan.chosen_rung().estimate.low_bytes > Bytes::from_gib(16));
    assert!(plan.chosen_rung().why.contains("tried once"));
}

#[test]
fn a_pinned_length_that_may_fit_is_tried_once() {
    let mut request = request("Qwen/Qwen2.5-7B", Bytes::from_gib(24));
    request.pins.max_length = Some(4096);
    let roomy = Request { pins: request.pins.clone(), ..idle("Qwen/Qwen2.5-7B") };
    let last = planned(&roomy).rungs.last().unwrap().estimate.low_bytes;
    request.card.free = last;
    assert!(planned(&request).chosen_rung().why.contains("tried once"));
    request.card.free = last.saturating_sub(Bytes::from_mib(1));
    assert!(matches!(plan(&request, &TierBook::builtin()), Err(PlanError::NothingFits { .. })));
}

#[test]
fn weights_that_do_not_fit_are_an_error_with_both_numbers_and_help() {
    let error = plan(&request("Qwen/Qwen2.5-72B", Bytes::from_gib(24)), &TierBook::builtin()).unwrap_err();
    insta::assert_snapshot!(format!("{error}\n{}", error.help().unwrap()), @r"
    `Qwen/Qwen2.5-72B` does not fit on GPU 0 (A100-SXM4-80GB): what stays in memory needs 137.10 GiB, 24.00 GiB are free
    pack the weights into 4 bits (`train_type` qlora), or take a smaller model or a larger card
    ");
}

#[test]
fn weights_that_do_not_fit_say_what_has_to_be_free_for_the_smallest_rung() {
    let help = |free: Bytes| {
        plan(&request("Qwen/Qwen2.5-7B", free), &TierBook::builtin()).unwrap_err().help().unwrap()
    };
    let roomy = planned(&idle("Qwen/Qwen2.5-7B"));
    let smallest = roomy.rungs.iter().map(|rung| rung.admission_bytes).min().unwrap();
    let free = Bytes::from_gib(2);
    let told = help(free);
    let missing: Bytes = told.strip_prefix("free ").unwrap().split_once(" more").unwrap().0.parse().unwrap();
    let freed = free.saturating_add(missing);
    assert!(freed >= smallest && freed < smallest.saturating_add(Bytes::from_mib(11)), "{told}");
    assert!(planned(&request("Qwen/Qwen2.5-7B", freed)).chosen_rung().fits);
}

#[test]
fn both_factors_pinned_under_the_minimum_are_an_error_with_both_numbers() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.pins = Pins { micro_batch: Some(2), accumulation: Some(4), ..Pins::default() };
    let error = plan(&request, &TierBook::builtin()).unwrap_err();
    assert!(matches!(error, PlanError::PinnedBatchTooSmall { product: 8, min_effective_batch: 32, .. }));
    request.pins = Pins { micro_batch: Some(31), accumulation: Some(1), ..Pins::default() };
    let error = plan(&request, &TierBook::builtin()).unwrap_err();
    assert!(matches!(error, PlanError::PinnedBatchTooSmall { product: 31, .. }), "one row under is under");
    request.pins = Pins { micro_batch: Some(32), max_length: Some(512), ..request.pins };
    assert_eq!(planned(&request).effective_batch, 32);
}

#[test]
fn one_pinned_factor_solves_the_other() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.pins = Pins { micro_batch: Some(5), ..Pins::default() };
    assert_eq!((chosen(&request).micro_batch, chosen(&request).accumulation), (5, 7));
    request.pins = Pins { accumulation: Some(8), ..Pins::default() };
    assert_eq!((chosen(&request).micro_batch, chosen(&request).accumulation), (4, 8));
}

#[test]
fn without_flash_attention_there_is_sdpa_and_no_packing() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.features.flash_attn = false;
    assert_eq!(shape_of(&chosen(&request)), (8, 4, 3072, false, AttnImpl::Sdpa));
    request.allow.no_packing = false;
    let error = plan(&request, &TierBook::builtin()).unwrap_err();
    assert!(error.to_string().contains("flash-attn is not installed"), "{error}");
}

#[test]
fn below_ampere_fp16_stands_in_for_bf16_only_when_allowed() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.card.compute_capability = Some(ComputeCapability { major: 7, minor: 0 });
    let tier = chosen(&request);
    assert_eq!((tier.torch_dtype, tier.attn_impl, tier.packing), (Dtype::Float16, AttnImpl::Sdpa, false));
    request.allow.lower_precision = false;
    assert!(matches!(plan(&request, &TierBook::builtin()), Err(PlanError::Conflict(..))));
}

#[test]
fn rows_of_4096_are_taken_only_when_asked_for() {
    let mut request = idle("Qwen/Qwen2.5-1.5B");
    assert_eq!(chosen(&request).max_length, 3072);
    request.length = Length::Long;
    assert_eq!((chosen(&request).name, chosen(&request).max_length), (Profile::Long, 4096));
}

/// Returns a profile of rows of these lengths, every one of them measured.
fn rows(lengths: &[u32]) -> Option<LengthProfile> {
    Some(LengthProfile::from_measured(lengths, 0, lengths.len() as u64, true))
}

#[test]
fn data_with_longer_rows_gets_4096_where_the_own_batch_fits() {
    let mut request = idle("Qwen/Qwen2.5-1.5B");
    request.data = rows(&[100, 3072]);
    assert_eq!(chosen(&request).max_length, 3072, "no row is longer");
    request.data = rows(&[100, 9000]);
    assert_eq!(chosen(&request).max_length, 3072, "4096 would not keep it either");
    request.data = rows(&[100, 3073]);
    let tier = chosen(&request);
    assert_eq!((tier.name, tier.max_length, tier.micro_batch), (Profile::Long, 4096, 8));
    assert!(planned(&request).notes.iter().any(|note| note.contains("keeps 1 rows more")));
    let own = planned(&request).chosen_rung().admission_bytes;
    request.card.free = own.checked_sub(Bytes::new(1)).unwrap();
    let tier = chosen(&request);
    assert_eq!((tier.name, tier.max_length), (Profile::Standard, 3072), "it does not fit");
    request.card.free = request.card.total;
    for other in [Length::Short, Length::Tokens(2000)] {
        request.length = other;
        assert!(chosen(&request).max_length < 3072, "the job asked for something else");
    }
    request.length = Length::Standard;
    request.allow.shorter_max_length = false;
    assert_eq!(chosen(&request).max_length, 3072, "it could not go down from 4096");
}

#[test]
fn where_most_of_a_pass_would_be_padding_a_smaller_one_goes_first_and_the_plan_says_so() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.features.flash_attn = false;
    let mut lengths = [600; 100];
    lengths[..10].fill(3000);
    request.data = rows(&lengths);
    let plan = planned(&request);
    assert_eq!(plan.chosen_rung().tier.micro_batch, 1);
    assert!(
        plan.notes.iter().any(|note| note.contains("rows are padded to the longest")),
        "{:?}",
        plan.notes
    );
    // Rows of one length are padded to nothing, and packed ones neither: the class's own batch.
    request.data = rows(&[600; 100]);
    assert_eq!(chosen(&request).micro_batch, 8);
    request.data = rows(&[3000; 100]);
    assert_eq!(chosen(&request).micro_batch, 8);
    request.features.flash_attn = true;
    request.data = rows(&lengths);
    assert_eq!(chosen(&request).micro_batch, 8);
}

#[test]
fn activations_are_kept_only_with_consent_and_room_to_spare() {
    let mut request = idle("Qwen/Qwen2.5-0.5B");
    assert!(planned(&request).rungs.iter().all(|rung| rung.tier.gradient_checkpointing));
    request.allow.no_checkpointing = true;
    let plan = planned(&request);
    let taken = plan.chosen_rung();
    assert!(!taken.tier.gradient_checkpointing, "{}", taken.why);
    assert!(taken.why.contains("at 2.5 % risk"), "{}", taken.why);
    let own = plan.rungs.iter().find(|rung| rung.tier.gradient_checkpointing && rung.fits).unwrap();
    assert!(taken.relative_time < own.relative_time);
    assert!(taken.tier.trains_the_same_as(&own.tier), "a checkpoint of one can be resumed by the other");
    assert!(plan.notes.iter().any(|note| note.contains("keep the activations")), "{:?}", plan.notes);
    request.card.free = Bytes::from_gib(8);
    assert!(chosen(&request).gradient_checkpointing, "there is no room");
    request.card.free = request.card.total;
    request.pins.gradient_checkpointing = Some(true);
    assert!(planned(&request).rungs.iter().all(|rung| rung.tier.gradient_checkpointing));
}

#[test]
fn experts_see_few_tokens_each_so_a_larger_pass_is_worth_its_memory() {
    let mut request = request("Qwen/Qwen3-30B-A3B", Bytes::from_gib(500));
    request.card.total = Bytes::from_gib(500);
    assert!(chosen(&request).micro_batch > 2);
    let dense = Request { model: idle("Qwen/Qwen2.5-32B").model, ..request };
    assert_eq!(chosen(&dense).micro_batch, 2);
}

#[test]
fn a_pinned_length_is_kept_by_every_rung() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.length = Length::Tokens(5000);
    assert!(planned(&request).rungs.iter().all(|rung| rung.tier.max_length == 5000));
}

#[test]
fn pinned_packing_without_flash_is_a_conflict() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.pins = Pins { packing: Some(true), attn_impl: Some(AttnImpl::Sdpa), ..Pins::default() };
    let error = plan(&request, &TierBook::builtin()).unwrap_err();
    assert!(error.to_string().contains("packing is pinned"), "{error}");
}

#[test]
fn pins_that_do_not_fit_say_what_each_costs() {
    let mut request = request("Qwen/Qwen2.5-7B", Bytes::from_gib(30));
    request.pins = Pins {
        micro_batch: Some(8),
        accumulation: Some(4),
        max_length: Some(3072),
        packing: Some(true),
        attn_impl: Some(AttnImpl::FlashAttn),
        ..Pins::default()
    };
    let error = plan(&request, &TierBook::builtin()).unwrap_err();
    insta::assert_snapshot!(error);
}

#[test]
fn learning_and_saving_are_as_asked_even_in_an_emergency() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.learning = Learning::Stable;
    request.save = Save::LongRun;
    for rung in planned(&request).rungs {
        let tier = rung.tier;
        assert_eq!((tier.learning_rate, tier.warmup_ratio, tier.max_grad_norm), (1e-4, 0.15, Some(0.5)));
        assert_eq!((tier.save_steps, tier.save_total_limit), (Steps::Count(500), 2));
    }
}

#[test]
fn a_larger_effective_batch_is_a_multiple_of_the_classs_micro_batch() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.min_effective_batch = 50;
    let plan = planned(&request);
    assert_eq!(plan.effective_batch, 56);
    assert!(plan.rungs.iter().all(|rung| rung.tier.effective_batch() == 56));
    request.min_effective_batch = 4;
    assert_eq!(planned(&request).effective_batch, 32);
}

#[test]
fn after_an_oom_the_next_rung_needs_less() {
    let plan = planned(&idle("Qwen/Qwen2.5-7B"));
    let next = after_oom(&plan, plan.chosen, None, None).unwrap();
    assert_eq!((plan.rungs[next].tier.micro_batch, plan.rungs[next].tier.max_length), (4, 3072));
}

#[test]
fn rungs_that_the_reported_need_rules_out_are_skipped() {
    let plan = planned(&idle("Qwen/Qwen2.5-7B"));
    // Twice what was predicted for 8x4 would be too much for 4x8 as well.
    let need = Bytes::from_gib(120);
    let next = after_oom(&plan, plan.chosen, Some(need), Some(Bytes::from_gib(60))).unwrap();
    assert_eq!(plan.rungs[next].tier.micro_batch, 2);
}

#[test]
fn a_reported_need_under_the_prediction_lowers_no_other_prediction() {
    let plan = planned(&idle("Qwen/Qwen2.5-7B"));
    // 4x8 is predicted at 42 GiB. That 8x4 died at 50 GiB instead of 69 is no reason to believe in 32.
    let next = after_oom(&plan, plan.chosen, Some(Bytes::from_gib(50)), Some(Bytes::from_gib(40))).unwrap();
    assert_eq!(plan.rungs[next].tier.micro_batch, 2);
}

#[test]
fn the_emergency_rung_is_the_last_answer_and_there_is_none_after_it() {
    let plan = planned(&idle("Qwen/Qwen2.5-7B"));
    let last = plan.rungs.len() - 1;
    assert_eq!(
        after_oom(&plan, plan.chosen, Some(Bytes::from_gib(700)), Some(Bytes::from_gib(18))),
        Some(last)
    );
    assert_eq!(after_oom(&plan, last, None, None), None);
    assert_eq!(after_oom(&plan, plan.chosen, None, Some(Bytes::from_gib(10))), None);
    assert_eq!(after_oom(&plan, plan.rungs.len(), None, None), None);
}

#[test]
fn the_emergency_rung_is_reached_from_the_one_above_it_unless_it_is_the_same_pass() {
    for (model, flash_attn) in [
        ("Qwen/Qwen2.5-7B", true),
        ("meta-llama/Llama-3.1-8B", true),
        ("Qwen/Qwen3-4B", true),
        ("Qwen/Qwen2.5-7B", false),
    ] {
        let mut request = idle(model);
        request.features.flash_attn = flash_attn;
        let plan = planned(&request);
        let last = plan.rungs.len() - 1;
        let (above, emergency) = (&plan.rungs[last - 1], &plan.rungs[last]);
        assert_eq!(emergency.tier.name, Profile::Emergency);
        let is_new = !emergency.tier.passes_the_same_as(&above.tier);
        assert_eq!(is_new, flash_attn, "{model}: {} after {}", emergency.tier, above.tier);
        let free = Some(above.predicted_peak_bytes);
        assert_eq!(after_oom(&plan, last - 1, None, free), is_new.then_some(last), "{model}");
    }
}

/// Returns a job without flash attention whose every row was counted, the longest with so many tokens.
fn with_rows(longest: u32) -> Request {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.features.flash_attn = false;
    request.data = Some(LengthProfile::from_measured(&[longest / 2, longest], 0, 2, true));
    request
}

#[test]
fn rows_that_are_not_packed_are_sized_by_the_longest_of_the_data() {
    let (short, full) = (planned(&with_rows(600)), planned(&with_rows(5000)));
    assert_eq!((short.longest_row, full.longest_row), (Some(640), Some(5056)));
    let said = |plan: &Plan| plan.notes.iter().any(|note| note.contains("the longest has 600"));
    assert!(said(&short) && !said(&full));
    for (short, full) in short.rungs.iter().zip(&full.rungs) {
        assert!(short.predicted_peak_bytes < full.predicted_peak_bytes, "{}", short.tier);
        assert!(short.full_rows_peak_bytes.is_some() && full.full_rows_peak_bytes.is_none());
    }
    let observed = |plan: &Plan| {
        let seen = Seen::MoreThan { limit: Bytes::from_gib(1) };
        plan.observation(0, "run".to_owned(), seen, None).and_then(|seen| seen.sized_row)
    };
    assert_eq!((observed(&short), observed(&full)), (Some(640), Some(short.rungs[0].tier.max_length)));
    let mut sampled = with_rows(600);
    sampled.data = Some(LengthProfile::from_measured(&[600], 0, 2, false));
    assert_eq!(planned(&sampled).longest_row, None);
}

#[test]
fn packs_are_as_full_as_they_may_be_whatever_the_rows_are() {
    let mut request = with_rows(600);
    request.features.flash_attn = true;
    let plain = planned(&Request { data: None, ..request.clone() });
    let plan = planned(&request);
    let (emergency, packed) = plan.rungs.split_last().unwrap();
    for rung in packed {
        let same = plain.rungs.iter().find(|other| other.tier == rung.tier).unwrap();
        assert_eq!(same.predicted_peak_bytes, rung.predicted_peak_bytes, "{}", rung.tier);
    }
    assert!(!emergency.tier.packing && emergency.full_rows_peak_bytes.is_some());
}

#[test]
fn an_oom_that_contradicts_the_longest_row_goes_one_rung_down() {
    let free = Bytes::from_gib(80);
    let mut request = with_rows(600);
    request.card.free = free;
    let plan = planned(&request);
    let own = plan.rungs.iter().position(|rung| rung.tier.micro_batch == 8).unwrap();
    assert!(plan.rungs[own].estimate.high_bytes < Bytes::from_gib(40));
    for need in [Some(Bytes::from_gib(81)), Some(Bytes::from_gib(90)), None] {
        let next = after_oom(&plan, own, need, Some(free)).unwrap();
        assert_eq!((plan.rungs[next].tier.micro_batch, plan.rungs[next].tier.max_length), (4, 3072));
    }
}

#[test]
fn a_shorter_length_that_no_row_reaches_is_no_answer_to_an_oom() {
    let mut request = with_rows(600);
    request.allow.emergency = false;
    let plan = planned(&request);
    let smallest = plan.rungs.iter().position(|rung| rung.tier.micro_batch == 1).unwrap();
    assert!(plan.rungs[smallest + 1..].iter().any(|rung| rung.tier.max_length == 2048));
    assert_eq!(after_oom(&plan, smallest, None, Some(Bytes::from_gib(80))), None);
    // The emergency rung of this card is that very pass.
    let plan = planned(&with_rows(600));
    let smallest = plan.rungs.iter().position(|rung| rung.tier.micro_batch == 1).unwrap();
    assert_eq!(after_oom(&plan, smallest, None, Some(Bytes::from_gib(80))), None);
}

#[test]
fn runs_that_were_sized_for_longer_rows_than_they_had_do_not_lower_a_known_length() {
    let request = with_rows(600);
    let blind = planned(&Request { data: None, ..request.clone() });
    let own = blind.rungs.iter().position(|rung| rung.tier.micro_batch == 8).unwrap();
    let half = blind.rungs[own].estimate.allocated_peak_bytes.as_f64() * 0.5;
    let seen = Seen::Peak { allocated: None, reserved: Some(Bytes::from_f64(half)), device: None };
    let history = |seen: Option<Observation>| History {
        observations: seen.into_iter().collect(),
        ..History::default()
    };
    let observed = blind.observation(own, "job 1".to_owned(), seen, None);
    let of = |seen| plan_learned(&request, &TierBook::builtin(), &history(seen)).unwrap();
    assert_eq!(of(observed).rungs[own].predicted_peak_bytes, of(None).rungs[own].predicted_peak_bytes);
}

#[test]
fn no_two_rungs_of_a_ladder_read_alike() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.allow.no_checkpointing = true;
    request.allow.quantize = true;
    request.allow.fewer_targets = true;
    let names: Vec<String> = planned(&request).rungs.iter().map(|rung| rung.tier.to_string()).collect();
    for (index, name) in names.iter().enumerate() {
        assert!(!names[..index].contains(name), "{name}");
    }
    assert!(names.iter().any(|name| name.ends_with(" no checkpointing")));
}

#[test]
fn every_why_carries_both_numbers() {
    for rung in planned(&request("Qwen/Qwen2.5-7B", Bytes::from_gib(40))).rungs {
        assert!(rung.why.contains(&rung.admission_bytes.to_string()), "{}", rung.why);
        assert!(rung.why.contains("40.00 GiB are free"), "{}", rung.why);
    }
}

#[test]
fn the_plan_of_a_7b_on_a_24_gib_card_reads_well() {
    let mut request = request("Qwen/Qwen2.5-7B-Instruct", Bytes::from_mib(23_900));
    request.held_by_others = Bytes::from_mib(340);
    let plan = planned(&request);
    let rungs: Vec<String> = plan.rungs.iter().map(|rung| format!("{}: {}", rung.tier, rung.why)).collect();
    insta::assert_snapshot!(format!("{}\n\n{}", rungs.join("\n"), plan.notes.join("\n")));
}

#[test]
fn a_full_card_says_what_would_take_a_higher_rung() {
    let mut request = request("Qwen/Qwen2.5-7B", Bytes::from_gib(23));
    request.features.liger = true;
    let (plan, book) = (planned(&request), TierBook::builtin());
    let lines = what_would_change(&request, &book, &History::default(), &plan);
    assert!(lines[0].starts_with('+') && lines[0].contains("free -> standard 1x32"), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("liger")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("qlora")), "{lines:?}");
    request.card.total = Bytes::from_gib(24);
    let lines = what_would_change(&request, &book, &History::default(), &plan);
    assert!(
        lines.iter().all(|line| !line.starts_with('+')),
        "a card of 24 GiB cannot have 25 free: {lines:?}"
    );
}

#[test]
fn bars_of_neighbours_have_one_scale_and_one_line_where_the_free_memory_ends() {
    let (free, total) = (Bytes::from_gib(35), Bytes::from_gib(80));
    let plan = planned(&request("Qwen/Qwen2.5-7B", free));
    let lines = bars(&plan, free, total);
    assert!(lines.iter().all(|line| line.is_ascii() && line.len() <= 100), "{lines:#?}");
    let drawn: Vec<&String> = lines.iter().filter(|line| line.contains('[')).collect();
    assert_eq!(drawn.len(), 3, "{lines:#?}");
    assert!(
        drawn[1].starts_with('>') && drawn[0].starts_with(' ') && drawn[2].starts_with(' '),
        "{lines:#?}"
    );
    let columns = |letter: char| drawn.iter().map(|line| line.find(letter).unwrap()).collect::<Vec<_>>();
    for letter in ['[', '|'] {
        assert!(columns(letter).windows(2).all(|pair| pair[0] == pair[1]), "{lines:#?}");
    }
    let behind: Vec<&str> = drawn.iter().map(|line| line.split_once('|').unwrap().1).collect();
    // The rung above reaches over the line, the others leave what others hold alone.
    assert!(
        behind[0].starts_with('L') && behind[1].starts_with('#') && behind[2].starts_with('#'),
        "{lines:#?}"
    );
    let legend = lines[3..].join("");
    for part in ["weights", "reserve", "context", "held by others 45.00 GiB", "end of the free 35.00 GiB"] {
        assert!(legend.contains(part), "{part}: {lines:#?}");
    }
}

#[test]
fn memory_for_a_rung_that_is_not_worth_it_is_not_asked_for() {
    let mut request = request("Qwen/Qwen2.5-1.5B", Bytes::from_gib(30));
    request.card.total = Bytes::from_gib(80);
    request.length = Length::Tokens(1024);
    let plan = planned(&request);
    let lines = what_would_change(&request, &TierBook::builtin(), &History::default(), &plan);
    assert!(lines.iter().all(|line| !line.contains("16x2")), "{lines:?}");
    let larger = plan.rungs.iter().find(|rung| rung.tier.micro_batch == 16).unwrap();
    assert!(!larger.worth_it && larger.why.starts_with("not worth it"), "{}", larger.why);
    assert!(larger.why.contains("30.00 GiB are free"), "{}", larger.why);
}

#[test]
fn fewer_targets_come_after_shorter_rows_and_before_the_emergency_profile_where_allowed() {
    let mut request = request("Qwen/Qwen2.5-7B", Bytes::from_mib(20_000));
    let targets = |plan: &Plan| -> Vec<(Profile, String)> {
        let adapters = |rung: &Rung| rung.tier.adapters.clone().unwrap().target_modules.to_string();
        plan.rungs.iter().map(|rung| (rung.tier.name, adapters(rung))).collect()
    };
    assert!(targets(&planned(&request)).iter().all(|(_, targets)| targets == "all-linear"));
    request.allow.fewer_targets = true;
    let plan = planned(&request);
    let rungs = targets(&plan);
    let place = rungs.iter().position(|(name, _)| *name == Profile::FewerTargets).unwrap();
    assert_eq!(place, rungs.len() - 2);
    assert_eq!(rungs[place - 1].0, Profile::Shorter);
    assert!(rungs[place..].iter().all(|(_, targets)| targets == "q_proj,v_proj"), "{rungs:?}");
    assert!(rungs[..place].iter().all(|(_, targets)| targets == "all-linear"), "{rungs:?}");
    assert!(plan.rungs[place].predicted_peak_bytes < plan.rungs[place - 1].predicted_peak_bytes);
    request.allow.fewer_targets = false;
    let whole = planned(&request);
    let last = |plan: &Plan| plan.rungs.last().unwrap().predicted_peak_bytes;
    assert!(last(&plan) < last(&whole), "the emergency rung has the fewer adapters too");
    assert!(!plan.rungs[place - 1].tier.trains_the_same_as(&plan.rungs[place].tier));
    let said = plan.notes.iter().any(|note| note.contains("q_proj,v_proj instead of all-linear"));
    assert!(said, "{:?}", plan.notes);
}

#[test]
fn packed_weights_come_before_the_emergency_profile_where_allowed_and_are_taken_when_nothing_else_fits() {
    let mut request = request("Qwen/Qwen2.5-7B", Bytes::from_mib(14_000));
    assert!(matches!(plan(&request, &TierBook::builtin()), Err(PlanError::WeightsDoNotFit { .. })));
    request.allow.quantize = true;
    let packed = planned(&request);
    let taken = &packed.chosen_rung().tier;
    assert_eq!((taken.name, taken.quant_bits, taken.effective_batch()), (Profile::Quantized, Some(4), 32));
    let first = packed.rungs.iter().position(|rung| rung.tier.quant_bits.is_some()).unwrap();
    assert_eq!(packed.rungs[first - 1].tier.name, Profile::Shorter);
    assert!(
        packed.rungs[first..].iter().all(|rung| rung.tier.quant_bits == Some(4)),
        "the emergency rung as well"
    );
    assert!(!packed.rungs[first - 1].tier.trains_the_same_as(&packed.rungs[first].tier));
    assert!(packed.notes.iter().any(|note| note.contains("packed into 4 bits")), "{:?}", packed.notes);
    // What such a rung shows is kept for the method that it is.
    let seen = Seen::MoreThan { limit: Bytes::from_gib(9) };
    let kept = packed.observation(packed.chosen, "job 1".to_owned(), seen, None).unwrap();
    assert_eq!(kept.fingerprint.method, TrainType::Qlora);
    assert_eq!(
        packed.observation(0, "job 2".to_owned(), seen, None).unwrap().fingerprint.method,
        TrainType::Lora
    );

    request.features.bitsandbytes = false;
    assert!(matches!(plan(&request, &TierBook::builtin()), Err(PlanError::WeightsDoNotFit { .. })));
    let mut idle = idle("Qwen/Qwen2.5-7B");
    idle.allow.quantize = true;
    idle.features.bitsandbytes = false;
    assert!(planned(&idle).notes.iter().any(|note| note.contains("bitsandbytes is not installed")));
}

#[test]
fn fewer_targets_leave_a_pin_alone_and_say_where_a_model_has_none() {
    let mut request = idle("Qwen/Qwen2.5-7B");
    request.allow.fewer_targets = true;
    request.pins.target_modules = Some(Targets::AllLinear);
    assert!(planned(&request).rungs.iter().all(|rung| rung.tier.name != Profile::FewerTargets));
    let mut request = idle("baichuan-inc/Baichuan2-7B-Chat");
    request.allow.fewer_targets = true;
    let plan = planned(&request);
    assert!(plan.rungs.iter().all(|rung| rung.tier.name != Profile::FewerTargets));
    assert!(plan.notes.iter().any(|note| note.contains("`allow.fewer_targets` changes nothing")));
}

#[test]
fn the_books_adapters_are_sized_and_a_pin_goes_before_them() {
    let text = include_str!("../../../config/tiers.toml");
    let edited = text.replace("rank = 8\n", "rank = 64\n").replace("\"all-linear\"\n", "\"q_proj\"\n");
    let book = TierBook::from_toml(&edited).unwrap();
    let mut request = idle("Qwen/Qwen2.5-7B");
    let adapters =
        |request: &Request| plan(request, &book).unwrap().chosen_rung().tier.adapters.clone().unwrap();
    assert_eq!(
        (adapters(&request).lora_rank, adapters(&request).target_modules.to_string()),
        (64, "q_proj".into())
    );
    request.pins.lora_rank = Some(16);
    assert_eq!(adapters(&request).lora_rank, 16);
    request.train_type = TrainType::Full;
    assert_eq!(plan(&request, &book).unwrap().chosen_rung().tier.adapters, None);
}

#[test]
fn help_names_only_what_can_be_done() {
    let help = |model: &str, total: u64| {
        let mut request = request(model, Bytes::from_gib(total));
        request.card.total = Bytes::from_gib(total);
        plan(&request, &TierBook::builtin()).unwrap_err().help().unwrap()
    };
    assert!(!help("Qwen/Qwen2.5-7B", 12).contains("free"), "the card is smaller than the weights");
    assert!(help("Qwen/Qwen2.5-7B", 12).contains("qlora"));
    for model in ["openai/gpt-oss-20b", "Qwen/Qwen2.5-72B-Instruct-AWQ"] {
        assert!(!help(model, 24).contains("qlora"), "{model}: {}", help(model, 24));
    }
}

#[test]
fn a_batch_that_is_pinned_whole_has_no_note_about_another_one() {
    let mut request = idle("openai/gpt-oss-20b");
    request.min_effective_batch = 16;
    request.pins = Pins { micro_batch: Some(1), accumulation: Some(16), ..Pins::default() };
    let plan = planned(&request);
    assert_eq!(plan.effective_batch, 16);
    assert!(plan.notes.iter().all(|note| !note.contains("effective batch of 32")), "{:?}", plan.notes);
}

#[test]
fn full_fine_tuning_says_that_its_learning_rate_was_chosen_for_adapters() {
    let mut request = idle("Qwen/Qwen2.5-0.5B");
    let said =
        |request: &Request| planned(request).notes.iter().any(|note| note.contains("chosen for adapters"));
    assert!(!said(&request));
    request.train_type = TrainType::Full;
    assert_eq!((chosen(&request).learning_rate, said(&request)), (2e-4, true));
    request.pins.learning_rate = Some(1e-5);
    assert!(!said(&request));
}

const MODELS: [&str; 8] = [
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-8B",
    "internlm/internlm-20b",
    "openai/gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B",
    "somebody/unheard-of-13B",
    "google/gemma-2-9b",
];

fn any_request() -> impl Strategy<Value = Request> {
    let pins = (
        prop::option::of(1u32..70),
        prop::option::of(1u32..70),
        prop::option::of(64u32..10_000),
        prop::option::of(any::<bool>()),
        prop::option::of(prop::sample::select(vec![AttnImpl::FlashAttn, AttnImpl::Sdpa, AttnImpl::Eager])),
        prop::option::of(any::<bool>()),
    );
    let wishes = (
        prop::sample::select(vec![TrainType::Lora, TrainType::Qlora, TrainType::Full]),
        prop::sample::select(vec![Length::Standard, Length::Long, Length::Short, Length::Tokens(1000)]),
        1u32..100,
        any::<(bool, bool, bool, bool, bool, bool)>(),
        any::<(bool, bool)>(),
        prop::sample::select(vec![(7, 0), (7, 5), (8, 0), (9, 0)]),
        prop::option::of(prop::collection::vec(1u32..6000, 1..20)),
    );
    (prop::sample::select(MODELS.to_vec()), 1u64..200_000, pins, wishes).prop_map(
        |(model, free, pins, wishes)| {
            let mut request = request(model, Bytes::from_mib(free));
            let (micro_batch, accumulation, max_length, packing, attn_impl, gradient_checkpointing) = pins;
            request.pins = Pins {
                micro_batch,
                accumulation,
                max_length,
                packing,
                attn_impl,
                gradient_checkpointing,
                ..Pins::default()
            };
            let (train_type, length, min, allow, features, (major, minor), lengths) = wishes;
            request.data = lengths.and_then(|lengths| rows(&lengths));
            request.train_type = train_type;
            request.length = length;
            request.min_effective_batch = min;
            (
                request.allow.shorter_max_length,
                request.allow.no_packing,
                request.allow.emergency,
                request.allow.liger,
                request.allow.fewer_targets,
                request.allow.no_checkpointing,
            ) = allow;
            (request.features.flash_attn, request.features.liger) = features;
            request.card.compute_capability = Some(ComputeCapability { major, minor });
            request
        },
    )
}

proptest! {
    // Each case plans some ten times.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// "+N free -> rung" is what the plan takes with that memory, and no refusal sends people to look for memory that would
    /// change nothing.
    #[test]
    fn what_is_said_to_change_the_plan_changes_it(
        model in prop::sample::select(vec![
            "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", "internlm/internlm2-chat-20b",
            "openai/gpt-oss-20b", "Qwen/Qwen2.5-32B",
        ]),
        total in prop::sample::select(vec![16_u64, 24, 40, 48, 80, 141]),
        share in 0.05_f64..1.0,
        length in prop::sample::select(vec![None, Some(512_u32), Some(1024), Some(2048)]),
        no_checkpointing in any::<bool>(),
    ) {
        let total = Bytes::from_gib(total);
        let mut asked = request(model, Bytes::from_f64(share * total.as_f64()));
        asked.card.total = total;
        asked.allow.no_checkpointing = no_checkpointing;
        if let Some(tokens) = length {
            asked.length = Length::Tokens(tokens);
        }
        let book = TierBook::builtin();
        if let Ok(first) = plan(&asked, &book) {
            let at = |free: Bytes| {
                let mut richer = asked.clone();
                (richer.card.free, richer.card.total) = (free, total.max(free));
                planned(&richer)
            };
            let idle = at(Bytes::from_gib(100_000));
            for line in what_would_change(&asked, &book, &History::default(), &first) {
                let Some((more, rung)) = line.strip_prefix('+').and_then(|line| line.split_once(" free -> ")) else {
                    continue;
                };
                let more: Bytes = more.replace(' ', "").parse().unwrap();
                let richer = at(asked.card.free.saturating_add(more));
                prop_assert_eq!(richer.chosen_rung().tier.to_string(), rung, "{}", line);
                prop_assert!(richer.chosen_rung().fits, "{}", line);
            }
            for (index, rung) in first.rungs.iter().enumerate() {
                prop_assert!(rung.why.contains(&rung.admission_bytes.to_string()), "{}", rung.why);
                prop_assert!(rung.why.contains(&format!("{} are free", asked.card.free)), "{}", rung.why);
                if rung.why.starts_with("refused: ") {
                    prop_assert!(at(rung.admission_bytes).chosen <= index, "{}", rung.why);
                }
                prop_assert!(!rung.why.starts_with("not worth it") || idle.chosen != index, "{}", rung.why);
            }
        }
    }
}

proptest! {
    #[test]
    fn more_free_memory_never_picks_a_lower_rung(request in any_request(), more in 0u64..100_000) {
        let mut roomier = request.clone();
        roomier.card.free = request.card.free.saturating_add(Bytes::from_mib(more));
        let book = TierBook::builtin();
        if let Ok(tight) = plan(&request, &book) {
            let roomy = plan(&roomier, &book);
            prop_assert!(roomy.is_ok(), "{roomy:?}");
            prop_assert!(roomy.unwrap().chosen <= tight.chosen);
        }
    }

    #[test]
    fn the_effective_batch_is_one_for_all_rungs_and_never_under_the_minimum(request in any_request()) {
        if let Ok(plan) = plan(&request, &TierBook::builtin()) {
            prop_assert!(plan.effective_batch >= u64::from(request.min_effective_batch));
            for rung in &plan.rungs {
                prop_assert_eq!(rung.tier.effective_batch(), plan.effective_batch);
            }
        }
    }

    #[test]
    fn pins_are_never_overridden(request in any_request()) {
        if let Ok(plan) = plan(&request, &TierBook::builtin()) {
            let pins = &request.pins;
            for Tier { micro_batch, accumulation, max_length, packing, attn_impl, gradient_checkpointing, .. }
                in plan.rungs.iter().map(|rung| &rung.tier)
            {
                prop_assert_eq!(pins.micro_batch.unwrap_or(*micro_batch), *micro_batch);
                prop_assert_eq!(pins.accumulation.unwrap_or(*accumulation), *accumulation);
                prop_assert_eq!(pins.max_length.unwrap_or(*max_length), *max_length);
                prop_assert_eq!(pins.packing.unwrap_or(*packing), *packing);
                prop_assert_eq!(pins.attn_impl.unwrap_or(*attn_impl), *attn_impl);
                prop_assert_eq!(pins.gradient_checkpointing.unwrap_or(*gradient_checkpointing), *gradient_checkpointing);
                prop_assert!(!*packing || attn_impl.is_flash());
            }
        }
    }

    #[test]
    fn a_forbidden_change_is_never_in_the_ladder(request in any_request()) {
        if let Ok(plan) = plan(&request, &TierBook::builtin()) {
            let first = &plan.rungs[0].tier;
            for rung in &plan.rungs {
                prop_assert!(request.allow.emergency || rung.tier.name != Profile::Emergency);
                prop_assert!(request.allow.shorter_max_length || rung.tier.max_length >= first.max_length);
                prop_assert!(request.allow.no_packing || rung.tier.packing == first.packing);
                prop_assert!(request.allow.liger || !rung.tier.liger_kernel);
                prop_assert!(request.allow.fewer_targets || rung.tier.adapters == first.adapters);
                let kept = !rung.tier.gradient_checkpointing && request.pins.gradient_checkpointing.is_none();
                prop_assert!(request.allow.no_checkpointing || !kept);
                prop_assert!(rung.estimate.low_bytes <= rung.predicted_peak_bytes);
                prop_assert!(rung.predicted_peak_bytes <= rung.estimate.high_bytes);
            }
            prop_assert!(plan.rungs.is_sorted_by_key(|rung| rung.tier.name));
        }
    }

    #[test]
    fn after_an_oom_the_answer_is_a_later_rung_that_needs_no_more(request in any_request(), need in 0u64..300_000) {
        if let Ok(plan) = plan(&request, &TierBook::builtin()) {
            let mut rung = plan.chosen;
            let mut attempts = 1;
            while let Some(next) = after_oom(&plan, rung, Some(Bytes::from_mib(need)), Some(request.card.free)) {
                prop_assert!(next > rung);
                let (dead, rung_next) = (&plan.rungs[rung], &plan.rungs[next]);
                let needs_no_more = rung_next.predicted_peak_bytes <= dead.predicted_peak_bytes;
                prop_assert!(needs_no_more || rung_next.tier.name == Profile::Emergency);
                prop_assert!(!rung_next.tier.passes_the_same_as(&dead.tier));
                rung = next;
                attempts += 1;
                prop_assert!(attempts <= plan.rungs.len());
            }
        }
    }
}
