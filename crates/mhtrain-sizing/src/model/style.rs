//! How is a block built, beyond its dimensions?
//!
//! A [`Style`] is a handful of independent attributes, each read off the model's code. `block.rs` puts the list of a
//! block together from them, so a kind that combines them in a new way needs no list of its own.
//!
//! Source: `modeling_*.py` and `configuration_*.py` of transformers 5.19.

/// The attributes of a block.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Style {
    /// How the hidden state is normalised.
    pub norm: Norm,
    /// Where the norms of a block stand.
    pub placement: Placement,
    /// How query and key are normalised.
    pub head_norm: HeadNorm,
    /// How positions are written into query and key.
    pub rotary: Rotary,
    /// Share of a head that is rotated.
    pub rotated: f64,
    /// Layers without positions.
    pub unrotated: Unrotated,
    /// Activation of the MLP.
    pub activation: Activation,
    /// What a sub-layer makes is scaled before it is added.
    pub scales_residual: bool,
    /// The embedding is scaled.
    pub scales_embedding: bool,
    /// The logits are scaled.
    pub scales_logits: bool,
    /// What a sub-layer makes is dropped out before it is added.
    pub drops_residual: bool,
    /// How the experts of a token are chosen.
    pub router: Router,
    /// The shared expert has a gate of its own, which scales what it makes.
    pub gates_shared: bool,
    /// When the shared expert comes.
    pub shared: Shared,
    /// The head has a bias.
    pub head_bias: bool,
    /// Query, key and value of a head lie beside each other in the fused product (GPT-NeoX), and not those of all heads.
    pub fused_by_head: bool,
    /// What gates what attention makes.
    pub attention_gate: AttentionGate,
    /// What attention makes is normalised, and so is the product within a gated MLP (BitNet).
    pub sub_norms: bool,
    /// The model's `forward` holds the embedding beside what it makes of it (AFMoE).
    pub keeps_embedding: bool,
    /// The embedding is normalised, and held beside that (nanochat).
    pub norms_embedding: bool,
    /// Each row of a batch has tables of sine and cosine of its own (Qwen3.5).
    pub tables_by_row: bool,
}

impl Style {
    /// Llama's, and that of most mixtures.
    pub const LLAMA: Style = Style {
        norm: Norm::Half,
        placement: Placement::Before,
        head_norm: HeadNorm::None,
        rotary: Rotary::Halves,
        rotated: 1.0,
        unrotated: Unrotated::None,
        activation: Activation::Kept,
        scales_residual: false,
        scales_embedding: false,
        scales_logits: false,
        drops_residual: false,
        router: Router::Softmax,
        gates_shared: true,
        shared: Shared::First,
        head_bias: false,
        fused_by_head: false,
        attention_gate: AttentionGate::None,
        sub_norms: false,
        keeps_embedding: false,
        norms_embedding: false,
        tables_by_row: false,
    };
}

/// Kinds of norms.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Norm {
    /// RMSNorm in fp32, the weight applied to the half-precision result (Llama).
    Half,
    /// RMSNorm whose weight is applied in fp32 (OLMo 2, gpt-oss).
    Wide,
    /// The same with the weight lifted to fp32 first (Helium).
    Lifted,
    /// RMSNorm with `1 + weight` in fp32 (Gemma).
    Raised,
    /// RMSNorm by a power of -0.5 instead of a root, the weight applied in fp32 (Gemma 4).
    Power,
    /// LayerNorm written out in fp32, without bias (Cohere).
    Centred,
    /// torch's LayerNorm on the half-precision input, with this many parameters of the hidden size: weight and bias.
    Layer {
        /// It has a bias.
        bias: bool,
    },
    /// torch's LayerNorm with `1 + weight` (Nemotron).
    LayerRaised,
    /// torch's LayerNorm in fp32 without parameters (OLMo).
    LayerLifted,
    /// RMSNorm in fp32 without parameters (nanochat).
    Bare,
}

impl Norm {
    /// Parameters of the hidden size in one norm.
    pub fn parameters(self) -> u64 {
        match self {
            Norm::Half | Norm::Wide | Norm::Lifted | Norm::Raised | Norm::Power | Norm::Centred => 1,
            Norm::Layer { bias } => 1 + u64::from(bias),
            Norm::LayerRaised => 2,
            Norm::LayerLifted | Norm::Bare => 0,
        }
    }
}

