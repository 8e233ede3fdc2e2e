//! The base model as adapters see it, and the check of a checkpoint against it.

use std::path::PathBuf;

use pyo3::prelude::*;
use slora_store::{Adapter, BaseSpec, Dtype};

use crate::errors::{adapter_error, config_error};

/// The base model, as adapters see it.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Base(pub BaseSpec);

#[pymethods]
impl Base {
    #[new]
    #[pyo3(signature = (*, num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size,
                        dtype, page_bytes, max_adapter_pages, max_rank=None, name=None))]
    #[allow(clippy::too_many_arguments, reason = "keywords of a Python call")]
    fn new(
        num_layers: u32,
        hidden_size: u32,
        intermediate_size: u32,
        num_heads: u32,
        num_kv_heads: u32,
        head_dim: u32,
        vocab_size: u32,
        dtype: &str,
        page_bytes: u64,
        max_adapter_pages: u32,
        max_rank: Option<u32>,
        name: Option<String>,
    ) -> PyResult<Self> {
        let dtype = match dtype {
            "float32" => Dtype::F32,
            "float16" => Dtype::F16,
            "bfloat16" => Dtype::Bf16,
            other => return Err(config_error(format!("dtype = {other:?} must be float32, float16 or bfloat16"))),
        };
        Ok(Self(BaseSpec {
            num_layers,
            hidden: hidden_size,
            intermediate: intermediate_size,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            dtype,
            page_bytes,
            tp_rank: 0,
            tp_size: 1,
            name,
            max_adapter_pages,
            max_rank: max_rank.unwrap_or(u32::MAX),
        }))
    }
}

/// The tensor accounting of a checkpoint as JSON.
#[pyfunction]
pub(crate) fn check_adapter(py: Python<'_>, path: PathBuf, base: &Base) -> PyResult<String> {
    py.detach(|| Adapter::open(&path, &base.0)).map(|adapter| adapter.report().to_json()).map_err(adapter_error)
}
