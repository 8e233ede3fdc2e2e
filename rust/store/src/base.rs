//! What the base model looks like to an adapter: the shapes its factors must have.

use std::ops::Range;

use serde::Serialize;

use crate::AdapterError;

/// The linear modules of a layer that can carry LoRA, in the order in which descriptors number them.
pub const MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Modules that read the same input and are laid out together: qkv, o, gate_up, down.
pub(crate) const GROUPS: [Range<usize>; 4] = [0..3, 3..4, 4..6, 6..7];

/// The sub-module of a decoder layer that holds each of [`MODULES`].
pub(crate) const PARENTS: [&str; 7] = ["self_attn", "self_attn", "self_attn", "self_attn", "mlp", "mlp", "mlp"];

/// Element types of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of `F32`.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }
}

/// The served base model, as far as adapters depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseSpec {
    /// Decoder layers.
    pub num_layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the MLP.
    pub intermediate: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key and value heads.
    pub num_kv_heads: u32,
    /// Elements of a head; need not be `hidden / num_heads`.
    pub head_dim: u32,
    /// Rows of the embedding. Unused until adapters on embeddings are supported.
    pub vocab_size: u32,
    /// Element type of the image.
    pub dtype: Dtype,
    /// Bytes of a page; a multiple of 16.
    pub page_bytes: u64,
    /// This process's position in the tensor-parallel group.
    pub tp_rank: u32,
    /// Size of the tensor-parallel group; 1 for now.
    pub tp_size: u32,
    /// Name or path of the base; an adapter that names another one is accepted with a warning.
    pub name: Option<String>,
    /// Pages an image may take.
    pub max_adapter_pages: u32,
    /// Rank that a module may have.
    pub max_rank: u32,
}

/// Which part of a module's factors this tensor-parallel rank keeps. A is `[rank, in]`, B is `[out, rank]` in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModuleShape {
    pub(crate) in_features: u32,
    pub(crate) out_features: u32,
    pub(crate) kept_in: Range<u32>,
    pub(crate) kept_out: Range<u32>,
}

impl BaseSpec {
    /// Pages and layers must fit the descriptor's 32-bit words, and tensor-parallel ranks must get equal shares.
    pub(crate) fn check(&self) -> Result<(), AdapterError> {
        let bad = |what: String| Err(AdapterError::BadBase { what });
        if self.page_bytes == 0 || !self.page_bytes.is_multiple_of(16) || self.page_bytes > i32::MAX as u64 {
            return bad(format!("page_bytes {} must be a multiple of 16 from 16 to {}", self.page_bytes, i32::MAX));
        }
        if self.num_layers == 0 || self.num_layers > u32::from(u16::MAX) {
            return bad(format!("num_layers {} must be from 1 to {}", self.num_layers, u16::MAX));
        }
        if self.max_adapter_pages > i32::MAX as u32 {
            return bad(format!("max_adapter_pages {} must be at most {}", self.max_adapter_pages, i32::MAX));
        }
        let heads = [self.num_heads, self.num_kv_heads].map(|n| n.checked_mul(self.head_dim));
        if heads.contains(&None) || heads.contains(&Some(0)) || self.hidden == 0 || self.intermediate == 0 {
            return bad("every width must be at least 1 and fit 32 bits".into());
        }
        if self.tp_size == 0 || self.tp_rank >= self.tp_size {
            return bad(format!("tp_rank {} must be below tp_size {}", self.tp_rank, self.tp_size));
        }
        let sharded = [self.num_heads, self.num_kv_heads, self.intermediate];
        if let Some(n) = sharded.into_iter().find(|n| n % self.tp_size != 0) {
            return bad(format!("tp_size {} must divide heads, kv heads and intermediate: {n}", self.tp_size));
        }
        Ok(())
    }

    /// Shapes of module `module` (an index into [`MODULES`]).
    ///
    /// The *replicated* tensor-parallel layout: what follows a column-parallel base layer (q, k, v, gate, up) keeps its
    /// outputs, what precedes a row-parallel one (o, down) its inputs; the other factor is whole on every rank.
    pub(crate) fn shape(&self, module: usize) -> ModuleShape {
        let (q_width, kv_width) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let (in_features, out_features) = match module {
            0 => (self.hidden, q_width),
            1 | 2 => (self.hidden, kv_width),
            3 => (q_width, self.hidden),
            4 | 5 => (self.hidden, self.intermediate),
            6 => (self.intermediate, self.hidden),
            _ => unreachable!("a layer has {} modules", MODULES.len()),
        };
        let shard = |n: u32| n / self.tp_size * self.tp_rank..n / self.tp_size * (self.tp_rank + 1);
        let row_parallel = module == 3 || module == 6;
        ModuleShape {
            in_features,
            out_features,
            kept_in: if row_parallel { shard(in_features) } else { 0..in_features },
            kept_out: if row_parallel { 0..out_features } else { shard(out_features) },
        }
    }
}
