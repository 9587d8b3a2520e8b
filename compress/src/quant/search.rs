//! Scales of least weighted squared error for groups of weights: the searches of `make_qx_quants`,
//! `make_qkx3_quants` and `make_qp_quants` in llama.cpp's `ggml-quants.c`, whose results these repeat.

/// Below this a group counts as zeros.
pub(super) const EPS: f32 = 1e-15;

/// To the nearest integer, halves to even, as `nearest_int` there.
pub(super) fn nearest(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// Symmetric: `x ~ scale * (q - most)`, `q` in `0..2 most`; `weights` of the squares of the errors.
pub(super) fn symmetric(x: &[f32], most: i32, weights: &[f32], q: &mut [u8]) -> f32 {
    let extreme = x.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    if extreme.abs() < EPS {
        q.fill(most as u8);
        return 0.0;
    }
    let level = |inverse: f32, x: f32| nearest(inverse * x).clamp(-most, most - 1);
    let sums = |inverse: f32| {
        x.iter().zip(weights).fold((0f32, 0f32), |(lx, l2), (&x, &w)| {
            let l = level(inverse, x) as f32;
            (lx + w * x * l, l2 + w * l * l)
        })
    };
    let mut chosen = -(most as f32) / extreme;
    let (lx, l2) = sums(chosen);
    let mut scale = if l2 > 0.0 { lx / l2 } else { 0.0 };
    let mut best = scale * lx;
    for step in (-9..=9).filter(|&s| s != 0) {
        let inverse = -(most as f32 + 0.1 * step as f32) / extreme;
        let (lx, l2) = sums(inverse);
        if l2 > 0.0 && lx * lx > best * l2 {
            chosen = inverse;
            scale = lx / l2;
            best = scale * lx;
        }
    }
    q.iter_mut().zip(x).for_each(|(q, &x)| *q = (level(chosen, x) + most) as u8);
    scale
}

/// How a search for scale and minimum goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    /// Greatest level.
    pub(super) most: i32,
    /// First change of it.
    pub(super) first: f32,
    /// Between changes.
    pub(super) by: f32,
    /// How many.
    pub(super) count: i32,
}

/// Most weights that [`affine`] takes.
const MOST: usize = 32;

/// With a minimum of at most 0: `x ~ scale * q - min`; returns `(scale, min)`.
pub(super) fn affine(x: &[f32], steps: Steps, weights: &[f32], q: &mut [u8]) -> (f32, f32) {
    let mut min = x.iter().copied().fold(f32::INFINITY, f32::min).min(0.0);
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    q.fill(0);
    if max <= min {
        return (0.0, -min);
    }
    let (mut sum_w, mut sum_x) = (0f32, 0f32);
    for (&x, &w) in x.iter().zip(weights) {
        sum_w += w;
        sum_x += w * x;
    }
    let levels = |inverse: f32, min: f32, q: &mut [u8]| {
        let level = |x: f32| nearest(inverse * (x - min)).clamp(0, steps.most) as u8;
        q.iter_mut().zip(x).for_each(|(q, &x)| *q = level(x));
    };
    let error = |q: &[u8], scale: f32, min: f32| -> f32 {
        let one = |((&x, &w), &q): ((&f32, &f32), &u8)| {
            let e = scale * f32::from(q) + min - x;
            w * e * e
        };
        x.iter().zip(weights).zip(q).map(one).sum()
    };
    let inverse = steps.most as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    levels(inverse, min, q);
    let mut best = error(q, scale, min);
    let mut tried = [0u8; MOST];
    let tried = &mut tried[..x.len()];
    for step in 0..=steps.count {
        // From the best minimum so far, not from the least value.
        let inverse = (steps.first + steps.by * step as f32 + steps.most as f32) / (max - min);
        levels(inverse, min, tried);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((&x, &w), &l) in x.iter().zip(weights).zip(&*tried) {
            let l = f32::from(l);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let det = sum_w * sum_l2 - sum_l * sum_l;
        if det <= 0.0 {
            continue;
        }
        let mut new =
            ((sum_w * sum_xl - sum_x * sum_l) / det, (sum_l2 * sum_x - sum_l * sum_xl) / det);
        if new.1 > 0.0 {
            new = (sum_xl / sum_l2, 0.0);
        }
        let e = error(tried, new.0, new.1);
        if e < best {
            (best, scale, min) = (e, new.0, new.1);
            q.copy_from_slice(tried);
        }
    }
    (scale, -min)
}

/// Levels of values that are not negative: `x ~ scale * q`, `q` in `0..=most`.
pub(super) fn positive(x: &[f32], most: i32, weights: &[f32], q: &mut [u8]) -> f32 {
    let max = x.iter().copied().fold(0f32, f32::max);
    q.fill(0);
    if max < EPS {
        return 0.0;
    }
    let level = |inverse: f32, x: f32| nearest(inverse * x).clamp(0, most) as f32;
    let error = |inverse: f32| -> f32 {
        let one = |(&x, &w): (&f32, &f32)| w * (x - level(inverse, x) / inverse).powi(2);
        x.iter().zip(weights).map(one).sum()
    };
    let mut inverse = most as f32 / max;
    let mut best = error(inverse);
    for step in (-4..=4).filter(|&s| s != 0) {
        let other = (0.1 * step as f32 + most as f32) / max;
        let e = error(other);
        if e < best {
            (best, inverse) = (e, other);
        }
    }
    let (mut lx, mut l2) = (0f32, 0f32);
    for ((q, &x), &w) in q.iter_mut().zip(x).zip(weights) {
        let l = level(inverse, x);
        *q = l as u8;
        lx += w * x * l;
        l2 += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((q, &x), &w) in q.iter_mut().zip(x).zip(weights) {
            let l = f32::from(*q);
            let (rest_lx, rest_l2) = (lx - w * x * l, l2 - w * l * l);
            if rest_lx <= 0.0 || rest_l2 <= 0.0 {
                continue;
            }
            let new = nearest(x * rest_l2 / rest_lx).clamp(0, most) as f32;
            let (new_lx, new_l2) = (rest_lx + w * x * new, rest_l2 + w * new * new);
            if new != l && new_lx * new_lx * l2 > lx * lx * new_l2 {
                (*q, lx, l2, changed) = (new as u8, new_lx, new_l2, true);
            }
        }
        if !changed {
            break;
        }
    }
    if l2 > 0.0 { lx / l2 } else { 0.0 }
}
