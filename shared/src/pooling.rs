//! Embeddings: the final hidden states of a sequence made one vector of length 1.
//!
//! The sum of a mean grows position by position, in their order and in f64, so that the vector is the
//! same to the bit however the sequence was cut into chunks and whatever ran beside it. It begins anew
//! at position 0, and takes no position twice and none out of turn: what was half added when a step
//! failed can only be begun again.

use serde::{Deserialize, Serialize};

/// Which hidden states an embedding is made of.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean over all positions.
    #[default]
    Mean,
    /// That of the last position.
    Last,
}

impl std::str::FromStr for Pooling {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "mean" => Ok(Self::Mean),
            "last" => Ok(Self::Last),
            _ => Err(format!("unknown pooling '{s}': use mean or last")),
        }
    }
}

/// Why a hidden state cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("position {position} cannot be added to a sum of {added:?} positions")]
pub struct OutOfTurn {
    /// What was to be added.
    pub position: u32,
    /// How many positions are in the sum; `None` where it is spoilt.
    pub added: Option<u32>,
}

/// The sum of the hidden states of a sequence's first positions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunningSum {
    sum: Vec<f64>,
    added: Option<u32>,
}

impl RunningSum {
    /// Adds the hidden state of a position; position 0 begins anew.
    ///
    /// # Errors
    /// If it is not the next position, or has another width; the sum is spoilt then.
    pub fn add(&mut self, position: u32, hidden: &[f32]) -> Result<(), OutOfTurn> {
        if position == 0 {
            self.sum.clear();
            self.sum.resize(hidden.len(), 0.0);
            self.added = Some(0);
        }
        if self.added != Some(position) || self.sum.len() != hidden.len() {
            let added = self.added;
            self.spoil();
            return Err(OutOfTurn { position, added });
        }
        self.sum.iter_mut().zip(hidden).for_each(|(sum, &x)| *sum += f64::from(x));
        self.added = Some(position + 1);
        Ok(())
    }

    /// Nobody knows what is in it any more: only position 0 can follow.
    pub fn spoil(&mut self) {
        self.added = None;
    }

    /// The mean, made as long as 1; `None` where that cannot be.
    pub fn mean(&self) -> Option<Vec<f32>> {
        let positions = f64::from(self.added.filter(|&n| n > 0)?);
        unit(self.sum.iter().map(|sum| sum / positions))
    }
}

/// A vector in the same direction with an Euclidean length of 1; `None` where there is no such
/// direction, or a number is not finite.
pub fn unit(values: impl Iterator<Item = f64> + Clone) -> Option<Vec<f32>> {
    let length = values.clone().fold(0.0, |sum, x| sum + x * x).sqrt();
    let fits = length.is_finite() && length > 0.0;
    fits.then(|| values.map(|x| (x / length) as f32).collect())
}

/// The first numbers of an embedding, made as long as 1 again; all of them as they are.
pub fn shortened(vector: &[f32], dimensions: usize) -> Option<Vec<f32>> {
    match vector.get(..dimensions) {
        Some(first) if dimensions < vector.len() => unit(first.iter().map(|&x| f64::from(x))),
        Some(_) => Some(vector.to_vec()),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(rows: &[[f32; 3]]) -> RunningSum {
        let mut sum = RunningSum::default();
        (0..).zip(rows).for_each(|(position, row)| sum.add(position, row).unwrap());
        sum
    }

    #[test]
    fn a_mean_is_as_long_as_one() {
        let mean = sum_of(&[[1.0, 0.0, 3.0], [5.0, 0.0, 5.0]]).mean().unwrap();
        assert_eq!(mean, [0.6, 0.0, 0.8]);
        assert_eq!(unit([0.0, 0.0].into_iter()), None);
        assert_eq!(unit([1.0, f64::NAN].into_iter()), None);
        assert_eq!(unit([f64::INFINITY].into_iter()), None);
        assert_eq!(RunningSum::default().mean(), None);
    }

    #[test]
    fn positions_are_taken_once_and_in_order() {
        let row = [2.0, 1.0, 2.0];
        let mut sum = sum_of(&[row, row]);
        let twice = OutOfTurn { position: 1, added: Some(2) };
        assert_eq!(sum.add(1, &row), Err(twice), "a step that was tried again");
        assert_eq!(sum.add(2, &row), Err(OutOfTurn { position: 2, added: None }), "it is spoilt");
        assert_eq!(sum.mean(), None);
        sum.add(0, &row).unwrap();
        assert_eq!(sum.add(2, &row), Err(OutOfTurn { position: 2, added: Some(1) }), "a gap");
        sum.add(0, &row).unwrap();
        assert_eq!(sum, sum_of(&[row]), "the first position begins anew");
        assert!(sum.add(1, &row[..2]).is_err(), "another width");
    }

    #[test]
    fn shortened_vectors_are_as_long_as_one_again() {
        let vector = [0.48, 0.64, 0.6];
        assert_eq!(shortened(&vector, 2).unwrap(), [0.6, 0.8]);
        assert_eq!(shortened(&vector, 3).unwrap(), vector, "as it was, to the bit");
        assert_eq!(shortened(&vector, 4), None);
        assert_eq!(shortened(&[0.0, 1.0], 1), None, "nothing is left of it");
    }
}
