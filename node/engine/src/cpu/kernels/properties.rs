//! Attention, the KV store, rotation and `exp` on random shapes: every instruction set gives the bits
//! of the plain one, and those are close to f64.

use super::attention::{
    Attend, PART, attend, attend_part, join, parts, positions_per_call, record_len, scratch_len,
};
use super::dispatch;
use super::elementwise::{self as ew, Rotation};
use super::lanes::Lanes;
use super::store::{Store, store};
use super::stored::KvType;
use super::tests::{Random, bits, isas};
use crate::Isa;

impl Random {
    /// In `0..n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
    fn floats(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.float() * size).collect()
    }
}

/// A cache of one sequence, whose unused places are NaN, and queries for its last positions.
struct Case {
    kind: KvType,
    dim: usize,
    group: usize,
    kv_heads: usize,
    block_size: usize,
    first: usize,
    count: usize,
    /// Blocks of the sequence, in any order.
    blocks: Vec<u32>,
    /// `positions x kv_heads x dim`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `count x kv_heads x group x dim`.
    queries: Vec<f32>,
    window: usize,
    softcap: f32,
}

impl Case {
    fn new(
        kind: KvType,
        [dim, group, block_size]: [usize; 3],
        longest: usize,
        random: &mut Random,
    ) -> Self {
        let kv_heads = 1 + random.below(3);
        let (first, count) = (random.below(longest), 1 + random.below(positions_per_call(group)));
        let used = (first + count).div_ceil(block_size);
        let mut blocks: Vec<u32> = (0..used as u32 + 2).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.below(i + 1));
        }
        blocks.truncate(used);
        let elements = (first + count) * kv_heads * dim;
        Self {
            kind,
            dim,
            group,
            kv_heads,
            block_size,
            first,
            count,
            blocks,
            keys: random.floats(elements, 2.0),
            values: random.floats(elements, 2.0),
            queries: random.floats(count * kv_heads * group * dim, 3.0),
            window: if random.below(3) > 0 { usize::MAX } else { 1 + random.below(first + count) },
            softcap: if random.below(3) > 0 { 0.0 } else { 4.0 },
        }
    }

    /// Keys and values of the cache as bytes.
    fn store(&self, isa: Isa) -> [Vec<u8>; 2] {
        let head = self.kind.head_bytes(self.block_size, self.dim);
        let bytes = (self.blocks.len() + 2) * self.kv_heads * head;
        let [mut keys, mut values] = [vec![0xffu8; bytes], vec![0xffu8; bytes]];
        for position in 0..self.first + self.count {
            for kv_head in 0..self.kv_heads {
                let block = self.blocks[position / self.block_size] as usize;
                let at = (block * self.kv_heads + kv_head) * head;
                let from = (position * self.kv_heads + kv_head) * self.dim;
                let one = Store {
                    key: self.keys[from..][..self.dim].as_ptr(),
                    value: self.values[from..][..self.dim].as_ptr(),
                    keys: keys[at..][..head].as_mut_ptr(),
                    values: values[at..][..head].as_mut_ptr(),
                    kind: self.kind,
                    dim: self.dim,
                    block_size: self.block_size,
                    offset: position % self.block_size,
                };
                // SAFETY: `dim` elements and a head's whole block.
                unsafe { store(isa, &one) };
            }
        }
        [keys, values]
    }

    /// The kernel's arguments for one KV head and the positions from `first`.
    fn call<'a>(
        &'a self,
        isa: Isa,
        [keys, values]: &'a [Vec<u8>; 2],
        (kv_head, first): (usize, usize),
        out: &mut [f32],
        scratch: &mut [f32],
    ) -> Attend<'a> {
        let width = self.kv_heads * self.group * self.dim;
        let head_at = kv_head * self.group * self.dim;
        Attend {
            q: self.queries[(first - self.first) * width + head_at..].as_ptr(),
            q_stride: width,
            out: out[head_at..].as_mut_ptr(),
            out_stride: width + 3,
            keys: keys.as_ptr(),
            values: values.as_ptr(),
            kind: self.kind,
            blocks: &self.blocks,
            block_size: self.block_size,
            kv_heads: self.kv_heads,
            kv_head,
            group: self.group,
            dim: self.dim,
            first,
            count: self.first + self.count - first,
            scale: 1.0 / (self.dim as f32).sqrt(),
            softcap: self.softcap,
            isa,
            window: self.window,
            scratch: scratch.as_mut_ptr(),
        }
    }

    /// Results of the positions from `first`, all heads, as the queries lie.
    fn attend(&self, isa: Isa, cache: &[Vec<u8>; 2], first: usize) -> Vec<f32> {
        let width = self.kv_heads * self.group * self.dim;
        let stride = width + 3;
        let mut out = vec![7.5f32; (self.first + self.count - first) * stride];
        let mut scratch = vec![f32::NAN; scratch_len(self.group, self.dim)];
        for kv_head in 0..self.kv_heads {
            let call = self.call(isa, cache, (kv_head, first), &mut out, &mut scratch);
            // SAFETY: all positions are stored; sizes as `Attend` says.
            unsafe { attend(isa, &call) };
        }
        assert!(out.chunks(stride).all(|c| c[width..] == [7.5; 3]), "wrote past the heads");
        out.chunks(stride).flat_map(|c| &c[..width]).copied().collect()
    }

    /// Results of the last position, each part by itself, the last part first.
    fn attend_parts(&self, isa: Isa, cache: &[Vec<u8>; 2]) -> Vec<f32> {
        let last = self.first + self.count - 1;
        let (heads, len) = (self.kv_heads * self.group, record_len(self.dim));
        let first = (last + 1).saturating_sub(self.window) / PART;
        let mut out = vec![7.5f32; heads * self.dim];
        let mut scratch = vec![f32::NAN; scratch_len(self.group, self.dim)];
        for kv_head in 0..self.kv_heads {
            let mut records = vec![f32::NAN; parts(last + 1) * self.group * len];
            let call = self.call(isa, cache, (kv_head, last), &mut out, &mut scratch);
            // SAFETY: as above; a record for every query and part.
            unsafe {
                for part in (first..parts(last + 1)).rev() {
                    attend_part(isa, &call, part, records[part * self.group * len..].as_mut_ptr());
                }
                for i in 0..self.group {
                    let from = records[(first * self.group + i) * len..].as_mut_ptr();
                    let to = call.out.add(i * self.dim);
                    join(isa, from, self.group * len, parts(last + 1) - first, to, self.dim);
                }
            }
        }
        out
    }

    /// Elements of a head of a position as the cache rounds them.
    fn rounded(&self, head: &[f32]) -> Vec<f64> {
        let absmax = head.iter().fold(0f32, |m, x| m.max(x.abs()));
        let one = |&x: &f32| match self.kind {
            KvType::F32 => x,
            KvType::F16 => half::f16::from_f32(x).to_f32(),
            KvType::Int8 => (x * (127.0 / absmax)).round_ties_even() * (absmax / 127.0),
        };
        head.iter().map(|x| f64::from(one(x))).collect()
    }

    /// The same in f64, from keys and values as rounded.
    fn exact(&self) -> Vec<f64> {
        let [keys, values] = [&self.keys, &self.values]
            .map(|all| all.chunks(self.dim).flat_map(|h| self.rounded(h)).collect::<Vec<f64>>());
        let mut out = Vec::new();
        for (i, query) in self.queries.chunks_exact(self.dim).enumerate() {
            let heads = self.kv_heads * self.group;
            let (position, kv_head) = (self.first + i / heads, i % heads / self.group);
            let at = |p: usize| (p * self.kv_heads + kv_head) * self.dim;
            let score = |p: usize| {
                let key = &keys[at(p)..][..self.dim];
                let dot: f64 = query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
                let plain = dot / (self.dim as f64).sqrt();
                let cap = f64::from(self.softcap);
                if cap > 0.0 { cap * (plain / cap).tanh() } else { plain }
            };
            let first = (position + 1).saturating_sub(self.window);
            let scores: Vec<f64> = (first..=position).map(score).collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut row = vec![0.0; self.dim];
            for (p, weight) in weights.iter().enumerate() {
                let value = &values[at(first + p)..][..self.dim];
                row.iter_mut().zip(value).for_each(|(o, v)| *o += weight / sum * v);
            }
            out.extend(row);
        }
        out
    }
}

