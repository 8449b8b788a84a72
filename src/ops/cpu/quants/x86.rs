//! Products of bytes: few rows by the dot products of AVX-512, more by tiles; and by AVX2 where there is neither.

use super::{BLOCK, Format, GROUP, NR, Panel, Product, SUPER, Signed};
use crate::ops::cpu::gemm::amx::MixedTiles;
use crate::ops::cpu::rows::ByteBlock;
use std::arch::asm;
use std::arch::x86_64::*;

/// Columns of a vector.
const LANES: usize = 16;
/// Rows of a tile.
const TILE: usize = 16;
/// From this many rows on, tiles are quicker than vectors.
pub(super) const TILES_MIN: usize = 5;
/// Bytes ahead of what dot products read that are fetched.
const AHEAD: usize = 4096;
/// Bytes ahead of what tiles read that are fetched.
const AHEAD_OF_TILES: usize = 8192;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a row of a tile of codes: four inputs of 16 columns.
const HALF: usize = LANES * GROUP;

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[u8]) -> __m512i {
    let from = &from[..HALF];
    // SAFETY: there are 64 bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn load_scales(from: &[u16]) -> __m512 {
    let from = &from[..LANES];
    // SAFETY: there are 16 numbers.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.as_ptr().cast()) })
}

/// Multiples of f16 scales.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn scaled(multiples: &[u8], scales: &[u16]) -> __m512 {
    let multiples = &multiples[..LANES];
    // SAFETY: there are 16 bytes.
    let multiples = unsafe { _mm_loadu_si128(multiples.as_ptr().cast()) };
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(multiples)), load_scales(scales))
}

/// [`Panel::factors`] of half of the columns.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn factors<const OFFSETS: bool>(panel: Panel<'_>, block: usize, half: usize) -> [__m512; 2] {
    let first = half * LANES;
    if !OFFSETS {
        return [load_scales(&panel.scales[block * NR + first..]), _mm512_setzero_ps()];
    }
    let (scales, multiples) = (&panel.scales[block / SUPER * 2 * NR..], &panel.multiples[block * 2 * NR..]);
    [scaled(&multiples[first..], &scales[first..]), scaled(&multiples[NR + first..], &scales[NR + first..])]
}

/// Adds a block's products with a row to the row's sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn add<const OFFSETS: bool>(sums: __m512, products: __m512i, [scale, offset]: [__m512; 2], x: &ByteBlock) -> __m512 {
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale));
    let sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums);
    if OFFSETS { _mm512_fnmadd_ps(offset, _mm512_set1_ps(x.scaled_sum), sums) } else { sums }
}

/// Writes half of a row's columns, as far as there are any.
///
/// # Safety
/// `of.out` must be valid for the row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(of: &Product, row: usize, half: usize, sums: __m512) {
    let columns = of.columns.saturating_sub(half * LANES).min(LANES);
    let mask = ((1u32 << columns) - 1) as __mmask16;
    // SAFETY: what is masked out is not written; the rest is the caller's.
    unsafe { _mm512_mask_storeu_ps(of.out.wrapping_add(row * of.stride + half * LANES), mask, sums) };
}

/// The product with a panel, by dot products.
///
/// # Safety
/// As [`super::Quants::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
pub(super) unsafe fn multiply_vectors(panel: Panel<'_>, of: &Product) {
    for first in (0..of.rows).step_by(4) {
        macro_rules! with_rows {
            ($four:literal, $offsets:literal) => {
                match of.rows - first {
                    1 => few::<1, $four, $offsets>(panel, of, first),
                    2 => few::<2, $four, $offsets>(panel, of, first),
                    3 => few::<3, $four, $offsets>(panel, of, first),
                    _ => few::<4, $four, $offsets>(panel, of, first),
                }
            };
        }
        // SAFETY: the caller's word.
        unsafe {
            match panel.format {
                Format::Q8_0 => with_rows!(false, false),
                Format::Q4_0 => with_rows!(true, false),
                Format::Q4K => with_rows!(true, true),
            }
        }
    }
}

