//! The largest logits of some rows, found on the device.

use tch::{Kind, TchError, Tensor};

/// Looked at beyond the largest `k` logits: equal ones are told apart on the host.
const BEYOND: usize = 4;

/// Largest logits of some rows.
#[derive(Debug)]
pub(crate) struct Largest {
    k: usize,
    values: Vec<f32>,
    ids: Vec<i64>,
    finite: Vec<i64>,
}

impl Largest {
    /// Finds them on the device.
    pub(crate) fn find(logits: &Tensor, k: usize) -> Result<Self, TchError> {
        let size = logits.size();
        let (rows, k) = (size[0] as usize, (k + BEYOND).min(size[1] as usize));
        let (values, ids) = logits.f_topk(k as i64, -1, true, true)?;
        let finite = logits.f_isfinite()?.f_all_dim(1, false)?.f_to_kind(Kind::Int64)?;
        let mut found = Largest {
            k,
            values: vec![0.0; rows * k],
            ids: vec![0; rows * k],
            finite: vec![0; rows],
        };
        values.f_contiguous()?.f_view(-1)?.f_copy_data(&mut found.values, rows * k)?;
        ids.f_contiguous()?.f_view(-1)?.f_copy_data(&mut found.ids, rows * k)?;
        finite.f_copy_data(&mut found.finite, rows)?;
        Ok(found)
    }

    /// The largest `k` of a row, larger first, equal ones by lower id; `false` where that cannot be told
    /// without the others.
    pub(crate) fn of(&self, row: usize, k: usize, vocab: usize, out: &mut Vec<(u32, f32)>) -> bool {
        let range = row * self.k..(row + 1) * self.k;
        let pairs = self.ids[range.clone()].iter().zip(&self.values[range]);
        out.clear();
        out.extend(pairs.map(|(&id, &value)| (id as u32, value)));
        out.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let k = k.min(vocab);
        let tied = self.k < vocab && out[k - 1].1 == out[self.k - 1].1;
        out.truncate(k);
        self.finite[row] != 0 && !tied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_are_told_apart_by_their_ids() {
        let mut row = vec![0.0f32; 64];
        (row[9], row[3], row[40]) = (2.0, 2.0, 1.0);
        let mut nan = row.clone();
        nan[50] = f32::NAN;
        let logits = Tensor::from_slice(&[row, nan].concat()).view([2, 64]);
        let found = Largest::find(&logits, 3).unwrap();
        let mut out = Vec::new();
        assert!(found.of(0, 3, 64, &mut out));
        assert_eq!(out, [(3, 2.0), (9, 2.0), (40, 1.0)]);
        assert!(!found.of(0, 4, 64, &mut out), "sixty others are equal");
        assert!(!found.of(1, 1, 64, &mut out), "not all are finite");
    }
}
