//! When requests are sent.

use rand::Rng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Exp1, Gamma};
use serde::{Deserialize, Serialize};

/// Times between requests.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
    /// Each value with its name and its range.
    pub(super) fn limits(&self) -> Vec<(&'static str, f64, f64, f64)> {
        let rate = |rate| ("rate", rate, 0.001, 1e6);
        match *self {
            Self::Closed { connections } => vec![("connections", connections as f64, 1.0, 65_536.0)],
            Self::Poisson { rate: value } => vec![rate(value)],
            Self::Gamma { rate: value, cv } => vec![rate(value), ("cv", cv, 0.01, 100.0)],
        }
    }

    /// Seconds to the next request.
    pub(super) fn gap_s(&self, random: &mut SmallRng) -> f64 {
        match *self {
            Self::Closed { .. } => 0.0,
            Self::Poisson { rate } => random.sample::<f64, _>(Exp1) / rate,
            Self::Gamma { rate, cv } => {
                let gaps = Gamma::new(1.0 / (cv * cv), cv * cv / rate);
                gaps.map_or(1.0 / rate, |gaps| gaps.sample(random))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn gaps_have_the_rate_and_the_variation_that_were_asked_for() {
        let mut random = SmallRng::seed_from_u64(1);
        let mut moments = |arrivals: Arrivals| {
            let gaps: Vec<f64> = (0..100_000).map(|_| arrivals.gap_s(&mut random)).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            (1.0 / mean, variance.sqrt() / mean)
        };
        for (arrivals, rate, cv) in [
            (Arrivals::Poisson { rate: 20.0 }, 20.0, 1.0),
            (Arrivals::Gamma { rate: 20.0, cv: 4.0 }, 20.0, 4.0),
            (Arrivals::Gamma { rate: 5.0, cv: 0.5 }, 5.0, 0.5),
        ] {
            let (found_rate, found_cv) = moments(arrivals.clone());
            assert!((found_rate / rate - 1.0).abs() < 0.06, "{arrivals:?}: {found_rate} a second");
            assert!((found_cv / cv - 1.0).abs() < 0.1, "{arrivals:?}: {found_cv}");
        }
    }
}
