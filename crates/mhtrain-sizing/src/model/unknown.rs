//! How far is a kind of block without a list from the nearest kind that has one?
//!
//! Two things tell: what its config.json says that no list explains, and parameters of its weight files that the nearest
//! kind's list does not count.

use serde_json::Value;

use super::{BESIDE, EXPERT_COUNT, EXPERTS_OF_TOKEN, Model, ModelShape, Traits, WORTH_A_NOTE, levels};
use crate::block::float;

/// Keys that the estimate reads whatever the kind is, beside [`EXPERT_COUNT`] and [`EXPERTS_OF_TOKEN`].
const READ: [&str; 38] = [
    "model_type",
    "quantization_config",
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "intermediate_size",
    "ffn_hidden_size",
    "n_inner",
    "tie_word_embeddings",
    "qk_layernorm",
    "use_qk_layernorm",
    "use_parallel_residual",
    "parallel_attn",
    "hidden_act",
    "moe_intermediate_size",
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "shared_expert_intermediate_size",
    "mlp_only_layers",
    "mlp_layer_types",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "n_group",
    "topk_group",
];

/// Keys that say nothing of a block's tensors: how it is stored, loaded and begun, how text is generated, how a router chooses.
///
/// Source: the attributes of `PreTrainedConfig` in transformers 4.57 (with those of generation) and 5.19, and what pages of the hub add.
const WITHOUT_TENSORS: [&str; 56] = [
    "architectures",
    "auto_map",
    "name_or_path",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "is_decoder",
    "task_specific_params",
    "problem_type",
    "id2label",
    "label2id",
    "return_dict",
    "torchscript",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cache_implementation",
    "attn_implementation",
    "experts_implementation",
    "use_flash_attn",
    "gradient_checkpointing",
    "pretraining_tp",
    "ep_size",
    "seq_length",
    "model_max_length",
    "n_positions",
    "n_ctx",
    "activation_function",
    "finetuning_task",
    "prefix",
    "unsloth_fixed",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "remove_invalid_values",
    "hidden_activation",
    "topk_method",
    "scoring_func",
    "seq_aux",
    // Layers that guess further tokens, which transformers does not load.
    "num_nextn_predict_layers",
    "num_mtp_modules",
];

/// Words of keys that speak of nothing or of little: positions, how far attention reaches, norms, biases, factors, routers.
/// Known kinds that differ from Llama's in these alone lie in the interval of a near kind.
const SMALL: [&str; 29] = [
    "token",
    "tokenizer",
    "template",
    "dtype",
    "version",
    "initializer",
    "range",
    "seed",
    "eps",
    "epsilon",
    "dropout",
    "pdrop",
    "noise",
    "loss",
    "coef",
    "router",
    "rope",
    "rotary",
    "position",
    "theta",
    "window",
    "norm",
    "layernorm",
    "bias",
    "multiplier",
    "scale",
    "scaling",
    "scalar",
    "softcapping",
];

/// Returns the keys that say of a block what no list explains, those that are set and not among the above, for a kind that
/// is not known by its name; of one that is, `layer_types` alone, where it has words that the kind's list does not.
pub(super) fn unexplained(config: &Value, shape: &ModelShape) -> Vec<String> {
    let levels = levels(config);
    let Some(object) = levels.last().copied() else { return Vec::new() };
    let is_named = levels.iter().any(|level| level.get("model_type").is_some_and(Value::is_string));
    let has_list = is_named && Traits::of(&shape.model_type).known;
    let is_odd = |(key, value): (&String, &Value)| match key.as_str() {
        "layer_types" => has_other_layers(value, shape),
        key => !has_list && is_on(value) && !is_explained(key),
    };
    object.iter().filter(|entry| is_odd(*entry)).map(|(key, _)| key.clone()).collect()
}

fn is_explained(key: &str) -> bool {
    let key = key.trim_start_matches('_');
    [&READ[..], &WITHOUT_TENSORS, &EXPERT_COUNT, &EXPERTS_OF_TOKEN, &BESIDE]
        .iter()
        .any(|keys| keys.contains(&key))
        || key.split('_').any(|word| SMALL.contains(&word))
}

