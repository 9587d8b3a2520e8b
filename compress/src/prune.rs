//! Weights that become zero: which ones, by what measure, in what pattern.
//!
//! A score for each weight, and a [`Pattern`] that says which of the lowest go. What is left keeps
//! its value, but for [`sparsegpt`], where it makes up for what went.

use millrace_engine::cpu::ZERO_TILE;
use serde::{Deserialize, Serialize};

use crate::{CompressError, Matrix};

/// Which weights compete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// All of a matrix.
    #[default]
    Tensor,
    /// Those of a row.
    Row,
    /// Two of every four neighbours in a row go.
    #[serde(rename = "2:4")]
    TwoOfFour,
    /// Blocks of 16 neighbours in a row go as a whole.
    Block,
    /// Tiles of 16 rows and 32 columns go as a whole: those that the engine passes over.
    Tile,
}

/// Neighbours that go together under [`Pattern::Block`]: a vector register of f32.
pub const BLOCK: usize = 16;

/// Sets the lowest scores of a pattern to zero. `sparsity` is the part that goes.
pub fn prune(m: &mut Matrix, scores: &[f32], pattern: Pattern, sparsity: f64) {
    match pattern {
        Pattern::Tensor => drop_lowest(&mut m.data, scores, sparsity),
        Pattern::Row => {
            let cols = m.cols;
            for (row, scores) in m.data.chunks_mut(cols).zip(scores.chunks(cols)) {
                drop_lowest(row, scores, sparsity);
            }
        }
        Pattern::TwoOfFour => {
            let cols = m.cols;
            for (row, scores) in m.data.chunks_mut(cols).zip(scores.chunks(cols)) {
                for (four, scores) in row.chunks_mut(4).zip(scores.chunks(4)) {
                    drop_lowest(four, scores, 0.5);
                }
            }
        }
        Pattern::Block => {
            let cols = m.cols;
            let sums: Vec<f32> = scores
                .chunks(cols)
                .flat_map(|row| row.chunks(BLOCK).map(|b| b.iter().map(|s| s * s).sum()))
                .collect();
            let mut kept = vec![1f32; sums.len()];
            drop_lowest(&mut kept, &sums, sparsity);
            let blocks = m.data.chunks_mut(cols).flat_map(|row| row.chunks_mut(BLOCK));
            for (block, kept) in blocks.zip(kept) {
                if kept == 0.0 {
                    block.fill(0.0);
                }
            }
        }
        Pattern::Tile => {
            let across = m.cols.div_ceil(ZERO_TILE[1]);
            let mut sums = vec![0f32; m.rows.div_ceil(ZERO_TILE[0]) * across];
            let cols = m.cols;
            let tile = |i: usize| i / cols / ZERO_TILE[0] * across + i % cols / ZERO_TILE[1];
            scores.iter().enumerate().for_each(|(i, s)| sums[tile(i)] += s * s);
            let mut kept = vec![1f32; sums.len()];
            drop_lowest(&mut kept, &sums, sparsity);
            let gone = |i: &usize| kept[tile(*i)] == 0.0;
            (0..scores.len()).filter(gone).for_each(|i| m.data[i] = 0.0);
        }
    }
}

/// The part of a matrix's weights that lies in tiles of zeros.
pub fn zero_tiles(m: &Matrix) -> f64 {
    let mut zeros = 0;
    for rows in m.data.chunks(ZERO_TILE[0] * m.cols) {
        for first in (0..m.cols).step_by(ZERO_TILE[1]) {
            let end = m.cols.min(first + ZERO_TILE[1]);
            if rows.chunks(m.cols).all(|row| row[first..end].iter().all(|x| *x == 0.0)) {
                zeros += rows.len() / m.cols * (end - first);
            }
        }
    }
    zeros as f64 / m.data.len().max(1) as f64
}

/// The `round(sparsity * n)` weights of lowest score become zero; of equal ones the first.
fn drop_lowest(weights: &mut [f32], scores: &[f32], sparsity: f64) {
    let count = ((weights.len() as f64 * sparsity).round() as usize).min(weights.len());
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    let by = |a: &u32, b: &u32| scores[*a as usize].total_cmp(&scores[*b as usize]).then(a.cmp(b));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by);
    }
    order[..count].iter().for_each(|&i| weights[i as usize] = 0.0);
}

/// Scores: magnitudes.
pub fn magnitude(m: &Matrix) -> Vec<f32> {
    m.data.iter().map(|x| x.abs()).collect()
}

/// Scores: magnitude times root mean square of the input (Sun et al., Wanda, 2023).
pub fn wanda(m: &Matrix, squares: &[f32]) -> Vec<f32> {
    let norms: Vec<f32> = squares.iter().map(|s| s.sqrt()).collect();
    m.data.iter().zip(norms.iter().cycle()).map(|(w, n)| w.abs() * n).collect()
}

