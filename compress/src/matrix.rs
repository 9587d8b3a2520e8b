//! A weight matrix in memory, and how far a changed one is from it.
//!
//! Rows are outputs, columns are inputs, as in GGUF: a row lies together. Everything here is plain
//! arithmetic; decompositions are faer's ([`crate::lowrank`], [`crate::hessian`]).

/// `rows x cols`, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows * cols` weights.
    pub data: Vec<f32>,
}

impl Matrix {
    /// Of weights that lie row by row.
    ///
    /// # Panics
    /// If there are not `rows * cols` of them.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} x {cols}");
        Self { rows, cols, data }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// Row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    /// So many matrices of the same height that lie one below the other.
    ///
    /// # Panics
    /// If the rows cannot be shared out.
    pub fn split(self, count: usize) -> Vec<Self> {
        if count == 1 {
            return vec![self];
        }
        assert!(count > 0 && self.rows.is_multiple_of(count), "{count} of {} rows", self.rows);
        let (rows, cols) = (self.rows / count, self.cols);
        let part = |i: usize| self.data[i * rows * cols..][..rows * cols].to_vec();
        (0..count).map(|i| Self { rows, cols, data: part(i) }).collect()
    }

    /// Weights that are not zero.
    pub fn nonzero(&self) -> u64 {
        self.data.iter().filter(|&&x| x != 0.0).count() as u64
    }

    /// Those rows alone, in that order.
    #[must_use]
    pub fn keep_rows(&self, rows: &[usize]) -> Self {
        let data = rows.iter().flat_map(|&i| self.row(i)).copied().collect();
        Self { rows: rows.len(), cols: self.cols, data }
    }

    /// Those columns alone, in that order.
    #[must_use]
    pub fn keep_cols(&self, cols: &[usize]) -> Self {
        let pick = |i: usize| cols.iter().map(move |&j| self.data[i * self.cols + j]);
        Self { rows: self.rows, cols: cols.len(), data: (0..self.rows).flat_map(pick).collect() }
    }

    /// How far another is from it.
    pub fn distance(&self, other: &Self) -> Distance {
        let mut sum = Distance::default();
        self.data.iter().zip(&other.data).for_each(|(&a, &b)| sum.add(a, b, 1.0));
        sum
    }

    /// As [`Matrix::distance`], of the outputs for inputs with these second moments (diagonal alone:
    /// `E[x_j^2]`).
    pub fn weighted_distance(&self, other: &Self, squares: &[f32]) -> Distance {
        let mut sum = Distance::default();
        for i in 0..self.rows {
            let weights = self.row(i).iter().zip(other.row(i)).zip(squares);
            weights.for_each(|((&a, &b), &s)| sum.add(a, b, f64::from(s)));
        }
        sum
    }
}

/// How far a changed matrix, or several, are from what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    error: f64,
    square: f64,
}

impl Distance {
    fn add(&mut self, before: f32, after: f32, importance: f64) {
        self.error += importance * f64::from(before - after).powi(2);
        self.square += importance * f64::from(before).powi(2);
    }

    /// `sqrt(sum (a - b)^2 / sum a^2)`, 0 for zeros that stayed so.
    pub fn relative(&self) -> f64 {
        if self.square == 0.0 { self.error.sqrt() } else { (self.error / self.square).sqrt() }
    }
}

impl std::ops::AddAssign for Distance {
    fn add_assign(&mut self, other: Self) {
        self.error += other.error;
        self.square += other.square;
    }
}

/// Calls `f` for each of `0..n` on some threads; results in order. Which thread computes what never
/// shows in the result.
pub fn parallel<T: Send>(n: usize, threads: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let mut mine = Vec::new();
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if i >= n {
                return mine;
            }
            mine.push((i, f(i)));
        }
    };
    let mut all: Vec<(usize, T)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.clamp(1, n.max(1))).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for thread in others {
            all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    });
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, t)| t).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_are_kept_in_the_order_given() {
        let m = Matrix::new(2, 3, vec![1., 2., 3., 4., 5., 6.]);
        assert_eq!(m.keep_rows(&[1, 0]).data, [4., 5., 6., 1., 2., 3.]);
        assert_eq!(m.keep_cols(&[2, 0]).data, [3., 1., 6., 4.]);
        assert_eq!(m.nonzero(), 6);
        let [upper, lower] = m.clone().split(2).try_into().unwrap();
        assert_eq!((upper.data, lower.data), (vec![1., 2., 3.], vec![4., 5., 6.]));
        assert_eq!(m.clone().split(1), [m]);
    }

    #[test]
    fn errors_are_relative_and_weighted_by_inputs() {
        let a = Matrix::new(1, 2, vec![3., 4.]);
        let b = Matrix::new(1, 2, vec![3., 0.]);
        assert!((a.distance(&b).relative() - 0.8).abs() < 1e-9);
        assert_eq!(a.weighted_distance(&b, &[1., 0.]).relative(), 0.0);
        assert!((a.weighted_distance(&b, &[0., 2.]).relative() - 1.0).abs() < 1e-9);
        let mut both = a.distance(&b);
        both += a.distance(&a);
        assert!((both.relative() - 0.32f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn results_come_in_order_whatever_the_threads() {
        for threads in [0, 1, 3, 50] {
            assert_eq!(
                parallel(20, threads, |i| i * i),
                (0..20).map(|i| i * i).collect::<Vec<_>>()
            );
        }
        assert!(parallel(0, 2, |i| i).is_empty());
    }
}
