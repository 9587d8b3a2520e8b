//! A type for each matrix, so that all fit a budget and outputs suffer least.
//!
//! For each matrix and each type the error of outputs (by mean squares of inputs, relative to the
//! outputs) is measured by quantising it. From the cheapest types on, the next step up is always the
//! one that lowers the sum of squared errors most for a byte, until the budget is spent.

use millrace_shared::model::{TensorEntry, TensorType};

use crate::apply::{Settings, encode};
use crate::hessian::Moments;
use crate::matrix::Distance;
use crate::quant::fallback;
use crate::source::{is_head, is_layer_matrix};
use crate::{Calibration, Calibrator, CompressError, Needs, Source, parallel};

/// Types to choose from, cheapest first.
const CHOICES: [TensorType; 6] = [
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q6_K,
    TensorType::Q8_0,
    TensorType::F16,
];

/// Types for the embedding and the output matrix: fewer bits hurt the choice among tokens.
const HEAD_CHOICES: [TensorType; 3] = [TensorType::Q5_0, TensorType::Q6_K, TensorType::Q8_0];

/// What a choice (a type, a rank) costs a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Price<T> {
    pub(crate) what: T,
    pub(crate) bytes: u64,
    /// Squared relative error of outputs.
    pub(crate) error: f64,
}