/// M rows from `first` on, and codes of four bits or eight.
///
/// # Safety
/// As [`super::Quants::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn few<const M: usize, const FOUR: bool, const OFFSETS: bool>(panel: Panel<'_>, of: &Product, first: usize) {
    // The dot product wants codes without signs: those of eight bits are made 128 larger.
    let excess = if FOUR { i32::from(panel.format.excess()) } else { 128 };
    let (low, sign) = (_mm512_set1_epi8(15), _mm512_set1_epi8(i8::MIN));
    let group_bytes = if FOUR { HALF } else { 2 * HALF };
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    for (block, codes) in panel.blocks().enumerate() {
        let mut rows = [std::ptr::null::<ByteBlock>(); M];
        let mut products = [[_mm512_setzero_si512(); 2]; M];
        for m in 0..M {
            rows[m] = of.x.wrapping_add(block * of.x_block + first + m);
            // SAFETY: the caller's word.
            products[m] = [_mm512_set1_epi32(-excess * unsafe { (*rows[m]).sum }); 2];
        }
        for (group, codes) in codes.chunks_exact(group_bytes).enumerate() {
            _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
            let weights = if FOUR {
                let both = load(codes);
                [_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16::<4>(both), low)]
            } else {
                _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD + LINE).cast());
                [_mm512_xor_si512(load(codes), sign), _mm512_xor_si512(load(&codes[HALF..]), sign)]
            };
            for m in 0..M {
                // SAFETY: the caller's word; a block begins with its codes, which have as many groups.
                let x = _mm512_set1_epi32(unsafe { rows[m].cast::<i32>().add(group).read() });
                for half in 0..2 {
                    products[m][half] = _mm512_dpbusd_epi32(products[m][half], weights[half], x);
                }
            }
        }
        for half in 0..2 {
            let factors = factors::<OFFSETS>(panel, block, half);
            for m in 0..M {
                // SAFETY: the caller's word.
                sums[m][half] = add::<OFFSETS>(sums[m][half], products[m][half], factors, unsafe { &*rows[m] });
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (half, sums) in sums.into_iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe { store(of, first + m, half, sums) };
        }
    }
}

/// Blocks whose products tiles make at a time.
const BATCH: usize = 4;
/// Tiles of rows whose sums are kept at a time: a batch's codes stay in the first cache for all of them.
const GROUPS: usize = 4;

/// Products of a batch's blocks, of a tile of rows and half of the columns.
#[repr(C, align(64))]
struct Products([[[i32; LANES]; TILE]; BATCH]);

/// Sums of a tile of rows and half of the columns.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[f32; LANES]; TILE]);

