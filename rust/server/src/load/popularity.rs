//! Which model a request asks for.

use rand::distr::weighted::WeightedIndex;
use serde::{Deserialize, Serialize};

use super::LoadError;

/// How often each name is asked for; the first is the most popular.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Popularity {
    /// All alike.
    #[default]
    Uniform,
    /// The k-th with weight `1 / k^alpha`.
    Zipf {
        /// How steep.
        alpha: f64,
    },
    /// The paper's: a draw `x` of the density `alpha × x^(alpha − 1)` on [0, 1) picks the name at `x`; the smaller alpha,
    /// the more the first ones get.
    Power {
        /// Above 0; 1: all alike.
        alpha: f64,
    },
}

impl Popularity {
    /// The distribution over `count` names.
    pub(super) fn shares(&self, count: usize) -> Result<WeightedIndex<f64>, LoadError> {
        let bad = |alpha: f64, least: f64| {
            LoadError::Config(format!("alpha is {alpha}, it must be {least} to 10 for this popularity"))
        };
        let weight: Box<dyn Fn(usize) -> f64> = match *self {
            Self::Uniform => Box::new(|_| 1.0),
            Self::Zipf { alpha } if (0.0..=10.0).contains(&alpha) => {
                Box::new(move |index| ((index + 1) as f64).powf(-alpha))
            }
            Self::Zipf { alpha } => return Err(bad(alpha, 0.0)),
            Self::Power { alpha } if (0.001..=10.0).contains(&alpha) => {
                let share = move |index: usize| (index as f64 / count as f64).powf(alpha);
                Box::new(move |index| share(index + 1) - share(index))
            }
            Self::Power { alpha } => return Err(bad(alpha, 0.001)),
        };
        WeightedIndex::new((0..count).map(weight)).map_err(|error| LoadError::Config(format!("popularity: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::distr::Distribution;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn names_get_their_shares() {
        let mut random = SmallRng::seed_from_u64(3);
        let power = |k: f64| ((k + 1.0) / 100.0).powf(0.3) - (k / 100.0).powf(0.3);
        let harmonic: f64 = (1..=100).map(|k| 1.0 / f64::from(k)).sum();
        for (popularity, first, tenth) in [
            (Popularity::Zipf { alpha: 1.0 }, 1.0 / harmonic, 0.1 / harmonic),
            (Popularity::Power { alpha: 0.3 }, power(0.0), power(9.0)),
            (Popularity::Uniform, 0.01, 0.01),
        ] {
            let shares = popularity.shares(100).unwrap();
            let mut counts = [0u32; 100];
            (0..200_000).for_each(|_| counts[shares.sample(&mut random)] += 1);
            let share = |index: usize| f64::from(counts[index]) / 200_000.0;
            assert!((share(0) / first - 1.0).abs() < 0.1 && (share(9) / tenth - 1.0).abs() < 0.1, "{popularity:?}");
            assert!(counts[99] > 0, "{popularity:?}");
        }
    }

    #[test]
    fn alphas_out_of_range_are_refused() {
        for popularity in [Popularity::Power { alpha: 0.0 }, Popularity::Zipf { alpha: f64::NAN }] {
            assert!(popularity.shares(4).unwrap_err().to_string().starts_with("alpha is "));
        }
    }
}