/// The type of each tensor of the source. `progress` gets the bytes of tensors that were measured.
///
/// # Errors
/// If the budget is below what the cheapest types take, or the model cannot be read.
pub(crate) fn choose(
    source: &Source,
    budget: u64,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<TensorType>, CompressError> {
    let fixed = |t: &&TensorEntry| !is_layer_matrix(t) && !is_head(t);
    let fixed: u64 = source.tensors.iter().filter(fixed).map(|t| t.bytes).sum();
    // Before any work: what no choice can be below.
    let least: u64 = source.tensors.iter().filter_map(|t| sizes(t).first().map(|p| p.1)).sum();
    if fixed + least > budget {
        return Err(CompressError::Settings(format!(
            "the budget of {budget} bytes cannot be met: with the cheapest types the tensors take {}; \
             drop layers or channels first",
            fixed + least
        )));
    }
    let mut prices = vec![Vec::new(); source.tensors.len()];
    let mut calibrator = Calibrator::of(source, settings, Needs::Squares)?;
    let mut done = 0;
    for layer in std::iter::once(None).chain((0..source.config.layers).map(Some)) {
        let seen = match (&mut calibrator, layer) {
            (Some(calibrator), Some(_)) => calibrator.next_layer()?.unwrap_or_default(),
            _ => Calibration::default(),
        };
        let calibration = settings.known.unwrap_or(&seen);
        let of_layer = |&i: &usize| Source::layer_of(&source.tensors[i].name) == layer;
        let indices: Vec<usize> = (0..source.tensors.len()).filter(of_layer).collect();
        let found = parallel(indices.len(), settings.threads, |i| {
            measure(source, &source.tensors[indices[i]], calibration)
        });
        for (index, found) in indices.into_iter().zip(found) {
            prices[index] = hull(found?);
            done += source.tensors[index].bytes;
        }
        progress(done);
    }
    let chosen = spend(&prices, budget - fixed);
    let types = source.tensors.iter().zip(&prices).zip(chosen);
    Ok(types.map(|((t, p), c)| p.get(c).map_or(t.dtype, |p| p.what)).collect())
}

/// What types take, cheapest first; nothing for tensors that stay as they are.
fn sizes(tensor: &TensorEntry) -> Vec<(TensorType, u64)> {
    let choices = match (is_layer_matrix(tensor), is_head(tensor)) {
        (true, _) => &CHOICES[..],
        (_, true) => &HEAD_CHOICES[..],
        _ => return Vec::new(),
    };
    let mut all = Vec::new();
    for &choice in choices {
        let dtype = fallback(choice, tensor.dims[0] as usize).unwrap_or(TensorType::F16);
        let Some(bytes) = dtype.bytes_of(tensor.elements()) else { continue };
        if !all.iter().any(|(t, _)| *t == dtype) {
            all.push((dtype, bytes));
        }
    }
    all.sort_by_key(|(_, bytes)| *bytes);
    all
}

fn measure(
    source: &Source,
    tensor: &TensorEntry,
    calibration: &Calibration,
) -> Result<Vec<Price<TensorType>>, CompressError> {
    let sizes = sizes(tensor);
    if sizes.is_empty() {
        return Ok(Vec::new());
    }
    let matrices = source.matrices(tensor)?;
    let seen = |name: &str| calibration.moments(name).map(Moments::importance);
    let importance: Vec<_> = matrices.iter().map(|(name, _)| seen(name)).collect();
    let mut prices = Vec::new();
    for (dtype, bytes) in sizes {
        let mut error = Distance::default();
        for ((name, before), importance) in matrices.iter().zip(&importance) {
            let mut after = before.clone();
            encode(name, dtype, &mut after, importance.as_deref(), None)?;
            error += match importance {
                Some(squares) => before.weighted_distance(&after, squares),
                None => before.distance(&after),
            };
        }
        prices.push(Price { what: dtype, bytes, error: error.relative().powi(2) });
    }
    Ok(prices)
}

/// Of prices, the cheapest first, those that no mixture of others beats: from each on, a further byte is
/// worth less and less.
pub(crate) fn hull<T>(prices: Vec<Price<T>>) -> Vec<Price<T>> {
    let worth = |a: &Price<T>, b: &Price<T>| (a.error - b.error) / (b.bytes - a.bytes) as f64;
    let mut kept: Vec<Price<T>> = Vec::new();
    for price in prices {
        if kept.last().is_some_and(|last| price.error >= last.error || price.bytes <= last.bytes) {
            continue;
        }
        while kept.len() > 1
            && worth(&kept[kept.len() - 2], &kept[kept.len() - 1])
                < worth(&kept[kept.len() - 1], &price)
        {
            kept.pop();
        }
        kept.push(price);
    }
    kept
}

/// The place in each list that the budget pays for.
pub(crate) fn spend<T>(prices: &[Vec<Price<T>>], budget: u64) -> Vec<usize> {
    let mut chosen = vec![0; prices.len()];
    let mut spent: u64 = prices.iter().filter_map(|p| p.first()).map(|p| p.bytes).sum();
    loop {
        let next = |i: usize| {
            let (now, then) = (prices[i].get(chosen[i])?, prices[i].get(chosen[i] + 1)?);
            let cost = then.bytes - now.bytes;
            (spent + cost <= budget).then(|| (i, cost, (now.error - then.error) / cost as f64))
        };
        let best = (0..prices.len()).filter_map(next).max_by(|a, b| a.2.total_cmp(&b.2));
        let Some((i, cost, _)) = best else { return chosen };
        chosen[i] += 1;
        spent += cost;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(points: &[(u64, f64)]) -> Vec<Price<()>> {
        let price = |&(bytes, error)| Price { what: (), bytes, error };
        points.iter().map(price).collect()
    }

    #[test]
    fn what_is_no_bargain_is_left_out() {
        let bytes = |p: Vec<Price<()>>| p.iter().map(|p| p.bytes).collect::<Vec<_>>();
        assert_eq!(bytes(hull(list(&[(1, 9.0), (2, 8.9), (3, 1.0), (4, 2.0)]))), [1, 3]);
        assert_eq!(bytes(hull(list(&[(1, 9.0), (2, 4.0), (3, 1.0)]))), [1, 2, 3]);
    }

    proptest! {
        #[test]
        fn budgets_are_kept_and_more_money_is_never_worse(
            errors in proptest::collection::vec((1.0f64..9.0, 0.1f64..1.0), 1..5), extra in 0u64..40,
        ) {
            let prices: Vec<Vec<Price<()>>> = errors
                .iter()
                .map(|(a, b)| hull(list(&[(4, *a), (5, a * b), (8, a * b * b * 0.5)])))
                .collect();
            let least = 4 * prices.len() as u64;
            let at = |budget: u64| {
                let chosen = spend(&prices, budget);
                let pairs = || prices.iter().zip(&chosen).map(|(p, &c)| p[c]);
                (pairs().map(|p| p.bytes).sum::<u64>(), pairs().map(|p| p.error).sum::<f64>())
            };
            let (bytes, error) = at(least + extra);
            prop_assert!(bytes <= least + extra);
            prop_assert!(error <= at(least).1 + 1e-12);
        }
    }
}
