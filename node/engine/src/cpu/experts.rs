//! Experts: which rows go through which, and what they give.
//!
//! Rows are gathered expert by expert and go through the same products as any others, which do not
//! depend on how many there are; a row's experts are added in the order of their numbers. So a row
//! comes out the same whatever else is in the batch. Everything is allocated at load.

use millrace_shared::model::{Activation, Experts};

use super::backend::Matrices;
use super::buffer::{Arena, Buf, Shared};
use super::kernels::rows::{Compute, QuantRows};
use super::kernels::{matmul, mixture};
use super::tensor::Tensor;
use crate::LoadError;

/// An expert that a row goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
struct Pick {
    expert: u32,
    /// Of what it gives.
    weight: f32,
}

/// What an expert's matrices were applied to in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// Its number.
    pub expert: usize,
    /// Inputs of gate and up, `n x hidden`.
    pub outer: Vec<f32>,
    /// Inputs of down, `n x ffn`.
    pub inner: Vec<f32>,
}

/// Room to send rows to experts.
#[derive(Debug)]
pub struct Routes {
    /// Scores, then their exponentials: `rows x experts`, in whole vectors.
    scores: Buf<f32>,
    padded: usize,
    /// `rows x used`, each row's by number.
    picks: Buf<Pick>,
    /// Indices of picks, expert by expert, and where each expert's begin.
    order: Buf<u32>,
    starts: Buf<u32>,
    /// Rows of one expert: what goes in, what comes out of the gate, what comes out.
    gathered: Tensor,
    act: Tensor,
    out: Tensor,
}

impl Routes {
    /// For so many rows of `hidden`, and experts of `ffn`.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn new(
        arena: &mut Arena,
        rows: usize,
        (hidden, ffn): (usize, usize),
        experts: &Experts,
    ) -> Result<Self, LoadError> {
        let (count, used) = (experts.count as usize, experts.used as usize);
        let padded = count.next_multiple_of(16);
        Ok(Self {
            scores: arena.take(rows * padded)?,
            padded,
            picks: arena.take(rows * used)?,
            order: arena.take(rows * used)?,
            starts: arena.take(count + 1)?,
            gathered: Tensor::new(arena, rows, hidden, true)?,
            act: Tensor::new(arena, rows, ffn, true)?,
            out: Tensor::new(arena, rows, hidden, false)?,
        })
    }

    /// Bytes of that, a little more than is taken.
    pub(super) fn bytes(rows: u64, (hidden, ffn): (u64, u64), experts: &Experts) -> u64 {
        let (count, used) = (u64::from(experts.count), u64::from(experts.used));
        let row = (count + 16) * 4 + used * 12 + hidden * 10 + ffn * 6;
        rows.saturating_mul(row).saturating_add(count * 4)
    }

    /// Picks each row's experts by its scores.
    fn pick(&mut self, compute: &mut Compute, scores: &Tensor, rule: &Experts) {
        let (isa, padded) = (compute.isa, self.padded);
        let (count, used) = (rule.count as usize, rule.used as usize);
        let room = Shared::new(&mut self.scores);
        let picks = Shared::new(&mut self.picks);
        compute.each_row(scores.rows, |i| {
            // SAFETY: each row with one thread.
            let (room, picks) =
                unsafe { (room.slice(i * padded, padded), picks.slice(i * used, used)) };
            let scores = &scores.row(i)[..count];
            choose(scores, picks);
            let top = scores[picks[0].expert as usize];
            room[..count].copy_from_slice(scores);
            room[count..].fill(top);
            mixture::exps(isa, room, top);
            picks.sort_unstable_by_key(|pick| pick.expert);
            let all = if rule.normalise {
                picks.iter().map(|p| room[p.expert as usize]).sum::<f32>()
            } else {
                room[..count].iter().sum()
            };
            for pick in picks {
                pick.weight = room[pick.expert as usize] / all;
            }
        });
    }

    /// Orders the picks of so many rows by expert.
    fn sort(&mut self, rows: usize, rule: &Experts) {
        let picks = &self.picks[..rows * rule.used as usize];
        self.starts.fill(0);
        for pick in picks {
            self.starts[pick.expert as usize + 1] += 1;
        }
        for expert in 1..self.starts.len() {
            self.starts[expert] += self.starts[expert - 1];
        }
        for (i, pick) in picks.iter().enumerate() {
            let next = &mut self.starts[pick.expert as usize];
            self.order[*next as usize] = i as u32;
            *next += 1;
        }
        // Each is now where the next one's begin.
        self.starts.copy_within(..rule.count as usize, 1);
        self.starts[0] = 0;
    }
}

