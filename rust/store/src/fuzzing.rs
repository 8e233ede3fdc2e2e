//! Entry points for the fuzz targets in `fuzz/` and for their corpus in the tests. Not part of the API.

use crate::AdapterError;
use crate::config::Config;
use crate::header;
use crate::pattern::Patterns;

/// Parses a safetensors header. What comes out covers its bytes without hole or overlap.
pub fn header(json: &[u8]) -> Result<usize, AdapterError> {
    let tensors = header::parse(json)?;
    let mut end = 0;
    for tensor in &tensors {
        assert_eq!(tensor.begin, end, "tensors follow one another");
        let elements: u64 = tensor.shape.iter().product();
        assert_eq!(tensor.end - tensor.begin, elements * tensor.dtype.bytes() as u64, "shape and bytes agree");
        end = tensor.end;
    }
    Ok(tensors.len())
}

/// Parses an `adapter_config.json`. What comes out has a positive rank and alpha.
pub fn config(json: &[u8]) -> Result<(), AdapterError> {
    let config = Config::parse(json)?;
    assert!(config.rank > 0 && config.alpha > 0.0 && config.alpha.is_finite(), "rank and alpha are positive");
    Ok(())
}

/// Whether the pattern `key` matches the module `name`.
pub fn pattern(key: &str, name: &str) -> Result<bool, AdapterError> {
    let mut patterns = Patterns::compile("rank_pattern", vec![(key.to_owned(), 1)])?;
    Ok(patterns.lookup(&[name]).is_some())
}
