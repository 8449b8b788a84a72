//! What this machine can do at most: how fast its memory is read, and how many FLOPs the instructions that the kernels
//! are made of do in a second, on all threads of the current rayon pool.

use super::aligned::Aligned;
use super::isa::{Isa, multiversion};
use candle_core::DType;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// The two ceilings of a roofline (Williams et al., 2009).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    pub read_bytes_per_s: f64,
    pub flops_per_s: f64,
    /// The instructions that `flops_per_s` is of.
    pub arithmetic: &'static str,
}

impl Machine {
    /// Measures both for weights of `dtype`, in about a second. Takes `buffer_bytes` of memory, which should be more than
    /// all caches hold.
    pub fn measure(dtype: DType, buffer_bytes: usize) -> Self {
        let arithmetic = Arithmetic::best(dtype);
        Self {
            read_bytes_per_s: read_rate(buffer_bytes),
            flops_per_s: arithmetic.rate(),
            arithmetic: arithmetic.name(),
        }
    }
}

/// Measurements, of which the best counts: what disturbs them makes them slower.
const PASSES: usize = 8;
/// Least time of a measurement of arithmetic.
const PASS_MIN: Duration = Duration::from_millis(20);

fn read_rate(bytes: usize) -> f64 {
    let mut words = Aligned::<u64>::zeroed((bytes / size_of::<u64>()).max(1));
    // Pages that no one wrote to would all be one page of zeros.
    words.par_iter_mut().enumerate().for_each(|(i, word)| *word = i as u64);
    let best = (0..PASSES).map(|_| {
        let started = Instant::now();
        let sums = rayon::broadcast(|thread| {
            let part = words.len().div_ceil(thread.num_threads());
            let mut all = 0;
            words.chunks(part).nth(thread.index()).into_iter().for_each(|part| sum(part, &mut all));
            all
        });
        black_box(sums);
        started.elapsed()
    });
    (words.len() * size_of::<u64>()) as f64 / best.min().unwrap_or_default().as_secs_f64()
}

multiversion!(fn sum(words: &[u64], out: &mut u64) = sum_body);

/// Parts of a thread's memory that are read in turns, as kernels read panels: prefetching follows several streams better
/// than one.
const STREAMS: usize = 4;

/// Words that are fetched ahead, as kernels do: some hardware is slow to do so by itself.
const AHEAD: usize = 6 << 10 >> 3;

/// Asks for the cache lines of `words` words.
#[inline(always)]
fn fetch(start: *const u64, words: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..words).step_by(8) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: fetching is harmless anywhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, words);
}

#[inline(always)]
fn sum_body(words: &[u64], out: &mut u64) {
    const AT_ONCE: usize = 32;
    let mut lanes = [0u64; AT_ONCE];
    let part = words.len() / STREAMS / AT_ONCE * AT_ONCE;
    for at in (0..part).step_by(AT_ONCE) {
        for stream in 0..STREAMS {
            let chunk = &words[stream * part + at..][..AT_ONCE];
            fetch(chunk.as_ptr().wrapping_add(AHEAD), AT_ONCE);
            for (lane, word) in lanes.iter_mut().zip(chunk) {
                *lane = lane.wrapping_add(*word);
            }
        }
    }
    *out = lanes.iter().fold(*out, |sum, lane| sum.wrapping_add(*lane));
}

/// Instructions that products are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    #[cfg(target_arch = "x86_64")]
    Amx,
    F32(Isa),
}

impl Arithmetic {
    fn best(dtype: DType) -> Self {
        #[cfg(target_arch = "x86_64")]
        if dtype == DType::BF16 && super::gemm::has_amx() {
            return Self::Amx;
        }
        Self::F32(Isa::get())
    }

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "AMX bf16",
            Self::F32(Isa::Amx | Isa::Avx512) => "AVX-512 f32",
            Self::F32(Isa::Avx2) => "AVX2 f32",
            Self::F32(Isa::Portable) => "portable f32",
        }
    }

    /// FLOPs a second of all threads.
    fn rate(self) -> f64 {
        let mut rounds = 1 << 10;
        while self.time(rounds).0 < PASS_MIN {
            rounds *= 2;
        }
        let rate = |(time, flops): (Duration, u64)| flops as f64 / time.as_secs_f64();
        (0..PASSES).map(|_| rate(self.time(rounds))).fold(0.0, f64::max)
    }

    fn time(self, rounds: usize) -> (Duration, u64) {
        let started = Instant::now();
        let flops = rayon::broadcast(|_| self.run(rounds)).into_iter().sum();
        (started.elapsed(), flops)
    }

    /// Does `rounds` times as many independent multiply-adds as hide their latency, all in registers; their FLOPs.
    fn run(self, rounds: usize) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => super::gemm::multiply_tiles(rounds),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::get` found these instructions.
            Self::F32(Isa::Amx | Isa::Avx512) => unsafe { x86::avx512(rounds) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::F32(Isa::Avx2) => unsafe { x86::avx2(rounds) },
            Self::F32(_) => portable(rounds),
        }
    }
}

/// A factor and a summand that let a chain of multiply-adds go to 10, through no subnormal number.
const CHAIN: (f32, f32) = (0.999, 0.01);

fn portable(rounds: usize) -> u64 {
    const LANES: usize = 32;
    let (factor, summand) = black_box(CHAIN);
    let mut chains = [0f32; LANES];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = *chain * factor + summand;
        }
    }
    black_box(chains);
    (rounds * LANES * 2) as u64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::CHAIN;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Twice what two units of a latency of four cycles need, and registers are left.
    const CHAINS: usize = 12;

    macro_rules! chains {
        ($name:ident, $features:literal, $lanes:literal, $set:ident, $fmadd:ident) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(rounds: usize) -> u64 {
                let (factor, summand) = black_box(CHAIN);
                let (factor, summand) = ($set(factor), $set(summand));
                let mut chains = [$set(0.0); CHAINS];
                for _ in 0..rounds {
                    for chain in &mut chains {
                        *chain = $fmadd(*chain, factor, summand);
                    }
                }
                black_box(chains);
                (rounds * CHAINS * $lanes * 2) as u64
            }
        };
    }

    chains!(avx512, "avx512f", 16, _mm512_set1_ps, _mm512_fmadd_ps);
    chains!(avx2, "avx2,fma", 8, _mm256_set1_ps, _mm256_fmadd_ps);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arithmetic_of_this_machine_counts_its_flops() {
        let mut all: Vec<Arithmetic> = Isa::available().into_iter().map(Arithmetic::F32).collect();
        all.push(Arithmetic::best(DType::BF16));
        for arithmetic in all {
            let (one, three) = (arithmetic.run(1), arithmetic.run(3));
            assert!(one > 0 && three == 3 * one, "{arithmetic:?}: {one}, {three}");
        }
    }

    #[test]
    fn ceilings_are_numbers_above_zero() {
        for dtype in [DType::BF16, DType::F32] {
            let machine = Machine::measure(dtype, 1 << 20);
            for rate in [machine.read_bytes_per_s, machine.flops_per_s] {
                assert!(rate.is_finite() && rate > 0.0, "{machine:?}");
            }
        }
        assert_eq!(Arithmetic::best(DType::F32), Arithmetic::F32(Isa::get()));
    }

    #[test]
    fn sums_take_every_whole_chunk() {
        let words: Vec<u64> = (0..256).collect();
        let mut all = 4;
        sum(&words, &mut all);
        assert_eq!(all, 4 + 255 * 256 / 2);
    }
}
