//! What shape has a model, and how sure is that?

mod delta_net;
mod gemma4;
mod latent;
mod layer;
mod lfm2;
mod quantised;
mod style;
mod unknown;

use serde::Serialize;
use serde_json::Value;

use crate::block::float;
use crate::catalogue::{Catalogue, Entry};
use crate::units::Bytes;
use crate::workload::{AttnImpl, ExpertForm, Targets};

pub use delta_net::DeltaNet;
pub use gemma4::Gemma4;
pub use latent::Latent;
use layer::is_each;
pub(crate) use layer::{Heads, Keys, Layer, Mixer, kinds_of};
pub use lfm2::Convolution;
pub use quantised::Quantised;
pub use style::{
    Activation, AttentionGate, HeadNorm, Norm, Placement, Rotary, Router, Shared, Style, Unrotated,
};

/// What is known about a model before it is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Hub id or path, as the user wrote it.
    pub name: String,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Where the dimensions come from; a worse source widens the interval of the estimate.
    pub source: ShapeSource,
    /// The model sees or hears beside reading: only its language model is in `shape`.
    pub multimodal: bool,
    /// What its weight files hold; `None` when no file was seen.
    pub weight_files: Option<WeightFiles>,
    /// Parameters of the weight files beyond those of the shape: loaded, and never trained.
    pub frozen_beside: f64,
    /// Parameters by which an unknown kind of block has more, or fewer, than the shape says; `None` where no weight file
    /// says how many there are.
    pub miscounted: Option<f64>,
    /// Keys of its config.json that say of an unknown kind of block what no list explains.
    pub unexplained: Vec<String>,
    /// How its files hold the weights, where that is not as they are trained.
    pub quantised: Option<Quantised>,
    /// Attention implementations that the model class supports in transformers, best first.
    pub attention: Vec<AttnImpl>,
    /// Tier class that the catalogue asks for; `None` leaves it to the parameter count.
    pub class: Option<String>,
    /// What a reader of the plan should know about the shape or the class; a sentence each.
    pub notes: Vec<String>,
}

/// What the weight files of a model hold.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct WeightFiles {
    /// Bytes of all tensors.
    pub bytes: Bytes,
    /// Parameters, whatever their type in the files; `None` where nothing says how many, or where some are packed.
    pub parameters: Option<u64>,
}

/// Why a model has no known shape.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ResolveError {
    /// Its config.json cannot be used.
    #[error("cannot read the shape of `{name}` from its config.json: {source}")]
    Config {
        /// The model's name.
        name: String,
        /// What is wrong with it.
        source: ShapeError,
    },
    /// Neither a config.json, nor the catalogue, nor the name says how large it is.
    #[error(
        "nothing says how large the model `{name}` is: no config.json, no entry in models.toml, no count in its name"
    )]
    Unknown {
        /// The model's name.
        name: String,
    },
}

impl ResolveError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            ResolveError::Config { source, .. } => source.help(),
            ResolveError::Unknown { .. } => {
                "download the model first, give a local directory with a config.json, or add it to models.toml"
                    .to_owned()
            }
        })
    }
}

impl Model {
    /// Returns what is known about the model `name`: from its config.json when `config` is given, else from the
    /// catalogue, else from the parameter count in its name.
    ///
    /// # Errors
    /// A `config` that cannot be used is an error and is not replaced by a guess; without one, a name that says
    /// nothing is.
    pub fn resolve(
        name: &str,
        config: Option<&Value>,
        weight_files: Option<WeightFiles>,
    ) -> Result<Model, ResolveError> {
        let known = Catalogue::builtin().find(name);
        let mut model = match (config, known) {
            (Some(config), known) => {
                let failure = |source| ResolveError::Config { name: name.to_owned(), source };
                let (shape, known_block) = ModelShape::from_config(config).map_err(failure)?;
                let mut model = Model::of_shape(name, shape);
                model.quantised = Quantised::of_config(config).map_err(failure)?;
                if let Some(known) = known {
                    model.adopt(known);
                }
                model.multimodal = is_multimodal(config);
                if !known_block {
                    model.source = ShapeSource::UnknownBlock;
                    model.unexplained = unknown::unexplained(config, &model.shape);
                    model.notes.push(format!(
                        "the blocks of `{}` are not among those that the estimate knows; the nearest kind stands in \
                         and the interval is wider",
                        model.shape.model_type
                    ));
                } else if model.multimodal {
                    // Its own blocks are known, and those beside it are not.
                    model.source = ShapeSource::PartlyKnown;
                }
                model
            }
            (None, Some(known)) => {
                let mut model = Model::of_shape(name, known.shape.clone());
                model.source =
                    if known.exact_blocks { ShapeSource::Catalogue } else { ShapeSource::UnknownBlock };
                model.adopt(known);
                model
            }
            (None, None) => Model::from_name(name)?,
        };
        if config.is_none() {
            model.quantised = Quantised::of_name(name);
        }
        // The 4-bit experts of gpt-oss are unpacked for training; `gpt_oss_note` says so.
        model.quantised = model.quantised.filter(|_| model.shape.block != BlockKind::GptOss);
        model.notes.extend(model.quantised.as_ref().map(Quantised::note));
        model.see_weight_files(weight_files);
        Ok(model)
    }

    /// Compares what the weight files hold with what config.json explains, and says where they differ.
    fn see_weight_files(&mut self, files: Option<WeightFiles>) {
        self.weight_files = files;
        // Quantised weights are sized by the bytes of their files.
        let stored = files.and_then(|files| files.parameters).filter(|_| self.quantised.is_none());
        if let Some(stored) = stored.filter(|_| self.source == ShapeSource::UnknownBlock) {
            self.take_nearest(stored);
        }
        let known = self.source == ShapeSource::Config || self.multimodal;
        let counted = float(self.parameters());
        let mut beside = stored.map_or(0.0, |stored| float(stored) - counted);
        let table = float(self.shape.vocab.saturating_mul(self.shape.hidden));
        if self.shape.tied_embeddings && known && !self.multimodal && beside >= table {
            // A head that is tied to the embedding is not loaded, though some files hold it. What a multimodal model or an
            // unknown kind has more may as well be something else, which is.
            beside -= table;
        }
        if known {
            // What a known kind has and the files lack is made when the model is built.
            self.frozen_beside = beside.max(0.0);
        } else if stored.is_some() && -2.0 * beside <= counted {
            // Files of less than half of a model do not hold all of it.
            self.miscounted = Some(beside);
        }
        if self.source == ShapeSource::UnknownBlock {
            self.notes.extend(self.distance_note());
        }
        if self.source == ShapeSource::UnknownBlock && !self.multimodal && !self.is_weighed() {
            self.notes.push(
                "no weight file says how many parameters that kind has, so the interval is wider still"
                    .to_owned(),
            );
        }
        let much = self.frozen_beside > WORTH_A_NOTE * counted;
        let held = format!("{:.2} billion parameters of its weight files", self.frozen_beside / 1e9);
        if self.multimodal {
            let counted = match files {
                Some(_) if self.quantised.is_some() => "its weight files are sized as they are".to_owned(),
                Some(_) if much => format!("{held} beside it are sized as frozen weights"),
                Some(WeightFiles { parameters: Some(_), .. }) => {
                    "its weight files hold next to nothing beside it".to_owned()
                }
                Some(WeightFiles { parameters: None, .. }) | None => {
                    "the weights of what sees or hears are not in the figure, because no weight file says how many \
                     there are"
                        .to_owned()
                }
            };
            self.notes.push(format!(
                "a multimodal model: its language model (`{}`) is sized; {counted}; what pictures or sounds take in a \
                 pass is not in the figure, and the interval is wider",
                self.shape.model_type
            ));
        } else if much {
            self.source = self.source.max(ShapeSource::PartlyKnown);
            self.notes.push(format!(
                "{held} are more than its config.json explains: they are sized as frozen weights, and the interval is \
                 wider"
            ));
        }
    }

    /// Returns whether its weight files say how much it holds, whatever its blocks are.
    pub fn is_weighed(&self) -> bool {
        self.miscounted.is_some() || self.quantised.is_some() && self.weight_files.is_some()
    }

    /// Returns whether bitsandbytes can pack its weights into 4 bits: not those that are packed already, and not
    /// gpt-oss, whose experts are no linear modules and whose own 4-bit format nobody tried it on.
    pub fn can_be_packed(&self) -> bool {
        self.quantised.is_none() && self.shape.block != BlockKind::GptOss
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        self.shape.parameters()
    }

    /// Returns a model of that shape, read from its own config.json.
    fn of_shape(name: &str, shape: ModelShape) -> Model {
        Model {
            name: name.to_owned(),
            attention: attention_of(&shape.model_type),
            class: None,
            notes: gpt_oss_note(&shape.model_type).or_else(|| delta_net_note(&shape)).into_iter().collect(),
            shape,
            source: ShapeSource::Config,
            multimodal: false,
            weight_files: None,
            frozen_beside: 0.0,
            miscounted: None,
            unexplained: Vec::new(),
            quantised: None,
        }
    }

    /// Takes over what the catalogue knows beside the dimensions.
    fn adopt(&mut self, known: &Entry) {
        self.class = known.class.clone();
        self.notes.extend(known.note.clone());
        if !known.attention.is_empty() {
            self.attention = known.attention.clone();
        }
    }

    fn from_name(name: &str) -> Result<Model, ResolveError> {
        let (shape, billions) = crate::catalogue::shape_from_name(name)
            .ok_or_else(|| ResolveError::Unknown { name: name.to_owned() })?;
        Ok(Model {
            source: ShapeSource::Name,
            notes: vec![format!(
                "no config.json and no entry in models.toml: the shape is a guess from the {billions} billion \
                 parameters in the name, and the interval is wide"
            )],
            ..Model::of_shape(name, shape)
        })
    }
}

/// Share of the parameters from which on a difference is said: above the buffers that old files hold.
const WORTH_A_NOTE: f64 = 0.005;

/// Keys of what sees or hears beside a language model.
const BESIDE: [&str; 8] = [
    "vision_config",
    "audio_config",
    "visual",
    "vision_tower",
    "mm_vision_tower",
    "talker_config",
    "speech_config",
    "img_processor",
];

/// Returns whether a config.json is that of a model that has more than a language model: it has one inside, or something
/// that sees or hears beside it.
fn is_multimodal(config: &Value) -> bool {
    let levels = levels(config);
    let sees = |level: &&serde_json::Map<String, Value>| {
        BESIDE.iter().any(|key| level.get(*key).is_some_and(|value| !value.is_null()))
    };
    levels.len() > 1 || levels.iter().any(sees)
}

/// Returns what a `model_type` supports in transformers, best first.
///
/// Source: `_supports_sdpa` and `_supports_flash_attn` of the model classes in transformers 4.57 and 5.19.
fn attention_of(model_type: &str) -> Vec<AttnImpl> {
    match model_type {
        "gpt_oss" => vec![AttnImpl::Eager],
        _ => vec![AttnImpl::FlashAttn, AttnImpl::Sdpa, AttnImpl::Eager],
    }
}

/// Returns what is special about gpt-oss.
fn gpt_oss_note(model_type: &str) -> Option<String> {
    (model_type == "gpt_oss").then(|| {
        "gpt-oss has no sdpa in transformers and its attention sinks need a flash build that knows them, so \
         attention is eager; its 4-bit experts are unpacked for training and are sized as bfloat16"
            .to_owned()
    })
}

/// Returns what is special about gated delta rules.
fn delta_net_note(shape: &ModelShape) -> Option<String> {
    shape.delta_net.map(|_| {
        "the layers without attention are sized as torch's own operations, which run where flash-linear-attention is not \
         installed; with it a pass needs less, and how much less was not measured"
            .to_owned()
    })
}

/// Where the dimensions of a model come from, surest first.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ShapeSource {
    /// The model's own config.json, of a block kind that the estimate knows.
    Config,
    /// `config/models.toml`.
    Catalogue,
    /// The model's own config.json, of a block kind that the estimate knows, and the model has more than those blocks: it
    /// sees or hears, or its weight files hold more.
    PartlyKnown,
    /// The model's own config.json, but its block kind is unknown and the nearest one stands in.
    UnknownBlock,
    /// Only the parameter count in the name, for example `7B`.
    Name,
}

/// Dimensions of a causal language model. Symbols of the memory formula stand behind the fields.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelShape {
    /// `model_type` of config.json.
    pub model_type: String,
    /// H.
    pub hidden: u64,
    /// L.
    pub layers: u64,
    /// A, query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of one head; q = heads x head_dim, k = kv_heads x head_dim.
    pub head_dim: u64,
    /// I, width of the dense MLP.
    pub intermediate: u64,
    /// V.
    pub vocab: u64,
    /// Embedding and head are one matrix.
    pub tied_embeddings: bool,
    /// Query, key and value come out of one product (Phi-3).
    pub fused_qkv: bool,
    /// Gate and up come out of one product (Phi-3, GLM-4).
    pub fused_gate_up: bool,
    /// Biases on q, k, v (Qwen2) or on all four projections.
    pub attention_bias: AttentionBias,
    /// How a block is built, beyond its dimensions.
    #[serde(skip)]
    pub style: Style,
    /// The MLP has a gate (three matrices) or not (two).
    pub gated_mlp: bool,
    /// The matrices of the MLP have biases.
    pub mlp_bias: bool,
    /// Which list of allocations a block follows.
    pub block: BlockKind,
    /// Logits are squeezed through tanh before the loss (Gemma 2).
    pub soft_capped_logits: bool,
    /// Attention scores are, too, where they are computed by plain products (Gemma 2).
    pub soft_capped_scores: bool,
    /// Each head has a learned sink (gpt-oss).
    pub attention_sinks: bool,
    /// Mixture of experts; `None` for a dense model.
    pub experts: Option<Experts>,
    /// Tokens that sliding layers look back; `None` when no layer slides.
    pub window: Option<u64>,
    /// Layers slide but for each of this number: 0 when all do, 2 when every second does not (Gemma 2, gpt-oss), 6 in
    /// Gemma 3.
    pub full_every: u64,
    /// Indices of the layers that attend to all tokens, smallest first, where they are listed one by one.
    #[serde(skip)]
    pub full_layers: Option<Vec<u64>>,
    /// What Gemma 4 has beyond the above.
    #[serde(skip)]
    pub gemma4: Option<Gemma4>,
    /// What layers have that are not listed (LFM2).
    #[serde(skip)]
    pub convolution: Option<Convolution>,
    /// What layers have that are not listed (Qwen3.5, Qwen3-Next).
    #[serde(skip)]
    pub delta_net: Option<DeltaNet>,
    /// Keys and values come out of a narrow product (DeepSeek V3); `head_dim` is that of query and key.
    #[serde(skip)]
    pub latent: Option<Latent>,
}

