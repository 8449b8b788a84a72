//! CPython's `random.Random(seed).sample`, number for number: lm-eval draws GSM8K's shots with it.

use rand_mt::Mt;
use std::collections::HashSet;

/// A `random.Random`, the Mersenne Twister seeded as CPython seeds it.
pub struct PythonRandom(Mt);

impl PythonRandom {
    /// `random.Random(seed)`: the seed's 32-bit words, lowest first, are the key.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let words = if high == 0 { 1 } else { 2 };
        Self(Mt::new_with_key([low, high].into_iter().take(words)))
    }

    /// `sample(range(n), k)`: k different numbers below n in the order drawn. `None` if k > n, where Python raises.
    pub fn sample(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        if k > n {
            return None;
        }
        Some(if n <= set_size(k) { self.sample_of_pool(n, k) } else { self.sample_of_set(n, k) })
    }

    /// Takes from a list of what is left, whose last entry then fills the gap.
    fn sample_of_pool(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut pool: Vec<usize> = (0..n).collect();
        (0..k).map(|_| pool.swap_remove(self.below(pool.len()))).collect()
    }

    /// Draws again what was drawn before.
    fn sample_of_set(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut seen = HashSet::with_capacity(k);
        let mut drawn = Vec::with_capacity(k);
        while drawn.len() < k {
            let number = self.below(n);
            if seen.insert(number) {
                drawn.push(number);
            }
        }
        drawn
    }

    /// `_randbelow(n)` for n > 0: as many bits as n has, until they are below n.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let number = self.bits(bits) as usize;
            if number < n {
                return number;
            }
        }
    }

    /// `getrandbits(count)` for 1 to 64 bits: the highest bits of a word, low words first.
    fn bits(&mut self, count: u32) -> u64 {
        let low = u64::from(self.0.next_u32());
        match count {
            ..=32 => low >> (32 - count),
            _ => low | (u64::from(self.0.next_u32()) >> (64 - count)) << 32,
        }
    }
}

/// Up to how many numbers CPython takes a pool: what a set of k entries would occupy.
fn set_size(k: usize) -> usize {
    if k <= 5 {
        return 21;
    }
    let mut power = 4;
    while power < 3 * k {
        power *= 4;
    }
    21 + power
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Seed, n, k, and how many samples in a row.
    type Case = (u64, usize, usize, usize);

    /// Cases and what CPython 3.11 gave as the last sample: both branches of `sample` up to their border, seeds and
    /// ranges of one word and of two.
    #[test]
    fn samples_are_those_of_cpython() {
        let cases: &[(Case, &[usize])] = &[
            ((1234, 7473, 5, 2), &[7462, 6610, 4769, 286, 5501]),
            ((1234, 21, 5, 1), &[14, 3, 0, 2, 1]),
            ((1234, 22, 5, 1), &[14, 3, 0, 2, 18]),
            ((0, 10, 10, 1), &[6, 9, 0, 2, 4, 3, 5, 1, 8, 7]),
            ((42, 85, 6, 1), &[81, 14, 3, 35, 31, 28]),
            ((42, 86, 6, 1), &[81, 14, 3, 35, 31, 28]),
            ((7, 37, 4, 1), &[20, 9, 25, 3]),
            ((4294967296, 100, 3, 1), &[14, 44, 53]),
            ((4294967301, 7473, 8, 1), &[1288, 3977, 2314, 7290, 4951, 6842, 118, 2908]),
            ((18446744073709551615, 1000, 7, 1), &[22, 254, 346, 633, 217, 467, 629]),
            ((1, 8589934592, 3, 1), &[3280387012, 1095513148, 6225516707]),
            ((3, 1, 1, 2), &[0]),
            ((3, 5, 0, 1), &[]),
            (
                (9, 280, 22, 1),
                &[237, 191, 136, 70, 95, 3, 173, 257, 41, 171, 20, 194, 86, 231, 216, 80, 121, 26, 56, 67, 259, 32],
            ),
        ];
        for (case @ (seed, n, k, times), want) in cases {
            let mut random = PythonRandom::new(*seed);
            let last = (0..*times).map(|_| random.sample(*n, *k).unwrap()).last();
            assert_eq!(last.as_deref(), Some(*want), "{case:?}");
        }
    }

    #[test]
    fn pools_are_taken_up_to_the_size_that_cpython_says() {
        for (k, want) in [(0, 21), (5, 21), (6, 85), (21, 85), (22, 277), (85, 277), (86, 1045)] {
            assert_eq!(set_size(k), want, "{k}");
        }
    }

    proptest! {
        #[test]
        fn a_sample_is_of_different_numbers_in_range(seed in any::<u64>(), n in 0usize..3000, share in 0usize..=100) {
            let k = n * share / 100;
            let drawn = PythonRandom::new(seed).sample(n, k).unwrap();
            prop_assert_eq!(drawn.len(), k);
            prop_assert!(drawn.iter().all(|i| *i < n));
            prop_assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), k);
            prop_assert_eq!(PythonRandom::new(seed).sample(n, n + 1), None);
        }
    }
}
