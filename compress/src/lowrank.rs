//! A matrix as the product of two thin ones.
//!
//! `W ~ A B`, `A` being `rows x r`, `B` `r x cols`: the truncated singular value decomposition, of `W`
//! itself or, where the inputs' moments `H = L L^T` are known, of `W L`, so that the error of outputs
//! is least and not that of weights (Wang et al., SVD-LLM, 2024). Decompositions are faer's.

use faer::{Mat, MatRef, Side};

use crate::hessian::Moments;
use crate::{CompressError, Matrix};

/// Kernels compute with ranks that are multiples of this.
pub(crate) const GRAIN: usize = 32;

/// To the nearest multiple of what kernels need.
pub(crate) fn grained(rank: usize) -> usize {
    ((rank + GRAIN / 2) / GRAIN).max(1) * GRAIN
}

/// How many singular values stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rank {
    /// So that the sum of their squares is this part of all.
    Energy(f64),
    /// So that both factors have this part of the matrix's weights.
    Size(f64),
    /// So many.
    Exactly(usize),
}

/// Two factors.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `rows x r`.
    pub a: Matrix,
    /// `r x cols`.
    pub b: Matrix,
    /// Part of the energy that is left.
    pub energy: f64,
    /// All singular values of what was decomposed, the largest first.
    pub values: Vec<f64>,
}

impl Factors {
    /// Singular values kept.
    pub fn rank(&self) -> usize {
        self.a.cols
    }

    /// Weights in both.
    pub fn weights(&self) -> u64 {
        (self.a.data.len() + self.b.data.len()) as u64
    }

    /// `A B`.
    pub fn product(&self) -> Matrix {
        let (a, b) = (&self.a, &self.b);
        let left = MatRef::from_row_major_slice(&a.data, a.rows, a.cols);
        let right = MatRef::from_row_major_slice(&b.data, b.rows, b.cols);
        row_major(a.rows, b.cols, &(left * right))
    }
}

/// Row by row.
fn row_major(rows: usize, cols: usize, m: &Mat<f32>) -> Matrix {
    let at = |i: usize| (0..cols).map(move |j| m[(i, j)]);
    Matrix::new(rows, cols, (0..rows).flat_map(at).collect())
}

/// The best factors of a rank; with `moments`, for inputs like those.
///
/// # Errors
/// If a decomposition does not converge.
pub fn factorise(
    w: &Matrix,
    rank: Rank,
    moments: Option<&Moments>,
) -> Result<Factors, CompressError> {
    let failed = |what: &str| CompressError::Settings(format!("the {what} of a matrix fails"));
    let plain = Mat::from_fn(w.rows, w.cols, |i, j| f64::from(w.data[i * w.cols + j]));
    let whitened = match moments {
        None => None,
        Some(moments) => {
            let factor = moments.damped().llt(Side::Lower);
            Some(factor.map_err(|_| failed("Cholesky decomposition"))?.L().to_owned())
        }
    };
    let target = match &whitened {
        None => plain,
        Some(lower) => &plain * lower,
    };
    // Singular vectors of the shorter side are the eigenvectors of the smaller of the two products of
    // the matrix with itself: several times as fast as a singular value decomposition, and in f64 exact
    // enough for weights of f32. The other side follows from them.
    let tall = w.rows >= w.cols;
    let product = match tall {
        true => target.transpose() * &target,
        false => &target * target.transpose(),
    };
    let eigen = product
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| failed("singular value decomposition"))?;
    let n = product.nrows();
    let values: Vec<f64> =
        (0..n).map(|k| eigen.S().column_vector()[n - 1 - k].max(0.0).sqrt()).collect();
    let r = kept(&values, rank, w);
    let total: f64 = values.iter().map(|s| s * s).sum();
    let energy = values[..r].iter().map(|s| s * s).sum::<f64>() / total.max(f64::MIN_POSITIVE);
    let near = Mat::from_fn(n, r, |i, k| eigen.U()[(i, n - 1 - k)]);
    let far = if tall { &target * &near } else { target.transpose() * &near };
    // Each factor takes the root of a singular value, so that both have like magnitudes.
    let root = |k: usize| values[k].max(values[0] * 1e-12).max(f64::MIN_POSITIVE).sqrt();
    let near = Mat::from_fn(n, r, |i, k| near[(i, k)] * root(k));
    let far = Mat::from_fn(far.nrows(), r, |i, k| far[(i, k)] / root(k));
    let (left, right) = if tall { (far, near) } else { (near, far) };
    let a = Mat::from_fn(w.rows, r, |i, k| left[(i, k)] as f32);
    let mut b = right.transpose().to_owned();
    if let Some(lower) = &whitened {
        // B = S V^T L^-1, so L^T B^T = (S V^T)^T.
        let mut turned = b.transpose().to_owned();
        faer::linalg::triangular_solve::solve_upper_triangular_in_place(
            lower.transpose(),
            turned.as_mut(),
            faer::Par::Seq,
        );
        b = turned.transpose().to_owned();
    }
    let b = Mat::from_fn(r, w.cols, |k, j| b[(k, j)] as f32);
    Ok(Factors { a: row_major(w.rows, r, &a), b: row_major(r, w.cols, &b), energy, values })
}