/// Families of blocks that allocate alike; see `block.rs`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockKind {
    /// Two RMSNorms, SwiGLU: Llama, Mistral, Qwen, Yi, InternLM, Baichuan, Phi-3, and their mixtures of experts.
    Llama,
    /// RMSNorms computed wholly in fp32, GeGLU: Gemma 1 to 3.
    Gemma,
    /// Partial rotary embedding, fused gate: GLM-4.
    Glm,
    /// Experts with biases and a clamped gate: gpt-oss.
    GptOss,
}

/// Which attention projections carry a bias.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionBias {
    /// None of them.
    None,
    /// Query, key and value.
    Qkv,
    /// Query, key, value and output.
    All,
}

/// The experts of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Experts {
    /// Experts in a block.
    pub count: u64,
    /// Experts that a token visits.
    pub top_k: u64,
    /// M, width of one expert.
    pub intermediate: u64,
    /// Width of the experts that every token visits, all together; 0 when there are none.
    pub shared_intermediate: u64,
    /// Indices of the blocks that are dense all the same (they use the dense width), smallest first.
    pub dense_layers: Vec<u64>,
    /// Experts carry biases (gpt-oss).
    pub biases: bool,
    /// The weights of a token's experts are made to sum to one.
    pub normalises: bool,
}

/// Why a config.json gives no shape.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ShapeError {
    /// The file is not an object.
    #[error("config.json is not a JSON object but {found}")]
    NotAnObject {
        /// What it is.
        found: String,
    },
    /// A needed key is absent.
    #[error("the key `{key}` is missing")]
    Missing {
        /// Its usual name.
        key: &'static str,
    },
    /// A key has no usable value.
    #[error("the key `{key}` is {found}, and has to be {expected}")]
    Unusable {
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// The dimensions are fine one by one, and absurd together.
    #[error("the dimensions make {parameters} parameters, more than the {limit} that this program sizes")]
    TooLarge {
        /// Parameters; saturated.
        parameters: u64,
        /// Largest number.
        limit: u64,
    },
}

impl ShapeError {
    /// Returns what to do about it.
    pub fn help(&self) -> String {
        match self {
            ShapeError::NotAnObject { .. } => "give the config.json of a Hugging Face model".to_owned(),
            ShapeError::Missing { key } => {
                format!("is this the config.json of a causal language model? it should state `{key}`")
            }
            ShapeError::Unusable { key, .. } => {
                format!("compare `{key}` with the config.json on the model's hub page")
            }
            ShapeError::TooLarge { .. } => "compare the dimensions with the model's hub page".to_owned(),
        }
    }
}

/// Largest model that is sized: 2^45 parameters, 35 times the largest open one, so that sums of bytes stay exact.
pub const PARAMETERS_MAX: u64 = 1 << 45;

/// Reads numbers and flags out of a config.json, and keeps to bounds.
struct Fields<'a> {
    object: &'a serde_json::Map<String, Value>,
}

impl Fields<'_> {
    /// Returns the number under the first key that is present and not null; `None` when none is.
    fn number(&self, keys: &[&'static str], max: u64) -> Result<Option<u64>, ShapeError> {
        for key in keys {
            match self.object.get(*key) {
                None | Some(Value::Null) => continue,
                Some(value) => {
                    let number = value.as_u64().filter(|n| (1..=max).contains(n));
                    let expected = || format!("a whole number from 1 to {max}");
                    return number.map(Some).ok_or_else(|| unusable(key, value, expected()));
                }
            }
        }
        Ok(None)
    }

    fn needed(&self, keys: &[&'static str], max: u64) -> Result<u64, ShapeError> {
        self.number(keys, max)?.ok_or(ShapeError::Missing { key: keys[0] })
    }

    /// Returns a count that may be zero.
    fn count(&self, key: &'static str, max: u64) -> Result<Option<u64>, ShapeError> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().filter(|n| *n <= max) {
                Some(count) => Ok(Some(count)),
                None => Err(unusable(key, value, format!("a whole number from 0 to {max}"))),
            },
        }
    }

    /// Returns a list of indices of layers, each once and in order.
    fn layer_list(&self, key: &'static str, layers: u64) -> Result<Vec<u64>, ShapeError> {
        let Some(value) = self.object.get(key).filter(|value| !value.is_null()) else {
            return Ok(Vec::new());
        };
        let expected = || format!("a list of layers from 0 to {}", layers - 1);
        let list = value.as_array().ok_or_else(|| unusable(key, value, expected()))?;
        let index = |item: &Value| {
            let index = item.as_u64().filter(|index| *index < layers);
            index.ok_or_else(|| unusable(key, item, expected()))
        };
        let mut indices = list.iter().map(index).collect::<Result<Vec<_>, _>>()?;
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }

    /// Returns the positive number under a key; `None` when it is absent, and `Some(None)` when it is null.
    #[expect(clippy::option_option, reason = "null switches off what a class has without the key")]
    fn positive(&self, key: &'static str) -> Result<Option<Option<f64>>, ShapeError> {
        match self.object.get(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(None)),
            Some(value) => match value.as_f64().filter(|number| *number > 0.0) {
                Some(number) => Ok(Some(Some(number))),
                None => Err(unusable(key, value, "a number above 0, or null".to_owned())),
            },
        }
    }

    /// Returns what `layer_types` says of each layer; `None` where it is no list.
    fn layer_types(&self) -> Option<&[Value]> {
        self.object.get("layer_types").and_then(Value::as_array).map(Vec::as_slice)
    }

    /// Returns whether `layer_types` says of the layer of that index that it attends to all tokens; `None` without a list.
    fn is_listed_as_full(&self, index: u64) -> Option<bool> {
        let types = self.layer_types()?;
        let of = usize::try_from(index).ok().and_then(|index| types.get(index));
        Some(of.is_some_and(|of| of == "full_attention"))
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, ShapeError> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => Err(unusable(key, value, "true or false".to_owned())),
        }
    }
}

fn unusable(key: &str, value: &Value, expected: String) -> ShapeError {
    ShapeError::Unusable { key: key.to_owned(), found: brief(value), expected }
}

/// Keys under which a multimodal model has its language model.
const INNER: [&str; 4] = ["text_config", "llm_config", "language_config", "thinker_config"];

/// Returns the objects of a config.json from the outermost to the one that describes the language model: multimodal
/// models have it inside, some of them (Omni) two levels deep. Empty when the value is no object.
fn levels(config: &Value) -> Vec<&serde_json::Map<String, Value>> {
    let mut levels: Vec<_> = config.as_object().into_iter().collect();
    while let Some(level) = levels.last().filter(|level| !level.contains_key("hidden_size")) {
        match INNER.iter().find_map(|key| level.get(*key).and_then(Value::as_object)) {
            Some(inner) => levels.push(inner),
            None => break,
        }
    }
    levels
}

/// Returns a value in a few words, however large it is.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.len() <= 40 => format!("{text:?}"),
        Value::String(_) => "a long text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

const HIDDEN_MAX: u64 = 1 << 20;
const LAYERS_MAX: u64 = 1 << 12;
const HEADS_MAX: u64 = 1 << 14;
const WIDTH_MAX: u64 = 1 << 24;
const VOCAB_MAX: u64 = 1 << 26;
const EXPERTS_MAX: u64 = 1 << 16;
const LENGTH_MAX: u64 = 1 << 40;

impl ModelShape {
    /// Reads the dimensions from a config.json, and whether its block kind is known to the estimate.
    ///
    /// Multimodal models are read by their text part; what sees images is not in the shape, see [`Model::resolve`].
    ///
    /// # Errors
    /// A key that is missing, of the wrong type or out of bounds is an error that names it.
    pub fn from_config(config: &Value) -> Result<(ModelShape, bool), ShapeError> {
        let levels = levels(config);
        let Some(object) = levels.last().copied() else {
            return Err(ShapeError::NotAnObject { found: brief(config) });
        };
        if !object.contains_key("hidden_size") {
            for (key, value) in INNER.iter().filter_map(|key| object.get(*key).map(|value| (key, value))) {
                if !value.is_null() {
                    return Err(unusable(key, value, "an object".to_owned()));
                }
            }
        }
        // A level that says nothing has what the one around it says.
        let stated =
            |key: &str| levels.iter().rev().find_map(|level| level.get(key).filter(|v| !v.is_null()));
        let model_type = match stated("model_type") {
            None | Some(Value::Null) => "llama".to_owned(),
            Some(Value::String(name)) if name.len() <= 100 => name.to_ascii_lowercase(),
            Some(value) => {
                return Err(ShapeError::Unusable {
                    key: "model_type".to_owned(),
                    found: brief(value),
                    expected: "a short text".to_owned(),
                });
            }
        };
        let mut tied = None;
        for level in levels.iter().rev() {
            let fields = Fields { object: level };
            if model_type == "lfm2" {
                tied = tied.or(fields.flag("tie_embedding")?);
            }
            tied = tied.or(fields.flag("tie_word_embeddings")?);
        }
        let traits = Traits::of(&model_type);
        let stated = stated("model_type").is_some();
        let shape = read_shape(&Fields { object }, model_type, &traits, tied)?;
        let parameters = shape.parameters();
        if parameters > PARAMETERS_MAX {
            return Err(ShapeError::TooLarge { parameters, limit: PARAMETERS_MAX });
        }
        // GELU as torch has it; `gelu_fast` and `gelu_new` are written out, which no list has for this kind.
        let act = object.get("hidden_act").and_then(Value::as_str).unwrap_or("gelu");
        // Of Gemma 4 nothing is read that is stated layer by layer, and no list has biases or a window that looks ahead.
        let ahead = object.get("use_bidirectional_attention").is_some_and(|of| of == "all");
        let usual_gemma4 = shape.gemma4.is_none()
            || !ahead
                && !object.contains_key("per_layer_config")
                && shape.attention_bias == AttentionBias::None;
        // What Qwen3-Next cuts out of its products lies in another way where there is one head of the key.
        let usual_delta_net = shape.delta_net.is_none_or(|net| !net.fused || net.key_heads > 1)
            && (shape.delta_net.is_none() || DeltaNet::has_usual_layers(&Fields { object }, shape.layers));
        // Quantised, the linear modules of BitNet are others; its activation and nanochat's is squared.
        let usual_bitnet =
            shape.model_type != "bitnet" || object.get("quantization_config").is_none_or(Value::is_null);
        let usual_square = !matches!(shape.model_type.as_str(), "bitnet" | "nanochat")
            || object.get("hidden_act").is_none_or(|act| act == "relu2");
        // Each head of latent attention has its own key, and its value is not the wider one.
        let usual_latent =
            shape.latent.is_none_or(|latent| shape.kv_heads == shape.heads && latent.value <= latent.head());
        let usual = (shape.model_type != "gpt_neox" || act == "gelu")
            && usual_gemma4
            && usual_delta_net
            && usual_latent
            && usual_bitnet
            && usual_square
            && slides_by_period(&Fields { object }, &shape.model_type);
        Ok((shape, traits.known && stated && usual))
    }