const KINDS: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Int8];

#[test]
fn attention_and_store_on_random_shapes() {
    let mut random = Random(0x51ab);
    for dim in [16, 48, 64, 128] {
        for group in [1, 3, 4, 8] {
            for block_size in [1, 2, 4, 16, 64] {
                for kind in KINDS {
                    let case = Case::new(kind, [dim, group, block_size], 150, &mut random);
                    let later = case.first + random.below(case.count);
                    check_attention(&case, later);
                }
            }
        }
    }
}

#[test]
fn attention_over_several_parts() {
    let mut random = Random(0x9a27);
    for (turn, dim) in [64, 32, 128, 80].into_iter().enumerate() {
        for block_size in [1, 16, 32, 64] {
            for kind in KINDS {
                let group = [1, 3, 5, 7, 9][(turn + block_size) % 5];
                let mut case =
                    Case::new(kind, [dim, group, block_size], 4 * PART - 100, &mut random);
                let later = case.first + random.below(case.count);
                check_attention(&case, later);
                // Queries on both sides of the end of a part.
                if case.first > PART {
                    case.first = PART - 2;
                    check_attention(&case, case.first + case.count / 2);
                }
            }
        }
    }
}

fn check_attention(case: &Case, later: usize) {
    let (first, count) = (case.first, case.count);
    let what = format!(
        "{:?}, dim {}, group {}, {} KV heads, blocks of {}, positions {first} + {count}",
        case.kind, case.dim, case.group, case.kv_heads, case.block_size
    );
    assert_eq!(PART % case.block_size, 0);
    let cache = case.store(Isa::Scalar);
    let reference = case.attend(Isa::Scalar, &cache, first);
    let tolerance = if case.kind == KvType::Int8 { 1e-3 } else { 2e-5 };
    let wrong = |(got, exact): (&f32, f64)| (f64::from(*got) - exact).abs();
    let worst = reference.iter().zip(case.exact()).map(wrong).fold(0.0, f64::max);
    assert!(worst < tolerance, "{worst} off: {what}");
    let expected = bits(&reference);
    let width = case.kv_heads * case.group * case.dim;
    for isa in isas() {
        assert!(case.store(isa) == cache, "store, {isa}: {what}");
        assert!(bits(&case.attend(isa, &cache, first)) == expected, "{isa}: {what}");
        // The last positions in a call of their own, and the very last in parts.
        let tail = bits(&case.attend(isa, &cache, later));
        assert!(tail == expected[(later - first) * width..], "{isa} from {later}: {what}");
        let last = bits(&case.attend_parts(isa, &cache));
        assert!(last == expected[(count - 1) * width..], "{isa} in parts: {what}");
    }
}

