//! The tile unit of x86 (AMX) through inline assembly: detection, configuration, and the product of two panels.

use super::pack::{Line, PANEL};
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Whether the processor has tiles of bf16 and of bytes and AVX-512 with dot products of both, and the system lets this
/// process use them.
pub(super) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| has_instructions() && permitted())
}

fn has_instructions() -> bool {
    const AMX_BF16_TILE_AND_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    /// Bits of XCR0 for the state of tiles.
    const TILE_STATE: u64 = 0b11 << 17;
    let vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vnni");
    vectors
        && __cpuid(0).eax >= 7
        && __cpuid_count(7, 0).edx & AMX_BF16_TILE_AND_INT8 == AMX_BF16_TILE_AND_INT8
        // SAFETY: AVX-512 was found, which implies that the system has switched on XGETBV.
        && unsafe { xcr0() } & TILE_STATE == TILE_STATE
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: register 0 exists wherever the instruction does.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the state of tiles, which a process does not have at its start.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let result: i64;
    // SAFETY: the call has no effect on memory; the kernel changes the registers named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Eight tiles of 16 rows of 64 bytes on this thread, until dropped.
pub(in crate::ops::cpu) struct Tiles {
    /// Tiles belong to the thread that has configured them.
    thread: PhantomData<*mut ()>,
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each tile; the last eight are reserved.
    row_bytes: [u16; 16],
    /// Rows of each tile; the last eight are reserved.
    rows: [u8; 16],
}

impl Tiles {
    /// # Panics
    /// If tiles aren't [`usable`].
    pub(in crate::ops::cpu) fn configure() -> Self {
        Self::of([(16, 64); 8])
    }

    /// Rows, and bytes of each, of every tile.
    fn of(tiles: [(u8, u16); 8]) -> Self {
        assert!(usable(), "this machine has no tiles");
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (tile, (rows, bytes)) in tiles.into_iter().enumerate() {
            (config.rows[tile], config.row_bytes[tile]) = (rows, bytes);
        }
        // SAFETY: the unit is there, and the instruction reads 64 bytes. Without `readonly`, `nomem` and `pure` the
        // compiler must have written them before.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
        Self { thread: PhantomData }
    }

    /// `rounds` times six products of tiles of ones into six others, with nothing read from memory; their FLOPs.
    pub(super) fn spin(&self, rounds: usize) -> u64 {
        /// Of 16 rows by 32 positions by 16 columns.
        const FLOPS: u64 = 2 * 16 * 32 * 16;
        static ONE: [u16; 32] = [0x3F80; 32];
        // No round would be a very long loop.
        let rounds = rounds.max(1);
        // SAFETY: the tiles are configured; every line of both is the same 64 bytes. The compiler itself never uses tile
        // registers.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "tileloadd tmm6, [{ones} + {stride}]",
                "tileloadd tmm7, [{ones} + {stride}]",
                "2:",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "tdpbf16ps tmm1, tmm6, tmm7",
                "tdpbf16ps tmm2, tmm6, tmm7",
                "tdpbf16ps tmm3, tmm6, tmm7",
                "tdpbf16ps tmm4, tmm6, tmm7",
                "tdpbf16ps tmm5, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                ones = in(reg) ONE.as_ptr(),
                stride = in(reg) 0usize,
                rounds = inout(reg) rounds => _,
                options(nostack),
            );
        }
        rounds as u64 * 6 * FLOPS
    }

    /// The product `[32, 32]` of two panels of `depth` pairs of tiles into `c`, or added to it. The rows of `c` start
    /// `c_stride` elements after each other.
    ///
    /// # Safety
    /// The 32 rows of 32 elements of `c` must be writable, and no other thread may touch them.
    #[inline(always)]
    pub(super) unsafe fn multiply(
        &self,
        a: &[[Line; PANEL]],
        b: &[[Line; PANEL]],
        c: *mut f32,
        c_stride: usize,
        accumulate: bool,
    ) {
        assert!(a.len() == b.len() && !a.is_empty());
        let lower = c.wrapping_add(16 * c_stride);
        // SAFETY: the tiles are configured, `a` and `b` hold as many pairs of tiles as the loop reads, and the caller
        // answers for `c`. The compiler itself never uses tile registers.
        unsafe {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{upper} + {c_stride}]",
                "tileloadd tmm1, [{upper} + {c_stride} + 64]",
                "tileloadd tmm2, [{lower} + {c_stride}]",
                "tileloadd tmm3, [{lower} + {c_stride} + 64]",
                "3:",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm6, [{b} + {line}]",
                "tileloadd tmm7, [{b} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{upper} + {c_stride}], tmm0",
                "tilestored [{upper} + {c_stride} + 64], tmm1",
                "tilestored [{lower} + {c_stride}], tmm2",
                "tilestored [{lower} + {c_stride} + 64], tmm3",
                accumulate = in(reg) u32::from(accumulate),
                upper = in(reg) c,
                lower = in(reg) lower,
                c_stride = in(reg) c_stride * size_of::<f32>(),
                line = in(reg) size_of::<Line>(),
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                depth = inout(reg) a.len() => _,
                options(nostack),
            );
        }
    }
}

/// Tiles for products of 32 bytes each: four (0 to 3) of 16 rows of 64 bytes, two of 16 rows of 32 bytes, and two of 8 rows
/// of 64 bytes.
pub(in crate::ops::cpu) struct MixedTiles(Tiles);

impl MixedTiles {
    /// # Panics
    /// If tiles aren't [`usable`].
    pub(in crate::ops::cpu) fn configure() -> Self {
        let (whole, narrow, flat) = ((16, 64), (16, 32), (8, 64));
        Self(Tiles::of([whole, whole, whole, whole, narrow, narrow, flat, flat]))
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever has a `Tiles` has the unit, on this thread.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}
