//! Whatever a config.json says: a shape or an error, and an estimate that is in order.

mod recipe;

use mhtrain_sizing::estimate::estimate;
use mhtrain_sizing::model::Model;
use mhtrain_sizing::workload::Workload;
use proptest::prelude::*;
use recipe::any_workload;
use serde_json::{Map, Value, json};

const KEYS: [&str; 68] = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "n_routed_experts",
    "first_k_dense_replace",
    "mlp_only_layers",
    "tie_word_embeddings",
    "attention_bias",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
    "final_logit_softcapping",
    "multi_query_group_num",
    "multi_query_attention",
    "kv_channels",
    "ffn_hidden_size",
    "padded_vocab_size",
    "num_layers",
    "add_qkv_bias",
    "bias",
    "mlp_bias",
    "attn_logit_softcapping",
    "decoder_sparse_step",
    "n_shared_experts",
    "quantization_config",
    "vision_config",
    "model_type",
    "text_config",
    "use_qk_norm",
    "qk_layernorm",
    "use_parallel_residual",
    "use_bias",
    "partial_rotary_factor",
    "no_rope_layer_interval",
    "layer_types",
    "moe_layer_start_index",
    "moe_layer_interval",
    "n_group",
    "hidden_act",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "full_attention_interval",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "mlp_layer_types",
    "num_dense_layers",
    "mup_enabled",
    "global_attn_every_n_layers",
    "rope_interleave",
    "topk_method",
    "full_attn_idxs",
    "per_layer_config",
];

const TYPES: [&str; 49] = [
    "llama",
    "mistral",
    "qwen",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "chatglm",
    "internlm2",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "gpt_oss",
    "smollm3",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "exaone4",
    "hunyuan_v1_dense",
    "seed_oss",
    "starcoder2",
    "nemotron",
    "apertus",
    "phi",
    "stablelm",
    "cohere",
    "cohere2",
    "granite",
    "granitemoe",
    "helium",
    "ernie4_5_moe",
    "glm4_moe",
    "lfm2",
    "gemma4_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "afmoe",
    "bitnet",
    "nanochat",
    "novel",
];

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => (1u64..5000).prop_map(Value::from),
        2 => (0u32..64).prop_map(|shift| Value::from(1u64 << shift)),
        1 => Just(Value::Null),
        1 => Just(json!(0)),
        1 => Just(json!(-1)),
        1 => Just(json!(1.5)),
        1 => Just(json!("64")),
        1 => Just(json!([1, 2])),
        2 => any::<bool>().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        1 => any::<f64>().prop_map(Value::from),
    ]
}

/// A usable config with some keys replaced by anything.
fn config() -> impl Strategy<Value = Value> {
    let odd = prop::collection::vec((prop::sample::select(KEYS.to_vec()), leaf()), 0..6);
    (prop::sample::select(TYPES.to_vec()), odd, prop::bool::weighted(0.1)).prop_map(|(kind, odd, nested)| {
        let mut config = json!({"model_type": kind, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "moe_intermediate_size": 32, "vocab_size": 1000,
            "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "ffn_hidden_size": 128,
            "padded_vocab_size": 1000, "num_layers": 3});
        for (key, value) in odd {
            config[key] = value;
        }
        if nested {
            let mut outer = Map::new();
            outer.insert("model_type".to_owned(), Value::from(kind));
            outer.insert("text_config".to_owned(), config);
            config = Value::Object(outer);
        }
        config
    })
}

fn workload() -> impl Strategy<Value = Workload> {
    let count = || prop_oneof![4 => 1u32..5000, 1 => any::<u32>()];
    any_workload([count(), count(), count(), count()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_config_is_a_shape_or_an_error_and_the_estimate_is_in_order(config in config(), work in workload()) {
        if let Ok(model) = Model::resolve("some/model", Some(&config), None)
            && let Ok(estimate) = estimate(&model, &work)
        {
            prop_assert!(estimate.low_bytes <= estimate.device_peak_bytes, "{estimate:?}");
            prop_assert!(estimate.device_peak_bytes <= estimate.high_bytes, "{estimate:?}");
            prop_assert!(estimate.allocated_peak_bytes <= estimate.device_peak_bytes, "{estimate:?}");
            prop_assert!(estimate.allocated_peak_bytes >= estimate.terms.weights, "{estimate:?}");
        }
    }

    #[test]
    fn more_rows_longer_rows_or_a_higher_rank_never_need_less(
        config in config(),
        work in workload(),
        more in 1u32..1000,
    ) {
        let Ok(model) = Model::resolve("some/model", Some(&config), None) else { return Ok(()) };
        let Ok(base) = estimate(&model, &work) else { return Ok(()) };
        for grown in [
            Workload { micro_batch: work.micro_batch.saturating_add(more), ..work.clone() },
            Workload { max_length: work.max_length.saturating_add(more), ..work.clone() },
            Workload { lora_rank: work.lora_rank.saturating_add(more), ..work.clone() },
        ] {
            let Ok(larger) = estimate(&model, &grown) else { continue };
            prop_assert!(larger.allocated_peak_bytes >= base.allocated_peak_bytes, "{grown:?}");
            prop_assert!(larger.device_peak_bytes >= base.device_peak_bytes, "{grown:?}");
            prop_assert!(larger.high_bytes >= base.high_bytes, "{grown:?}");
        }
    }
}
