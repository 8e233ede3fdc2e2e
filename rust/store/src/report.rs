//! What is in an adapter: the tensor accounting that `slora adapters check` prints.

use std::path::PathBuf;

use serde::Serialize;

use crate::base::MODULES;
use crate::{AdapterError, Dtype};

/// The two factors of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Matrix {
    /// `lora_A`, `[rank, in]`.
    A,
    /// `lora_B`, `[out, rank]`.
    B,
}

/// How the scale follows from alpha and rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// `alpha / rank`.
    Lora,
    /// `alpha / √rank`.
    Rslora,
}

/// Where a tensor of the file went. There is no third place: a tensor that fits neither refuses the adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// It is a factor of a module of the base.
    Mapped {
        /// Decoder layer.
        layer: u16,
        /// One of [`MODULES`](crate::MODULES).
        module: &'static str,
        /// Which factor.
        matrix: Matrix,
    },
    /// It does not belong to the adapter's computation.
    Ignored {
        /// Why.
        reason: &'static str,
    },
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorReport {
    /// The name in the file.
    pub name: String,
    /// The element type in the file.
    pub dtype: Dtype,
    /// The shape in the file.
    pub shape: Vec<u64>,
    /// Where it went.
    pub fate: Fate,
}

/// One kind of module, over all layers that have it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModuleReport {
    /// One of [`MODULES`](crate::MODULES).
    pub module: &'static str,
    /// Layers in which it has weights.
    pub num_layers: usize,
    /// Least rank.
    pub min_rank: u32,
    /// Greatest rank.
    pub max_rank: u32,
    /// Least scale.
    pub min_scale: f32,
    /// Greatest scale.
    pub max_scale: f32,
}

/// Something the operator should know, although the adapter is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// A stable code; `docs/adapters.md` lists them.
    pub code: &'static str,
    /// The sentence for people.
    pub message: String,
}

/// The accounting of one adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The folder that holds the two files.
    pub folder: PathBuf,
    /// The base that the config names.
    pub base_model: Option<String>,
    /// Bytes of the safetensors file.
    pub file_bytes: u64,
    /// Bytes of the image's rows.
    pub image_bytes: u64,
    /// Pages of the image.
    pub num_pages: u32,
    /// Elements of all mapped tensors.
    pub num_parameters: u64,
    /// Least rank of any module.
    pub min_rank: u32,
    /// Greatest rank of any module.
    pub max_rank: u32,
    /// How scales were computed.
    pub scaling: Scaling,
    /// Element types of the mapped tensors, sorted.
    pub dtypes: Vec<Dtype>,
    /// A line for each kind of module that has weights.
    pub modules: Vec<ModuleReport>,
    /// Tensors that map to the base.
    pub num_mapped: usize,
    /// Tensors that were ignored.
    pub num_ignored: usize,
    /// Every tensor, in the order of the file's bytes.
    pub tensors: Vec<TensorReport>,
    /// What the operator should know.
    pub warnings: Vec<Warning>,
}

impl Report {
    /// The modules that have weights in some layer.
    pub fn targets(&self) -> Vec<&'static str> {
        self.modules.iter().map(|line| line.module).collect()
    }

    /// The report as one JSON object.
    pub fn to_json(&self) -> String {
        // Folder names that are not UTF-8 are the only thing that JSON cannot hold; they are shown with replacements.
        serde_json::to_string(self).unwrap_or_else(|_| {
            let folder = self.folder.to_string_lossy().into_owned().into();
            serde_json::to_string(&Report { folder, ..self.clone() }).unwrap_or_default()
        })
    }
}

/// Summaries over modules, which come as (module index, rank, scale).
pub(crate) fn summarize(modules: impl Iterator<Item = (usize, u32, f32)>) -> Vec<ModuleReport> {
    let mut lines: [Option<ModuleReport>; MODULES.len()] = Default::default();
    for (module, rank, scale) in modules {
        let line = lines[module].get_or_insert(ModuleReport {
            module: MODULES[module],
            num_layers: 0,
            min_rank: rank,
            max_rank: rank,
            min_scale: scale,
            max_scale: scale,
        });
        line.num_layers += 1;
        line.min_rank = line.min_rank.min(rank);
        line.max_rank = line.max_rank.max(rank);
        line.min_scale = line.min_scale.min(scale);
        line.max_scale = line.max_scale.max(scale);
    }
    lines.into_iter().flatten().collect()
}

impl AdapterError {
    /// The refusal as one JSON object: `{"code": …, "message": …}`.
    pub fn to_json(&self) -> String {
        serde_json::json!({"code": self.code(), "message": self.to_string()}).to_string()
    }
}