/// Scores: pseudo-random, the same for a seed and a tensor's name.
pub fn random(m: &Matrix, seed: u64, name: &str) -> Vec<f32> {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes()).update(name.as_bytes());
    let mut stream = vec![0u8; m.data.len() * 4];
    hash.finalize_xof().fill(&mut stream);
    let number = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32;
    stream.chunks_exact(4).map(number).collect()
}

/// `w I(|w| > theta)`.
pub fn threshold(m: &mut Matrix, theta: f32) {
    m.data.iter_mut().filter(|x| x.abs() <= theta).for_each(|x| *x = 0.0);
}

/// `w I(w > theta)`, as it reads: every negative weight goes for a `theta` of 0 or more.
pub fn signed_threshold(m: &mut Matrix, theta: f32) {
    m.data.iter_mut().filter(|x| **x <= theta).for_each(|x| *x = 0.0);
}

/// Into `[least, most]`; nothing becomes zero.
pub fn clip(m: &mut Matrix, least: f32, most: f32) {
    m.data.iter_mut().for_each(|x| *x = x.clamp(least, most));
}

/// Columns among which a row's weights compete.
const SPARSE_BLOCK: usize = 128;

/// Prunes a row, its later columns making up for what went (Frantar and Alistarh, SparseGPT, 2023):
/// of every 128 columns, or of every 4 with [`Pattern::TwoOfFour`], those go for which
/// `w^2 / U_jj^2` is least. `u` is that of [`crate::hessian::Moments::compensation`].
pub fn sparsegpt(row: &mut [f32], u: &[f32], pattern: Pattern, sparsity: f64) {
    let cols = row.len();
    let (width, sparsity) = match pattern {
        Pattern::TwoOfFour => (4, 0.5),
        _ => (SPARSE_BLOCK, sparsity),
    };
    for first in (0..cols).step_by(width) {
        let end = (first + width).min(cols);
        let score = |j: usize| (row[j] / u[j * cols + j]).powi(2);
        let scores: Vec<f32> = (first..end).map(score).collect();
        let mut kept = vec![1f32; end - first];
        drop_lowest(&mut kept, &scores, sparsity);
        for j in (first..end).filter(|&j| kept[j - first] == 0.0) {
            let error = row[j] / u[j * cols + j];
            row[j] = 0.0;
            let factors = &u[j * cols + j + 1..(j + 1) * cols];
            row[j + 1..].iter_mut().zip(factors).for_each(|(w, f)| *w -= error * f);
        }
    }
}

/// Magnitudes of many tensors in logarithmic bins, for one threshold over all of them. A bin is
/// 2^-12 of the magnitude wide.
#[derive(Debug)]
pub struct Histogram(Vec<u64>);

/// Bits of an f32 that a bin does not tell apart.
const DROPPED: u32 = 11;

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; 1 << (31 - DROPPED)])
    }
}

impl Histogram {
    /// Adds weights.
    pub fn add(&mut self, weights: &[f32]) {
        weights.iter().for_each(|x| self.0[(x.abs().to_bits() >> DROPPED) as usize] += 1);
    }

