//! In how many bits do the files of a model hold its weights?

use serde::Serialize;
use serde_json::Value;

use super::{Fields, ShapeError, levels, unusable};

/// Largest group that is read: a whole column of the widest matrix.
const GROUP_MAX: u64 = 1 << 24;

/// Weights that are stored in fewer bits than a training takes them in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantised {
    /// The method, by its name in config.json: gptq, awq, fp8, bitsandbytes, ….
    pub method: String,
    /// Bits of a weight of a linear module; `None` when nothing says how many.
    pub bits: Option<u32>,
    /// Weights that share a scale; `None` when the scales are too few to count.
    pub group: Option<u32>,
}

impl Quantised {
    /// Returns how the files of a model hold its weights, by `quantization_config` in its config.json.
    ///
    /// Source: the `*Config` classes in `utils/quantization_config.py` of transformers 5.19.
    pub(super) fn of_config(config: &Value) -> Result<Option<Quantised>, ShapeError> {
        let levels = levels(config);
        let stated = levels.iter().find_map(|level| level.get("quantization_config"));
        let stated = match stated {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(stated)) => Fields { object: stated },
            Some(other) => {
                return Err(unusable("quantization_config", other, "an object".to_owned()));
            }
        };
        let method = match stated.object.get("quant_method") {
            None | Some(Value::Null) => "unknown",
            Some(Value::String(method)) => method,
            Some(other) => return Err(unusable("quant_method", other, "a text".to_owned())),
        };
        let method: String = method.to_ascii_lowercase().chars().take(40).collect();
        let is_set = |key| stated.flag(key).map(|flag| flag == Some(true));
        let bits = match method.as_str() {
            "bitsandbytes" if is_set("load_in_8bit")? => Some(8),
            "bitsandbytes" if is_set("load_in_4bit")? => Some(4),
            "fp8" | "fbgemm_fp8" | "eetq" => Some(8),
            _ => stated.number(&["bits", "w_bit", "nbits"], 8)?,
        };
        let group = match method.as_str() {
            // -1 is one scale for a whole column.
            "gptq" | "awq" => match stated.object.get("group_size") {
                Some(Value::Number(size)) if size.as_i64() == Some(-1) => None,
                None | Some(_) => Some(stated.number(&["group_size"], GROUP_MAX)?.unwrap_or(128)),
            },
            _ => None,
        };
        let small = |n: u64| u32::try_from(n).ok().filter(|n| *n > 0);
        Ok(Some(Quantised { method, bits: bits.and_then(small), group: group.and_then(small) }))
    }

    /// Returns what the name of a model says about how its files hold the weights: `…-GPTQ-Int4`, `…-FP8`.
    pub(super) fn of_name(name: &str) -> Option<Quantised> {
        let name = name.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        let words: Vec<&str> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        let has = |wanted: &[&'static str]| wanted.iter().copied().find(|word| words.contains(word));
        let eight = has(&["int8", "8bit", "w8a16", "w8a8"]).is_some();
        let bits = Some(if eight { 8 } else { 4 });
        let (method, bits, group) = match has(&["gptq", "awq", "fp8", "bnb", "int4", "int8", "4bit", "8bit"])?
        {
            "fp8" => ("fp8", Some(8), None),
            "bnb" => ("bitsandbytes", bits, None),
            method @ ("gptq" | "awq") => (method, bits, Some(128)),
            word => (word, bits, None),
        };
        Some(Quantised { method: method.to_owned(), bits, group })
    }

    /// Returns the bytes of a weight of a linear module with its share of the scales; `None` when nothing says it.
    ///
    /// A group has a scale of two bytes and a zero of as many bits as a weight. Source: Frantar et al. 2022 (GPTQ),
    /// Lin et al. 2023 (AWQ), and the buffers of their linear modules.
    pub(crate) fn weight_bytes(&self) -> Option<f64> {
        let bits = f64::from(self.bits?);
        let shared = self.group.map_or(0.0, |group| (16.0 + bits) / f64::from(group));
        Some((bits + shared) / 8.0)
    }

    pub(super) fn note(&self) -> String {
        let method = &self.method;
        match self.bits {
            Some(bits) => format!(
                "its weights are stored in {bits} bits ({method}): they are sized so, and the interval is wider, because \
                 no training on such weights was measured"
            ),
            None => format!(
                "its weights are quantised ({method}), and nothing says to how many bits: they are sized as if they were \
                 not, and the interval is wide"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Model;

    #[test]
    fn quantised_weights_are_read_from_the_config_or_the_name() {
        let of = |quantization: Value| {
            let config = json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 128, "vocab_size": 1000, "quantization_config": quantization});
            Model::resolve("a/b", Some(&config), None).map(|model| model.quantised.map(|q| (q.bits, q.group)))
        };
        for (quantization, bits, group) in [
            (json!({"quant_method": "gptq", "bits": 4, "group_size": 128}), Some(4), Some(128)),
            (json!({"quant_method": "gptq", "bits": 8, "group_size": -1}), Some(8), None),
            (json!({"quant_method": "awq", "bits": 4}), Some(4), Some(128)),
            (json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), Some(8), None),
            (
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false}),
                Some(4),
                None,
            ),
            (json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), Some(8), None),
            (json!({"quant_method": "compressed-tensors", "config_groups": {}}), None, None),
        ] {
            assert_eq!(of(quantization.clone()), Ok(Some((bits, group))), "{quantization}");
        }
        assert_eq!(of(json!(null)), Ok(None));
        for (key, bad) in [
            ("quant_method", json!(4)),
            ("bits", json!("4")),
            ("bits", json!(64)),
            ("group_size", json!("128")),
            ("group_size", json!(-2)),
            ("group_size", json!(0)),
        ] {
            let mut quantization = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
            quantization[key] = bad.clone();
            let error = of(quantization).unwrap_err();
            assert!(error.help().unwrap().contains(&format!("`{key}`")), "{key} {bad}: {error}");
        }
        assert!(of(json!("gptq")).unwrap_err().to_string().contains("its config.json"));
        for (name, bits) in [
            ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", Some(4)),
            ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", Some(8)),
            ("Qwen/Qwen2.5-7B-Instruct-AWQ", Some(4)),
            ("Qwen/Qwen3-8B-FP8", Some(8)),
            ("unsloth/Qwen2.5-7B-bnb-4bit", Some(4)),
            ("Qwen/Qwen2.5-7B-Instruct", None),
            ("openai/gpt-oss-20b", None),
        ] {
            let model = Model::resolve(name, None, None).unwrap();
            assert_eq!(model.quantised.and_then(|quantised| quantised.bits), bits, "{name}");
        }
    }
}
