//! What calibration tells about a matrix's inputs, and what error compensation makes of it.
//!
//! For inputs `x` the squared error of outputs is `sum_rows d H d^T`, `H = sum x x^T`. When column `j`
//! of a row errs by `e`, the columns after it make up for most of it: `w_k -= e / U_jj * U_jk`, `U`
//! being the upper Cholesky factor of `H^-1` (Frantar et al., GPTQ, 2022, algorithm 1).

use std::sync::PoisonError;

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

use crate::{CompressError, parallel};

/// Rows of `H` that a thread takes at once.
const STRIPE: usize = 128;
/// Damping of `H`: this part of the mean of its diagonal is added to it, as GPTQ does.
const DAMPING: f64 = 0.01;

/// Positions that an expert is taken to have seen beside those that went to it, all their inputs being
/// alike: so that one that saw few is not judged by chance, nor one that saw none by nothing.
pub const ALIKE: u64 = 16;

/// Second moments of a matrix's inputs.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    /// Inputs.
    pub cols: usize,
    /// Positions seen.
    pub positions: u64,
    /// Sums of `x_j^2`.
    pub squares: Vec<f64>,
    /// Sums of `x_i x_j`, `cols x cols`; empty where they were not asked for.
    pub gram: Vec<f32>,
}

impl Moments {
    /// Of nothing yet.
    pub fn new(cols: usize, full: bool) -> Self {
        let gram = if full { vec![0.0; cols * cols] } else { Vec::new() };
        Self { cols, positions: 0, squares: vec![0.0; cols], gram }
    }

    /// Adds inputs, `n x cols`; threads change nothing but the time.
    pub fn add(&mut self, x: &[f32], threads: usize) {
        for row in x.chunks_exact(self.cols) {
            self.squares.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x) * f64::from(x));
        }
        let n = x.len() / self.cols;
        self.positions += n as u64;
        if self.gram.is_empty() || n == 0 {
            return;
        }
        let x = faer::MatRef::from_row_major_slice(x, n, self.cols);
        let (cols, accum) = (self.cols, faer::Accum::Add);
        let share = cols.div_ceil(STRIPE);
        let next = std::sync::Mutex::new(self.gram.chunks_mut(STRIPE * cols).enumerate());
        parallel(threads.min(share), threads, |_| {
            loop {
                let taken = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((i, stripe)) = taken else { return };
                let rows = stripe.len() / cols;
                let gram = faer::MatMut::from_row_major_slice_mut(stripe, rows, cols);
                let left = x.subcols(i * STRIPE, rows).transpose();
                faer::linalg::matmul::matmul(gram, accum, left, x, 1.0f32, faer::Par::Seq);
            }
        });
    }

    /// Adds [`ALIKE`] positions whose inputs are as large as the mean of those seen, and independent.
    pub(crate) fn add_alike(&mut self) {
        let seen = self.squares.iter().sum::<f64>() / (self.cols as u64 * self.positions) as f64;
        let square = if seen > 0.0 { seen } else { 1.0 } * ALIKE as f64;
        self.squares.iter_mut().for_each(|s| *s += square);
        self.gram.iter_mut().step_by(self.cols + 1).for_each(|g| *g += square as f32);
        self.positions += ALIKE;
    }

    /// Mean squares of the inputs: the importance of columns.
    pub fn importance(&self) -> Vec<f32> {
        let n = self.positions.max(1) as f64;
        self.squares.iter().map(|s| (s / n) as f32).collect()
    }

    /// `H`, mean over positions, in f64: of what is off its diagonal a part goes, the larger the fewer
    /// positions there were for the inputs, so that nothing is made of chance; and the diagonal is damped.
    pub fn damped(&self) -> Mat<f64> {
        let n = self.positions.max(1) as f64;
        let trust = n / (n + self.cols as f64);
        let mean = self.squares.iter().sum::<f64>() / self.cols.max(1) as f64 / n;
        // Inputs that were never used err as they like; a diagonal of ones keeps H regular.
        let extra = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        Mat::from_fn(self.cols, self.cols, |i, j| {
            let h = f64::from(self.gram[i * self.cols + j]) / n;
            if i == j { h + extra } else { trust * h }
        })
    }

    /// What makes up for errors: of columns in order, or the most active first.
    ///
    /// # Errors
    /// If there is no full matrix of moments, or it cannot be inverted.
    pub fn compensation(&self, active_first: bool) -> Result<Compensation, CompressError> {
        let n = self.cols;
        if self.gram.len() != n * n {
            return Err(CompressError::settings("calibration kept no products of inputs"));
        }
        let singular = |_| {
            CompressError::settings(
                "the second moments of the inputs cannot be inverted: calibrate with more text",
            )
        };
        let mut order: Vec<usize> = (0..n).collect();
        if active_first {
            order.sort_by(|&a, &b| self.squares[b].total_cmp(&self.squares[a]));
        }
        // Each is large, and goes as soon as the next one is made.
        let ordered = {
            let damped = self.damped();
            Mat::from_fn(n, n, |i, j| damped[(order[i], order[j])])
        };
        let inverse = ordered.llt(Side::Lower).map_err(singular)?.inverse();
        drop(ordered);
        let factor = inverse.llt(Side::Lower).map_err(singular)?;
        let lower = factor.L();
        let at = |i: usize| {
            let (row, col) = (i / n, i % n);
            if col >= row { lower[(col, row)] as f32 } else { 0.0 }
        };
        let u = (0..n * n).map(at).collect();
        Ok(Compensation { u, order, importance: self.importance() })
    }
}