    /// The magnitude at or below which this part of all weights lies.
    ///
    /// # Errors
    /// If there are no weights.
    pub fn threshold(&self, sparsity: f64) -> Result<f32, CompressError> {
        let total: u64 = self.0.iter().sum();
        if total == 0 {
            return Err(CompressError::settings("the model has no matrix to prune"));
        }
        let wanted = (total as f64 * sparsity).round() as u64;
        let mut below = 0;
        for (bin, &count) in self.0.iter().enumerate() {
            if below + count > wanted {
                return Ok(f32::from_bits((bin as u32) << DROPPED).next_down());
            }
            below += count;
        }
        Ok(f32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hessian::Moments;
    use crate::hessian::tests::inputs;

    fn zeros(m: &Matrix) -> usize {
        m.data.len() - m.nonzero() as usize
    }

    proptest! {
        #[test]
        fn as_many_go_as_asked_and_they_are_the_lowest(
            data in proptest::collection::vec(0.1f32..9.0, 64), part in 0u32..=8,
        ) {
            let sparsity = f64::from(part) / 8.0;
            for pattern in [Pattern::Tensor, Pattern::Row, Pattern::Block, Pattern::Tile] {
                let mut m = Matrix::new(2, 32, data.clone());
                let scores = magnitude(&m);
                prune(&mut m, &scores, pattern, sparsity);
                let exact = match pattern {
                    Pattern::Block => part % 2 == 0,
                    Pattern::Tile => part == 0 || part == 8,
                    _ => true,
                };
                prop_assert!(!exact || zeros(&m) == (64.0 * sparsity) as usize, "{:?}", pattern);
                if pattern == Pattern::Tensor {
                    let gone = (0..64).filter(|&i| m.data[i] == 0.0).map(|i| data[i]).fold(0.0, f32::max);
                    prop_assert!(m.data.iter().all(|&x| x == 0.0 || x >= gone));
                }
            }
        }

        #[test]
        fn two_of_four_go(data in proptest::collection::vec(0.1f32..9.0, 32)) {
            let mut m = Matrix::new(2, 16, data);
            let scores = magnitude(&m);
            prune(&mut m, &scores, Pattern::TwoOfFour, 0.9);
            prop_assert!(m.data.chunks(4).all(|c| c.iter().filter(|x| **x == 0.0).count() == 2));
        }
    }

    #[test]
    fn tiles_go_as_a_whole() {
        // Two tiles across, two down, the lower ones of 4 rows; the one at the upper right is least.
        let cols = 2 * ZERO_TILE[1];
        let value = |i: usize| if i / cols < 16 && i % cols >= 32 { 0.1 } else { -1.0 };
        let mut m = Matrix::new(20, cols, (0..20 * cols).map(value).collect());
        let scores = magnitude(&m);
        assert_eq!(zero_tiles(&m), 0.0);
        prune(&mut m, &scores, Pattern::Tile, 0.25);
        assert_eq!(zero_tiles(&m), 0.4);
        assert!((0..20 * cols).all(|i| (m.data[i] == 0.0) == (value(i) == 0.1)));
        m.data[40] = 1.0;
        assert_eq!(zero_tiles(&m), 0.0);
    }

    #[test]
    fn the_signed_threshold_is_not_the_one_by_magnitude() {
        let m = Matrix::new(1, 4, vec![-2.0, -0.1, 0.1, 2.0]);
        let [mut a, mut b, mut c] = [m.clone(), m.clone(), m];
        threshold(&mut a, 0.5);
        signed_threshold(&mut b, 0.5);
        clip(&mut c, -1.0, 0.5);
        assert_eq!(a.data, [-2.0, 0.0, 0.0, 2.0]);
        assert_eq!(b.data, [0.0, 0.0, 0.0, 2.0]);
        assert_eq!(c.data, [-1.0, -0.1, 0.1, 0.5]);
    }

    #[test]
    fn random_scores_depend_on_seed_and_name_alone() {
        let m = Matrix::new(1, 8, vec![1.0; 8]);
        assert_eq!(random(&m, 1, "a"), random(&m, 1, "a"));
        assert_ne!(random(&m, 1, "a"), random(&m, 2, "a"));
        assert_ne!(random(&m, 1, "a"), random(&m, 1, "b"));
    }

    #[test]
    fn one_threshold_over_all_tensors() {
        let mut all = Histogram::default();
        all.add(&[1.0, -2.0, 3.0]);
        all.add(&[4.0, -0.5]);
        let theta = all.threshold(0.4).unwrap();
        assert!((1.0..2.0).contains(&theta), "{theta}");
        assert!(all.threshold(0.0).unwrap() < 0.5);
        assert!(all.threshold(1.0).unwrap() > 4.0);
        assert!(Histogram::default().threshold(0.5).is_err());
    }

    #[test]
    fn inputs_of_unlike_size_make_wanda_better_than_magnitudes() {
        let cols = 64;
        let mut x = inputs(400, cols, 3);
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % cols < 16 { 10.0 } else { 0.5 });
        let mut moments = Moments::new(cols, false);
        moments.add(&x, 1);
        let original = Matrix::new(4, cols, inputs(4, cols, 9));
        let lost = |scores: &[f32]| {
            let mut m = original.clone();
            prune(&mut m, scores, Pattern::Row, 0.5);
            original.weighted_distance(&m, &moments.importance()).relative()
        };
        let (plain, aware) =
            (lost(&magnitude(&original)), lost(&wanda(&original, &moments.importance())));
        assert!(aware < 0.5 * plain, "{aware} {plain}");
    }

    #[test]
    fn inputs_tell_wanda_and_sparsegpt_what_matters() {
        let cols = 256;
        let mut x = inputs(600, cols, 5);
        // Inputs that go together: one can stand for another.
        for row in x.chunks_exact_mut(cols) {
            let common = row[0];
            row.iter_mut().for_each(|x| *x += 4.0 * common);
        }
        let mut moments = Moments::new(cols, true);
        moments.add(&x, 1);
        let u = moments.compensation(false).unwrap().u;
        let original = Matrix::new(1, cols, inputs(1, cols, 8));
        let error = |m: &Matrix| -> f64 {
            let one = |x: &[f32]| -> f64 {
                let pairs = x.iter().zip(&original.data).zip(&m.data);
                pairs.map(|((x, a), b)| f64::from(x * (a - b))).sum::<f64>().powi(2)
            };
            x.chunks_exact(cols).map(one).sum()
        };
        for pattern in [Pattern::Row, Pattern::TwoOfFour] {
            let [mut plain, mut aware, mut compensated] = [(); 3].map(|()| original.clone());
            prune(&mut plain, &magnitude(&original), pattern, 0.5);
            prune(&mut aware, &wanda(&original, &moments.importance()), pattern, 0.5);
            sparsegpt(&mut compensated.data, &u, pattern, 0.5);
            assert_eq!(zeros(&compensated), cols / 2);
            let [plain, aware, compensated] = [plain, aware, compensated].map(|m| error(&m));
            assert!(compensated < 0.7 * aware.min(plain), "{plain} {aware} {compensated}");
        }
    }
}