    /// Returns q, the width of all query heads.
    pub fn q_width(&self) -> u64 {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Returns k, the width of all key heads.
    pub fn k_width(&self) -> u64 {
        self.kv_heads.saturating_mul(self.head_dim)
    }

    /// Returns the parameters of embedding and head.
    pub fn vocab_parameters(&self) -> u64 {
        let table = self.vocab.saturating_mul(self.hidden);
        if self.tied_embeddings { table } else { table.saturating_mul(2) }
    }

    /// Returns the number of parameters; exact for the block kinds that are known, saturated at the largest number.
    ///
    /// Source: the modules of `modeling_*.py` in transformers 5.19, counted.
    pub fn parameters(&self) -> u64 {
        let linears: u128 =
            self.linears().iter().map(|linear| linear.parameters() * u128::from(linear.layers)).sum();
        let (layers, hidden) = (u128::from(self.layers), u128::from(self.hidden));
        let norm = u128::from(self.style.norm.parameters()) * hidden;
        let mut per_layer = u128::from(self.style.placement.norms()) * norm;
        let head_norms: u128 =
            self.head_norms().iter().map(|(n, count)| u128::from(*n) * u128::from(*count)).sum();
        if self.style.sub_norms {
            per_layer += u128::from(self.q_width()) + u128::from(self.intermediate);
        }
        if self.attention_sinks {
            per_layer += u128::from(self.heads);
        }
        if self.style.activation == Activation::Xielu {
            per_layer += 2;
        }
        let mut total = linears + layers * per_layer + norm + u128::from(self.vocab_parameters());
        let attention_layers = u128::from(self.attention_layers());
        total += attention_layers * head_norms;
        if let Some(convolution) = self.convolution {
            let each = u128::from(convolution.kernel) + u128::from(convolution.bias);
            total += layers.saturating_sub(attention_layers) * hidden * each;
        }
        if let Some(net) = &self.delta_net {
            let each: u128 =
                net.parameters().iter().map(|(n, count)| u128::from(*n) * u128::from(*count)).sum();
            total += layers.saturating_sub(attention_layers) * each;
        }
        if self.style.head_bias {
            total += u128::from(self.vocab);
        }
        if let Some(gemma4) = &self.gemma4 {
            let more = self.gemma4_parameters(gemma4);
            total += more.iter().map(|(n, count)| u128::from(*n) * u128::from(*count)).sum::<u128>();
            if let Some(experts) = &self.experts {
                // Its router is a linear module.
                total -= layers * hidden * u128::from(experts.count);
            }
        }
        if let Some(experts) = &self.experts {
            let mut each = experts.parameters(hidden);
            if self.has_shared_gate(experts) {
                each += hidden;
            }
            if matches!(self.style.router, Router::Corrected | Router::SigmoidModule) {
                each += u128::from(experts.count);
            }
            if self.style.router == Router::SigmoidModule {
                // It is a linear module.
                each = each.saturating_sub(hidden * u128::from(experts.count));
            }
            total += u128::from(self.sparse_layers(experts)) * each;
        }
        u64::try_from(total).unwrap_or(u64::MAX)
    }

    /// Returns the parameters of the norms of query and key in one block: elements of one, and how many there are.
    fn head_norms(&self) -> [(u64, u64); 2] {
        let (heads, kv_heads, width) = (self.heads, self.kv_heads, self.head_dim);
        match self.style.head_norm {
            _ if let Some(latent) = self.latent => [(latent.query_rank.unwrap_or(0), 1), (latent.rank, 1)],
            HeadNorm::None => [(0, 0); 2],
            _ if self.gemma4.is_some() || self.style.norm.parameters() == 0 => [(0, 0); 2],
            HeadNorm::Each | HeadNorm::EachLater | HeadNorm::EachRotated => [(width, 1); 2],
            HeadNorm::Whole | HeadNorm::EachOwn => [(self.q_width(), 1), (self.k_width(), 1)],
            HeadNorm::EachModule => [(width, heads), (width, kv_heads)],
        }
    }

    /// Returns the parameters of the layers' linear modules: what 4-bit quantisation packs.
    pub fn linear_weights(&self) -> u64 {
        let total: u128 = self
            .linears()
            .iter()
            .map(|l| u128::from(l.input) * u128::from(l.output) * u128::from(l.layers))
            .sum();
        u64::try_from(total).unwrap_or(u64::MAX)
    }

    /// Returns whether a shared expert has a gate of its own.
    fn has_shared_gate(&self, experts: &Experts) -> bool {
        experts.shared_intermediate > 0 && self.style.gates_shared
    }

    /// Returns how many blocks have experts.
    fn sparse_layers(&self, experts: &Experts) -> u64 {
        self.layers.saturating_sub(u64::try_from(experts.dense_layers.len()).unwrap_or(u64::MAX))
    }

    /// Returns the parameters of the matrices of all experts; 0 for a dense model.
    pub(crate) fn expert_weights(&self) -> u64 {
        let Some(experts) = &self.experts else { return 0 };
        let sparse = self.sparse_layers(experts);
        let each = self.hidden.saturating_mul(experts.intermediate).saturating_mul(3);
        each.saturating_mul(experts.count).saturating_mul(sparse)
    }

    /// Returns the parameters of adapters of `rank` on `targets`: rank x (in + out) for each adapted linear.
    ///
    /// Source: Hu et al. 2021, section 4.1.
    pub fn adapter_parameters(&self, rank: u32, targets: &Targets) -> u64 {
        let total: u128 = self
            .adapted(targets)
            .map(|l| u128::from(rank) * (u128::from(l.input) + u128::from(l.output)) * u128::from(l.layers))
            .sum();
        u64::try_from(total).unwrap_or(u64::MAX)
    }

    /// Returns the linear modules that get an adapter where experts are fused.
    pub fn adapted(&self, targets: &Targets) -> impl Iterator<Item = Linear> {
        let targets = targets.clone();
        self.linears().into_iter().filter(move |linear| linear.is_adapted_by(&targets))
    }

    /// Returns whether the experts are linear modules. Those of gpt-oss never are.
    pub fn has_expert_modules(&self, form: ExpertForm) -> bool {
        form == ExpertForm::Modules && self.experts.is_some() && self.block != BlockKind::GptOss
    }

    /// Returns the linear modules of the blocks where experts are held in that form.
    ///
    /// Source: `*SparseMoeBlock` of transformers 4.57: a list of MLPs, and linear modules for the router and the gate of
    /// the shared expert. `find_all_linears` of ms-swift 3.12.6 takes them all; `get_modules_to_not_convert` there keeps
    /// router and gate out of bitsandbytes.
    pub(crate) fn modules(&self, form: ExpertForm) -> Vec<Linear> {
        let mut all = self.linears();
        let Some(experts) = self.experts.as_ref().filter(|_| self.has_expert_modules(form)) else {
            return all;
        };
        // A router that is a module in either form is among those below.
        all.retain(|linear| linear.part != Part::Router);
        for linear in &mut all {
            linear.adapted_by_all = true;
        }
        let sparse = self.sparse_layers(experts);
        all.extend(self.mlp(experts.intermediate, sparse.saturating_mul(experts.count), true));
        let mut router = |name, part, output| {
            all.push(Linear {
                name,
                part,
                input: self.hidden,
                output,
                bias: false,
                layers: sparse,
                adapted_by_all: true,
                packed: false,
            });
        };
        router("gate", Part::Router, experts.count);
        if self.has_shared_gate(experts) {
            router("shared_expert_gate", Part::SharedGate, 1);
        }
        all
    }

    /// Returns the parameters that are no linear modules of the blocks: elements of one, and how many there are.
    pub(crate) fn other_parameters(&self, form: ExpertForm) -> impl Iterator<Item = (f64, f64)> {
        let (h, layers) = (float(self.hidden), float(self.layers));
        let tables = if self.tied_embeddings { 1.0 } else { 2.0 };
        let norm_parameters = float(self.style.norm.parameters());
        let norms = float(self.style.placement.norms()) * layers + 1.0;
        let attention_layers = float(self.attention_layers());
        let [q_norms, k_norms] =
            self.head_norms().map(|(n, count)| (float(n), float(count) * attention_layers));
        let slopes = if self.style.activation == Activation::Xielu { 2.0 * layers } else { 0.0 };
        let sub_norms = if self.style.sub_norms { layers } else { 0.0 };
        let sinks = if self.attention_sinks { layers } else { 0.0 };
        let mut all = vec![
            (float(self.vocab) * h, tables),
            (h, norm_parameters * norms),
            q_norms,
            k_norms,
            (float(self.heads), sinks),
            (1.0, slopes),
            (float(self.q_width()), sub_norms),
            (float(self.intermediate), sub_norms),
            (float(self.vocab), if self.style.head_bias { 1.0 } else { 0.0 }),
        ];
        if let Some(gemma4) = &self.gemma4 {
            let more = self.gemma4_parameters(gemma4);
            all.extend(more.into_iter().map(|(n, count)| (float(n), float(count))));
        }
        if let Some(convolution) = self.convolution {
            let count = layers - attention_layers;
            all.push((float(convolution.kernel) * h, count));
            all.push((h, if convolution.bias { count } else { 0.0 }));
        }
        if let Some(net) = &self.delta_net {
            let count = layers - attention_layers;
            all.extend(net.parameters().map(|(n, times)| (float(n), float(times) * count)));
        }
        if let Some(experts) = self.experts.as_ref().filter(|_| !self.has_expert_modules(form)) {
            let sparse = float(self.sparse_layers(experts));
            let (count, width) = (float(experts.count), float(experts.intermediate));
            all.extend([(count * 2.0 * width * h, sparse), (count * width * h, sparse)]);
            match self.style.router {
                Router::Softmax
                | Router::BestFirst
                | Router::Mixer
                | Router::SoftmaxLifted
                | Router::SoftmaxGrouped => all.push((count * h, sparse)),
                // Corrections in fp32: two numbers of half precision each.
                Router::Sigmoid => all.extend([(count * h, sparse), (2.0 * count, sparse)]),
                // The router too.
                Router::Corrected => all.extend([(2.0 * count * h, sparse), (2.0 * count, sparse)]),
                Router::SoftmaxWide => all.push((2.0 * count * h, sparse)),
                Router::SigmoidModule => all.push((count, sparse)),
                Router::SigmoidHalf => all.extend([(count * h, sparse), (count, sparse)]),
                // A linear module, and its scales are counted above.
                Router::Scaled => {}
            }
            if experts.biases {
                all.extend([(count * 2.0 * width, sparse), (count * h, sparse), (count, sparse)]);
            }
            if self.has_shared_gate(experts) {
                all.push((h, sparse));
            }
        }
        all.into_iter()
    }

    /// Returns whether layers that slide have rotary tables of their own (Gemma 3, OLMo 3, Mellum).
    pub(crate) fn has_two_rotary_tables(&self) -> bool {
        let both = self.window.is_some() && self.full_every != 0;
        self.model_type.starts_with("gemma3")
            || self.model_type == "olmo3"
            || (self.model_type == "mellum" && both)
    }

    /// Returns the buffers, those of the rotary embedding above all: elements of four bytes of one, and how many there are.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (f64, f64)> {
        let partial = self.style.rotated;
        let kinds = if self.has_two_rotary_tables() { 2.0 } else { 1.0 };
        let mut all = vec![(float(self.head_dim) * partial / 2.0, 2.0 * kinds)];
        if let Some(gemma4) = &self.gemma4 {
            // Those of layers that do not slide, a scale of each layer, and those of the embeddings.
            let tables = if gemma4.inputs > 0 { 2.0 } else { 1.0 };
            all.extend([(float(gemma4.full_head_dim) / 2.0, 2.0), (1.0, float(self.layers) + tables)]);
        }
        all.into_iter()
    }

    /// Returns the linear modules of the blocks. Fused experts and routers are none.
    pub fn linears(&self) -> Vec<Linear> {
        if let Some(gemma4) = &self.gemma4 {
            return self.gemma4_linears(gemma4);
        }
        let (h, q, k) = (self.hidden, self.q_width(), self.k_width());
        let names = LinearNames::of(&self.model_type);
        let (qkv_bias, o_bias) =
            (self.attention_bias != AttentionBias::None, self.attention_bias == AttentionBias::All);
        let attention_layers = self.attention_layers();
        let linear = |name, part, input, output, bias| Linear {
            name,
            part,
            input,
            output,
            bias,
            layers: attention_layers,
            adapted_by_all: true,
            packed: true,
        };
        let mut all = Vec::with_capacity(8);
        if let Some(latent) = self.latent {
            let heads = |width: u64| self.heads.saturating_mul(width);
            let bias = qkv_bias;
            if let Some(rank) = latent.query_rank {
                all.push(linear("q_a_proj", Part::QueryIn, h, rank, bias));
                all.push(linear("q_b_proj", Part::QueryOut, rank, q, false));
            } else {
                all.push(linear("q_proj", Part::Query, h, q, false));
            }
            let narrow = latent.rank.saturating_add(latent.rotated);
            all.push(linear("kv_a_proj_with_mqa", Part::LatentIn, h, narrow, bias));
            let made = heads(latent.plain.saturating_add(latent.value));
            all.push(linear("kv_b_proj", Part::LatentOut, latent.rank, made, false));
        } else if self.fused_qkv {
            all.push(linear(
                names.qkv,
                Part::QueryKeyValue,
                h,
                q.saturating_add(k.saturating_mul(2)),
                qkv_bias,
            ));
        } else {
            let gates = if self.style.attention_gate == AttentionGate::InQuery { 2 } else { 1 };
            all.push(linear("q_proj", Part::Query, h, q.saturating_mul(gates), qkv_bias));
            all.push(linear("k_proj", Part::Key, h, k, qkv_bias));
            all.push(linear("v_proj", Part::Value, h, k, qkv_bias));
        }
        if self.style.attention_gate == AttentionGate::Own {
            // "All linears" of a mixture are query, key, value and output alone, see below.
            let gate = linear("gate_proj", Part::AttentionGate, h, q, false);
            all.push(Linear { adapted_by_all: false, ..gate });
        }
        let attended = self.latent.map_or(q, |latent| self.heads.saturating_mul(latent.value));
        all.push(linear(names.output, Part::Output, attended, h, o_bias));
        if let Some(Convolution { bias, .. }) = self.convolution {
            let mut linear = |name, part, output| {
                let layers = self.layers.saturating_sub(attention_layers);
                all.push(Linear { layers, ..linear(name, part, h, output, bias) });
            };
            linear("in_proj", Part::ConvolutionIn, h.saturating_mul(3));
            linear("out_proj", Part::ConvolutionOut, h);
        }
        if let Some(net) = &self.delta_net {
            let mut linear = |name, part, input, output| {
                let layers = self.layers.saturating_sub(attention_layers);
                all.push(Linear { layers, ..linear(name, part, input, output, false) });
            };
            let (values, heads) = (net.values(), net.value_heads);
            if net.fused {
                linear("in_proj_qkvz", Part::DeltaIn, h, net.all().saturating_add(values));
                linear("in_proj_ba", Part::DeltaStep, h, heads.saturating_mul(2));
            } else {
                linear("in_proj_qkv", Part::DeltaIn, h, net.all());
                linear("in_proj_z", Part::DeltaGate, h, values);
                linear("in_proj_b", Part::DeltaStep, h, heads);
                linear("in_proj_a", Part::DeltaDecay, h, heads);
            }
            linear("out_proj", Part::DeltaOut, values, h);
        }
        match &self.experts {
            None => all.extend(self.mlp(self.intermediate, self.layers, true)),
            Some(experts) => {
                // An adapter on "all linears" of a mixture meets attention only, as in the memory harness: with
                // transformers 5 the experts are fused tensors. A shared expert is adapted by name.
                let sparse = self.sparse_layers(experts);
                // The harness tells mixtures by that ending.
                let adapted = !self.model_type.ends_with("moe") && !self.style.gates_shared;
                all.extend(self.mlp(experts.shared_intermediate, sparse, adapted));
                all.extend(self.mlp(self.intermediate, self.layers.saturating_sub(sparse), adapted));
                if self.style.router == Router::SigmoidModule {
                    let gate = linear("gate", Part::Router, h, experts.count, false);
                    all.push(Linear { layers: sparse, adapted_by_all: false, ..gate });
                }
            }
        }
        all
    }

