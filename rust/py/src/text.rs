//! Tokenizer and chat template.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use serde_json::{Map, Value};
use slora_text::{ChatInput, TextModel};

use crate::errors::{bad_request, load_error};

/// Tokenizer and chat template of a model folder.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Text(pub Arc<TextModel>);

#[pymethods]
impl Text {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| TextModel::from_dir(&path)).map(|model| Self(Arc::new(model))).map_err(load_error)
    }

    #[pyo3(signature = (text, add_special_tokens=true, *, max_context=None))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &str,
        add_special_tokens: bool,
        max_context: Option<u32>,
    ) -> PyResult<Vec<u32>> {
        self.0.check_len(text.len(), max_context.unwrap_or(u32::MAX)).map_err(bad_request)?;
        py.detach(|| self.0.encode(text, add_special_tokens)).map_err(bad_request)
    }

    #[pyo3(signature = (ids, skip_special_tokens=true))]
    fn decode(&self, py: Python<'_>, ids: Vec<u32>, skip_special_tokens: bool) -> PyResult<String> {
        py.detach(|| self.0.decode(&ids, skip_special_tokens)).map_err(bad_request)
    }

    #[pyo3(signature = (messages, *, tools=None, add_generation_prompt=true, continue_final_message=false, kwargs=None,
                        now_unix_s=0, utc_offset_s=0, max_context=None))]
    #[allow(clippy::too_many_arguments, reason = "keywords of a Python call")]
    fn encode_chat(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: Option<&str>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Option<&str>,
        now_unix_s: i64,
        utc_offset_s: i32,
        max_context: Option<u32>,
    ) -> PyResult<Vec<u32>> {
        py.detach(|| {
            let input = ChatInput {
                messages: parse(messages)?,
                tools: tools.map(parse).transpose()?,
                documents: None,
                add_generation_prompt,
                continue_final_message,
                kwargs: match kwargs.map(parse).transpose()? {
                    Some(Value::Object(map)) => map,
                    _ => Map::new(),
                },
                now_unix_s,
                utc_offset_s,
            };
            self.0.encode_chat(&input, max_context.unwrap_or(u32::MAX)).map_err(bad_request)
        })
    }

    #[getter]
    fn stop_token_ids(&self) -> Vec<u32> {
        self.0.stop_token_ids().to_vec()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
}

fn parse(json: &str) -> PyResult<Value> {
    serde_json::from_str(json).map_err(bad_request)
}