#[test]
fn rotation_on_random_shapes() {
    let mut random = Random(0xc0de);
    for dim in [16, 48, 64, 128] {
        for turn in 0..24 {
            let (interleaved, heads) = (turn % 2 == 0, 1 + random.below(5));
            // The whole head, or a part of it.
            let pairs = if turn < 4 { dim / 2 } else { 1 + random.below(dim / 2) };
            let angles: Vec<f64> = (0..pairs).map(|_| f64::from(random.float()) * 9.0).collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
            let input = random.floats(heads * dim, 4.0);
            let run = |isa| {
                let mut x = input.clone();
                let rotation = Rotation { cos: &cos, sin: &sin, interleaved };
                // SAFETY: whole heads, and at most `dim / 2` pairs.
                unsafe { ew::rotate(isa, &mut x, dim, rotation) };
                x
            };
            let reference = run(Isa::Scalar);
            for (head, got) in input.chunks(dim).zip(reference.chunks(dim)) {
                assert_eq!(bits(&head[2 * pairs..]), bits(&got[2 * pairs..]));
                for (i, angle) in angles.iter().enumerate() {
                    let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                    let (x, y) = (f64::from(head[a]), f64::from(head[b]));
                    let exact =
                        (x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos());
                    assert!((f64::from(got[a]) - exact.0).abs() < 2e-6, "{pairs} of {dim}");
                    assert!((f64::from(got[b]) - exact.1).abs() < 2e-6, "{pairs} of {dim}");
                }
            }
            for isa in isas() {
                assert_eq!(bits(&run(isa)), bits(&reference), "{isa}: {pairs} pairs of {dim}");
            }
        }
    }
}

dispatch! {
    fn exp_row = exp_row_generic(x: *const f32, y: *mut f32, n: usize);
}

#[inline(always)]
unsafe fn exp_row_generic<V: Lanes>(x: *const f32, y: *mut f32, n: usize) {
    for i in (0..n).step_by(16) {
        // SAFETY: `n` elements, a multiple of 16.
        unsafe { ew::exp(V::load(x.add(i))).store(y.add(i)) };
    }
}

#[test]
fn exp_is_the_same_close_and_clamped() {
    let mut random = Random(0xe4);
    let mut x = random.floats(4096, 87.0);
    x.extend(random.floats(1024, 1.0));
    let inner = x.len();
    let low = [-87.0, -87.000_01, -88.0, -104.0, -1e30, f32::MIN, f32::NEG_INFINITY, -87.0];
    let high = [88.0, 88.000_01, 88.8, 100.0, 1e30, f32::MAX, f32::INFINITY, 88.0];
    x.extend(low.iter().chain(&high));
    x.extend([0.0, -0.0, f32::MIN_POSITIVE, -1e-40, 1e-40, 0.5, -0.5, 1.0]);
    x.extend([f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffc1_2345)]);
    x.extend([f32::NAN; 4]);
    let run = |isa| {
        let mut y = vec![0f32; x.len()];
        // SAFETY: as many elements, a multiple of 16.
        unsafe { exp_row(isa, x.as_ptr(), y.as_mut_ptr(), x.len()) };
        y
    };
    assert_eq!(x.len() % 16, 0);
    let reference = run(Isa::Scalar);
    for (x, y) in x.iter().zip(&reference).take(inner) {
        let exact = f64::from(*x).exp();
        assert!((f64::from(*y) - exact).abs() <= 3e-7 * exact, "exp({x}) = {y}");
    }
    let ends = &reference[inner..];
    assert!(ends[..8].iter().all(|&y| y == ends[0] && y > 0.0), "{:?}", &ends[..8]);
    assert!(ends[8..16].iter().all(|&y| y == ends[8] && y.is_finite()), "{:?}", &ends[8..16]);
    assert_eq!(ends[16..21], [1.0; 5]);
    for isa in isas() {
        let got = run(isa);
        let (numbers, nans) = got.split_at(inner + 24);
        assert_eq!(bits(numbers), bits(&reference[..inner + 24]), "{isa}");
        assert!(nans.iter().all(|y| y.is_nan()), "{isa}: {nans:?}");
    }
}
