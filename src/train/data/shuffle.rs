//! A seeded permutation that is computed, not stored: the order of windows of any epoch costs no memory, and going on
//! from the middle of one costs no time.

/// A permutation of `0..count`: a Feistel network over the next power of four, walked until it falls below `count`
/// (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
pub(super) struct Permutation {
    count: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

const ROUNDS: usize = 6;

impl Permutation {
    pub(super) fn new(count: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        let key = mixed(seed, epoch);
        Self { count, half_bits: bits.div_ceil(2), keys: std::array::from_fn(|round| mixed(key, round as u64)) }
    }

    /// Where `index`, below `count`, goes.
    pub(super) fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.count);
        let mask = (1 << self.half_bits) - 1;
        let mut x = index;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mixed(key, right) & mask));
            }
            x = left << self.half_bits | right;
            // At most four times as many values as there are to hit: a few steps.
            if x < self.count {
                return x;
            }
        }
    }
}

/// A number that looks random and depends on both (SplitMix64's finaliser).
pub(super) fn mixed(seed: u64, value: u64) -> u64 {
    let mut x = seed ^ value.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_index_is_hit_once(count in 1u64..3000, seed: u64, epoch in 0u64..4) {
            let permutation = Permutation::new(count, seed, epoch);
            let mut hit: Vec<u64> = (0..count).map(|i| permutation.at(i)).collect();
            hit.sort_unstable();
            prop_assert!(hit.into_iter().eq(0..count));
        }
    }

    #[test]
    fn epochs_and_seeds_have_their_own_order_and_neighbours_are_torn_apart() {
        let count = 10_000;
        let order = |seed, epoch| -> Vec<u64> {
            let permutation = Permutation::new(count, seed, epoch);
            (0..count).map(|i| permutation.at(i)).collect()
        };
        let first = order(1, 0);
        assert_eq!(first, order(1, 0));
        for other in [order(1, 1), order(2, 0)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "about one of 10,000 is expected to stay: {same}");
        }
        // Of a random order's neighbours the mean distance is a third of the range.
        let distance: u64 = first.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum();
        let mean = distance as f64 / (count - 1) as f64;
        assert!((mean / count as f64 - 1.0 / 3.0).abs() < 0.02, "{mean}");
    }

    #[test]
    fn huge_counts_are_no_trouble() {
        let permutation = Permutation::new(1 << 62, 7, 0);
        assert!(permutation.at((1 << 62) - 1) < 1 << 62);
    }
}