/// The largest scores, the first among equals; what is not a number comes last.
fn choose(scores: &[f32], picks: &mut [Pick]) {
    for n in 0..picks.len() {
        let (chosen, rest) = picks.split_at_mut(n);
        let mut best: Option<usize> = None;
        for (i, &score) in scores.iter().enumerate() {
            let ahead =
                best.is_none_or(|b| score > scores[b] || (scores[b].is_nan() && !score.is_nan()));
            if ahead && !chosen.iter().any(|p| p.expert as usize == i) {
                best = Some(i);
            }
        }
        rest[0].expert = best.unwrap_or(n) as u32;
    }
}

/// `out += sum of weight_e down_e (activation(gate_e x) * up_e x)`, by the router's `scores`. Whoever
/// wants to know what went where gets it in `routed`.
pub(super) fn mix<'w>(
    compute: &mut Compute,
    (x, scores): (&Tensor, &Tensor),
    weights: &dyn Fn(usize) -> [&'w Matrices; 2],
    (rule, activation): (&Experts, Activation),
    routes: &mut Routes,
    mut routed: Option<&mut Vec<Routed>>,
    out: &mut Tensor,
) {
    routes.pick(compute, scores, rule);
    routes.sort(x.rows, rule);
    let used = rule.used as usize;
    let Routes { picks, order, starts, gathered, act, out: given, .. } = routes;
    for expert in 0..rule.count as usize {
        let mine = &order[starts[expert] as usize..starts[expert + 1] as usize];
        if mine.is_empty() {
            continue;
        }
        let [gate_up, down] = weights(expert);
        gather(compute, x, (mine, used), gathered);
        let Compute { pool, isa } = &mut *compute;
        matmul::gated(pool, *isa, &gate_up.0, gathered, activation, act);
        if let Some(routed) = &mut routed {
            let all = |x: &Tensor| x.data[..mine.len() * x.width].to_vec();
            routed.push(Routed { expert, outer: all(gathered), inner: all(act) });
        }
        given.rows = mine.len();
        let to =
            matmul::Output { stride: given.width, data: Shared::new(&mut given.data), add: false };
        matmul::matmul(pool, *isa, &down.0, act, 0..mine.len(), to);
        let (isa, width, sums) = (compute.isa, out.width, Shared::new(&mut out.data));
        compute.each_row(mine.len(), |i| {
            let pick = mine[i] as usize;
            // SAFETY: a row goes through an expert once, so each has one thread.
            let sum = unsafe { sums.slice(pick / used * width, width) };
            mixture::add_weighed(isa, given.row(i), picks[pick].weight, sum);
        });
    }
}