/// Returns whether a value switches something on.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
    }
}

/// Returns whether layers are named that have something else than attention, or than the kind's list has.
fn has_other_layers(types: &Value, shape: &ModelShape) -> bool {
    let is_known = |of: &Value| match of.as_str() {
        Some("full_attention" | "sliding_attention" | "chunked_attention") => true,
        Some("linear_attention") => shape.delta_net.is_some(),
        Some("conv") => shape.convolution.is_some(),
        Some(_) | None => false,
    };
    types.as_array().is_some_and(|types| !types.iter().all(is_known))
}

impl ModelShape {
    /// Returns the shape without a gate in its MLP, which no key of config.json tells, where its parameters are those that the
    /// weight files hold, and nearer than with one.
    fn without_gate(&self, stored: u64) -> Option<ModelShape> {
        let plain = ModelShape { gated_mlp: false, ..self.clone() };
        let off = |shape: &ModelShape| shape.parameters().abs_diff(stored);
        let may_have_none = self.experts.is_none() && !Traits::of(&self.model_type).known;
        let is_it = float(off(&plain)) <= WORTH_A_NOTE * float(plain.parameters());
        (may_have_none && is_it && off(&plain) < off(self)).then_some(plain)
    }
}

impl Model {
    /// Takes the nearest of the kinds that stand in for an unknown one, by the parameters that its weight files hold.
    pub(super) fn take_nearest(&mut self, stored: u64) {
        let Some(shape) = self.shape.without_gate(stored) else { return };
        self.shape = shape;
        self.notes.push(
            "its weight files hold as much as an MLP without a gate explains, so it is taken to have none"
                .to_owned(),
        );
    }

    /// Returns whether an unknown kind is far from the one that stands in for it: its config.json says what no list explains, or
    /// its weight files hold parameters that the list does not count.
    pub fn is_far(&self) -> bool {
        !self.unexplained.is_empty() || self.is_miscounted()
    }

    fn is_miscounted(&self) -> bool {
        self.miscounted.is_some_and(|beside| beside.abs() > WORTH_A_NOTE * float(self.parameters()))
    }

