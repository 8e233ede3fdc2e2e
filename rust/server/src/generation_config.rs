//! `generation_config.json`: what the model's makers want for requests that say nothing.

use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;
use slora_core::SamplingParams;

use crate::config::{SamplingDefaults, ServerConfig};

const FILE_NAME: &str = "generation_config.json";

/// The fields that mean something here; the file has many more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// The configured defaults, and behind them those of the file. Why they cannot be, if they cannot.
pub(crate) fn defaults(config: &ServerConfig) -> Result<SamplingDefaults, String> {
    let found = match config.generation_config.as_str() {
        "vllm" => GenerationConfig::default(),
        "auto" => read(Path::new(&config.model))?.unwrap_or_default(),
        folder => read(Path::new(folder))?.ok_or_else(|| format!("generation_config {folder}: has no {FILE_NAME}"))?,
    };
    let own = config.sampling_defaults.clone();
    let temperature = if found.do_sample == Some(false) { Some(0.0) } else { found.temperature };
    let defaults = SamplingDefaults {
        temperature: own.temperature.or(temperature),
        top_p: own.top_p.or(found.top_p),
        top_k: own.top_k.or(found.top_k),
        min_p: own.min_p.or(found.min_p),
        repetition_penalty: own.repetition_penalty.or(found.repetition_penalty),
        max_tokens: own.max_tokens,
    };
    check(&defaults).map(|()| defaults)
}

/// `None`: there is no such file.
fn read(folder: &Path) -> Result<Option<GenerationConfig>, String> {
    let path = folder.join(FILE_NAME);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| format!("{}: {error}; hint: --generation-config vllm ignores it", path.display()))
}

fn check(defaults: &SamplingDefaults) -> Result<(), String> {
    let fallback = SamplingParams::default();
    let params = SamplingParams {
        temperature: defaults.temperature.unwrap_or(fallback.temperature),
        top_p: defaults.top_p.unwrap_or(fallback.top_p),
        min_p: defaults.min_p.unwrap_or(fallback.min_p),
        repetition_penalty: defaults.repetition_penalty.unwrap_or(fallback.repetition_penalty),
        ..fallback
    };
    params.check(u32::MAX).map_err(|error| format!("the model's sampling defaults: {error}"))?;
    match defaults.top_k {
        Some(top_k) if top_k < -1 => Err(format!("the model's sampling defaults: top_k is {top_k}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Defaults with this file, if any, and these fields of the configuration.
    fn with(file: Option<&str>, fields: serde_json::Value) -> Result<SamplingDefaults, String> {
        let folder = tempfile::tempdir().unwrap();
        if let Some(file) = file {
            std::fs::write(folder.path().join(FILE_NAME), file).unwrap();
        }
        let mut config: ServerConfig = serde_json::from_value(fields).unwrap();
        config.model = folder.path().to_string_lossy().into_owned();
        defaults(&config)
    }

    #[test]
    fn the_file_fills_what_the_configuration_leaves_open() {
        let file = r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2]}"#;
        let found = with(Some(file), serde_json::json!({"sampling_defaults": {"top_p": 0.5}})).unwrap();
        assert_eq!((found.temperature, found.top_p, found.top_k, found.min_p), (Some(0.6), Some(0.5), Some(20), None));
    }

    #[test]
    fn a_model_that_does_not_sample_is_greedy() {
        let greedy = with(Some(r#"{"do_sample": false, "temperature": 0.6}"#), serde_json::json!({})).unwrap();
        assert_eq!(greedy.temperature, Some(0.0));
    }

    #[test]
    fn the_file_may_be_absent_or_ignored_but_not_wrong() {
        assert!(with(None, serde_json::json!({})).unwrap().temperature.is_none());
        let ignored = serde_json::json!({"generation_config": "vllm"});
        assert!(with(Some("{"), ignored).unwrap().temperature.is_none());
        for wrong in ["{", r#"{"temperature": -1}"#, r#"{"top_k": -2}"#, r#"{"top_p": "x"}"#] {
            assert!(with(Some(wrong), serde_json::json!({})).is_err(), "{wrong}");
        }
        assert!(with(None, serde_json::json!({"generation_config": "/nothing"})).unwrap_err().contains("/nothing"));
    }
}
