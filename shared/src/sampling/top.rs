//! The `k` largest of many, without sorting them all.

/// An id and its logit.
pub(super) type Candidate = (u32, f32);

/// Larger logit first; equal logits by lower id.
pub(super) fn best_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    // Logits are finite here, so the comparison is total; `==` makes 0.0 and -0.0 equal.
    b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Fills `out` with the `k` largest logits in the order of [`best_first`].
///
/// One pass with a rising threshold: when the buffer is full it is cut to the best `k`, and what
/// does not beat the worst of those is never looked at again (a later equal logit has a higher id
/// and loses).
pub(super) fn largest(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    let full = (2 * k).max(k + 64);
    let mut threshold = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > threshold {
            out.push((id as u32, logit));
            if out.len() == full {
                threshold = cut(out, k);
            }
        }
    }
    if out.len() > k {
        cut(out, k);
    }
    out.sort_unstable_by(best_first);
}

/// Keeps the best `k` and returns the worst logit among them.
fn cut(out: &mut Vec<Candidate>, k: usize) -> f32 {
    let (_, worst, _) = out.select_nth_unstable_by(k - 1, best_first);
    let threshold = worst.1;
    out.truncate(k);
    threshold
}

/// Largest logit with the lowest id, in one pass; `None` if any logit is not finite (or there are
/// none).
pub(super) fn argmax(logits: &[f32]) -> Option<Candidate> {
    const BLOCK: usize = 64;
    const LANES: usize = 16;
    let mut best = f32::NEG_INFINITY;
    let mut at = 0;
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        let mut largest = [f32::NEG_INFINITY; LANES];
        let mut bits = [0u32; LANES];
        for part in block.chunks(LANES) {
            for ((max, bits), &x) in largest.iter_mut().zip(&mut bits).zip(part) {
                *max = if x > *max { x } else { *max };
                *bits = (*bits).max(x.to_bits() & 0x7fff_ffff);
            }
        }
        if bits.iter().any(|&b| b >= f32::INFINITY.to_bits()) {
            return None;
        }
        let block_best = largest.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        if block_best > best {
            best = block_best;
            at = index * BLOCK;
        }
    }
    let offset = logits.get(at..)?.iter().position(|&x| x == best)?;
    Some(((at + offset) as u32, best))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_finds_the_first_of_equals() {
        for len in [1, 15, 16, 17, 63, 64, 65, 300] {
            for at in 0..len {
                let mut logits = vec![-3.0f32; len];
                logits[at] = 2.5;
                logits[len - 1] = 2.5;
                assert_eq!(argmax(&logits), Some((at as u32, 2.5)), "{len} {at}");
                logits[at] = f32::NAN;
                assert_eq!(argmax(&logits), None);
                logits[at] = f32::NEG_INFINITY;
                assert_eq!(argmax(&logits), None);
            }
        }
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[-0.0, 0.0]), Some((0, -0.0)));
    }
}
