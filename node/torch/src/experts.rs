//! Experts: which rows go through which, and what they give.
//!
//! Scores are picked on the device; the picks come to the host once for each layer, which gathers each
//! chosen expert's rows. A row's experts are added in the order of their numbers.

use millrace_shared::model::Experts;
use tch::{Kind, TchError, Tensor};

/// Rows that go through an expert: its number, which rows, and the weights of what it gives, `n x 1`.
pub(crate) type Route = (usize, Tensor, Tensor);

/// Picks experts by the router's scores, `n x (experts …)` of f32.
pub(crate) fn routes(scores: &Tensor, rule: &Experts) -> Result<Vec<Route>, TchError> {
    let (count, used) = (i64::from(rule.count), i64::from(rule.used));
    let scores = scores.f_narrow(1, 0, count)?.f_to_kind(Kind::Float)?;
    let shares = scores.f_softmax(-1, Kind::Float)?;
    let (mut weights, picks) = shares.f_topk(used, -1, true, false)?;
    if rule.normalise {
        weights = weights.f_div(&weights.f_sum_dim_intlist(-1, true, Kind::Float)?)?;
    }
    let rows = scores.size()[0];
    let mut host = vec![0i64; (rows * used) as usize];
    picks.f_contiguous()?.f_view(-1)?.f_copy_data(&mut host, (rows * used) as usize)?;
    let weights = weights.f_contiguous()?.f_view([rows * used, 1])?;
    let mut routes = Vec::new();
    for expert in 0..count {
        let mine: Vec<i64> =
            (0..host.len()).filter(|&i| host[i] == expert).map(|i| i as i64).collect();
        if mine.is_empty() {
            continue;
        }
        let rows: Vec<i64> = mine.iter().map(|i| i / used).collect();
        let to = |list: &[i64]| Tensor::f_from_slice(list)?.f_to_device(weights.device());
        let weights = weights.f_index_select(0, &to(&mine)?)?;
        routes.push((expert as usize, to(&rows)?, weights));
    }
    Ok(routes)
}
