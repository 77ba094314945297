//! What shape has a model whose config.json is not at hand?
//!
//! First `config/models.toml` by name; else a shape made up from the parameter count in the name.

use std::sync::OnceLock;

use regex::Regex;
use serde::Deserialize;

use crate::model::{AttentionBias, BlockKind, Experts, ModelShape, ShapeError, Style};
use crate::workload::AttnImpl;

/// Known models, read from `config/models.toml`.
#[derive(Debug)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

/// One known model.
#[derive(Debug)]
pub struct Entry {
    pattern: Regex,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Its block kind is one that the estimate knows.
    pub exact_blocks: bool,
    /// Tier class where the parameter count would choose another.
    pub class: Option<String>,
    /// Attention implementations that its class supports, best first; empty: the default of its `model_type`.
    pub attention: Vec<AttnImpl>,
    /// A sentence for every plan.
    pub note: Option<String>,
}

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The file is not what it should be.
    #[error("cannot read the catalogue of models: {0}")]
    Toml(#[from] toml::de::Error),
    /// A pattern is no regular expression.
    #[error("the pattern `{pattern}` in the catalogue of models is no regular expression")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        source: regex::Error,
    },
    /// An entry has no usable dimensions.
    #[error("the entry `{pattern}` in the catalogue of models has no usable shape")]
    Shape {
        /// The entry's pattern.
        pattern: String,
        /// What is wrong.
        source: ShapeError,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    #[serde(rename = "match")]
    pattern: String,
    config: serde_json::Value,
    class: Option<String>,
    #[serde(default)]
    attention: Vec<AttnImpl>,
    note: Option<String>,
}

impl Catalogue {
    /// Returns the catalogue that comes with the program.
    pub fn builtin() -> &'static Catalogue {
        static BUILTIN: OnceLock<Catalogue> = OnceLock::new();
        BUILTIN.get_or_init(|| {
            Catalogue::from_toml(include_str!("../../../config/models.toml"))
                .expect("the embedded models.toml is read by a test")
        })
    }

    /// Reads a catalogue.
    ///
    /// # Errors
    /// Unknown keys, patterns that are no regular expressions, and shapes that are none.
    pub fn from_toml(text: &str) -> Result<Catalogue, CatalogueError> {
        let file: File = toml::from_str(text)?;
        let entries = file.model.into_iter().map(Entry::new).collect::<Result<_, _>>()?;
        Ok(Catalogue { entries })
    }

    /// Returns the entry with the longest match on the last part of a hub id or path.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        let name = plain_name(name);
        let length = |entry: &Entry| entry.pattern.find(&name).map_or(0, |found| found.len());
        self.entries.iter().filter(|entry| length(entry) > 0).max_by_key(|entry| length(entry))
    }
}

impl Entry {
    fn new(row: Row) -> Result<Entry, CatalogueError> {
        let pattern = Regex::new(&format!("^(?:{})(?:-|$)", row.pattern))
            .map_err(|source| CatalogueError::Pattern { pattern: row.pattern.clone(), source })?;
        let (shape, exact_blocks) = ModelShape::from_config(&row.config)
            .map_err(|source| CatalogueError::Shape { pattern: row.pattern, source })?;
        Ok(Entry { pattern, shape, exact_blocks, class: row.class, attention: row.attention, note: row.note })
    }
}

/// Returns the last part of a hub id or path in lower case. A cache directory of the hub
/// (`models--Qwen--Qwen2.5-7B/snapshots/<commit>`) is read as the id that it holds.
fn plain_name(name: &str) -> String {
    let name: String = name.trim().chars().take(4096).collect();
    let parts: Vec<&str> = name.split(['/', '\\']).filter(|part| !part.is_empty()).collect();
    let cached = parts.iter().rev().find_map(|part| part.strip_prefix("models--"));
    let last = cached.and_then(|id| id.rsplit("--").next()).or(parts.last().copied()).unwrap_or_default();
    // ModelScope's cache writes `___` for a dot.
    last.to_lowercase().replace("___", ".").replace('_', "-")
}

