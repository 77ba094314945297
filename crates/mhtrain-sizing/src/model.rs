//! What shape has a model, and how sure is that?

use serde::Serialize;

use crate::units::Bytes;
use crate::workload::AttnImpl;

/// What is known about a model before it is loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Hub id or path, as the user wrote it.
    pub name: String,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Where the dimensions come from; a worse source widens the interval of the estimate.
    pub source: ShapeSource,
    /// Bytes of the weight files as their headers state them; `None` when no file was seen.
    pub weight_file_bytes: Option<Bytes>,
    /// Attention implementations that the model class supports in transformers, best first.
    pub attention: Vec<AttnImpl>,
}

/// Why a model has no known shape.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ResolveError {
    /// Neither a config.json, nor the catalogue, nor the name says how large it is.
    #[error("nothing says how large the model `{name}` is")]
    Unknown {
        /// The model's name.
        name: String,
    },
}

impl ResolveError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        None
    }
}

impl Model {
    /// Returns what is known about the model `name`: from its config.json when `config` is given, else from the
    /// catalogue, else from the parameter count in its name.
    pub fn resolve(
        name: &str,
        _config: Option<&serde_json::Value>,
        _weight_file_bytes: Option<Bytes>,
    ) -> Result<Model, ResolveError> {
        Err(ResolveError::Unknown { name: name.to_owned() })
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        0
    }
}

/// Where the dimensions of a model come from, surest first.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ShapeSource {
    /// The model's own config.json, of a block kind that the estimate knows.
    Config,
    /// `config/models.toml`.
    Catalogue,
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
    /// Query and key are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// Query, key and value come out of one product (Phi-3).
    pub fused_qkv: bool,
    /// Biases on q, k, v (Qwen2) or on all four projections.
    pub attention_bias: AttentionBias,
    /// RMSNorms in a block: 2, or 4 (Gemma 2, GLM-4).
    pub norms_per_block: u64,
    /// The MLP has a gate (three matrices) or not (two).
    pub gated_mlp: bool,
    /// Mixture of experts; `None` for a dense model.
    pub experts: Option<Experts>,
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
    /// Blocks that are dense all the same (they use the dense width).
    pub dense_layers: u64,
    /// Experts carry biases (gpt-oss).
    pub biases: bool,
}
