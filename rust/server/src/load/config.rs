//! What a load is told.

use std::net::{SocketAddr, ToSocketAddrs};

use serde::{Deserialize, Serialize};

use super::{Arrivals, Popularity};
use crate::Secret;

/// Most models and most tokens of one request.
const MAX_MODELS: usize = 1 << 20;
const MAX_TOKENS: u32 = 1 << 20;

/// Why a load did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A value is out of range, or an address cannot be.
    #[error("{0}")]
    Config(String),
    /// The generator's thread cannot be started.
    #[error("cannot start the load's thread: {0}")]
    Threads(std::io::Error),
    /// The generator's thread has panicked.
    #[error("the load's thread has panicked")]
    Panicked,
}

/// A range of counts; both ends belong to it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// Least.
    pub min: u32,
    /// Most.
    pub max: u32,
}

impl Span {
    /// Always the same.
    pub fn exactly(count: u32) -> Self {
        Self { min: count, max: count }
    }
}

/// What requests may ask for.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The base or an adapter.
    pub name: String,
    /// The adapter's folder as the server sees it, where churn may register it again.
    #[serde(default)]
    pub path: Option<String>,
}

/// What is sent, and how fast.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadConfig {
    /// The server, `http://host:port`.
    pub url: String,
    /// A user's key.
    #[serde(skip_serializing)]
    pub api_key: Option<Secret>,
    /// For churn: a key that may manage adapters.
    #[serde(skip_serializing)]
    pub admin_key: Option<Secret>,
    /// What requests ask for; the first is the most popular.
    pub models: Vec<Model>,
    /// How often each is asked for.
    pub popularity: Popularity,
    /// When requests are sent.
    pub arrivals: Arrivals,
    /// For how long requests are sent, in seconds.
    pub duration_s: f64,
    /// How many requests are sent, if that is fewer.
    pub num_requests: Option<u64>,
    /// Tokens of a prompt.
    pub input_tokens: Span,
    /// Tokens to generate; the model's end of sequence is ignored.
    pub output_tokens: Span,
    /// Ids of prompts.
    pub token_ids: Span,
    /// Whether answers stream.
    pub stream: bool,
    /// Share of requests whose client leaves somewhere before the end.
    pub cancel: f64,
    /// Adapters that are replaced by fresh copies of themselves, per second.
    pub churn_per_s: f64,
    /// An answer that takes longer counts as broken, in seconds.
    pub timeout_s: f64,
    /// What counts as good: seconds to the first token.
    pub slo_ttft_s: f64,
    /// What counts as good: seconds between two tokens, on average over a request.
    pub slo_itl_s: f64,
    /// Of random numbers: the same seed sends the same requests.
    pub seed: u64,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:8000".into(),
            api_key: None,
            admin_key: None,
            models: vec![Model { name: "base".into(), path: None }],
            popularity: Popularity::default(),
            arrivals: Arrivals::default(),
            duration_s: 10.0,
            num_requests: None,
            input_tokens: Span::exactly(8),
            output_tokens: Span::exactly(8),
            // The example's letters.
            token_ids: Span { min: 80, max: 105 },
            stream: false,
            cancel: 0.0,
            churn_per_s: 0.0,
            timeout_s: 600.0,
            slo_ttft_s: 6.0,
            slo_itl_s: 0.2,
            seed: 0,
        }
    }
}

impl LoadConfig {
    pub(super) fn check(&self) -> Result<(), LoadError> {
        let bad = |message: String| Err(LoadError::Config(message));
        if self.models.is_empty() || self.models.len() > MAX_MODELS {
            return bad(format!("{} models, it must be 1 to {MAX_MODELS}", self.models.len()));
        }
        let numbers = [
            ("duration_s", self.duration_s, 0.001, 1e7),
            ("timeout_s", self.timeout_s, 0.001, 1e7),
            ("slo_ttft_s", self.slo_ttft_s, 0.0, 1e7),
            ("slo_itl_s", self.slo_itl_s, 0.0, 1e7),
            ("cancel", self.cancel, 0.0, 1.0),
            ("churn_per_s", self.churn_per_s, 0.0, 1e4),
        ];
        for (name, value, least, most) in numbers.into_iter().chain(self.arrivals.limits()) {
            if !(least..=most).contains(&value) {
                return bad(format!("{name} is {value}, it must be {least} to {most}"));
            }
        }
        let spans = [
            ("input_tokens", self.input_tokens, 1, MAX_TOKENS),
            ("output_tokens", self.output_tokens, 1, MAX_TOKENS),
            ("token_ids", self.token_ids, 0, u32::MAX - 1),
        ];
        for (name, span, least, most) in spans {
            if span.min > span.max || span.min < least || span.max > most {
                return bad(format!("{name} is {}:{}, it must rise within {least}:{most}", span.min, span.max));
            }
        }
        if self.num_requests == Some(0) {
            return bad("num_requests is 0, it must be at least 1".into());
        }
        self.check_churn()
    }

