//! Counter-based random numbers: hashes, not a generator, so that any position can be drawn again.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Keeps streams of choices apart from their seeds.
const SALT: u64 = 0x6368_6f69_6365_7321;

/// The finaliser of splitmix64: a bijection whose every output bit depends on every input bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The random stream of one choice of a request: choices of one seed are independent.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    let stream = mix(u64::from(choice).wrapping_add(1).wrapping_mul(GOLDEN));
    // Without the salt, seed 0 and choice 0 would cancel out.
    mix(mix(seed.wrapping_add(GOLDEN)) ^ stream ^ SALT)
}

/// The number in `[0, 1)` that belongs to a position of a stream: a multiple of 2^-53.
pub fn uniform(seed: u64, position: u32) -> f64 {
    let key = mix(seed ^ 0x6d69_6c6c_7261_6365);
    let counter = u64::from(position).wrapping_add(1).wrapping_mul(GOLDEN);
    let bits = mix(key ^ mix(counter.wrapping_add(key)));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_fixed_for_all_time() {
        // Changing these numbers changes the answers of every seeded request.
        let parts = |seed, position| (uniform(seed, position) * (1u64 << 53) as f64) as u64;
        assert_eq!(choice_seed(0, 0), 0x5d11_e80a_34e2_196b);
        assert_eq!(choice_seed(0, 1), 0xd701_906f_e288_e1f0);
        assert_eq!(choice_seed(1, 0), 0xf199_db03_f3f5_164c);
        assert_eq!(choice_seed(42, 3), 0x02a3_de07_d5c4_20c4);
        assert_eq!(choice_seed(u64::MAX, u32::MAX), 0xb7c1_cf4d_281b_12b7);
        assert_eq!(parts(0, 0), 0x000c_cdc6_d042_80bb);
        assert_eq!(parts(42, 7), 0x0007_1306_cf3b_d927);
        assert_eq!(parts(choice_seed(0, 0), 1), 0x0014_a1ca_463f_7b62);
        assert_eq!(parts(u64::MAX, u32::MAX), 0x0010_a8cb_f2da_1d3a);
    }

    #[test]
    fn uniform_fills_the_unit_interval_evenly() {
        let mut buckets = [0u32; 16];
        let n = 64_000;
        let mut sum = 0.0;
        for position in 0..n {
            let u = uniform(3, position);
            assert!((0.0..1.0).contains(&u), "{u}");
            buckets[(u * 16.0) as usize] += 1;
            sum += u;
        }
        assert!((sum / f64::from(n) - 0.5).abs() < 0.01);
        for count in buckets {
            assert!((3_700..4_300).contains(&count), "{buckets:?}");
        }
    }

    /// Neighbouring seeds at one position are as unrelated as neighbouring positions of one seed.
    #[test]
    fn seeds_do_not_correlate() {
        let n = 20_000u64;
        let mean: f64 =
            (0..n).map(|seed| uniform(seed, 5) * uniform(seed + 1, 5)).sum::<f64>() / n as f64;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }
}
