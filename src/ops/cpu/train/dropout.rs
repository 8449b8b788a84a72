//! Dropout whose mask is a function of a seed and the element's index: nothing is stored for backward.

use super::super::isa::multiversion;
use super::CHUNK;
use crate::types::split_mix;
use rayon::prelude::*;

/// Sets a share `p` of the elements to 0 and scales the others by `1/(1 − p)`. Applied to the gradient of its
/// result with the same `p` and seed, it gives the gradient of `x`.
pub(crate) fn dropout(x: &[f32], p: f32, seed: u64) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    x.par_chunks(CHUNK).zip(y.par_chunks_mut(CHUNK)).enumerate().for_each(|(chunk, (x, y))| {
        drop_chunk(x, p, split_mix(seed, chunk as u64), y);
    });
    y
}

multiversion!(fn drop_chunk(x: &[f32], p: f32, key: u64, y: &mut [f32]) = drop_chunk_body);

#[inline(always)]
fn drop_chunk_body(x: &[f32], p: f32, key: u64, y: &mut [f32]) {
    let (first, second) = (key as u32, (key >> 32) as u32);
    // 24 bits of the hash are compared: as many as p has.
    let dropped = (f64::from(p) * f64::from(1u32 << 24)) as i32;
    let scale = 1.0 / (1.0 - p);
    for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
        let hash = mix(mix(i as u32, first), second);
        *y = if (hash >> 8) as i32 >= dropped { x * scale } else { 0.0 };
    }
}

/// 32 bits that look random and depend on all bits of both: the finalizer of MurmurHash3. 32-bit multiplications,
/// because these have vector instructions everywhere.
#[inline(always)]
pub(super) fn mix(x: u32, key: u32) -> u32 {
    let x = x.wrapping_mul(0x9e37_79b1) ^ key;
    let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn the_right_share_is_kept_and_scaled() {
        let n = 10 * CHUNK + 17;
        for p in [0.0, 0.1, 0.5, 0.9, 1.0] {
            let y = dropout(&vec![2.0; n], p, 3);
            let kept = y.iter().filter(|y| **y != 0.0).count() as f64 / n as f64;
            let deviation = (f64::from(p) * f64::from(1.0 - p) / n as f64).sqrt();
            assert!((kept - f64::from(1.0 - p)).abs() <= 4.0 * deviation, "{p}: {kept}");
            assert!(y.iter().all(|y| *y == 0.0 || *y == 2.0 / (1.0 - p)));
        }
    }

    #[test]
    fn masks_of_seeds_chunks_and_neighbours_are_independent() {
        let mask = |seed| dropout(&vec![0.5; 4 * CHUNK], 0.5, seed);
        let agree =
            |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len().min(b.len()) as f64;
        let (a, b) = (mask(1), mask(2));
        assert_eq!(a, mask(1));
        for (a, b) in [(&a[..], &b[..]), (&a[CHUNK..], &a[..]), (&a[1..], &a[..]), (&a[256..], &a[..])] {
            let share = agree(a, b);
            assert!((share - 0.5).abs() < 0.01, "{share}");
        }
    }

    #[test]
    fn the_gradient_takes_the_mask_of_forward() {
        let (x, dy) = (random(1000, 1), random(1000, 2));
        let (y, dx) = (dropout(&x, 0.3, 9), dropout(&dy, 0.3, 9));
        assert!((0..1000).all(|i| (y[i] == 0.0) == (dx[i] == 0.0)));
        assert_same_bits_on_any_threads(|| dropout(&random(3 * CHUNK, 1), 0.3, 9));
    }
}
