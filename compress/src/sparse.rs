//! Matrices without their zeros: compressed rows (CSR) and blocks of 16 columns, and their products.
//!
//! The engine multiplies dense matrices, and tiles; these tell whether it would pay to do otherwise:
//! [`race`] times one product of each form on this machine, in plain f32 on one thread.

use std::time::Instant;

use crate::Matrix;
use crate::prune::BLOCK;

/// Values, their columns, and where each row begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Csr {
    values: Vec<f32>,
    columns: Vec<u32>,
    starts: Vec<u32>,
}

impl Csr {
    /// Of a matrix with at most `2^32` weights.
    pub fn new(m: &Matrix) -> Self {
        let (mut values, mut columns, mut starts) = (Vec::new(), Vec::new(), vec![0]);
        for i in 0..m.rows {
            for (j, &x) in m.row(i).iter().enumerate().filter(|(_, x)| **x != 0.0) {
                values.push(x);
                columns.push(j as u32);
            }
            starts.push(values.len() as u32);
        }
        Self { values, columns, starts }
    }

    /// `out = M x`.
    ///
    /// # Panics
    /// If `x` is shorter than the matrix is wide.
    pub fn product(&self, x: &[f32], out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(self.starts.windows(2)) {
            let row = row[0] as usize..row[1] as usize;
            let pairs = self.values[row.clone()].iter().zip(&self.columns[row]);
            *out = pairs.map(|(v, &j)| v * x[j as usize]).sum();
        }
    }
}

/// Blocks of 16 neighbours in a row that are not all zero, the column where each begins, and where each
/// row's begin. The last block of a row is filled with zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    values: Vec<[f32; BLOCK]>,
    columns: Vec<u32>,
    starts: Vec<u32>,
}

impl Blocks {
    /// Of a matrix.
    pub fn new(m: &Matrix) -> Self {
        let (mut values, mut columns, mut starts) = (Vec::new(), Vec::new(), vec![0]);
        for i in 0..m.rows {
            for (b, block) in m.row(i).chunks(BLOCK).enumerate() {
                if block.iter().any(|x| *x != 0.0) {
                    let mut whole = [0f32; BLOCK];
                    whole[..block.len()].copy_from_slice(block);
                    values.push(whole);
                    columns.push((b * BLOCK) as u32);
                }
            }
            starts.push(values.len() as u32);
        }
        Self { values, columns, starts }
    }

    /// `out = M x`; `x` is as long as the matrix is wide, rounded up to whole blocks.
    ///
    /// # Panics
    /// If `x` is shorter.
    pub fn product(&self, x: &[f32], out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(self.starts.windows(2)) {
            let row = row[0] as usize..row[1] as usize;
            let mut lanes = [0f32; BLOCK];
            for (values, &at) in self.values[row.clone()].iter().zip(&self.columns[row]) {
                let x = &x[at as usize..at as usize + BLOCK];
                lanes.iter_mut().zip(values).zip(x).for_each(|((l, v), x)| *l += v * x);
            }
            *out = lanes.iter().sum();
        }
    }
}

fn dense(m: &Matrix, x: &[f32], out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        let mut lanes = [0f32; BLOCK];
        let (row, rest) = m.row(i).as_chunks::<BLOCK>();
        for (values, x) in row.iter().zip(x.chunks_exact(BLOCK)) {
            lanes.iter_mut().zip(values).zip(x).for_each(|((l, v), x)| *l += v * x);
        }
        let tail = &x[m.cols - rest.len()..];
        *out = lanes.iter().sum::<f32>() + rest.iter().zip(tail).map(|(v, x)| v * x).sum::<f32>();
    }
}

/// How many times faster than dense a product is with each form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Race {
    /// As CSR.
    pub csr: f64,
    /// As blocks.
    pub blocks: f64,
}

impl Race {
    /// In words, of a race of that matrix.
    pub(crate) fn told(&self, m: &Matrix) -> String {
        format!(
            "other sparse forms, as plain loops in f32 over the first matrix of {} x {}, for comparison: \
             {:.2} times the dense loop's speed as CSR, {:.2} as blocks of 16; the engine computes with \
             tiles alone",
            m.rows, m.cols, self.csr, self.blocks
        )
    }
}

/// Times products of a matrix with a vector: the best of a few.
pub fn race(m: &Matrix) -> Race {
    let x = vec![1f32; m.cols.next_multiple_of(BLOCK)];
    let mut out = vec![0f32; m.rows];
    let (csr, blocks) = (Csr::new(m), Blocks::new(m));
    let mut best = [f64::INFINITY; 3];
    for _ in 0..7 {
        for (i, best) in best.iter_mut().enumerate() {
            let start = Instant::now();
            match i {
                0 => dense(m, &x, &mut out),
                1 => csr.product(&x, &mut out),
                _ => blocks.product(&x, &mut out),
            }
            *best = best.min(start.elapsed().as_secs_f64().max(1e-9));
            std::hint::black_box(&out);
        }
    }
    Race { csr: best[0] / best[1], blocks: best[0] / best[2] }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn all_forms_give_the_same_product(
            rows in 1usize..6, cols in 1usize..40,
            data in proptest::collection::vec(prop_oneof![Just(0f32), -2f32..2.0], 240),
            x in proptest::collection::vec(-2f32..2.0, 48),
        ) {
            let m = Matrix::new(rows, cols, data[..rows * cols].to_vec());
            let naive = |i: usize| -> f32 { m.row(i).iter().zip(&x).map(|(a, b)| a * b).sum() };
            let mut out = [vec![0f32; rows], vec![0f32; rows], vec![0f32; rows]];
            Csr::new(&m).product(&x, &mut out[0]);
            Blocks::new(&m).product(&x, &mut out[1]);
            dense(&m, &x[..cols], &mut out[2]);
            for i in 0..rows {
                for out in &out {
                    prop_assert!((out[i] - naive(i)).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn zeros_are_not_kept() {
        let mut m = Matrix::new(2, 64, vec![0.0; 128]);
        m.data[70] = 1.0;
        assert_eq!((Csr::new(&m).values.len(), Blocks::new(&m).values.len()), (1, 1));
        let race = race(&m);
        assert!(race.csr > 0.0 && race.blocks > 0.0);
    }
}