impl Sums {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(&self) -> [__m512; TILE] {
        let mut sums = [_mm512_setzero_ps(); TILE];
        for (sums, from) in sums.iter_mut().zip(&self.0) {
            // SAFETY: there are 16.
            *sums = unsafe { _mm512_loadu_ps(from.as_ptr()) };
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(&mut self, sums: [__m512; TILE]) {
        for (to, sums) in self.0.iter_mut().zip(sums) {
            // SAFETY: there is room for 16.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sums) };
        }
    }
}

/// A block's codes taken apart.
#[repr(C, align(64))]
struct Room(Signed);

/// The product with a panel, by tiles.
///
/// # Safety
/// As [`super::Quants::multiply`].
pub(super) unsafe fn multiply_tiles(panel: Panel<'_>, of: &Product) {
    // SAFETY: the caller's word.
    unsafe {
        match panel.format {
            Format::Q4K => tiles::<true>(panel, of),
            Format::Q8_0 | Format::Q4_0 => tiles::<false>(panel, of),
        }
    }
}

/// # Safety
/// As [`multiply_tiles`].
#[target_feature(enable = "avx512f,avx512bw,f16c")]
unsafe fn tiles<const OFFSETS: bool>(panel: Panel<'_>, of: &Product) {
    let tiles = MixedTiles::configure();
    let blocks = panel.blocks().len();
    let mut room = [const { Room([0; BLOCK * NR]) }; BATCH];
    let mut products = [const { Products([[[0; LANES]; TILE]; BATCH]) }; 2];
    for first in (0..of.rows).step_by(GROUPS * TILE) {
        let groups = (of.rows - first).min(GROUPS * TILE).div_ceil(TILE);
        let mut sums = [const { [Sums([[0.0; LANES]; TILE]); 2] }; GROUPS];
        for block in (0..blocks).step_by(BATCH) {
            let mut codes = [std::ptr::null(); BATCH];
            for ((codes, packed), room) in codes.iter_mut().zip(panel.blocks().skip(block)).zip(&mut room) {
                *codes = panel.signed(packed, &mut room.0).as_ptr();
            }
            let (x, x_block) = (of.x.wrapping_add(block * of.x_block + first), of.x_block);
            let batch = Batch { panel, block, codes, x, x_block };
            for (group, sums) in sums.iter_mut().enumerate().take(groups) {
                // SAFETY: whole tiles of rows may be read.
                unsafe {
                    match blocks - block {
                        1 => batch.multiply::<1, OFFSETS>(&tiles, group, &mut products, sums),
                        2 => batch.multiply::<2, OFFSETS>(&tiles, group, &mut products, sums),
                        3 => batch.multiply::<3, OFFSETS>(&tiles, group, &mut products, sums),
                        _ => batch.multiply::<BATCH, OFFSETS>(&tiles, group, &mut products, sums),
                    }
                }
            }
        }
        for (row, group) in (first..of.rows).step_by(TILE).zip(&sums) {
            for (half, sums) in group.iter().enumerate() {
                for (row, sums) in (row..of.rows).zip(&sums.0) {
                    // SAFETY: there are 16 sums; the rest is the caller's word.
                    unsafe { store(of, row, half, _mm512_loadu_ps(sums.as_ptr())) };
                }
            }
        }
    }
}

/// Blocks that are multiplied with several tiles of rows.
struct Batch<'a> {
    panel: Panel<'a>,
    /// The first one.
    block: usize,
    /// Every block's, with signs.
    codes: [*const i8; BATCH],
    /// The first row's first block, and from block to block.
    x: *const ByteBlock,
    x_block: usize,
}

impl Batch<'_> {
    /// Adds the products of N blocks with 16 rows to `sums`, of the columns' halves.
    ///
    /// # Safety
    /// There must be codes and rows of N blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,f16c")]
    unsafe fn multiply<const N: usize, const OFFSETS: bool>(
        &self,
        tiles: &MixedTiles,
        group: usize,
        products: &mut [Products; 2],
        sums: &mut [Sums; 2],
    ) {
        // SAFETY: the caller's word.
        unsafe {
            for i in 0..N {
                self.multiply_tile(tiles, i, group, 0, &raw mut products[0].0[i]);
            }
            // What was stored is not to be read quickly: meanwhile tiles have the other half to do, and do it while vectors add.
            let mut all = sums[0].load();
            for i in 0..N {
                self.multiply_tile(tiles, i, group, 1, &raw mut products[1].0[i]);
                self.add::<OFFSETS>(i, group, 0, &products[0], &mut all);
            }
            sums[0].store(all);
            let mut all = sums[1].load();
            for i in 0..N {
                self.add::<OFFSETS>(i, group, 1, &products[1], &mut all);
            }
            sums[1].store(all);
        }
    }

