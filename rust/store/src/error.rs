//! Why an adapter was refused.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A variant of LoRA, or a part of a checkpoint beyond LoRA's A and B, that slora does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are PEFT's own")]
pub enum Feature {
    Alora,
    Arrow,
    Bdlora,
    Bias,
    Corda,
    Dora,
    Embedding,
    Eva,
    Init,
    Kasa,
    LayerReplication,
    LoraBias,
    LoraGa,
    ModulesToSave,
    Monteclora,
    Qalora,
    TargetParameters,
    TrainableTokens,
    Velora,
    WeightTying,
}

impl Feature {
    /// The stable code of the refusal.
    pub const fn code(self) -> &'static str {
        match self {
            Feature::Alora => "unsupported_alora",
            Feature::Arrow => "unsupported_arrow",
            Feature::Bdlora => "unsupported_bdlora",
            Feature::Bias => "unsupported_bias",
            Feature::Corda => "unsupported_corda",
            Feature::Dora => "unsupported_dora",
            Feature::Embedding => "unsupported_embedding",
            Feature::Eva => "unsupported_eva",
            Feature::Init => "unsupported_init",
            Feature::Kasa => "unsupported_kasa",
            Feature::LayerReplication => "unsupported_layer_replication",
            Feature::LoraBias => "unsupported_lora_bias",
            Feature::LoraGa => "unsupported_lora_ga",
            Feature::ModulesToSave => "unsupported_modules_to_save",
            Feature::Monteclora => "unsupported_monteclora",
            Feature::Qalora => "unsupported_qalora",
            Feature::TargetParameters => "unsupported_target_parameters",
            Feature::TrainableTokens => "unsupported_trainable_tokens",
            Feature::Velora => "unsupported_velora",
            Feature::WeightTying => "unsupported_weight_tying",
        }
    }

    const fn hint(self) -> &'static str {
        match self {
            Feature::Corda | Feature::Eva | Feature::LoraGa => {
                "hint: if the adapter was converted to plain LoRA, set the key to null"
            }
            Feature::Init => {
                "hint: save it with path_initial_model_for_weight_conversion; or, if it fits the base that is served as \
                 it is, set the key to true"
            }
            Feature::ModulesToSave | Feature::Embedding => {
                "hint: train with LoRA on the linear layers only, or merge this adapter into its base"
            }
            _ => "hint: only plain LoRA and rsLoRA are served; merge this adapter into its base",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Alora => "activated lora (alora)",
            Feature::Arrow => "arrow routing",
            Feature::Bdlora => "block-diagonal lora",
            Feature::Bias => "trained biases",
            Feature::Corda => "corda",
            Feature::Dora => "dora",
            Feature::Embedding => "lora on the embedding or the output head",
            Feature::Eva => "eva",
            Feature::Init => "an initialisation that may change the base",
            Feature::Kasa => "kasa",
            Feature::LayerReplication => "layer replication",
            Feature::LoraBias => "lora_bias",
            Feature::LoraGa => "lora-ga",
            Feature::ModulesToSave => "training whole modules (modules_to_save)",
            Feature::Monteclora => "monteclora",
            Feature::Qalora => "qalora",
            Feature::TargetParameters => "lora on raw parameters (target_parameters)",
            Feature::TrainableTokens => "trainable tokens",
            Feature::Velora => "velora",
            Feature::WeightTying => "ensure_weight_tying",
        })
    }
}

