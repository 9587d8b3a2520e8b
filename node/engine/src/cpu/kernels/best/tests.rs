//! The largest logits while they are computed, against a scan of all of them.

use bytemuck::Zeroable;
use millrace_shared::sampling::{MAX_CANDIDATES, SampleError, largest_logits};

use super::{Best, merged, scan};
use crate::cpu::kernels::matmul;
use crate::cpu::kernels::tests::{Random, TYPES, activations, group, isas, matrix, pack, product};
use crate::cpu::pool::Pool;

/// Pairs with the bits of their logits, or which logit is broken.
type Found = Result<Vec<(u32, u32)>, usize>;

fn found(top: Result<&[(u32, f32)], SampleError>) -> Found {
    match top {
        Ok(top) => Ok(top.iter().map(|&(id, logit)| (id, logit.to_bits())).collect()),
        Err(SampleError::NonFinite { id, .. }) => Err(id),
        Err(other) => panic!("{other}"),
    }
}

fn scanned(logits: &[f32], k: usize) -> Found {
    let mut out = Vec::new();
    found(largest_logits(logits, k, &mut out).map(|()| out.as_slice()))
}

fn below(random: &mut Random, n: usize) -> usize {
    (random.next() >> 33) as usize % n
}

#[test]
fn products_give_the_largest_of_all_logits() {
    let mut random = Random(23);
    for dtype in TYPES {
        let step = dtype.block_elements().max(32) as usize;
        for _ in 0..3 {
            let (rows, cols) = (1 + below(&mut random, 700), step * (1 + below(&mut random, 2)));
            let columns = 1 + below(&mut random, 64);
            let file = matrix(dtype, rows, cols, &mut random);
            let seed = random.next();
            let first = below(&mut random, columns);
            let k: Vec<usize> = (first..columns)
                .map(|_| [1, 1 + below(&mut random, 64)][below(&mut random, 2)])
                .collect();
            for isa in isas() {
                let x = activations(isa, columns, cols, &mut Random(seed));
                let w = [pack(dtype, (rows, cols), group(isa), &file)];
                let all = product(isa, 1, &w, &x, false);
                for threads in [1, 2, 3] {
                    let mut lists = vec![Best::zeroed(); threads * k.len()];
                    lists.iter_mut().zip(k.iter().cycle()).for_each(|(l, &k)| l.reset(k));
                    let mut pool = Pool::new(threads, threads);
                    matmul::largest(&mut pool, isa, &w[0], &x, first..columns, &mut lists);
                    let mut next = 0;
                    merged(&mut lists, k.len(), &mut |i, top| {
                        assert_eq!(i, next);
                        next += 1;
                        let logits = &all[(first + i) * (rows + 3)..][..rows];
                        let expected = scanned(logits, k[i]);
                        assert_eq!(found(top), expected, "{dtype:?} {isa} {rows}x{cols} {threads}");
                    });
                    assert_eq!(next, k.len());
                }
            }
        }
    }
}

/// Coarse logits, zeros of both signs and broken ones, in pieces of any size, seen by any thread.
#[test]
fn pieces_in_any_order_and_ties() {
    let mut random = Random(41);
    for case in 0..2000 {
        let n = 1 + below(&mut random, 400);
        let coarse = [3, 40, 4000][below(&mut random, 3)];
        let mut logits: Vec<f32> = (0..n)
            .map(|_| {
                let x = (below(&mut random, coarse) as f32 - (coarse / 2) as f32) / 4.0;
                if x == 0.0 && random.next().is_multiple_of(2) { -0.0 } else { x }
            })
            .collect();
        if case % 4 == 0 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                logits[below(&mut random, n)] = bad;
            }
        }
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < n {
            let end = n.min(at + 1 + below(&mut random, 100));
            pieces.push(at..end);
            at = end;
        }
        for i in (1..pieces.len()).rev() {
            pieces.swap(i, below(&mut random, i + 1));
        }
        let k = 1 + below(&mut random, MAX_CANDIDATES);
        for isa in isas() {
            let mut lists = [Best::zeroed(); 3];
            lists.iter_mut().for_each(|list| list.reset(k));
            for piece in &pieces {
                let list = &mut lists[below(&mut random, 3)];
                // SAFETY: the piece lies in the logits; the machine has the instruction set.
                unsafe {
                    scan(
                        isa,
                        logits[piece.clone()].as_ptr(),
                        piece.len(),
                        piece.start as u32,
                        list,
                    );
                }
            }
            merged(&mut lists, 1, &mut |_, top| {
                assert_eq!(found(top), scanned(&logits, k), "{isa}, {k} of {logits:?}");
            });
        }
    }
}