    /// Returns what tells that an unknown kind is far from the one that stands in for it; `None` when it is near.
    pub(super) fn distance_note(&self) -> Option<String> {
        const SHOWN: usize = 3;
        let mut reasons = Vec::new();
        if !self.unexplained.is_empty() {
            let short = |key: &String| format!("`{}`", key.chars().take(40).collect::<String>());
            let mut keys = self.unexplained.iter().take(SHOWN).map(short).collect::<Vec<_>>().join(", ");
            if self.unexplained.len() > SHOWN {
                keys += &format!(" and {} more", self.unexplained.len() - SHOWN);
            }
            reasons.push(format!("of its config.json no list explains {keys}"));
        }
        if let Some(beside) = self.miscounted.filter(|_| self.is_miscounted()) {
            let than = if beside > 0.0 { "more" } else { "fewer" };
            let billions = beside.abs() / 1e9;
            reasons
                .push(format!("its weight files hold {billions:.2} billion parameters {than} than counted"));
        }
        let reasons = reasons.join("; ");
        self.is_far().then(|| format!("it is far from that kind, so the interval is wider still: {reasons}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{ShapeSource, WeightFiles};
    use super::*;
    use crate::units::Bytes;

    fn model(more: &[(&str, Value)], parameters: Option<u64>) -> Model {
        let mut config = json!({"model_type": "novel", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000, "tie_word_embeddings": true});
        for (key, value) in more {
            config[*key] = value.clone();
        }
        let files = parameters.map(|n| WeightFiles { bytes: Bytes::from_mib(1), parameters: Some(n) });
        Model::resolve("some/model", Some(&config), files).unwrap()
    }

    #[test]
    fn what_no_list_explains_makes_a_kind_far() {
        for (key, value) in [
            ("linear_num_key_heads", json!(16)),
            ("kv_lora_rank", json!(512)),
            ("mamba_d_conv", json!(4)),
            ("hybrid_override_pattern", json!("MEM*")),
            ("attention_k_eq_v", json!(true)),
            ("layer_types", json!(["full_attention", "linear_attention"])),
            ("layer_types", json!(["conv"])),
        ] {
            let model = model(&[(key, value.clone())], None);
            assert_eq!(
                (model.source, &model.unexplained[..]),
                (ShapeSource::UnknownBlock, &[key.to_owned()][..])
            );
            assert!(model.is_far() && model.notes.iter().any(|note| note.contains(key)), "{:?}", model.notes);
        }
    }

    #[test]
    fn what_speaks_of_little_or_is_off_leaves_a_kind_near() {
        let near = model(
            &[
                ("attention_multiplier", json!(0.1)),
                ("_name_or_path", json!("some/base")),
                ("rms_norm_eps", json!(1e-5)),
                // Defaults that transformers 4 wrote into what is within another config.json.
                ("max_length", json!(20)),
                ("top_p", json!(1.0)),
                ("length_penalty", json!(1.0)),
                ("num_local_experts", json!(null)),
                ("kv_lora_rank", json!(null)),
                ("mamba_d_conv", json!(0)),
                ("attention_k_eq_v", json!(false)),
                ("hybrid_override_pattern", json!("")),
                ("compress_rates", json!({})),
                ("vision_config", json!({"hidden_size": 8})),
                ("layer_types", json!(["full_attention", "sliding_attention"])),
            ],
            None,
        );
        assert_eq!(
            (near.source, near.is_far()),
            (ShapeSource::UnknownBlock, false),
            "{:?}",
            near.unexplained
        );
    }

    #[test]
    fn layers_are_known_by_the_list_that_their_kind_has() {
        let layers = |types: &[&str]| {
            model(&[("model_type", json!("qwen3_5_text")), ("layer_types", json!(types))], None)
        };
        // Fewer than there are, so the list does not fit; what it names does.
        let few = layers(&["linear_attention", "full_attention"]);
        assert_eq!((few.source, few.is_far()), (ShapeSource::UnknownBlock, false), "{:?}", few.unexplained);
        assert!(layers(&["linear_attention", "conv", "full_attention", "full_attention"]).is_far());
    }

    #[test]
    fn parameters_that_are_not_counted_make_a_kind_far() {
        let counted = model(&[], None).parameters();
        for (parameters, far) in [
            (counted, false),
            (counted + counted / 1000, false),
            (counted + counted / 50, true),
            (counted - counted / 50, true),
        ] {
            let model = model(&[], Some(parameters));
            assert_eq!(model.is_far(), far, "{parameters} of {counted}");
            assert_eq!(
                model.notes.iter().any(|note| note.contains("billion parameters")),
                far,
                "{:?}",
                model.notes
            );
        }
    }

    #[test]
    fn weight_files_tell_whether_the_mlp_has_a_gate() {
        let gated = model(&[], None);
        assert!(gated.shape.gated_mlp);
        // Four gates of 64 x 128.
        let plain = gated.parameters() - 4 * 64 * 128;
        let nearest = model(&[], Some(plain));
        assert_eq!((nearest.shape.gated_mlp, nearest.parameters(), nearest.is_far()), (false, plain, false));
        assert!(nearest.notes.iter().any(|note| note.contains("without a gate")), "{:?}", nearest.notes);
        // As many as with it, and files that hold a part of the model.
        for parameters in [gated.parameters(), gated.parameters() / 3, gated.parameters() * 45 / 100] {
            assert!(model(&[], Some(parameters)).shape.gated_mlp, "{parameters}");
        }
        // A kind that is known has its gate, whatever else about it is not.
        let ahead = [("model_type", json!("gemma4_text")), ("use_bidirectional_attention", json!("all"))];
        let ahead = model(&ahead, Some(plain));
        assert_eq!((ahead.source, ahead.shape.gated_mlp), (ShapeSource::UnknownBlock, true));
        // Of a mixture the experts of each block count, so nothing is told.
        let experts = [("num_experts", json!(8)), ("num_experts_per_tok", json!(2))];
        assert!(model(&experts, Some(plain)).shape.gated_mlp);
    }
}
