//! Which instructions this processor has, asked once.

use std::sync::OnceLock;

/// Instruction sets the kernels are written for, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// AVX-512 and tiles of bf16.
    Amx,
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Whatever the target has at least.
    Portable,
}

impl Isa {
    /// The best this processor has.
    pub(super) fn get() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| Self::available()[0])
    }

    /// All this processor has, best first.
    pub(super) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if super::gemm::has_amx() {
                all.push(Self::Amx);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                all.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }
}

/// `cpu (AVX-512, 2 threads)`.
pub(crate) fn describe() -> String {
    let name = match Isa::get() {
        Isa::Amx => "AMX",
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2",
        Isa::Portable => "portable",
    };
    format!("cpu ({name}, {} threads)", rayon::current_num_threads())
}

/// Defines `$name`, which runs the inlined `$body` compiled for the best instruction set there is.
macro_rules! multiversion {
    ($vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:path) => {
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::ops::cpu::isa::Isa;
                #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) { $body($($arg),*) }
                match Isa::get() {
                    // SAFETY: `Isa::get` found these instructions.
                    Isa::Amx | Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(super) use multiversion;