/// Rows of `x`, with their int8 form, one after the other.
fn gather(compute: &mut Compute, x: &Tensor, (picks, used): (&[u32], usize), out: &mut Tensor) {
    let (width, blocks) = (x.width, x.width / 32);
    assert!(out.width == width, "invariant: widths agree");
    out.rows = picks.len();
    let quant = QuantRows::new(&mut out.quant, width);
    let data = Shared::new(&mut out.data);
    compute.each_row(picks.len(), |i| {
        let from = picks[i] as usize / used;
        // SAFETY: each row with one thread.
        unsafe {
            data.slice(i * width, width).copy_from_slice(x.row(from));
            let to = quant.row(i);
            let q = &x.quant;
            let blocks = from * blocks..(from + 1) * blocks;
            let bytes = &q.q[blocks.start * 32..blocks.end * 32];
            to.q.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            let (n, scale) = (blocks.len(), &q.scale[blocks.clone()]);
            to.scale.copy_from_nonoverlapping(scale.as_ptr(), n);
            to.scaled_sum.copy_from_nonoverlapping(q.scaled_sum[blocks.clone()].as_ptr(), n);
            to.sums.copy_from_nonoverlapping(q.sums[blocks].as_ptr(), n);
        }
    });
}

/// `out += sigmoid(g) x`, `g` being element `column` of each row of `scores`.
pub(super) fn add_gated(
    compute: &mut Compute,
    x: &Tensor,
    (scores, column): (&Tensor, usize),
    out: &mut Tensor,
) {
    let (isa, width) = (compute.isa, out.width);
    assert!(x.width == width && x.rows == scores.rows && x.rows <= out.rows);
    let sums = Shared::new(&mut out.data);
    compute.each_row(x.rows, |i| {
        // SAFETY: each row with one thread.
        let sum = unsafe { sums.slice(i * width, width) };
        mixture::add_weighed(isa, x.row(i), mixture::sigmoid(isa, scores.row(i)[column]), sum);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f32], used: usize) -> Vec<u32> {
        let mut picks = vec![Pick::default(); used];
        choose(scores, &mut picks);
        picks.iter().map(|p| p.expert).collect()
    }

    #[test]
    fn the_first_of_equals_is_chosen_and_never_twice() {
        assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
        assert_eq!(chosen(&[0.0; 4], 2), [0, 1]);
        assert_eq!(chosen(&[f32::NEG_INFINITY; 3], 3), [0, 1, 2]);
        assert_eq!(chosen(&[f32::NAN, 1.0, f32::NAN, 2.0], 3), [3, 1, 0]);
        assert_eq!(chosen(&[f32::NAN; 3], 2), [0, 1]);
    }

    #[test]
    fn weights_are_those_of_a_softmax_and_rows_are_sorted_by_expert() {
        let e = std::f64::consts::E;
        let part = (e.powi(3) + e.powi(2)) / (e.powi(3) + e.powi(2) + e + 1.0);
        for (normalise, sum) in [(true, 1.0), (false, part)] {
            let rule = Experts { count: 4, used: 2, normalise, shared_ffn: 0 };
            let mut arena = Arena::new("a test");
            let mut routes = Routes::new(&mut arena, 3, (32, 32), &rule).unwrap();
            let mut scores = Tensor::new(&mut arena, 3, 4, false).unwrap();
            scores.rows = 3;
            let rows = [[0.0, 3.0, 1.0, 2.0], [3.0, 2.0, 1.0, 0.0], [1.0, 3.0, 2.0, 0.0]];
            scores.data[..12].copy_from_slice(&rows.concat());
            let pool = crate::cpu::pool::Pool::new(1, 1);
            let mut compute = Compute { pool, isa: crate::Isa::best() };
            routes.pick(&mut compute, &scores, &rule);
            let picks = &routes.picks[..6];
            let experts: Vec<u32> = picks.iter().map(|p| p.expert).collect();
            assert_eq!(experts, [1, 3, 0, 1, 1, 2]);
            for row in picks.chunks(2) {
                let found = f64::from(row[0].weight + row[1].weight);
                assert!((found - sum).abs() < 1e-3, "{found}, not {sum}");
            }
            assert!((picks[0].weight / picks[1].weight - 1f32.exp()).abs() < 1e-5);
            routes.sort(3, &rule);
            assert_eq!(routes.starts[..], [0, 1, 4, 5, 6]);
            assert_eq!(routes.order[..6], [2, 0, 3, 4, 5, 1]);
        }
    }
}