/// How columns make up for the errors of those before them.
#[derive(Clone, Debug)]
pub struct Compensation {
    /// `U`, row by row, of columns in `order`; below the diagonal zeros.
    pub u: Vec<f32>,
    /// The order of the columns.
    pub order: Vec<usize>,
    /// Mean squares of inputs, in their own order.
    pub importance: Vec<f32>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Correlated inputs, `n x cols`.
    pub(crate) fn inputs(n: usize, cols: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut all = Vec::new();
        for _ in 0..n {
            let common = next();
            let row = (0..cols).map(|j| next() * (1.0 + (j % 7) as f32) + common * (j % 3) as f32);
            all.extend(row.collect::<Vec<_>>());
        }
        all
    }

    #[test]
    fn moments_are_those_of_a_naive_sum() {
        let (n, cols) = (50, 12);
        let x = inputs(n, cols, 1);
        let mut moments = Moments::new(cols, true);
        // In two parts.
        moments.add(&x[..20 * cols], 1);
        moments.add(&x[20 * cols..], 2);
        assert_eq!(moments.positions, 50);
        for i in 0..cols {
            for j in 0..cols {
                let naive: f64 =
                    (0..n).map(|r| f64::from(x[r * cols + i]) * f64::from(x[r * cols + j])).sum();
                assert!((f64::from(moments.gram[i * cols + j]) - naive).abs() < 1e-3);
            }
            let own = f64::from(moments.gram[i * cols + i]);
            assert!((own - moments.squares[i]).abs() < 1e-3);
        }
    }

    #[test]
    fn who_saw_nothing_takes_all_inputs_for_alike_and_who_saw_much_what_they_are() {
        let cols = 4;
        let mut moments = Moments::new(cols, true);
        moments.add_alike();
        assert_eq!((moments.importance(), moments.positions), (vec![1.0; cols], ALIKE));
        let u = moments.compensation(true).unwrap().u;
        let apart = |i: usize| !i.is_multiple_of(cols + 1);
        assert!(u.iter().enumerate().all(|(i, u)| !apart(i) || *u == 0.0), "{u:?}");
        let mut moments = Moments::new(cols, true);
        moments.add(&[1.0, 2.0, 0.0, 3.0].repeat(10_000), 1);
        moments.add_alike();
        let wanted = [1.0, 4.0, 0.0, 9.0];
        assert!(moments.importance().iter().zip(wanted).all(|(a, b)| (a - b).abs() < 0.02));
        assert!((moments.gram[1] - 20_000.0).abs() < 1.0);
    }

    #[test]
    fn the_factor_gives_the_inverse() {
        let cols = 8;
        let mut moments = Moments::new(cols, true);
        moments.add(&inputs(100, cols, 2), 1);
        let u = moments.compensation(false).unwrap().u;
        let h = moments.damped();
        // (U^T U) H = 1.
        for i in 0..cols {
            for j in 0..cols {
                let mut sum = 0f64;
                for k in 0..cols {
                    let inverse: f64 = (0..cols)
                        .map(|r| f64::from(u[r * cols + i]) * f64::from(u[r * cols + k]))
                        .sum();
                    sum += inverse * h[(k, j)];
                }
                assert!((sum - f64::from(u8::from(i == j))).abs() < 1e-3, "{i} {j}: {sum}");
            }
        }
        assert!(Moments::new(4, false).compensation(true).is_err());
    }
}