    /// Returns the linear modules of Gemma 4: those of each kind of layer, and what makes the layers' inputs of the embedding.
    fn gemma4_linears(&self, gemma4: &Gemma4) -> Vec<Linear> {
        let h = self.hidden;
        let mut all = Vec::new();
        let linear = |name, part, input, output, layers| Linear {
            name,
            part,
            input,
            output,
            bias: false,
            layers,
            adapted_by_all: true,
            packed: true,
        };
        for (layer, count) in self.layer_kinds() {
            let heads = self.heads_of(layer);
            let (q, k) = (heads.queries.saturating_mul(heads.width), heads.keys.saturating_mul(heads.width));
            all.push(linear("q_proj", Part::Query, h, q, count));
            if layer.keys != Keys::Shared {
                all.push(linear("k_proj", Part::Key, h, k, count));
                if layer.sliding || !gemma4.value_is_key {
                    all.push(linear("v_proj", Part::Value, h, k, count));
                }
            }
            all.push(linear("o_proj", Part::Output, q, h, count));
            all.extend(self.mlp(self.dense_width(layer), count, true));
            if gemma4.inputs > 0 {
                all.push(linear("per_layer_input_gate", Part::InputGate, h, gemma4.inputs, count));
                all.push(linear("per_layer_projection", Part::InputProjection, gemma4.inputs, h, count));
            }
        }
        if let Some(experts) = &self.experts {
            all.push(linear("proj", Part::Router, h, experts.count, self.layers));
        }
        if gemma4.inputs > 0 {
            let all_inputs = gemma4.inputs.saturating_mul(self.layers);
            all.push(linear("per_layer_model_projection", Part::AllInputs, h, all_inputs, 1));
        }
        all
    }

    /// Returns the width of the dense MLP of a layer.
    pub(crate) fn dense_width(&self, layer: Layer) -> u64 {
        match &self.gemma4 {
            Some(gemma4) if gemma4.double_wide && layer.keys == Keys::Shared => {
                self.intermediate.saturating_mul(2)
            }
            Some(_) | None => self.intermediate,
        }
    }

    /// Returns what Gemma 4 has beside linear modules, tables of the vocabulary and the four norms of each layer: elements
    /// of one, and how many there are.
    fn gemma4_parameters(&self, gemma4: &Gemma4) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        for (layer, count) in self.layer_kinds() {
            let norms = if layer.keys == Keys::Shared { 1 } else { 2 };
            all.push((self.heads_of(layer).width, norms * count));
        }
        if gemma4.inputs > 0 {
            let columns = gemma4.inputs.saturating_mul(self.layers);
            all.extend([(gemma4.inputs_vocab.saturating_mul(columns), 1), (gemma4.inputs, 1)]);
            all.push((self.hidden, self.layers));
        }
        if let Some(experts) = &self.experts {
            // Three more norms, the router's scale, and one number for each expert.
            all.extend([(self.hidden, 4 * self.layers), (experts.count, self.layers)]);
        }
        all
    }

    /// Returns the linears of a dense MLP of width `width` in `layers` of the layers.
    fn mlp(&self, width: u64, layers: u64, adapted_by_all: bool) -> Vec<Linear> {
        if width == 0 || layers == 0 {
            return Vec::new();
        }
        let names = LinearNames::of(&self.model_type);
        let linear = |name, part, input, output| Linear {
            name,
            part,
            input,
            output,
            bias: self.mlp_bias,
            layers,
            adapted_by_all,
            packed: true,
        };
        let h = self.hidden;
        let mut all = Vec::with_capacity(3);
        if self.fused_gate_up {
            all.push(linear(names.gate_up, Part::GateUp, h, width.saturating_mul(2)));
        } else {
            if self.gated_mlp {
                all.push(linear(names.gate, Part::Gate, h, width));
            }
            all.push(linear(names.up, Part::Up, h, width));
        }
        all.push(linear(names.down, Part::Down, width, h));
        all
    }
}

impl Experts {
    /// Returns the parameters of the experts and the router of one block; the shared expert is a linear module, and its
    /// gate apart.
    fn parameters(&self, hidden: u128) -> u128 {
        let (count, width) = (u128::from(self.count), u128::from(self.intermediate));
        let biases = if self.biases { 2 * width + hidden + 1 } else { 0 };
        count * (3 * hidden * width + hidden + biases)
    }
}

/// One kind of linear module in the blocks.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Last part of its module name.
    pub name: &'static str,
    /// Where it sits.
    pub part: Part,
    /// Inputs.
    pub input: u64,
    /// Outputs.
    pub output: u64,
    /// It has a bias.
    pub bias: bool,
    /// How many there are: blocks that have it, times the experts of each.
    pub layers: u64,
    /// `all-linear` adapts it.
    pub adapted_by_all: bool,
    /// bitsandbytes packs it.
    pub packed: bool,
}

/// Where a linear module sits.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Query projection of attention.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// All three in one.
    QueryKeyValue,
    /// Output projection of attention.
    Output,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Both in one.
    GateUp,
    /// Down projection of the MLP.
    Down,
    /// What chooses the experts.
    Router,
    /// Gate of the shared expert.
    SharedGate,
    /// Gate of what a layer gets beside the residual stream (Gemma 4).
    InputGate,
    /// What brings that to the width of the stream.
    InputProjection,
    /// What makes the inputs of all layers of the embedding.
    AllInputs,
    /// What goes into a short convolution and gates it (LFM2).
    ConvolutionIn,
    /// What comes out of it.
    ConvolutionOut,
    /// Query, key and value of a gated delta rule, with Qwen3-Next its output gate too.
    DeltaIn,
    /// Its output gate.
    DeltaGate,
    /// Its step, with Qwen3-Next the decay too.
    DeltaStep,
    /// Its decay.
    DeltaDecay,
    /// What comes out of it.
    DeltaOut,
    /// What latent attention makes its queries of.
    QueryIn,
    /// Those queries.
    QueryOut,
    /// What it makes keys and values of, and the key that all heads share.
    LatentIn,
    /// Those keys and values.
    LatentOut,
    /// What gates what attention makes.
    AttentionGate,
}

impl Linear {
    fn parameters(&self) -> u128 {
        u128::from(self.input) * u128::from(self.output) + if self.bias { u128::from(self.output) } else { 0 }
    }

    /// Returns whether it gets an adapter.
    pub fn is_adapted_by(&self, targets: &Targets) -> bool {
        match targets {
            Targets::AllLinear => self.adapted_by_all,
            Targets::Names(names) => names.iter().any(|name| self.is_called(name)),
        }
    }

    /// Returns whether a target name means this module: its own name, or a path that ends in it.
    fn is_called(&self, target: &str) -> bool {
        target.rsplit('.').next() == Some(self.name)
    }
}