    /// Adds products of block `i`.
    ///
    /// # Safety
    /// As [`Self::multiply`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,f16c")]
    unsafe fn add<const OFFSETS: bool>(
        &self,
        i: usize,
        group: usize,
        half: usize,
        products: &Products,
        sums: &mut [__m512; TILE],
    ) {
        let factors = factors::<OFFSETS>(self.panel, self.block + i, half);
        let x = self.x.wrapping_add(i * self.x_block + group * TILE);
        for (row, (sums, products)) in sums.iter_mut().zip(&products.0[i]).enumerate() {
            // SAFETY: there are 16 products; the rest is the caller's word.
            unsafe {
                let products = _mm512_loadu_si512(products.as_ptr().cast());
                *sums = add::<OFFSETS>(*sums, products, factors, &*x.wrapping_add(row));
            }
        }
    }

    /// Block `i` of 16 rows with half of the columns.
    ///
    /// # Safety
    /// As [`Self::multiply`]; there must be room for the products.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_tile(&self, _: &MixedTiles, i: usize, group: usize, half: usize, to: *mut [[i32; LANES]; TILE]) {
        let x = self.x.wrapping_add(i * self.x_block + group * TILE);
        let codes = self.codes[i].wrapping_add(half * HALF);
        if group == 0 {
            // Some at a time: all at once they would be in the way of what tiles wait for.
            let bytes = self.panel.format.block_bytes();
            let ahead = (self.block + i) * bytes + half * bytes / 2 + AHEAD_OF_TILES;
            for line in (0..bytes / 2).step_by(LINE) {
                _mm_prefetch::<_MM_HINT_T1>(self.panel.codes.as_ptr().wrapping_add(ahead + line).cast());
            }
        }
        /// One tile's sums need not wait for another's.
        macro_rules! multiply {
            ($sums:literal, $rows:literal, $columns:literal) => {
                // SAFETY: whoever has `MixedTiles` has configured tiles of these sizes on this thread; the caller answers for
                // `x`; of a block's codes every second 64 bytes are half of the columns. The compiler itself never uses tile
                // registers.
                unsafe {
                    asm!(
                        concat!("tileloadd ", $rows, ", [{x} + {line}]"),
                        concat!("tileloadd ", $columns, ", [{codes} + {line} * 2]"),
                        concat!("tilezero ", $sums),
                        concat!("tdpbssd ", $sums, ", ", $rows, ", ", $columns),
                        concat!("tilestored [{to} + {line}], ", $sums),
                        x = in(reg) x,
                        codes = in(reg) codes,
                        to = in(reg) to,
                        line = in(reg) LINE,
                        options(nostack, preserves_flags),
                    )
                }
            };
        }
        match i {
            0 => multiply!("tmm0", "tmm4", "tmm6"),
            1 => multiply!("tmm1", "tmm5", "tmm7"),
            2 => multiply!("tmm2", "tmm4", "tmm6"),
            _ => multiply!("tmm3", "tmm5", "tmm7"),
        }
    }
}

/// The product with a panel, by AVX2.
///
/// # Safety
/// As [`super::Quants::multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply_avx2(panel: Panel<'_>, of: &Product) {
    // SAFETY: the caller's word.
    unsafe { of.multiply_by(panel, |codes, x| products_avx2(codes, x)) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn products_avx2(codes: &Signed, x: &[i8; BLOCK]) -> [i32; NR] {
    const LANES: usize = 8;
    let mut sums = [_mm256_setzero_si256(); NR / LANES];
    for (codes, x) in codes.as_chunks::<{ NR * GROUP }>().0.iter().zip(x.as_chunks::<GROUP>().0) {
        let x = _mm256_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned)));
        let magnitude = _mm256_abs_epi8(x);
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<{ LANES * GROUP }>().0) {
            // SAFETY: there are 32 bytes.
            let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
            // No code is −128, which has no opposite, and two products of at most 127² fit 16 bits.
            let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(codes, x));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
    // SAFETY: both are 128 bytes, any value of which is valid.
    unsafe { std::mem::transmute(sums) }
}