fn kept(values: &[f64], rank: Rank, w: &Matrix) -> usize {
    let most = values.len().max(1);
    match rank {
        Rank::Energy(part) => {
            let total: f64 = values.iter().map(|s| s * s).sum();
            let mut sum = 0.0;
            let enough = values.iter().position(|s| {
                sum += s * s;
                sum >= part * total
            });
            enough.map_or(most, |at| at + 1)
        }
        Rank::Size(part) => (rank_of(part, w.rows, w.cols) as usize).clamp(1, most),
        Rank::Exactly(rank) => rank.clamp(1, most),
    }
}

/// The rank at which both factors have this part of a matrix's weights.
pub(crate) fn rank_of(part: f64, rows: usize, cols: usize) -> f64 {
    part * (rows * cols) as f64 / (rows + cols) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::inputs;

    #[test]
    fn all_of_a_matrix_is_the_matrix_and_less_is_as_good_as_its_energy() {
        let w = Matrix::new(12, 20, inputs(12, 20, 3));
        let all = factorise(&w, Rank::Energy(1.0), None).unwrap();
        assert!(w.distance(&all.product()).relative() < 1e-5);
        let some = factorise(&w, Rank::Energy(0.9), None).unwrap();
        assert!(some.rank() < all.rank() && some.energy >= 0.9);
        let error = w.distance(&some.product()).relative();
        assert!((error - (1.0 - some.energy).sqrt()).abs() < 1e-4, "{error}");
    }

    #[test]
    fn ranks_are_what_kernels_need() {
        assert_eq!([0, 1, 15, 16, 47, 48, 100].map(grained), [32, 32, 32, 32, 32, 64, 96]);
    }

    #[test]
    fn size_is_kept_to() {
        let w = Matrix::new(40, 60, inputs(40, 60, 3));
        let f = factorise(&w, Rank::Size(0.5), None).unwrap();
        assert_eq!((f.rank(), f.weights()), (12, 1200));
        assert_eq!(factorise(&w, Rank::Size(0.0), None).unwrap().rank(), 1);
    }

    #[test]
    fn whitened_factors_err_less_in_outputs() {
        let cols = 24;
        let x = inputs(300, cols, 6);
        let mut moments = Moments::new(cols, true);
        moments.add(&x, 1);
        let w = Matrix::new(16, cols, inputs(16, cols, 7));
        let [plain, aware] =
            [None, Some(&moments)].map(|m| factorise(&w, Rank::Size(0.5), m).unwrap().product());
        let error = |m: &Matrix| -> f64 {
            let mut sum = 0.0;
            for x in x.chunks_exact(cols) {
                for i in 0..w.rows {
                    let pairs = x.iter().zip(w.row(i)).zip(m.row(i));
                    sum += pairs.map(|((x, a), b)| f64::from(x * (a - b))).sum::<f64>().powi(2);
                }
            }
            sum
        };
        assert!(error(&aware) < 0.9 * error(&plain), "{} {}", error(&aware), error(&plain));
        let whole = factorise(&w, Rank::Energy(1.0), Some(&moments)).unwrap();
        assert!(w.distance(&whole.product()).relative() < 1e-4);
    }
}