/// Names of the linear modules where a model type has its own.
struct LinearNames {
    qkv: &'static str,
    output: &'static str,
    gate_up: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

impl LinearNames {
    fn of(model_type: &str) -> LinearNames {
        let usual = LinearNames {
            qkv: "qkv_proj",
            output: "o_proj",
            gate_up: "gate_up_proj",
            gate: "gate_proj",
            up: "up_proj",
            down: "down_proj",
        };
        match model_type {
            "qwen" => {
                LinearNames { qkv: "c_attn", output: "c_proj", gate: "w2", up: "w1", down: "c_proj", ..usual }
            }
            "internlm2" => {
                LinearNames { qkv: "wqkv", output: "wo", gate: "w1", up: "w3", down: "w2", ..usual }
            }
            "baichuan" => LinearNames { qkv: "W_pack", ..usual },
            "mixtral" => LinearNames { gate: "w1", up: "w3", down: "w2", ..usual },
            "lfm2" => LinearNames { output: "out_proj", gate: "w1", up: "w3", down: "w2", ..usual },
            "granitemoeshared" => LinearNames { gate_up: "input_linear", down: "output_linear", ..usual },
            "starcoder2" => LinearNames { up: "c_fc", down: "c_proj", ..usual },
            "nanochat" => LinearNames { up: "fc1", down: "fc2", ..usual },
            "phi" => LinearNames { output: "dense", up: "fc1", down: "fc2", ..usual },
            "gpt_neox" => LinearNames {
                qkv: "query_key_value",
                output: "dense",
                up: "dense_h_to_4h",
                down: "dense_4h_to_h",
                ..usual
            },
            "chatglm" => LinearNames {
                qkv: "query_key_value",
                output: "dense",
                gate_up: "dense_h_to_4h",
                down: "dense_4h_to_h",
                ..usual
            },
            _ => usual,
        }
    }
}

/// What a `model_type` has beyond what its config.json says.
struct Traits {
    known: bool,
    block: BlockKind,
    bias: AttentionBias,
    fused_qkv: bool,
    fused_gate_up: bool,
    tied: bool,
    mixture: bool,
    gated_mlp: bool,
    mlp_bias: bool,
    style: Style,
}

impl Traits {
    /// Returns the traits of a `model_type`. Source: `modeling_*.py` and the defaults of `configuration_*.py` in
    /// transformers 5.19; for models with remote code (qwen, chatglm, internlm, baichuan) the code on their hub pages.
    fn of(model_type: &str) -> Traits {
        let llama = Traits {
            known: true,
            block: BlockKind::Llama,
            bias: AttentionBias::None,
            fused_qkv: false,
            fused_gate_up: false,
            tied: false,
            mixture: false,
            gated_mlp: true,
            mlp_bias: false,
            style: Style::LLAMA,
        };
        let moe = Traits { mixture: true, ..llama };
        let style = Style::LLAMA;
        let gemma = Style { norm: Norm::Raised, scales_embedding: true, ..style };
        let glm = Style { rotary: Rotary::Pairs, rotated: 0.5, ..style };
        let olmo = Style { rotary: Rotary::WideTables, ..style };
        let olmo2 =
            Style { norm: Norm::Wide, placement: Placement::After, head_norm: HeadNorm::Whole, ..olmo };
        let cohere = Style {
            norm: Norm::Centred,
            placement: Placement::Parallel,
            rotary: Rotary::Lifted,
            scales_logits: true,
            ..style
        };
        let granite = Style { scales_residual: true, scales_embedding: true, scales_logits: true, ..style };
        let layer_norm = Norm::Layer { bias: true };
        // GLM-4.5 and DeepSeek V3: sigmoid of fp32 products, a shared expert without a gate behind the others.
        let sigmoid = Style { router: Router::Sigmoid, gates_shared: false, shared: Shared::Last, ..style };
        // Gated attention on a quarter of a head, beside gated delta rules.
        let qwen3_next = Style {
            norm: Norm::Raised,
            head_norm: HeadNorm::Each,
            rotary: Rotary::Joined,
            rotated: 0.25,
            attention_gate: AttentionGate::InQuery,
            ..style
        };
        match model_type {
            "llama" | "mistral" | "yi" | "ministral" | "ministral3" | "cwm" => llama,
            "smollm3" => {
                Traits { tied: true, style: Style { unrotated: Unrotated::Every(4), ..style }, ..llama }
            }
            "internlm" => Traits { bias: AttentionBias::All, ..llama },
            "internlm2" | "baichuan" => Traits { fused_qkv: true, ..llama },
            "qwen2" => Traits { bias: AttentionBias::Qkv, ..llama },
            "qwen" => Traits { bias: AttentionBias::Qkv, fused_qkv: true, ..llama },
            "qwen3" => Traits { style: Style { head_norm: HeadNorm::Each, ..style }, ..llama },
            "phi3" => Traits {
                fused_qkv: true,
                fused_gate_up: true,
                style: Style { rotary: Rotary::Joined, ..style },
                ..llama
            },
            "gemma" => Traits { block: BlockKind::Gemma, tied: true, style: gemma, ..llama },
            "vaultgemma" => Traits { block: BlockKind::Gemma, tied: true, style: gemma, ..llama },
            "gemma2" => Traits {
                block: BlockKind::Gemma,
                tied: true,
                style: Style { placement: Placement::Around, ..gemma },
                ..llama
            },
            "gemma3_text" | "gemma3" => Traits {
                block: BlockKind::Gemma,
                tied: true,
                style: Style { placement: Placement::Around, head_norm: HeadNorm::EachLater, ..gemma },
                ..llama
            },
            "gemma4_text" => Traits {
                block: BlockKind::Gemma,
                tied: true,
                style: Style {
                    norm: Norm::Power,
                    placement: Placement::Around,
                    head_norm: HeadNorm::Each,
                    router: Router::Scaled,
                    ..gemma
                },
                ..llama
            },
            "lfm2" => Traits { tied: true, style: Style { head_norm: HeadNorm::Each, ..style }, ..llama },
            "glm" => Traits { block: BlockKind::Glm, fused_gate_up: true, style: glm, ..llama },
            "glm4" => Traits {
                block: BlockKind::Glm,
                fused_gate_up: true,
                style: Style { placement: Placement::Around, ..glm },
                ..llama
            },
            "chatglm" => Traits {
                block: BlockKind::Glm,
                bias: AttentionBias::Qkv,
                fused_qkv: true,
                fused_gate_up: true,
                style: glm,
                ..llama
            },
            "olmo" => Traits { style: Style { norm: Norm::LayerLifted, ..olmo }, ..llama },
            "olmo2" | "olmo3" => Traits { style: olmo2, ..llama },
            "flex_olmo" => Traits { style: olmo2, ..moe },
            "olmoe" => Traits { style: Style { head_norm: HeadNorm::Whole, ..style }, ..moe },
            "exaone4" => Traits {
                style: Style { placement: Placement::After, head_norm: HeadNorm::EachLater, ..style },
                ..llama
            },
            "hunyuan_v1_dense" => {
                Traits { style: Style { head_norm: HeadNorm::EachRotated, ..style }, ..llama }
            }
            "seed_oss" => Traits { bias: AttentionBias::Qkv, ..llama },
            "starcoder2" => Traits {
                bias: AttentionBias::All,
                tied: true,
                gated_mlp: false,
                mlp_bias: true,
                style: Style { norm: layer_norm, ..style },
                ..llama
            },
            "nemotron" => Traits {
                gated_mlp: false,
                style: Style {
                    norm: Norm::LayerRaised,
                    activation: Activation::Squared,
                    rotary: Rotary::Joined,
                    rotated: 0.5,
                    ..style
                },
                ..llama
            },
            "arcee" => Traits {
                gated_mlp: false,
                style: Style { activation: Activation::Squared, ..style },
                ..llama
            },
            "apertus" => Traits {
                gated_mlp: false,
                style: Style { activation: Activation::Xielu, head_norm: HeadNorm::EachLater, ..style },
                ..llama
            },
            "phi" => Traits {
                bias: AttentionBias::All,
                gated_mlp: false,
                mlp_bias: true,
                style: Style {
                    norm: layer_norm,
                    placement: Placement::Parallel,
                    activation: Activation::Written,
                    rotary: Rotary::Joined,
                    rotated: 0.5,
                    head_bias: true,
                    ..style
                },
                ..llama
            },
            "stablelm" => Traits {
                style: Style { norm: layer_norm, rotary: Rotary::Joined, rotated: 0.25, ..style },
                ..llama
            },
            "cohere" => Traits { tied: true, style: cohere, ..llama },
            "cohere2" => {
                Traits { tied: true, style: Style { unrotated: Unrotated::Full, ..cohere }, ..llama }
            }
            "granite" => Traits { style: granite, ..llama },
            "granitemoeshared" => Traits {
                fused_gate_up: true,
                style: Style {
                    router: Router::BestFirst,
                    gates_shared: false,
                    shared: Shared::Last,
                    ..granite
                },
                ..moe
            },
            "jais2" => Traits {
                bias: AttentionBias::All,
                gated_mlp: false,
                mlp_bias: true,
                style: Style { norm: layer_norm, activation: Activation::Squared, ..style },
                ..llama
            },
            "hyperclovax" => Traits { style: Style { placement: Placement::Around, ..granite }, ..llama },
            "granitemoe" => Traits { style: Style { router: Router::BestFirst, ..granite }, ..moe },
            "helium" => {
                Traits { style: Style { norm: Norm::Lifted, rotary: Rotary::PairsWhole, ..style }, ..llama }
            }
            "ernie4_5" => {
                Traits { tied: true, style: Style { rotary: Rotary::LiftedApart, ..style }, ..llama }
            }
            "ernie4_5_moe" => Traits {
                tied: true,
                style: Style {
                    rotary: Rotary::LiftedApart,
                    router: Router::Corrected,
                    gates_shared: false,
                    ..style
                },
                ..moe
            },
            "glm4_moe" => Traits { style: Style { rotary: Rotary::Joined, rotated: 0.5, ..sigmoid }, ..moe },
            "solar_open" => Traits { style: Style { rotary: Rotary::Joined, ..sigmoid }, ..moe },
            "deepseek_v3" | "glm4_moe_lite" => {
                Traits { style: Style { rotary: Rotary::PairsApart, ..sigmoid }, ..moe }
            }
            "afmoe" => Traits {
                style: Style {
                    norm: Norm::Wide,
                    placement: Placement::Around,
                    head_norm: HeadNorm::EachLater,
                    unrotated: Unrotated::Full,
                    attention_gate: AttentionGate::Own,
                    router: Router::SigmoidModule,
                    gates_shared: false,
                    shared: Shared::BehindRouter,
                    keeps_embedding: true,
                    ..style
                },
                ..moe
            },
            "bitnet" => {
                Traits { style: Style { activation: Activation::Squared, sub_norms: true, ..style }, ..llama }
            }
            "nanochat" => Traits {
                gated_mlp: false,
                style: Style {
                    norm: Norm::Bare,
                    head_norm: HeadNorm::EachRotated,
                    activation: Activation::Squared,
                    norms_embedding: true,
                    ..style
                },
                ..llama
            },
            "deepseek_v2" => Traits {
                style: Style { rotary: Rotary::Complex, router: Router::SoftmaxLifted, ..sigmoid },
                ..moe
            },
            "dots1" => Traits { style: Style { head_norm: HeadNorm::Each, ..sigmoid }, ..moe },
            "minimax_m2" => Traits {
                style: Style {
                    head_norm: HeadNorm::Whole,
                    rotary: Rotary::Joined,
                    router: Router::SigmoidHalf,
                    ..style
                },
                ..moe
            },
            "hunyuan_v1_moe" => Traits {
                style: Style {
                    head_norm: HeadNorm::EachRotated,
                    router: Router::SoftmaxWide,
                    gates_shared: false,
                    ..style
                },
                ..moe
            },
            "phimoe" => Traits { style: Style { norm: layer_norm, router: Router::Mixer, ..style }, ..moe },
            "exaone_moe" => Traits { style: Style { head_norm: HeadNorm::EachLater, ..sigmoid }, ..moe },
            "mellum" => Traits { style: Style { head_norm: HeadNorm::Each, ..style }, ..moe },
            "gpt_neox" => Traits {
                bias: AttentionBias::All,
                fused_qkv: true,
                gated_mlp: false,
                mlp_bias: true,
                style: Style {
                    norm: layer_norm,
                    placement: Placement::ParallelOwn,
                    rotary: Rotary::Joined,
                    rotated: 0.25,
                    fused_by_head: true,
                    ..style
                },
                ..llama
            },
            "qwen3_5_text" | "qwen3_5" => {
                Traits { style: Style { tables_by_row: true, ..qwen3_next }, ..llama }
            }
            "qwen3_5_moe_text" | "qwen3_5_moe" => {
                Traits { style: Style { tables_by_row: true, ..qwen3_next }, ..moe }
            }
            "qwen3_next" => Traits { style: qwen3_next, ..moe },
            "qwen3_moe" => Traits { style: Style { head_norm: HeadNorm::Each, ..style }, ..moe },
            "qwen2_moe" => Traits { bias: AttentionBias::Qkv, ..moe },
            "mixtral" => moe,
            "gpt_oss" => Traits {
                block: BlockKind::GptOss,
                bias: AttentionBias::All,
                style: Style {
                    norm: Norm::Wide,
                    rotary: Rotary::Apart,
                    rotated: 1.0,
                    router: Router::BestFirst,
                    ..style
                },
                ..moe
            },
            // No list was recorded for these: up, an activation that keeps its input, down.
            "falcon" => Traits { known: false, gated_mlp: false, mlp_bias: true, ..llama },
            _ => Traits { known: false, ..llama },
        }
    }
}

/// What a class has where its config.json leaves a key out, as those of Gemma 3 on the hub do.
///
/// Source: the defaults of `configuration_*.py` in transformers 5.19.
#[derive(Copy, Clone, Debug, Default)]
struct ClassDefaults {
    heads: Option<u64>,
    kv_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab: Option<u64>,
}

impl ClassDefaults {
    fn of(model_type: &str) -> ClassDefaults {
        let gemma = |heads, kv_heads, vocab| ClassDefaults {
            heads: Some(heads),
            kv_heads: Some(kv_heads),
            head_dim: Some(256),
            vocab: Some(vocab),
        };
        let none = ClassDefaults::default();
        match model_type {
            "gemma" => gemma(16, 16, 256_000),
            "gemma2" | "vaultgemma" => gemma(8, 4, 256_000),
            "gemma3" | "gemma3_text" => gemma(8, 4, 262_208),
            "gemma4_text" => gemma(8, 4, 262_144),
            "mistral" | "mixtral" | "ministral" | "glm4_moe" | "phimoe" => {
                ClassDefaults { kv_heads: Some(8), ..none }
            }
            "lfm2" => ClassDefaults { kv_heads: Some(8), ..none },
            "seed_oss" | "ministral3" => ClassDefaults { kv_heads: Some(8), head_dim: Some(128), ..none },
            "starcoder2" => ClassDefaults { kv_heads: Some(2), ..none },
            "smollm3" | "ernie4_5_moe" => ClassDefaults { kv_heads: Some(4), ..none },
            "exaone4" | "stablelm" => ClassDefaults { kv_heads: Some(32), ..none },
            "ernie4_5" => ClassDefaults { kv_heads: Some(2), head_dim: Some(128), ..none },
            "helium" => ClassDefaults { kv_heads: Some(20), head_dim: Some(128), ..none },
            "gpt_oss" => ClassDefaults { kv_heads: Some(8), head_dim: Some(64), ..none },
            "qwen3" => ClassDefaults { head_dim: Some(128), ..none },
            "qwen3_5_text" | "qwen3_5" => ClassDefaults { kv_heads: Some(4), head_dim: Some(256), ..none },
            "qwen3_5_moe_text" | "qwen3_5_moe" | "qwen3_next" => {
                ClassDefaults { kv_heads: Some(2), head_dim: Some(256), ..none }
            }
            "afmoe" => ClassDefaults { head_dim: Some(128), ..none },
            "bitnet" => ClassDefaults { kv_heads: Some(5), ..none },
            "mellum" => ClassDefaults { kv_heads: Some(4), head_dim: Some(128), ..none },
            "minimax_m2" => ClassDefaults { kv_heads: Some(8), head_dim: Some(128), ..none },
            "glm" | "glm4" => ClassDefaults { kv_heads: Some(2), head_dim: Some(128), ..none },
            _ => none,
        }
    }
}

fn read_shape(
    fields: &Fields<'_>,
    model_type: String,
    traits: &Traits,
    tied: Option<bool>,
) -> Result<ModelShape, ShapeError> {
    let hidden = fields.needed(&["hidden_size", "n_embd", "d_model"], HIDDEN_MAX)?;
    let layers = fields.needed(&["num_hidden_layers", "num_layers", "n_layer"], LAYERS_MAX)?;
    let defaults = ClassDefaults::of(&model_type);
    let heads = match fields.number(&["num_attention_heads", "n_head"], HEADS_MAX)?.or(defaults.heads) {
        Some(heads) => heads,
        None => return Err(ShapeError::Missing { key: "num_attention_heads" }),
    };
    let grouped = if model_type == "chatglm" {
        match fields.flag("multi_query_attention")? {
            Some(false) => None,
            Some(true) | None => fields.number(&["multi_query_group_num"], HEADS_MAX)?,
        }
    } else {
        // null is as many as query heads; only a key that is left out has the default of its class.
        let default = defaults.kv_heads.filter(|_| !fields.object.contains_key("num_key_value_heads"));
        fields.number(&["num_key_value_heads"], HEADS_MAX)?.or(default)
    };
    let kv_heads = grouped.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(ShapeError::Unusable {
            key: if model_type == "chatglm" { "multi_query_group_num" } else { "num_key_value_heads" }
                .to_owned(),
            found: kv_heads.to_string(),
            expected: format!("a divisor of the {heads} query heads"),
        });
    }
    let latent = match model_type.as_str() {
        "deepseek_v2" | "deepseek_v3" | "glm4_moe_lite" => Some(Latent::read(fields, &model_type)?),
        _ => None,
    };
    let stated_head_dim = match latent {
        Some(latent) => Some(latent.head()),
        None => fields.number(&["head_dim", "kv_channels"], HIDDEN_MAX)?.or(defaults.head_dim),
    };
    let head_dim = match stated_head_dim {
        Some(width) => width,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(ShapeError::Unusable {
                key: "num_attention_heads".to_owned(),
                found: heads.to_string(),
                expected: format!("a divisor of `hidden_size` {hidden} where no `head_dim` is stated"),
            });
        }
    };
    let vocab = match fields.number(&["vocab_size", "padded_vocab_size"], VOCAB_MAX)?.or(defaults.vocab) {
        Some(vocab) => vocab,
        None => return Err(ShapeError::Missing { key: "vocab_size" }),
    };
    let experts = read_experts(fields, &model_type, traits, layers)?;
    let intermediate = match fields.number(&["intermediate_size", "ffn_hidden_size", "n_inner"], WIDTH_MAX)? {
        // The first Qwen states both halves of its gated MLP together.
        Some(both) if model_type == "qwen" => (both / 2).max(1),
        Some(stated) if model_type == "lfm2" => lfm2::mlp_width(fields, stated)?,
        Some(width) => width,
        None => match &experts {
            Some(experts) => experts.intermediate,
            None => return Err(ShapeError::Missing { key: "intermediate_size" }),
        },
    };
    let bias = match fields.flag("attention_bias")? {
        // The biases of these kinds are not up to this key.
        _ if matches!(
            model_type.as_str(),
            "starcoder2" | "ernie4_5" | "ernie4_5_moe" | "stablelm" | "phi"
        ) =>
        {
            match fields.flag(if model_type == "stablelm" { "use_qkv_bias" } else { "use_bias" })? {
                Some(true) if model_type == "stablelm" => AttentionBias::Qkv,
                Some(true) if model_type != "phi" => AttentionBias::All,
                Some(false) if model_type != "phi" => AttentionBias::None,
                Some(_) | None => traits.bias,
            }
        }
        stated if model_type == "seed_oss" => {
            match (stated.unwrap_or(true), fields.flag("attention_out_bias")?.unwrap_or(false)) {
                (true, true) => AttentionBias::All,
                (true, false) => AttentionBias::Qkv,
                (false, _) => AttentionBias::None,
            }
        }
        Some(true) if traits.block == BlockKind::Glm || model_type == "glm4_moe" => AttentionBias::Qkv,
        Some(true) => AttentionBias::All,
        Some(false) => AttentionBias::None,
        None => match (model_type.as_str(), fields.flag("add_qkv_bias")?, fields.flag("bias")?) {
            ("chatglm", Some(false), _) | ("internlm" | "internlm2", _, Some(false)) => AttentionBias::None,
            ("internlm2", _, Some(true)) => AttentionBias::All,
            _ => traits.bias,
        },
    };
    // Gemma 2 caps both unless its config says null; Gemma 3 has the keys, and caps the logits alone when told to.
    let caps = matches!(model_type.as_str(), "gemma2" | "vaultgemma");
    let nanochat = model_type == "nanochat";
    let stated_cap = fields.positive("final_logit_softcapping")?;
    let capped_logits = stated_cap.map_or(caps || nanochat, |cap| cap.is_some());
    let capped_scores = fields.positive("attn_logit_softcapping")?.map_or(caps, |cap| cap.is_some());
    let stated_mlp_bias = fields.flag("mlp_bias")?;
    let mlp_bias = match model_type.as_str() {
        "starcoder2" | "ernie4_5" | "ernie4_5_moe" => fields.flag("use_bias")?,
        "llama" | "smollm3" | "nemotron" | "arcee" | "jais2" | "granite" | "hyperclovax" | "helium"
        | "seed_oss" | "deepseek_v2" => stated_mlp_bias,
        _ => stated_mlp_bias.filter(|_| !traits.known),
    };
    let mlp_bias = mlp_bias.unwrap_or(traits.mlp_bias);
    let mut style = read_style(fields, &model_type, traits, head_dim)?;
    if let Some(latent) = latent {
        style.rotated = float(latent.rotated) / float(head_dim);
        let is_set = |key: &str, value: &str| fields.object.get(key).is_some_and(|of| of == value);
        if is_set("topk_method", "group_limited_greedy") && model_type == "deepseek_v2" {
            style.router = Router::SoftmaxGrouped;
        }
        if fields.flag("rope_interleave")? == Some(false) && model_type != "deepseek_v2" {
            style.rotary = Rotary::Halves;
        }
    }
    let window = read_window(fields, &model_type)?;
    let (mut gemma4, mut convolution, mut delta_net, mut full_layers) = (None, None, None, None);
    match model_type.as_str() {
        "gemma4_text" => {
            let (read, full) = Gemma4::read(fields, layers, kv_heads)?;
            (gemma4, full_layers) = (Some(read), Some(full));
        }
        "lfm2" => {
            let (read, full) = Convolution::read(fields, layers)?;
            (convolution, full_layers) = (Some(read), Some(full));
        }
        "qwen3_5_text" | "qwen3_5" | "qwen3_5_moe_text" | "qwen3_5_moe" | "qwen3_next" => {
            let (read, full) = DeltaNet::read(fields, layers, model_type == "qwen3_next")?;
            (delta_net, full_layers) = (Some(read), Some(full));
        }
        _ => {}
    }
    Ok(ModelShape {
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        vocab,
        tied_embeddings: tied.unwrap_or(traits.tied),
        fused_qkv: traits.fused_qkv,
        fused_gate_up: traits.fused_gate_up,
        attention_bias: bias,
        style,
        gated_mlp: traits.gated_mlp,
        mlp_bias,
        block: traits.block,
        soft_capped_logits: (traits.block == BlockKind::Gemma || nanochat) && capped_logits,
        soft_capped_scores: caps && capped_scores,
        attention_sinks: traits.block == BlockKind::GptOss,
        experts,
        window: window.map(|(window, _)| window),
        full_every: window.map_or(0, |(_, every)| every),
        full_layers,
        gemma4,
        convolution,
        delta_net,
        latent,
        model_type,
    })
}