/// Why an adapter was refused, or why its weights could not be packed.
///
/// Messages name the key or tensor, the value and the limit beside it; [`code`](AdapterError::code) is stable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what each field is")]
pub enum AdapterError {
    // The folder.
    #[error("no adapter folder at {}; hint: give the folder that holds adapter_config.json", path.display())]
    NotFound { path: PathBuf },
    #[error("{} is {kind}, not an adapter folder; hint: give the folder that holds adapter_config.json", path.display())]
    NotAFolder { path: PathBuf, kind: &'static str },
    #[error("no adapter_config.json in {} nor one level down; \
             hint: give a folder as PEFT's save_pretrained writes it", path.display())]
    MissingConfig { path: PathBuf },
    #[error("{} holds several adapters ({}); hint: name one of these folders", path.display(), candidates.join(", "))]
    AmbiguousFolder { path: PathBuf, candidates: Vec<String> },
    #[error("no adapter_model.safetensors in {}; hint: was it downloaded whole?", path.display())]
    MissingWeights { path: PathBuf },
    #[error("{} holds pickled weights only (adapter_model.bin), which are never loaded; \
             hint: load and save the adapter with a current PEFT, which writes safetensors", path.display())]
    PickleOnly { path: PathBuf },
    #[error("{} is {kind}, not a regular file", path.display())]
    NotRegular { path: PathBuf, kind: &'static str },
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} does not lie beneath a root", path.display())]
    OutsideRoots { path: PathBuf },
    #[error("{} has changed since it was registered ({what}); hint: register the adapter again", path.display())]
    Changed { path: PathBuf, what: &'static str },

    // adapter_config.json.
    #[error("adapter_config.json has {bytes} bytes, the limit is {limit}")]
    ConfigTooLarge { bytes: u64, limit: u64 },
    #[error("adapter_config.json is not a JSON object: {}", shown(reason))]
    BadConfig { reason: String },
    #[error("adapter_config.json: `{key}` is {}, expected {expected}", shown(value))]
    BadConfigValue { key: &'static str, value: String, expected: &'static str },
    #[error(
        "adapter_config.json: unknown key `{}` is {}; hint: slora cannot tell whether it changes the \
             computation; null, false or empty would be accepted",
        shown(key),
        shown(value)
    )]
    UnknownConfigKey { key: String, value: String },
    #[error("adapter_config.json: peft_type is {}, only \"LORA\" is served", shown(peft_type))]
    NotLora { peft_type: String },
    #[error("{feature} is not supported: {}; {}", shown(at), feature.hint())]
    Unsupported { feature: Feature, at: String },
    #[error(
        "adapter_config.json: {field} key `{}` {reason}; \
             hint: use plain module names, or regular expressions without look-around",
        shown(pattern)
    )]
    BadPattern { field: &'static str, pattern: String, reason: String },
    #[error("adapter_config.json: {field} has {count} {what}, the limit is {limit}")]
    TooManyPatterns { field: &'static str, what: &'static str, count: usize, limit: usize },

    // The safetensors header.
    #[error("{} is truncated: it has {actual} bytes and needs {needed}; hint: was it downloaded whole?", path.display())]
    Truncated { path: PathBuf, actual: u64, needed: u64 },
    #[error("the safetensors header has {bytes} bytes, the limit is {limit}")]
    HeaderTooLarge { bytes: u64, limit: u64 },
    #[error("the safetensors header is malformed: {}", shown(reason))]
    BadHeader { reason: String },
    #[error("the safetensors header lists more than {limit} tensors")]
    TooManyTensors { limit: usize },
    #[error("{file} has the key `{}` twice", shown(key))]
    DuplicateKey { file: &'static str, key: String },
    #[error(
        "tensor `{}` is of dtype {}, only F32, F16 and BF16 are served; hint: save it as one of them",
        shown(name),
        shown(dtype)
    )]
    UnsupportedDtype { name: String, dtype: String },
    #[error("tensor `{}` has shape {shape:?}, whose bytes do not fit 64 bits", shown(name))]
    ShapeOverflow { name: String, shape: Vec<u64> },
    #[error("tensor `{}` of shape {shape:?} takes {expected} bytes, its data_offsets span {actual}", shown(name))]
    WrongTensorBytes { name: String, shape: Vec<u64>, expected: u64, actual: u64 },
    #[error("tensor `{}` ends at byte {end} before it begins at {begin}", shown(name))]
    ReversedOffsets { name: String, begin: u64, end: u64 },
    #[error("tensor `{}` begins at byte {begin}, inside `{}`, which ends at {end}", shown(name), shown(previous))]
    OverlappingTensors { name: String, previous: String, begin: u64, end: u64 },
    #[error("bytes {begin} to {end} before tensor `{}` belong to no tensor", shown(name))]
    Hole { name: String, begin: u64, end: u64 },
    #[error("{} has {actual} bytes, its tensors end at {expected}", path.display())]
    TrailingBytes { path: PathBuf, actual: u64, expected: u64 },

    // Tensor accounting.
    #[error("tensor `{}` maps to nothing in the base: {reason}", shown(name))]
    UnknownTensor { name: String, reason: &'static str },
    #[error("tensors `{}` and `{}` map to the same place", shown(first), shown(second))]
    DuplicateModule { first: String, second: String },
    #[error(
        "tensor `{}` is of layer {layer}, the base has {num_layers} layers; hint: was it trained on another base?",
        shown(name)
    )]
    LayerOutOfRange { name: String, layer: u64, num_layers: u32 },
    #[error("tensor `{}` has no {missing} beside it", shown(name))]
    MissingPair { name: String, missing: &'static str },
    #[error(
        "tensor `{}` has shape {shape:?}, the base needs {expected}; hint: was it trained on another base?",
        shown(name)
    )]
    WrongShape { name: String, shape: Vec<u64>, expected: String },
    #[error("{} gives rank 0, the least is 1", shown(at))]
    RankZero { at: String },
    #[error("tensor `{}` has rank {b_rank}, its lora_A has rank {a_rank}", shown(name))]
    RankMismatch { name: String, a_rank: u64, b_rank: u64 },
    #[error(
        "tensor `{}` has rank {rank}, adapter_config.json says {config_rank} ({}); hint: PEFT \
        cannot load it either, the first key of rank_pattern that matches counts",
        shown(name),
        shown(by)
    )]
    ContradictoryRank { name: String, rank: u32, config_rank: u32, by: String },
    #[error(
        "tensor `{}` gets the scale {scale:e} from alpha {alpha:e} and rank {rank}, \
             which is no positive normal f32",
        shown(name)
    )]
    BadScale { name: String, alpha: f64, rank: u32, scale: f64 },
    #[error("no tensor of the {tensors} in the file maps to the base")]
    NothingMapped { tensors: usize },

    // The image.
    #[error("the base cannot take adapters: {what}")]
    BadBase { what: String },
    #[error("tp_size is {tp_size}, only 1 is served")]
    UnsupportedTensorParallel { tp_size: u32 },
    #[error("a row of {module} takes {row_bytes} bytes, a page has {page_bytes}; hint: raise page_tokens")]
    RowTooLong { module: &'static str, row_bytes: u64, page_bytes: u64 },
    #[error("the image takes {pages} pages, the limit is {limit}; hint: give the pool more bytes")]
    TooManyPages { pages: u64, limit: u32 },
    #[error(
        "{module} of layer {layer} has rank {rank}, this engine serves ranks up to {limit}; hint: a larger max_rank"
    )]
    RankTooLarge { module: &'static str, layer: u16, rank: u32, limit: u32 },

    // Packing.
    #[error("tensor `{}` holds {value} at [{row}, {column}], weights must be finite", shown(name))]
    NotFinite { name: String, value: f32, row: u64, column: u64 },
    #[error("tensor `{}` holds {value:e} at [{row}, {column}], which overflows {dtype}", shown(name))]
    Overflow { name: String, value: f32, row: u64, column: u64, dtype: &'static str },
    #[error("packing was cancelled")]
    Cancelled,
}

impl AdapterError {
    /// A stable machine-readable code; `docs/adapters.md` lists them.
    pub fn code(&self) -> &'static str {
        use AdapterError::*;
        match self {
            NotFound { .. } => "not_found",
            NotAFolder { .. } => "not_a_folder",
            MissingConfig { .. } => "missing_config",
            AmbiguousFolder { .. } => "ambiguous_folder",
            MissingWeights { .. } => "missing_weights",
            PickleOnly { .. } => "pickle_only",
            NotRegular { .. } => "not_a_regular_file",
            Io { .. } => "io",
            OutsideRoots { .. } => "outside_roots",
            Changed { .. } => "changed",
            ConfigTooLarge { .. } => "config_too_large",
            BadConfig { .. } => "bad_config",
            BadConfigValue { .. } => "bad_config_value",
            UnknownConfigKey { .. } => "unknown_config_key",
            NotLora { .. } => "not_lora",
            Unsupported { feature, .. } => feature.code(),
            BadPattern { .. } => "bad_pattern",
            TooManyPatterns { .. } => "too_many_patterns",
            Truncated { .. } => "truncated",
            HeaderTooLarge { .. } => "header_too_large",
            BadHeader { .. } => "bad_header",
            TooManyTensors { .. } => "too_many_tensors",
            DuplicateKey { .. } => "duplicate_key",
            UnsupportedDtype { .. } => "unsupported_dtype",
            ShapeOverflow { .. } => "shape_overflow",
            WrongTensorBytes { .. } => "wrong_tensor_bytes",
            ReversedOffsets { .. } => "reversed_offsets",
            OverlappingTensors { .. } => "overlapping_tensors",
            Hole { .. } => "hole",
            TrailingBytes { .. } => "trailing_bytes",
            UnknownTensor { .. } => "unknown_tensor",
            DuplicateModule { .. } => "duplicate_module",
            LayerOutOfRange { .. } => "layer_out_of_range",
            MissingPair { .. } => "missing_pair",
            WrongShape { .. } => "wrong_shape",
            RankZero { .. } => "rank_zero",
            RankMismatch { .. } => "rank_mismatch",
            ContradictoryRank { .. } => "contradictory_rank",
            BadScale { .. } => "bad_scale",
            NothingMapped { .. } => "nothing_mapped",
            BadBase { .. } => "bad_base",
            UnsupportedTensorParallel { .. } => "unsupported_tensor_parallel",
            RowTooLong { .. } => "row_too_long",
            TooManyPages { .. } => "too_many_pages",
            RankTooLarge { .. } => "rank_too_large",
            NotFinite { value, .. } if value.is_nan() => "nan",
            NotFinite { .. } => "infinite",
            Overflow { .. } => "overflow",
            Cancelled => "cancelled",
        }
    }
}

/// Text from a file, fit for a message: control characters escaped, at most 200 characters.
pub(crate) fn shown(text: &str) -> String {
    const LIMIT: usize = 200;
    let mut out: String = text.chars().take(LIMIT).flat_map(shown_char).collect();
    if text.chars().nth(LIMIT).is_some() {
        out.push('…');
    }
    out
}

fn shown_char(c: char) -> impl Iterator<Item = char> {
    let (plain, escaped) = if c.is_control() { (None, Some(c.escape_default())) } else { (Some(c), None) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_is_shortened_and_escaped() {
        assert_eq!(shown("a\u{1b}[31mé"), "a\\u{1b}[31mé");
        assert_eq!(shown(&"x".repeat(1 << 20)).chars().count(), 201);
    }
}
