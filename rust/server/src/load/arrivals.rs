//! When requests are sent.

use serde::{Deserialize, Serialize};

use super::random::Random;

/// Times between requests.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Arrivals {
    /// Each of so many connections sends its next request when the last one was answered.
    Closed {
        /// How many.
        connections: usize,
    },
    /// Independent users.
    Poisson {
        /// Requests a second.
        rate: f64,
    },
    /// Bursts, as in the paper's traces: the coefficient of variation is above 1.
    Gamma {
        /// Requests a second.
        rate: f64,
        /// Coefficient of variation of the gaps.
        cv: f64,
    },
}

impl Default for Arrivals {
    fn default() -> Self {
        Self::Closed { connections: 64 }
    }
}

impl Arrivals {
    pub(super) fn check(&self) -> Result<(), String> {
        let is_good = match self {
            Self::Closed { connections } => (1..=65_536).contains(connections),
            Self::Poisson { rate } => (0.001..1e6).contains(rate),
            Self::Gamma { rate, cv } => (0.001..1e6).contains(rate) && (0.01..100.0).contains(cv),
        };
        is_good.then_some(()).ok_or_else(|| format!("arrivals are out of range: {self:?}"))
    }

    /// Seconds to the next request.
    pub(super) fn gap_s(&self, random: &mut Random) -> f64 {
        match self {
            Self::Closed { .. } => 0.0,
            Self::Poisson { rate } => random.exponential() / rate,
            Self::Gamma { rate, cv } => {
                let shape = 1.0 / (cv * cv);
                random.gamma(shape) / (shape * rate)
            }
        }
    }
}