/// Returns a made-up shape of the size that a name states (`7B`, `0.5B`, `500M`, `8x7B`, `30B-A3B`), and the size in
/// billions; `None` when the name states none.
///
/// The proportions are those of the open models of that size. Their vocabulary is the large one (152k), because the
/// loss needs more memory than all else, and because guessing it small is the dearer mistake.
pub fn shape_from_name(name: &str) -> Option<(ModelShape, f64)> {
    static PATTERN: OnceLock<Regex> = OnceLock::new();
    let pattern = PATTERN.get_or_init(|| {
        Regex::new(r"(?:^|[^a-z0-9.])(?:(?<experts>\d{1,3})x)?(?<count>\d{1,4}(?:\.\d{1,3})?)(?<unit>[bm])(?:-a(?<active>\d{1,3}(?:\.\d{1,3})?)b)?(?:[^a-z0-9.]|$)")
            .expect("a constant pattern, read by a test")
    });
    // `foo-1_8b` is 1.8 billion where hyphens part the words; `llama_2_7b` is the seventh billion of a second version.
    static POINT: OnceLock<Regex> = OnceLock::new();
    let point = POINT.get_or_init(|| {
        Regex::new(r"-(\d{1,3})_(\d{1,3}[bBmM])").expect("a constant pattern, read by a test")
    });
    let name = plain_name(&point.replace_all(name, "-$1.$2"));
    let found = pattern.captures(&name)?;
    let number = |group: &str| found.name(group).and_then(|text| text.as_str().parse::<f64>().ok());
    let scale = if &found["unit"] == "b" { 1.0 } else { 1e-3 };
    let stated = number("count")? * scale;
    if !(0.01..=2000.0).contains(&stated) {
        return None;
    }
    let shape = match (number("experts"), number("active")) {
        (Some(experts), _) => repeated_shape(stated, experts),
        (None, Some(active)) => mixture_shape(stated, active)?,
        (None, None) => dense_shape(stated),
    };
    let billions = if found.name("experts").is_some() { parameters_in_billions(&shape) } else { stated };
    Some((shape, billions))
}

#[expect(clippy::cast_precision_loss, reason = "a size for people")]
fn parameters_in_billions(shape: &ModelShape) -> f64 {
    (shape.parameters() as f64 / 1e8).round() / 10.0
}

/// Sizes in billions with hidden width, layers and heads of the open models near them.
/// Source: the configurations in `config/models.toml` (Qwen2.5, Qwen3 and Llama 3).
const PROPORTIONS: [(f64, u64, u64, u64, u64); 9] = [
    (0.5, 896, 24, 14, 2),
    (1.5, 1536, 28, 12, 2),
    (3.0, 2048, 36, 16, 2),
    (7.0, 3584, 28, 28, 4),
    (8.0, 4096, 36, 32, 8),
    (14.0, 5120, 48, 40, 8),
    (32.0, 5120, 64, 40, 8),
    (70.0, 8192, 80, 64, 8),
    (405.0, 16384, 126, 128, 8),
];
const VOCAB_GUESS: u64 = 152_064;

/// Returns a dense shape of `billions` parameters: the proportions of the nearest size, the MLP as wide as needed.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a guess; `as` saturates, and the sizes are bounded by the caller"
)]
fn dense_shape(billions: f64) -> ModelShape {
    let distance = |size: f64| (size.ln() - billions.ln()).abs();
    let nearest = PROPORTIONS.iter().min_by(|a, b| distance(a.0).total_cmp(&distance(b.0)));
    let &(_, mut hidden, layers, heads, kv_heads) = nearest.expect("the table is not empty");
    // Tiny models: narrow until the embedding leaves room for the layers.
    while hidden > 64 && 1.5 * (VOCAB_GUESS * hidden) as f64 > billions * 1e9 {
        hidden /= 2;
    }
    let tied = billions < 4.0;
    let head_dim = (hidden / heads).max(1);
    let attention = 2 * hidden * head_dim * (heads + kv_heads);
    let table = VOCAB_GUESS * hidden * if tied { 1 } else { 2 };
    let left = billions * 1e9 - (table + layers * attention) as f64;
    let width = (left / (3 * hidden * layers) as f64).max(hidden as f64) as u64;
    ModelShape {
        model_type: "qwen2".to_owned(),
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate: width,
        vocab: VOCAB_GUESS,
        tied_embeddings: tied,
        fused_qkv: false,
        fused_gate_up: false,
        attention_bias: AttentionBias::None,
        style: Style::LLAMA,
        gated_mlp: true,
        mlp_bias: false,
        block: BlockKind::Llama,
        soft_capped_logits: false,
        soft_capped_scores: false,
        attention_sinks: false,
        experts: None,
        window: None,
        full_every: 0,
        full_layers: None,
        gemma4: None,
        convolution: None,
        delta_net: None,
        latent: None,
    }
}

/// Returns a mixture that is called `8x7B`: a dense model of `billions` whose MLP is there `count` times, two of which a token
/// uses.
///
/// Source: Jiang et al. 2024, "Mixtral of Experts", section 2. Mistral 7B has 7.24 billion parameters, 5.64 of them in its
/// MLPs: 7.24 + 7 x 5.64 = 46.7, which is what Mixtral 8x7B has.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "three digits at most")]
fn repeated_shape(billions: f64, count: f64) -> ModelShape {
    let dense = dense_shape(billions);
    let count = (count as u64).max(1);
    let experts = Experts {
        count,
        top_k: count.min(2),
        intermediate: dense.intermediate,
        shared_intermediate: 0,
        dense_layers: Vec::new(),
        biases: false,
        normalises: true,
    };
    ModelShape { model_type: "qwen3_moe".to_owned(), experts: Some(experts), ..dense }
}

