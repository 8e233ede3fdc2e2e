//! Sampling parameters, as Python's keywords.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use slora_core::SamplingParams;

use crate::errors::bad_request;

/// How tokens are chosen, and when a request ends.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Sampling(pub slora_runtime::Sampling);

#[derive(FromPyObject)]
enum Stops {
    One(String),
    Several(Vec<String>),
}

#[pymethods]
impl Sampling {
    #[new]
    #[pyo3(signature = (*, max_tokens=Some(16), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0,
                        frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=None, seed=None, min_tokens=0,
                        ignore_eos=false, stop=None, include_stop=false, stop_token_ids=Vec::new(), logprobs=None,
                        prompt_logprobs=None, skip_special_tokens=true))]
    #[allow(clippy::too_many_arguments, reason = "keywords of a Python call")]
    fn new(
        max_tokens: Option<i64>,
        temperature: f64,
        top_k: i64,
        top_p: f64,
        min_p: f64,
        presence_penalty: f64,
        frequency_penalty: f64,
        repetition_penalty: f64,
        logit_bias: Option<BTreeMap<i64, f64>>,
        seed: Option<i64>,
        min_tokens: i64,
        ignore_eos: bool,
        stop: Option<Stops>,
        include_stop: bool,
        stop_token_ids: Vec<i64>,
        logprobs: Option<i64>,
        prompt_logprobs: Option<i64>,
        skip_special_tokens: bool,
    ) -> PyResult<Self> {
        let max_tokens = max_tokens.map(|value| natural("max_tokens", value)).transpose()?;
        let params = SamplingParams {
            temperature: temperature as f32,
            // −1 is a common spelling of "off".
            top_k: natural("top_k", if top_k == -1 { 0 } else { top_k })?,
            top_p: top_p as f32,
            min_p: min_p as f32,
            presence_penalty: presence_penalty as f32,
            frequency_penalty: frequency_penalty as f32,
            repetition_penalty: repetition_penalty as f32,
            logit_bias: (logit_bias.unwrap_or_default().into_iter())
                .map(|(token, bias)| Ok((natural("a token of logit_bias", token)?, bias as f32)))
                .collect::<PyResult<_>>()?,
            min_tokens: natural("min_tokens", min_tokens)?,
            ignore_eos,
            stop_token_ids: (stop_token_ids.into_iter())
                .map(|token| natural("a token of stop_token_ids", token))
                .collect::<PyResult<_>>()?,
            logprobs: logprobs.map(|value| natural("logprobs", value)).transpose()?,
            prompt_logprobs: prompt_logprobs.map(|value| natural("prompt_logprobs", value)).transpose()?,
            ..SamplingParams::default()
        };
        let stops = match stop {
            None => Vec::new(),
            Some(Stops::One(stop)) => vec![stop],
            Some(Stops::Several(stops)) => stops,
        };
        let seed = seed.map(|seed| seed as u64);
        let sampling = slora_runtime::Sampling { params, max_tokens, seed, stops, include_stop, skip_special_tokens };
        sampling.check(u32::MAX).map_err(bad_request)?;
        Ok(Self(sampling))
    }

    fn for_choice(&self, index: u64) -> Self {
        Self(self.0.for_choice(index))
    }
}

fn natural(name: &str, value: i64) -> PyResult<u32> {
    u32::try_from(value).map_err(|_| bad_request(format!("{name} is {value}, it must be between 0 and {}", u32::MAX)))
}