/// Returns the attributes of a block: those of its kind, with what its config.json says of them.
///
/// Source: the defaults of `configuration_*.py` in transformers 5.19.
fn read_style(
    fields: &Fields<'_>,
    model_type: &str,
    traits: &Traits,
    head_dim: u64,
) -> Result<Style, ShapeError> {
    let mut style = traits.style;
    if fields.flag("use_qk_norm")?.unwrap_or(false) {
        match model_type {
            "cohere" => style.head_norm = HeadNorm::EachOwn,
            "glm4_moe" => style.head_norm = HeadNorm::Each,
            _ => {}
        }
    }
    if model_type == "hyperclovax" && fields.flag("use_post_norm")? == Some(false) {
        style.placement = Placement::Before;
    }
    if model_type == "gpt_neox" && fields.flag("use_parallel_residual")? == Some(false) {
        style.placement = Placement::Before;
    }
    if model_type == "stablelm" {
        if fields.flag("qk_layernorm")? == Some(true) {
            style.head_norm = HeadNorm::EachModule;
        }
        if fields.flag("use_parallel_residual")? == Some(true) {
            style.placement = Placement::Parallel;
        }
    }
    if !traits.known {
        style = guessed_style(fields)?;
    }
    if style.rotary == Rotary::Joined {
        let nested = fields.object.get("rope_parameters").and_then(Value::as_object);
        let nested = nested.map(|object| Fields { object });
        let rotary_dim = fields.number(&["rotary_dim"], HIDDEN_MAX)?.filter(|_| model_type == "minimax_m2");
        let neox = if model_type == "gpt_neox" { fields.positive("rotary_pct")?.flatten() } else { None };
        let stated = match nested.map(|inner| inner.positive("partial_rotary_factor")).transpose()?.flatten()
        {
            Some(Some(share)) => Some(share),
            Some(None) | None => fields.positive("partial_rotary_factor")?.flatten(),
        };
        let of_width = rotary_dim.map(|width| float(width) / float(head_dim));
        style.rotated = stated.or(of_width).or(neox).unwrap_or(style.rotated).min(1.0);
    }
    match style.unrotated {
        Unrotated::Every(every) => {
            let stated = fields.number(&["no_rope_layer_interval"], LAYERS_MAX)?;
            style.unrotated = Unrotated::Every(stated.unwrap_or(every));
        }
        Unrotated::None | Unrotated::Full => {}
    }
    if matches!(model_type, "exaone4" | "exaone_moe")
        && !fields.object.get("sliding_window").is_some_and(Value::is_null)
    {
        style.unrotated = Unrotated::Full;
    }
    if model_type == "afmoe" {
        style.scales_embedding = fields.flag("mup_enabled")?.unwrap_or(false);
    }
    if model_type == "phimoe" {
        style.head_bias = fields.flag("lm_head_bias")?.unwrap_or(false);
    }
    if model_type == "seed_oss" {
        style.drops_residual =
            fields.object.get("residual_dropout").and_then(Value::as_f64).is_none_or(|p| p > 0.0);
    }
    if model_type == "starcoder2" {
        style.drops_residual =
            fields.object.get("residual_dropout").and_then(Value::as_f64).is_some_and(|p| p > 0.0);
    }
    Ok(style)
}

/// Returns what the config.json of an unknown kind lets guess about its block: kinds name the same thing alike.
fn guessed_style(fields: &Fields<'_>) -> Result<Style, ShapeError> {
    let mut style = Style::LLAMA;
    let states = |key: &str| fields.object.get(key).is_some_and(|value| !value.is_null());
    let is_set = |key: &str| fields.object.get(key) == Some(&Value::Bool(true));
    if !states("rms_norm_eps")
        && ["layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"].iter().any(|key| states(key))
    {
        style.norm = Norm::Layer { bias: true };
    }
    if is_set("use_qk_norm") || is_set("qk_norm") || is_set("use_qk_layernorm") || is_set("qk_layernorm") {
        style.head_norm = HeadNorm::Each;
    }
    if is_set("use_parallel_residual") || is_set("parallel_attn") {
        style.placement = Placement::Parallel;
    }
    if states("partial_rotary_factor") {
        style.rotary = Rotary::Joined;
    }
    if states("n_group") && states("topk_group") {
        style.router = Router::Sigmoid;
    }
    style.gates_shared = !(states("n_shared_experts") || states("num_shared_experts"));
    style.scales_residual = states("residual_multiplier");
    style.scales_embedding = states("embedding_multiplier");
    style.scales_logits = states("logits_scaling") || states("logit_scale");
    style.activation = match fields.object.get("hidden_act").and_then(Value::as_str) {
        Some("relu2") => Activation::Squared,
        Some("xielu") => Activation::Xielu,
        Some("gelu_new") => Activation::Written,
        Some(_) | None => Activation::Kept,
    };
    Ok(style)
}

/// Returns the window of sliding layers, and which layers do not slide.
///
/// Source: `configuration_*.py` of transformers 5.19: defaults of `sliding_window`, `sliding_window_pattern` and
/// `layer_types`.
fn read_window(fields: &Fields<'_>, model_type: &str) -> Result<Option<(u64, u64)>, ShapeError> {
    let (default, every) = match model_type {
        "mistral" => (Some(4096), 0),
        "gemma2" | "vaultgemma" => (Some(4096), 2),
        "gemma3" | "gemma3_text" => (Some(4096), 6),
        "gemma4_text" => (Some(512), 6),
        "gpt_oss" => (Some(128), 2),
        "olmo3" | "cohere2" | "exaone4" | "exaone_moe" | "cwm" => (Some(4096), 4),
        "afmoe" => {
            let every = fields.number(&["global_attn_every_n_layers"], LAYERS_MAX)?.unwrap_or(4);
            (Some(1024), every)
        }
        "ministral" => (Some(4096), 0),
        "mellum" if fields.object.contains_key("layer_types") => (Some(1024), 0),
        "phi3" | "mixtral" | "starcoder2" | "phimoe" => (None, 0),
        _ => return Ok(None),
    };
    let off = fields.flag("use_sliding_window")? == Some(false);
    if off
        || fields.object.get("sliding_window").is_some_and(Value::is_null)
            && (every == 0 || matches!(model_type, "exaone4" | "exaone_moe"))
    {
        return Ok(None);
    }
    let window = window_of(fields, default)?;
    if let Some(types) = listed_layers(fields, model_type) {
        // `slides_by_period` looks at the others.
        let every = first_full(types).map_or(0, |index| u64::try_from(index).unwrap_or(0) + 1);
        return Ok(window_of(fields, default)?.filter(|_| every != 1).map(|window| (window, every)));
    }
    // EXAONE 4 writes its pattern in letters: `LLLG`.
    let letters = fields.object.get("sliding_window_pattern").and_then(Value::as_str);
    let every = match letters.filter(|_| matches!(model_type, "exaone4" | "exaone_moe")) {
        Some(letters) => u64::try_from(letters.len()).unwrap_or(every),
        None => fields
            .number(&["sliding_window_pattern", "_sliding_window_pattern"], LAYERS_MAX)?
            .unwrap_or(every),
    };
    Ok(window.map(|window| (window, every)))
}

/// Returns what a config says of each layer, of a kind whose attention looks back through a window in layers that it names.
fn listed_layers<'a>(fields: &'a Fields<'_>, model_type: &str) -> Option<&'a [Value]> {
    let lists = matches!(
        model_type,
        "olmo3" | "cohere2" | "exaone4" | "exaone_moe" | "ministral" | "mellum" | "afmoe"
    );
    fields.layer_types().filter(|_| lists)
}

fn first_full(types: &[Value]) -> Option<usize> {
    types.iter().position(|of| of == "full_attention")
}

/// Returns whether layers without a window come again and again as the first of them does: others were not measured.
fn slides_by_period(fields: &Fields<'_>, model_type: &str) -> bool {
    let Some(types) = listed_layers(fields, model_type) else { return true };
    let Some(first) = first_full(types) else { return true };
    let is_due = |index: usize| (index + 1).is_multiple_of(first + 1);
    types.iter().enumerate().all(|(index, of)| (of == "full_attention") == is_due(index))
}

fn window_of(fields: &Fields<'_>, default: Option<u64>) -> Result<Option<u64>, ShapeError> {
    Ok(fields.number(&["sliding_window"], LENGTH_MAX)?.or(default))
}

/// Keys of the number of experts in a block.
const EXPERT_COUNT: [&str; 4] = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];

/// Keys of the number of experts that a token visits.
const EXPERTS_OF_TOKEN: [&str; 7] = [
    "num_experts_per_tok",
    "top_k_experts",
    "experts_per_token",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
];

