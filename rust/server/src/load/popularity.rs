//! Which adapter a request asks for.

use serde::{Deserialize, Serialize};

use super::random::Random;

/// How often each name is asked for; the first is the most popular.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
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

/// Draws by popularity.
pub(super) struct Picker {
    /// Cumulative shares.
    shares: Vec<f64>,
}

impl Picker {
    pub fn new(popularity: &Popularity, count: usize) -> Result<Self, String> {
        let weight: Box<dyn Fn(usize) -> f64> = match *popularity {
            Popularity::Uniform => Box::new(|_| 1.0),
            Popularity::Zipf { alpha } if (0.0..=10.0).contains(&alpha) => {
                Box::new(move |index| ((index + 1) as f64).powf(-alpha))
            }
            Popularity::Power { alpha } if alpha > 0.001 && alpha <= 10.0 => {
                let share = move |index: usize| (index as f64 / count as f64).powf(alpha);
                Box::new(move |index| share(index + 1) - share(index))
            }
            _ => return Err(format!("popularity is out of range: {popularity:?}")),
        };
        let total: f64 = (0..count).map(&weight).sum();
        let mut sum = 0.0;
        let shares = (0..count).map(|index| {
            sum += weight(index) / total;
            sum
        });
        Ok(Self { shares: shares.collect() })
    }

    /// An index.
    pub fn pick(&self, random: &mut Random) -> usize {
        let at = random.uniform();
        self.shares.partition_point(|share| *share <= at).min(self.shares.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_the_most_popular() {
        let mut random = Random::new(3, 4);
        for popularity in [Popularity::Zipf { alpha: 1.0 }, Popularity::Power { alpha: 0.3 }] {
            let picker = Picker::new(&popularity, 100).unwrap();
            let mut counts = [0u32; 100];
            (0..50_000).for_each(|_| counts[picker.pick(&mut random)] += 1);
            assert!(counts[0] > 5 * counts[20] && counts[99] > 0, "{popularity:?} {counts:?}");
        }
        let picker = Picker::new(&Popularity::Uniform, 4).unwrap();
        assert!(picker.shares == [0.25, 0.5, 0.75, 1.0]);
        assert!(Picker::new(&Popularity::Power { alpha: 0.0 }, 4).is_err());
    }
}