    fn check_churn(&self) -> Result<(), LoadError> {
        if self.churn_per_s == 0.0 {
            return Ok(());
        }
        let message = if self.admin_key.is_none() {
            "churn registers and unloads adapters, for which it needs an admin's key"
        } else if self.models.iter().all(|model| model.path.is_none()) {
            "churn needs an adapter whose folder is known; hint: give adapters, not only the base"
        } else {
            return Ok(());
        };
        Err(LoadError::Config(message.into()))
    }

    /// Where the server listens.
    pub(super) fn address(&self) -> Result<SocketAddr, LoadError> {
        let bad = |reason: String| LoadError::Config(format!("{:?}: {reason}", self.url));
        let Some(rest) = self.url.strip_prefix("http://") else {
            return Err(bad(
                "must be http://HOST:PORT; hint: behind a proxy with TLS, measure the server itself".into()
            ));
        };
        let host = rest.trim_end_matches('/');
        if host.is_empty() || host.contains('/') {
            return Err(bad("must be http://HOST:PORT, without a path".into()));
        }
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let host = if has_port { host.to_owned() } else { format!("{host}:80") };
        let mut found = host.to_socket_addrs().map_err(|error| bad(error.to_string()))?;
        found.next().ok_or_else(|| bad("has no address".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut LoadConfig)) -> String {
        let mut config = LoadConfig::default();
        change(&mut config);
        let checked = config.check().and_then(|()| config.address().map(drop));
        checked.map_or_else(|error| error.to_string(), |()| "none".into())
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_eq!(refusal(|_| ()), "none");
        assert_eq!(refusal(|config| config.url = "http://127.0.0.1:1/".into()), "none");
        assert!(refusal(|config| config.url = "https://127.0.0.1".into()).contains("must be http://"));
        assert!(refusal(|config| config.url = "http://127.0.0.1/v1".into()).contains("without a path"));
        assert!(refusal(|config| config.url = "http://".into()).contains("without a path"));
        assert!(refusal(|config| config.models.clear()).starts_with("0 models"));
        assert!(refusal(|config| config.cancel = 1.5).starts_with("cancel is 1.5, it must be 0 to 1"));
        assert!(refusal(|config| config.duration_s = f64::NAN).starts_with("duration_s is NaN"));
        assert!(refusal(|config| config.num_requests = Some(0)).starts_with("num_requests"));
        assert!(refusal(|config| config.input_tokens = Span { min: 9, max: 8 }).starts_with("input_tokens is 9:8"));
        assert!(refusal(|config| config.output_tokens = Span::exactly(0)).starts_with("output_tokens is 0:0"));
        assert!(refusal(|config| config.arrivals = Arrivals::Closed { connections: 0 }).starts_with("connections"));
        assert!(refusal(|config| config.arrivals = Arrivals::Poisson { rate: 0.0 }).starts_with("rate is 0"));
        assert!(refusal(|config| config.arrivals = Arrivals::Gamma { rate: 1.0, cv: 0.0 }).starts_with("cv is 0"));
        assert!(refusal(|config| config.churn_per_s = 1.0).contains("an admin's key"));
        let has_key = |config: &mut LoadConfig| {
            (config.churn_per_s, config.admin_key) = (1.0, Some(Secret("admin".into())));
        };
        assert!(refusal(has_key).contains("needs an adapter"));
    }
}