/// Where norms stand.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Before each sub-layer (Llama).
    Before,
    /// After each sub-layer, before the sum (OLMo 2, EXAONE 4).
    After,
    /// Before and after (Gemma 2, GLM-4).
    Around,
    /// One before both, which run beside each other (Cohere, Phi).
    Parallel,
    /// One before each, and both run beside each other (GPT-NeoX).
    ParallelOwn,
}

impl Placement {
    /// Norms in a block.
    pub fn norms(self) -> u64 {
        match self {
            Placement::Before | Placement::After | Placement::ParallelOwn => 2,
            Placement::Around => 4,
            Placement::Parallel => 1,
        }
    }
}

/// Norms of query and key.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum HeadNorm {
    /// None.
    None,
    /// Each head, directly behind its product (Qwen 3).
    Each,
    /// Each head, when all three products are made (Gemma 3, EXAONE 4).
    EachLater,
    /// Each head, when it is rotated (Hunyuan).
    EachRotated,
    /// All heads together, directly behind the product (OLMo 2, OLMoE).
    Whole,
    /// Each head with weights of its own (Cohere).
    EachOwn,
    /// Each head by a module of its own (StableLM).
    EachModule,
}

/// How positions are written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Rotary {
    /// By halves, in the type of the query (Llama).
    Halves,
    /// The same, joined to a rest that may be empty (Phi-3, Nemotron, GLM-4.5).
    Joined,
    /// Even and odd elements, tables spread in each layer (GLM-4).
    Pairs,
    /// The same on whole heads, without a rest (Helium).
    PairsWhole,
    /// Even and odd elements as they lie, both products apart (DeepSeek V3).
    PairsApart,
    /// Pairs as complex numbers (DeepSeek V2).
    Complex,
    /// Both halves apart (gpt-oss).
    Apart,
    /// By halves with fp32 tables, the result cast back (OLMo).
    WideTables,
    /// Even and odd elements of query and key that are lifted to fp32 first (Cohere).
    Lifted,
    /// The same, with fp32 tables that are spread in each layer, and both parts lifted apart (ERNIE 4.5).
    LiftedApart,
}

/// What gates what attention makes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum AttentionGate {
    /// Nothing.
    None,
    /// Half of the product of the query, head by head (Qwen3.5).
    InQuery,
    /// A product of its own (AFMoE).
    Own,
}

/// When the shared expert comes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Shared {
    /// Before the router.
    First,
    /// Behind the router (AFMoE).
    BehindRouter,
    /// Behind the experts.
    Last,
}

/// Which layers have no positions.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Unrotated {
    /// None.
    None,
    /// Each of this number (SmolLM 3).
    Every(u64),
    /// Those that do not slide (Cohere 2, EXAONE 4).
    Full,
}

/// Activations by what they keep.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Activation {
    /// One operation that keeps its input (SiLU, GELU).
    Kept,
    /// `relu(x)` squared.
    Squared,
    /// xIELU in Python, with two parameters (Apertus).
    Xielu,
    /// GELU written out (Phi's `gelu_new`).
    Written,
}

/// How experts are chosen.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Router {
    /// Softmax in fp32, the best of it.
    Softmax,
    /// The best scores, then softmax (gpt-oss, Granite's mixtures).
    BestFirst,
    /// Sigmoid of fp32 products, groups of experts, a correction (GLM-4.5, DeepSeek V3).
    Sigmoid,
    /// Softmax of fp32 products with a correction (ERNIE 4.5).
    Corrected,
    /// Softmax of products with a weight that is kept in fp32, made to sum to one (Hunyuan's mixture).
    SoftmaxWide,
    /// Sigmoid of the products of a linear module, a correction, made to sum to one (AFMoE).
    SigmoidModule,
    /// Softmax of fp32 products (DeepSeek V2).
    SoftmaxLifted,
    /// The same, the best of the best groups of experts.
    SoftmaxGrouped,
    /// Sigmoid of half-precision products, a correction, made to sum to one (MiniMax M2).
    SigmoidHalf,
    /// Two experts, one after the other, by sampling (Phi-3.5-MoE).
    Mixer,
    /// Softmax of a product of the normalised and scaled input, made to sum to one and scaled for each expert; a linear module
    /// (Gemma 4).
    Scaled,
}