/// Returns a mixture of experts of `billions` parameters, of which a token uses `active`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a guess; `as` saturates, and the sizes are bounded by the caller"
)]
fn mixture_shape(billions: f64, active: f64) -> Option<ModelShape> {
    if !(0.05..=2000.0).contains(&active) || active > billions {
        return None;
    }
    // A mixture is about as deep and narrow as a dense model of its active size.
    let dense = dense_shape(active);
    let top_k = 8;
    let width = (dense.intermediate / top_k).max(1);
    let expert = 3 * dense.hidden * width * dense.layers;
    let rest = dense.parameters().saturating_sub(expert * top_k);
    let count = ((billions * 1e9 - rest as f64) / expert as f64).max(top_k as f64) as u64;
    let experts = Experts {
        count,
        top_k,
        intermediate: width,
        shared_intermediate: 0,
        dense_layers: Vec::new(),
        biases: false,
        normalises: true,
    };
    Some(ModelShape { model_type: "qwen3_moe".to_owned(), experts: Some(experts), ..dense })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, ShapeSource};

    #[test]
    fn the_shipped_catalogue_is_read_and_all_its_blocks_are_known() {
        assert!(Catalogue::builtin().entries.iter().all(|entry| entry.exact_blocks));
    }

    #[test]
    fn names_are_found_whatever_their_suffix_case_or_place() {
        for (name, parameters) in [
            ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
            ("/models/qwen2.5-7b-instruct-1m/", 7_615_616_512),
            ("~/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/abc123", 7_615_616_512),
            ("~/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct", 7_615_616_512),
            ("Qwen/Qwen2.5-Coder-7B-Instruct", 7_615_616_512),
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
            ("qwen/Qwen-1_8B-Chat", 1_836_828_672),
            ("LLM-Research/Meta-Llama-3.1-8B-Instruct", 8_030_261_248),
            ("AI-ModelScope/gemma-2-9b-it", 9_241_705_984),
            ("THUDM/GLM-4-9B-0414", 9_400_279_040),
            ("Shanghai_AI_Laboratory/internlm-chat-20b", 20_088_714_240),
        ] {
            let model = Model::resolve(name, None, None).unwrap();
            assert_eq!((model.source, model.parameters()), (ShapeSource::Catalogue, parameters), "{name}");
        }
    }

    #[test]
    fn a_size_in_the_name_makes_a_shape_of_that_size() {
        for (name, billions) in [
            ("somebody/novel-7B-chat", 7.0),
            ("novel-0.5B", 0.5),
            ("novel_1.8b-base", 1.8),
            ("somebody/novel-1_8b", 1.8),
            ("novel-0_5B-chat", 0.5),
            ("novel_2_7b", 7.0),
            ("novel-500M", 0.5),
            ("novel-13b", 13.0),
            ("novel-65B", 65.0),
            ("novel-30B-A3B", 30.0),
            ("novel-8x7B", 46.7),
        ] {
            let model = Model::resolve(name, None, None).unwrap();
            assert_eq!(model.source, ShapeSource::Name, "{name}");
            let ratio = crate::block::float(model.parameters()) / (billions * 1e9);
            assert!((0.9..1.15).contains(&ratio), "{name}: {ratio}");
        }
    }

    #[test]
    fn a_mixture_by_its_name_needs_about_what_mixtral_needs() {
        use crate::estimate::estimate;
        use crate::workload::Workload;
        for (guess, truth) in [("novel-8x7B", "Mixtral-8x7B"), ("novel-8x22B", "Mixtral-8x22B")] {
            let [guess, truth] = [guess, truth].map(|name| Model::resolve(name, None, None).unwrap());
            assert_eq!((guess.source, truth.source), (ShapeSource::Name, ShapeSource::Catalogue));
            let work = Workload::packed_lora();
            let [guess, truth] = [guess, truth].map(|model| estimate(&model, &work).unwrap());
            let inside = guess.low_bytes..=guess.high_bytes;
            assert!(inside.contains(&truth.device_peak_bytes), "{inside:?} {}", truth.device_peak_bytes);
            // The guess has five times the vocabulary.
            let grows = |said: &crate::estimate::Estimate| {
                said.terms.activations.as_f64() + said.terms.logits.as_f64()
            };
            let ratio = grows(&truth) / grows(&guess);
            assert!((0.35..1.1).contains(&ratio), "{ratio}");
        }
    }

    #[test]
    fn a_name_without_a_size_is_an_error_that_says_what_to_do() {
        for name in ["somebody/novel", "", "/", "v2", "model-2024", "7", "b", "novel-0B", "novel-99999B"] {
            let error = Model::resolve(name, None, None).unwrap_err();
            assert!(error.help().unwrap().contains("config.json"), "{name}");
        }
    }

    #[test]
    fn a_bad_catalogue_is_refused() {
        assert!(Catalogue::from_toml("[[model]]\nmatch = 'a'\nsize = 3").is_err());
        assert!(Catalogue::from_toml("[[model]]\nmatch = '('\nconfig = { hidden_size = 1 }").is_err());
        assert!(Catalogue::from_toml("[[model]]\nmatch = 'a'\nconfig = { hidden_size = 0 }").is_err());
    }
}