fn read_experts(
    fields: &Fields<'_>,
    model_type: &str,
    traits: &Traits,
    layers: u64,
) -> Result<Option<Experts>, ShapeError> {
    // An unknown model is a mixture when its config speaks of experts.
    let stated = |keys: &[&'static str]| {
        keys.iter().any(|key| fields.object.get(*key).is_some_and(|value| !value.is_null()))
    };
    let gemma4 = model_type == "gemma4_text" && fields.flag("enable_moe_block")? == Some(true);
    if !traits.mixture && !gemma4 && (traits.known || !stated(&EXPERT_COUNT) || !stated(&EXPERTS_OF_TOKEN)) {
        return Ok(None);
    }
    let gpt_oss = traits.block == BlockKind::GptOss;
    // Hunyuan's mixture may list a number for each layer: transformers builds its experts with one for all.
    let mut alike = None;
    if model_type == "hunyuan_v1_moe" {
        let mut object = fields.object.clone();
        for (_, value) in &mut object {
            let one = value
                .as_array()
                .and_then(|list| list.first().filter(|first| list.iter().all(|n| n == *first)));
            if let Some(one) = one.cloned() {
                *value = one;
            }
        }
        alike = Some(object);
    }
    let fields = &Fields { object: alike.as_ref().unwrap_or(fields.object) };
    // Mellum's config.json may leave out all of it; the defaults are those of its class.
    let mellum = model_type == "mellum";
    let or_default = |key: &'static str, stated: Option<u64>, default| {
        stated.or(Some(default).filter(|_| mellum)).ok_or(ShapeError::Missing { key })
    };
    let count = or_default(EXPERT_COUNT[0], fields.number(&EXPERT_COUNT, EXPERTS_MAX)?, 64)?;
    // More than there are would end the trainer.
    let top_k = or_default(EXPERTS_OF_TOKEN[0], fields.number(&EXPERTS_OF_TOKEN, count)?, 8)?;
    // Hunyuan's mixture has experts of the dense width in transformers, whatever else its config.json says.
    let widths: &[&'static str] = match model_type {
        "mellum" => &["moe_intermediate_size"],
        "hunyuan_v1_moe" => &["intermediate_size"],
        _ => &["moe_intermediate_size", "intermediate_size"],
    };
    let intermediate = or_default(widths[0], fields.number(widths, WIDTH_MAX)?, 896)?;
    // The mixture of Qwen3.5 has experts in every layer.
    let all_sparse = model_type.starts_with("qwen3_5_moe");
    let has_shared = !traits.known || !traits.style.gates_shared;
    let shared_experts = match fields.count("n_shared_experts", EXPERTS_MAX)? {
        Some(count) => Some(count),
        None if model_type == "exaone_moe" => {
            Some(fields.count("num_shared_experts", EXPERTS_MAX)?.unwrap_or(1))
        }
        None => match fields.count("moe_num_shared_experts", EXPERTS_MAX)? {
            None if !traits.known => fields.count("num_shared_experts", EXPERTS_MAX)?,
            None if matches!(model_type, "deepseek_v3" | "glm4_moe_lite") => Some(1),
            None if model_type == "deepseek_v2" => Some(2),
            None if model_type == "afmoe" => {
                Some(fields.count("num_shared_experts", EXPERTS_MAX)?.unwrap_or(2))
            }
            stated => stated,
        },
    };
    let shared_experts = shared_experts.filter(|_| has_shared);
    let shared = match fields.count("shared_expert_intermediate_size", WIDTH_MAX)? {
        Some(width) => width,
        None if model_type == "granitemoeshared" => {
            fields.count("shared_intermediate_size", WIDTH_MAX)?.unwrap_or(1024)
        }
        None if model_type == "hunyuan_v1_moe" => intermediate,
        None if model_type == "qwen3_next" || all_sparse => 512,
        None => shared_experts.unwrap_or(0).saturating_mul(intermediate),
    };
    // `*MoeDecoderLayer.__init__` of Qwen: experts where (i + 1) % decoder_sparse_step is 0 and i is not listed.
    // DeepSeek and GLM: from the layer first_k_dense_replace on.
    let listed = if all_sparse { Vec::new() } else { fields.layer_list("mlp_only_layers", layers)? };
    let exaone = model_type == "exaone_moe";
    let kinds = fields.object.get("mlp_layer_types").and_then(Value::as_array);
    let lite = model_type == "glm4_moe_lite";
    let kinds = kinds.filter(|_| mellum || exaone || lite || !traits.known);
    // GLM-4.7-Flash and AFMoE do not read it.
    let leading = fields.count("first_k_dense_replace", layers)?.filter(|_| !lite && model_type != "afmoe");
    let usual = match model_type {
        "exaone_moe" | "glm4_moe_lite" => 1,
        "deepseek_v3" => 3,
        "afmoe" => fields.count("num_dense_layers", layers)?.unwrap_or(1),
        _ => 0,
    };
    // What a list says of each layer goes before it.
    let leading = if kinds.is_some() { 0 } else { leading.unwrap_or(usual) };
    let step = fields.number(&["decoder_sparse_step"], LAYERS_MAX)?.filter(|_| !all_sparse).unwrap_or(1);
    // ERNIE 4.5: each moe_layer_interval-th from moe_layer_start_index to moe_layer_end_index.
    let start = fields.count("moe_layer_start_index", layers)?.unwrap_or(0);
    let end = fields.object.get("moe_layer_end_index").and_then(Value::as_u64).unwrap_or(u64::MAX);
    let interval = fields.number(&["moe_layer_interval"], LAYERS_MAX)?.unwrap_or(1);
    let listed_dense = |index: u64| {
        let of = kinds.zip(usize::try_from(index).ok()).and_then(|(kinds, index)| kinds.get(index));
        of.is_some_and(|of| of == "dense")
    };
    let is_dense = |index: &u64| {
        listed_dense(*index)
            || *index < leading
            || *index < start
            || *index > end
            || !(index + 1).is_multiple_of(interval)
            || !(index + 1).is_multiple_of(step)
            || listed.binary_search(index).is_ok()
    };
    Ok(Some(Experts {
        count,
        top_k,
        intermediate,
        shared_intermediate: shared,
        dense_layers: (0..layers).filter(is_dense).collect(),
        biases: gpt_oss,
        normalises: match fields.flag("norm_topk_prob")? {
            Some(flag) => flag,
            None => matches!(
                model_type,
                "mixtral"
                    | "glm4_moe"
                    | "solar_open"
                    | "deepseek_v3"
                    | "glm4_moe_lite"
                    | "mellum"
                    | "hunyuan_v1_moe"
                    | "exaone_moe"
                    | "qwen3_next"
                    | "qwen3_5_moe_text"
                    | "qwen3_5_moe"
            ),
        },
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn shape(config: Value) -> ModelShape {
        ModelShape::from_config(&config).unwrap().0
    }

    /// Counts of `sum(p.numel() for p in model.parameters())` on transformers 5.19, and of adapters of rank 8 on all
    /// linears on peft 0.20.
    #[test]
    fn parameters_are_counted_exactly() {
        let counts: [(&str, u64, u64); 12] = [
            ("Qwen2.5-0.5B", 494_032_768, 4_399_104),
            ("Qwen2.5-7B", 7_615_616_512, 20_185_088),
            ("Qwen3-4B", 4_022_468_096, 16_515_072),
            ("Llama-3.2-3B", 3_212_749_824, 12_156_928),
            ("Mistral-7B-v0.3", 7_248_023_552, 20_971_520),
            ("Qwen3-30B-A3B", 30_532_122_624, 6_684_672),
            ("gpt-oss-20b", 20_914_757_184, 3_981_312),
            ("gemma-2-2b", 2_614_341_888, 10_383_360),
            ("gemma-2-9b", 9_241_705_984, 27_009_024),
            ("gemma-2b", 2_506_172_416, 9_805_824),
            ("gemma-3-1b", 999_885_952, 6_522_880),
            ("Qwen1.5-MoE-A2.7B", 14_315_784_192, 3_145_728),
        ];
        for (name, parameters, adapters) in counts {
            let model = Model::resolve(name, None, None).unwrap();
            assert_eq!(model.parameters(), parameters, "{name}");
            assert_eq!(model.shape.adapter_parameters(8, &Targets::AllLinear), adapters, "{name}");
        }
    }

    #[test]
    fn the_text_part_of_a_multimodal_model_is_read() {
        let config = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
            "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "intermediate_size": 10240, "vocab_size": 262208}, "vision_config": {"hidden_size": 1152}});
        let (shape, known) = ModelShape::from_config(&config).unwrap();
        assert_eq!((shape.hidden, shape.model_type.as_str(), known), (2560, "gemma3_text", true));
        let model = Model::resolve("a/b", Some(&config), None).unwrap();
        assert_eq!((model.source, model.multimodal), (ShapeSource::PartlyKnown, true));
    }

    #[test]
    fn chatglm_and_the_first_qwen_have_their_own_keys() {
        let glm = shape(json!({"model_type": "chatglm", "hidden_size": 4096, "num_layers": 40,
            "num_attention_heads": 32, "multi_query_attention": true, "multi_query_group_num": 2, "kv_channels": 128,
            "ffn_hidden_size": 13696, "padded_vocab_size": 151_552, "add_qkv_bias": true}));
        assert_eq!(glm.parameters(), 9_399_951_360);
        let qwen = shape(json!({"model_type": "qwen", "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "intermediate_size": 22016, "vocab_size": 151_936}));
        assert_eq!((qwen.intermediate, qwen.parameters()), (11_008, 7_721_324_544));
    }

    #[test]
    fn an_unknown_block_kind_is_flagged() {
        let config = json!({"model_type": "novel", "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 1000});
        let model = Model::resolve("some/novel", Some(&config), None).unwrap();
        assert_eq!(model.source, ShapeSource::UnknownBlock);
        assert!(model.notes[0].contains("novel"), "{:?}", model.notes);
    }

    /// A config of that type with everything that a shape needs.
    fn whole(model_type: &str) -> Value {
        json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32})
    }

    #[test]
    fn unusable_keys_are_errors_that_name_them() {
        let count = [json!(0), json!(-1), json!(1u64 << 63), json!("64"), json!(1.5), json!([64]), json!({})];
        let from_zero = [json!(-3), json!(1u64 << 63), json!("3"), json!(1.5), json!([1]), json!(true)];
        let flag = [json!(0), json!("true"), json!([true]), json!({})];
        let cap = [json!(0), json!(-30.0), json!("30"), json!(true), json!([30.0])];
        let list =
            [json!("abc"), json!(3), json!([-1]), json!(["x"]), json!([9999]), json!([1, 2.5]), json!({})];
        let inner = [json!("abc"), json!([]), json!(3)];
        let cases: [(&str, &[&str], &[Value]); 15] = [
            (
                "qwen2",
                &[
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                ],
                &count,
            ),
            ("qwen2", &["vocab_size", "intermediate_size"], &count),
            (
                "chatglm",
                &["multi_query_group_num", "kv_channels", "padded_vocab_size", "ffn_hidden_size"],
                &count,
            ),
            ("chatglm", &["num_layers", "n_head", "n_embd"], &count),
            ("chatglm", &["multi_query_attention", "add_qkv_bias"], &flag),
            ("internlm2", &["bias", "attention_bias", "tie_word_embeddings", "mlp_bias"], &flag),
            ("qwen3_moe", &["num_experts", "num_experts_per_tok", "moe_intermediate_size"], &count),
            ("qwen3_moe", &["decoder_sparse_step"], &count),
            ("qwen3_moe", &["shared_expert_intermediate_size", "first_k_dense_replace"], &from_zero),
            ("novel", &["n_shared_experts"], &from_zero),
            ("qwen3_moe", &["norm_topk_prob"], &flag),
            ("qwen3_moe", &["mlp_only_layers"], &list),
            ("gemma2", &["final_logit_softcapping", "attn_logit_softcapping"], &cap),
            ("mistral", &["sliding_window", "sliding_window_pattern"], &count),
            ("mistral", &["use_sliding_window"], &flag),
        ];
        for (model_type, keys, values) in cases {
            for (key, bad) in keys.iter().flat_map(|key| values.iter().map(move |bad| (key, bad))) {
                let mut config = whole(model_type);
                for other in [
                    "num_hidden_layers",
                    "num_attention_heads",
                    "hidden_size",
                    "vocab_size",
                    "intermediate_size",
                ] {
                    // Of several names for one thing the first is read.
                    if model_type == "chatglm" && other != "num_hidden_layers" || *key == "num_layers" {
                        config.as_object_mut().unwrap().remove(other);
                    }
                }
                for (name, value) in [
                    ("num_layers", 4),
                    ("n_head", 4),
                    ("n_embd", 64),
                    ("padded_vocab_size", 1000),
                    ("ffn_hidden_size", 128),
                    ("multi_query_group_num", 2),
                ] {
                    config[name] = json!(value);
                }
                ModelShape::from_config(&config).unwrap();
                config[*key] = bad.clone();
                let error = ModelShape::from_config(&config).unwrap_err();
                assert!(error.to_string().contains(&format!("`{key}`")), "{key} {bad}: {error}");
            }
        }
        for (key, bad) in INNER.iter().flat_map(|key| inner.iter().map(move |bad| (key, bad))) {
            let error = ModelShape::from_config(&json!({"model_type": "x", *key: bad})).unwrap_err();
            assert!(error.to_string().contains(&format!("`{key}`")), "{key} {bad}: {error}");
        }
        let more = json!({"num_experts_per_tok": 9});
        let mut config = whole("qwen3_moe");
        config["num_experts_per_tok"] = more["num_experts_per_tok"].clone();
        let error = ModelShape::from_config(&config).unwrap_err().to_string();
        assert!(error.contains("`num_experts_per_tok` is 9") && error.contains("from 1 to 8"), "{error}");
        let error = ModelShape::from_config(&json!({"hidden_size": 64})).unwrap_err();
        assert_eq!(error, ShapeError::Missing { key: "num_hidden_layers" });
        for config in [json!(null), json!(3), json!("x"), json!([]), json!(true)] {
            assert!(matches!(ModelShape::from_config(&config), Err(ShapeError::NotAnObject { .. })));
        }
    }

    /// Parameters of the real models with that config, on transformers 5.19.
    #[test]
    fn which_blocks_of_a_mixture_are_dense_is_read() {
        let dense = |extra: Value| {
            let mut config = whole("qwen3_moe");
            for (key, value) in extra.as_object().unwrap() {
                config[key] = value.clone();
            }
            shape(config).experts.unwrap().dense_layers
        };
        assert_eq!(dense(json!({})), Vec::<u64>::new());
        assert_eq!(dense(json!({"decoder_sparse_step": 2})), [0, 2]);
        assert_eq!(dense(json!({"decoder_sparse_step": 2, "mlp_only_layers": [3, 3, 0]})), [0, 2, 3]);
        assert_eq!(dense(json!({"decoder_sparse_step": 9})), [0, 1, 2, 3]);
        assert_eq!(dense(json!({"mlp_only_layers": null, "first_k_dense_replace": 1})), [0]);
        let mut half = whole("qwen3_moe");
        half["decoder_sparse_step"] = json!(2);
        let (all, half) = (shape(whole("qwen3_moe")), shape(half));
        let expert_block = 8 * (3 * 64 * 32 + 64);
        assert_eq!(all.parameters() - half.parameters(), 2 * (expert_block - 3 * 64 * 128));
    }

    #[test]
    fn hunyuan_may_list_a_number_for_each_layer() {
        let mut config = whole("hunyuan_v1_moe");
        config["num_experts_per_tok"] = json!(null);
        config["moe_topk"] = json!([2, 2, 2, 2]);
        config["moe_intermediate_size"] = json!([32, 32, 32, 32]);
        let experts = shape(config.clone()).experts.unwrap();
        assert_eq!((experts.top_k, experts.intermediate, experts.shared_intermediate), (2, 128, 128));
        config["moe_topk"] = json!([2, 1, 2, 2]);
        assert!(ModelShape::from_config(&config).unwrap_err().to_string().contains("`moe_topk`"));
    }

    #[test]
    fn neox_with_an_activation_that_is_written_out_is_not_known() {
        let mut config = whole("gpt_neox");
        assert!(ModelShape::from_config(&config).unwrap().1);
        config["hidden_act"] = json!("gelu_fast");
        assert!(!ModelShape::from_config(&config).unwrap().1);
    }

    #[test]
    fn gemma_4_as_no_list_has_it_is_not_known() {
        let known = |key: &str, value: Value| {
            let mut config = whole("gemma4_text");
            config[key] = value;
            ModelShape::from_config(&config).unwrap().1
        };
        assert!(known("attention_bias", json!(false)));
        for (key, value) in [
            ("attention_bias", json!(true)),
            ("per_layer_config", json!({})),
            ("use_bidirectional_attention", json!("all")),
        ] {
            assert!(!known(key, value), "{key}");
        }
    }

    #[test]
    fn lfm2_adjusts_the_width_of_its_mlp_and_lists_its_attention() {
        let with = |more: &[(&str, Value)]| {
            let mut config = whole("lfm2");
            config["intermediate_size"] = json!(1000);
            for (key, value) in more {
                config[*key] = value.clone();
            }
            shape(config)
        };
        assert_eq!(with(&[]).intermediate, 768);
        assert_eq!(with(&[("block_multiple_of", json!(100))]).intermediate, 700);
        assert_eq!(with(&[("block_ffn_dim_multiplier", json!(1.5))]).intermediate, 1024);
        assert_eq!(with(&[("block_auto_adjust_ff_dim", json!(false))]).intermediate, 1000);
        assert_eq!(with(&[]).attention_layers(), 4);
        assert_eq!(with(&[("full_attn_idxs", json!([2]))]).attention_layers(), 1);
        assert_eq!(
            with(&[("layer_types", json!(["conv", "full_attention", "conv", "conv"]))]).full_layers,
            Some(vec![1])
        );
    }

    #[test]
    fn qwen_3_5_lists_its_attention_or_has_it_in_each_fourth_layer() {
        let with = |more: &[(&str, Value)]| {
            let mut config = whole("qwen3_5_text");
            config["num_hidden_layers"] = json!(9);
            for (key, value) in more {
                config[*key] = value.clone();
            }
            ModelShape::from_config(&config)
        };
        let full = |more: &[(&str, Value)]| with(more).unwrap().0.full_layers.unwrap();
        assert_eq!(full(&[]), [3, 7]);
        assert_eq!(full(&[("full_attention_interval", json!(3))]), [2, 5, 8]);
        assert_eq!(full(&[("layer_types", json!(["full_attention", "linear_attention"]))]), [0]);
        let known = |types: Value| with(&[("layer_types", types)]).unwrap().1;
        let whole_list = |odd: &str| {
            json!((0..9).map(|i| if i == 4 { odd } else { "linear_attention" }).collect::<Vec<_>>())
        };
        assert!(known(whole_list("full_attention")) && !known(whole_list("sliding_attention")));
        assert!(!known(json!(["full_attention", "linear_attention"])), "seven of nine layers are not said");
        let error = with(&[("linear_num_key_heads", json!(5))]).unwrap_err();
        assert!(error.to_string().contains("`linear_num_key_heads` is 5"), "{error}");
        let mut next = whole("qwen3_next");
        for key in ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] {
            next[key] = json!(4);
        }
        assert!(ModelShape::from_config(&next).unwrap().1);
        next["linear_num_key_heads"] = json!(1);
        assert!(!ModelShape::from_config(&next).unwrap().1);
        let note = |config: Value| Model::resolve("m", Some(&config), None).unwrap().notes.concat();
        assert!(note(next).contains("flash-linear-attention") && note(whole("llama")).is_empty());
    }

    #[test]
    fn heads_of_latent_attention_are_read_from_their_parts() {
        let config = |model_type: &str, more: Value| {
            let mut config = whole(model_type);
            config["num_key_value_heads"] = json!(4);
            config["head_dim"] = json!(64);
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            ModelShape::from_config(&config).unwrap()
        };
        let (v3, known) = config("deepseek_v3", json!({"first_k_dense_replace": 1}));
        assert_eq!((v3.head_dim, v3.q_width(), known), (192, 768, true));
        let names: Vec<_> =
            v3.linears().iter().map(|linear| (linear.name, linear.input, linear.output)).collect();
        assert_eq!(names[0], ("q_a_proj", 64, 1536));
        assert_eq!(
            names[2..5],
            [("kv_a_proj_with_mqa", 64, 576), ("kv_b_proj", 512, 1024), ("o_proj", 512, 64)]
        );
        let (lite, _) = config("glm4_moe_lite", json!({"q_lora_rank": null, "first_k_dense_replace": 3}));
        assert_eq!((lite.head_dim, lite.linears()[0].name), (256, "q_proj"));
        assert_eq!(lite.experts.unwrap().dense_layers, [0]);
        assert!(!config("deepseek_v2", json!({"num_key_value_heads": 2})).1);
        assert!(config("deepseek_v2", json!({"v_head_dim": 192})).1);
        assert!(!config("deepseek_v2", json!({"v_head_dim": 193})).1, "wider than query and key");
    }

    #[test]
    fn bitnet_is_known_without_its_quantisation_and_afmoe_scales_when_told_to() {
        let config = |model_type: &str, key: &str, value: Value| {
            let mut config = whole(model_type);
            config[key] = value;
            ModelShape::from_config(&config).unwrap()
        };
        assert!(config("bitnet", "hidden_act", json!("relu2")).1);
        assert!(!config("bitnet", "hidden_act", json!("silu")).1);
        assert!(!config("bitnet", "quantization_config", json!({"quant_method": "bitnet"})).1);
        assert!(config("bitnet", "quantization_config", Value::Null).1);
        let (afmoe, known) = config("afmoe", "mup_enabled", json!(true));
        assert!(known && afmoe.style.scales_embedding);
        assert_eq!((afmoe.window, afmoe.full_every), (Some(1024), 4));
        for form in [ExpertForm::Fused, ExpertForm::Modules] {
            let linears = afmoe.modules(form);
            assert_eq!(linears.iter().filter(|linear| linear.part == Part::Router).count(), 1, "{form:?}");
        }
        let types = |odd: usize| {
            json!(
                (0..4)
                    .map(|i| ["sliding_attention", "full_attention"][usize::from(i == odd || i == 1)])
                    .collect::<Vec<_>>()
            )
        };
        assert!(config("afmoe", "layer_types", types(3)).1);
        assert!(
            !config("afmoe", "layer_types", types(2)).1,
            "the layers that see all come not again and again"
        );
        let experts = afmoe.experts.unwrap();
        assert_eq!((experts.dense_layers, experts.shared_intermediate), (vec![0], 64));
        let (nanochat, known) = config("nanochat", "final_logit_softcapping", json!(15.0));
        assert!(known && nanochat.soft_capped_logits);
    }

    #[test]
    fn smollm_ties_its_tables_and_llama_can_have_biases_in_its_mlp() {
        assert!(shape(whole("smollm3")).tied_embeddings);
        for kind in ["llama", "smollm3", "novel"] {
            let mut config = whole(kind);
            if kind == "novel" {
                config.as_object_mut().unwrap().remove("num_experts");
            }
            let without = shape(config.clone()).parameters();
            config["mlp_bias"] = json!(true);
            assert_eq!(shape(config).parameters() - without, 4 * (128 + 128 + 64), "{kind}");
        }
        let mut config = whole("mistral");
        config["mlp_bias"] = json!(true);
        assert_eq!(shape(config).parameters(), shape(whole("mistral")).parameters());
    }

    #[test]
    fn soft_caps_that_are_null_are_off() {
        let capped = |key: &str, value: Value| {
            let mut config = whole("gemma2");
            config[key] = value;
            let shape = shape(config);
            (shape.soft_capped_logits, shape.soft_capped_scores)
        };
        assert_eq!(capped("model_type", json!("gemma2")), (true, true));
        assert_eq!(capped("attn_logit_softcapping", json!(null)), (true, false));
        assert_eq!(capped("final_logit_softcapping", json!(null)), (false, true));
    }

    /// The language model of InternVL-Chat-1.2 with 13.0 GiB of weight files in bf16.
    #[test]
    fn what_sees_is_counted_from_the_weight_files() {
        let llama = json!({"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000});
        let inside = json!({"model_type": "internvl_chat", "llm_config": llama, "vision_config": {"hidden_size": 3200}});
        let mut beside = llama.clone();
        beside["vision_config"] = json!({"hidden_size": 3200});
        let text = shape(llama.clone()).parameters();
        let files = |parameters| Some(WeightFiles { bytes: Bytes::from_gib(13), parameters });
        for config in [inside, beside] {
            let seen = Model::resolve("a/b", Some(&config), files(Some(6_979_321_856))).unwrap();
            assert_eq!((seen.source, seen.multimodal), (ShapeSource::PartlyKnown, true));
            assert_eq!(seen.frozen_beside, float(6_979_321_856 - text));
            assert!(
                seen.notes.iter().any(|note| note.contains("5.88 billion parameters")),
                "{:?}",
                seen.notes
            );
            let unseen = Model::resolve("a/b", Some(&config), None).unwrap();
            assert_eq!((unseen.source, unseen.frozen_beside), (ShapeSource::PartlyKnown, 0.0));
            assert!(unseen.notes.iter().any(|note| note.contains("not in the figure")), "{:?}", unseen.notes);
        }
        let known = Model::resolve("a/b", Some(&llama), files(Some(text))).unwrap();
        assert_eq!((known.source, known.frozen_beside, known.notes.len()), (ShapeSource::Config, 0.0, 0));
        let more = Model::resolve("a/b", Some(&llama), files(Some(2 * text))).unwrap();
        assert_eq!((more.source, more.frozen_beside), (ShapeSource::PartlyKnown, float(text)));
        assert!(more.notes[0].contains("more than its config.json explains"), "{:?}", more.notes);
        let fewer = Model::resolve("a/b", Some(&llama), files(Some(text - 1000))).unwrap();
        assert_eq!((fewer.source, fewer.frozen_beside, fewer.miscounted), (ShapeSource::Config, 0.0, None));
        // A head that is tied, and stored all the same.
        let mut tied = llama;
        tied["tie_word_embeddings"] = json!(true);
        let tied = Model::resolve("a/b", Some(&tied), files(Some(text))).unwrap();
        assert_eq!((tied.source, tied.frozen_beside), (ShapeSource::Config, 0.0));
        // Of an unknown kind the files know better in both directions, unless they hold next to nothing.
        let mut novel = whole("novel");
        novel.as_object_mut().unwrap().remove("num_experts");
        let counted = shape(novel.clone()).parameters();
        for (stored, miscounted) in
            [(counted + 500, Some(500.0)), (counted - 500, Some(-500.0)), (counted / 3, None)]
        {
            let model = Model::resolve("a/b", Some(&novel), files(Some(stored))).unwrap();
            assert_eq!((model.miscounted, model.frozen_beside), (miscounted, 0.0));
        }
    }

    #[test]
    fn a_language_model_inside_of_another_config_is_found_however_deep() {
        let text = json!({"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 1000});
        let shallow = shape(json!({"model_type": "x", "text_config": text.clone()}));
        for config in [
            json!({"model_type": "x", "thinker_config": {"model_type": "y", "text_config": text.clone()}}),
            json!({"text_config": {"text_config": text.clone()}}),
        ] {
            assert_eq!(shape(config), shallow);
        }
        let inner = json!({"text_config": {"text_config": {"hidden_size": 64}}, "tie_word_embeddings": true});
        assert_eq!(ModelShape::from_config(&inner), Err(ShapeError::Missing { key: "num_hidden_layers" }));
    }

    /// The config.json of google/gemma-3-4b-it, without its image part.
    #[test]
    fn keys_that_a_config_leaves_out_have_the_defaults_of_their_class() {
        let gemma = shape(
            json!({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
            "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}}),
        );
        assert_eq!((gemma.heads, gemma.kv_heads, gemma.head_dim, gemma.vocab), (8, 4, 256, 262_208));
        assert_eq!(gemma.parameters(), 3_880_263_168);
    }

    #[test]
    fn heads_that_cannot_be_are_errors() {
        let with = |extra: Value| {
            let mut config = json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 1000});
            for (key, value) in extra.as_object().unwrap() {
                config[key] = value.clone();
            }
            ModelShape::from_config(&config).map(|(shape, _)| (shape.kv_heads, shape.head_dim))
        };
        let error = with(json!({"num_attention_heads": 7})).unwrap_err().to_string();
        assert!(error.contains("`num_attention_heads` is 7") && error.contains("head_dim"), "{error}");
        assert_eq!(with(json!({"num_attention_heads": 7, "head_dim": 16})), Ok((7, 16)));
        for kv_heads in [8, 3] {
            let error = with(json!({"num_key_value_heads": kv_heads})).unwrap_err().to_string();
            assert!(error.contains("divisor of the 4 query heads"), "{error}");
        }
        assert_eq!(with(json!({"num_key_value_heads": null})), Ok((4, 16)));
    }

    #[test]
    fn absurd_dimensions_are_refused_together() {
        let config = json!({"model_type": "mixtral", "hidden_size": 1 << 20, "num_hidden_layers": 4096,
            "num_attention_heads": 16384, "intermediate_size": 1 << 24, "vocab_size": 1 << 26,
            "num_local_experts": 65536, "num_experts_per_tok": 2, "head_dim": 1 << 20});
        assert!(matches!(ModelShape::from_config(&config), Err(ShapeError::TooLarge { .. })));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (1u64..5000).prop_map(Value::from),
            "[a-z0-9_]{0,12}".prop_map(Value::from),
        ];
        let keys = prop::sample::select(vec![
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "model_type",
            "text_config",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "tie_word_embeddings",
            "attention_bias",
            "mlp_only_layers",
            "decoder_sparse_step",
            "first_k_dense_replace",
            "final_logit_softcapping",
            "attn_logit_softcapping",
            "mlp_bias",
            "vision_config",
        ]);
        leaf.prop_recursive(2, 40, 16, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(keys.clone(), inner, 0..15)
                    .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_json_is_a_shape_or_an_error(config in any_json()) {
            if let Ok((shape, _)) = ModelShape::from_config(&config) {
                prop_assert!(shape.parameters() <= PARAMETERS_MAX);
            }
        }
    }
}
