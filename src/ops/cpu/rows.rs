//! Activations on their way into a product, in the form its weights ask for.

use super::SharedOut;
use super::aligned::Aligned;
use super::isa::{Isa, multiversion};
use super::pack::{BLOCK, Data, PackedMatrix};
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a product reads of its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    /// Rounded to nearest even.
    Bf16,
    /// Eight bits, with a scale for every [`BLOCK`].
    Bytes,
}

impl Form {
    /// What products with `w` read.
    pub(super) fn of(w: &PackedMatrix) -> Self {
        match w.data() {
            Data::Bf16(_) => Self::Bf16,
            Data::Quantised(_) => Self::Bytes,
            Data::F32(_) | Data::F16(_) => Self::F32,
        }
    }

    /// Bytes of an element; a block of [`Self::Bytes`], a [`ByteBlock`], counts as many elements as one of bf16.
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::Bytes => 2,
        }
    }

    fn row_stride(self, stride: usize) -> usize {
        match self {
            Self::F32 => stride,
            Self::Bf16 | Self::Bytes => BLOCK,
        }
    }
}

/// A block of a row in eight bits, scale · code each. Of the same size as one of bf16.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ByteBlock {
    /// From −127 to 127.
    pub codes: [i8; BLOCK],
    /// A 127th of the block's largest magnitude; NaN if that isn't finite.
    pub scale: f32,
    /// Of the codes.
    pub sum: i32,
    /// scale · sum
    pub scaled_sum: f32,
}

const _: () = assert!(size_of::<ByteBlock>() == BLOCK * size_of::<u16>());

impl ByteBlock {
    /// Up to [`BLOCK`] numbers, and zeros after them.
    #[inline(always)]
    fn of(x: &[f32]) -> Self {
        /// What has no larger number is a block of zeros: the inverse of its scale may be no number.
        const LEAST: f32 = 1e-30;
        /// Added to a number, it leaves this rounded to even in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        let mut whole = [0.0; BLOCK];
        whole[..x.len()].copy_from_slice(x);
        // As bits, in whose order what is no number comes last.
        let largest = whole.iter().fold(0, |largest, x: &f32| largest.max(x.to_bits() & 0x7FFF_FFFF));
        let largest = f32::from_bits(largest);
        let inverse = if largest >= LEAST { 127.0 / largest } else { 0.0 };
        let mut codes = [0; BLOCK];
        for (code, x) in codes.iter_mut().zip(&whole) {
            *code = (x * inverse + ROUND).to_bits() as i8;
        }
        let sum = codes.iter().map(|code| i32::from(*code)).sum();
        let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
        Self { codes, scale, sum, scaled_sum: scale * sum as f32 }
    }
}

/// Rows of activations, `[M, I]`. Those of f32 lie row after row. The others lie [`BLOCK`] inputs after the other, `[I /
/// BLOCK, M, BLOCK]`: what a tile takes in then has no gaps, wherever rows begin.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    start: *const u8,
    form: Form,
    len: usize,
    /// Elements: of f32 from row to row, else from block to block.
    stride: usize,
    width: usize,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: rows are only read.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// `x` as rows of `width`.
    pub(super) fn of_f32(x: &'a [f32], width: usize) -> Self {
        let len = x.len() / width;
        Self { start: x.as_ptr().cast(), form: Form::F32, len, stride: width, width, lifetime: PhantomData }
    }

    /// M.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// I.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Elements from row to row, of the same block.
    pub(super) fn row_stride(&self) -> usize {
        self.form.row_stride(self.stride)
    }

    /// Elements from block to block of inputs, of the same row.
    pub(super) fn block_stride(&self) -> usize {
        match self.form {
            Form::F32 => BLOCK,
            Form::Bf16 | Form::Bytes => self.stride,
        }
    }

    /// Where a block of a row begins; of f32 a row has but one.
    fn block(&self, block: usize, row: usize) -> *const u8 {
        assert!(row < self.len);
        self.start.wrapping_add((block * self.block_stride() + row * self.row_stride()) * self.form.bytes())
    }

    /// Some of the rows.
    pub(super) fn slice(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.len);
        let start = self.start.wrapping_add(rows.start * self.row_stride() * self.form.bytes());
        Self { start, len: rows.len(), ..self }
    }

    /// The first row's elements, where they are f32.
    pub(super) fn f32(&self) -> *const f32 {
        assert_eq!(self.form, Form::F32, "products with these weights read f32");
        self.start.cast()
    }

    /// The first row's first block, where they are bf16: every row goes on with zeros to a whole [`BLOCK`], and whole
    /// tiles of rows may be read.
    pub(super) fn bf16(&self) -> *const u16 {
        assert_eq!(self.form, Form::Bf16, "products with these weights read bf16");
        self.start.cast()
    }

    /// The first row's first block, where they have eight bits, and how many blocks after it the row's next one comes. Other
    /// rows' come one after the other; whole tiles of rows may be read.
    pub(super) fn bytes(&self) -> (*const ByteBlock, usize) {
        assert_eq!(self.form, Form::Bytes, "products with these weights read eight bits");
        (self.start.cast(), self.stride / BLOCK)
    }
}

/// Rows that one may read beyond the last one: a tile's.
const SPARE_ROWS: usize = 15;

/// Room for rows of activations. Memory is taken from a store of the thread and given back to it.
pub(super) struct RowBuffer {
    words: Aligned<u32>,
    /// Of `words`.
    start: *mut u8,
    form: Form,
    len: usize,
    stride: usize,
    width: usize,
}

thread_local! {
    /// Buffers to be used again. Not the one first that was used last: other cores still have its lines.
    static STORE: RefCell<Vec<Aligned<u32>>> = const { RefCell::new(Vec::new()) };
}

/// Buffers a thread keeps: an expert layer has two at a time, and a projection within it none.
const STORED_MAX: usize = 4;

impl RowBuffer {
    /// For `[len, width]` elements, which must be written before they are read.
    pub(super) fn new(form: Form, len: usize, width: usize) -> Self {
        let (_, words) = Self::extent(form, len, width);
        let stored = STORE.with_borrow_mut(|store| {
            let fits = store.iter().position(|stored| stored.len() >= words);
            fits.map(|at| store.swap_remove(at))
        });
        Self::within(stored.unwrap_or_default(), form, len, width)
    }

    /// [`Self::new`] in `words`, or in others if these are too few.
    fn within(mut words: Aligned<u32>, form: Form, len: usize, width: usize) -> Self {
        let (stride, needed) = Self::extent(form, len, width);
        if words.len() < needed {
            words = Aligned::zeroed(needed);
        }
        let start = words.as_mut_ptr().cast();
        let mut buffer = Self { words, start, form, len, stride, width };
        buffer.clear_ends();
        buffer
    }

    /// The stride of such a buffer, and its words.
    fn extent(form: Form, len: usize, width: usize) -> (usize, usize) {
        match form {
            Form::F32 => (width, len * width),
            Form::Bf16 | Form::Bytes => {
                // An odd number of cache lines: were blocks a multiple of 4 KB apart, they would share a set of the cache.
                let stride = ((len + SPARE_ROWS) | 1) * BLOCK;
                (stride, width.div_ceil(BLOCK) * stride / 2)
            }
        }
    }

    /// Whether rows of `width` go into it, in this form.
    pub(super) fn takes(&self, form: Form, width: usize) -> bool {
        (self.form, self.width) == (form, width)
    }

    /// `x [M, I]` in another form.
    pub(super) fn rounded(form: Form, x: &[f32], width: usize) -> Self {
        let buffer = Self::new(form, x.len() / width, width);
        super::for_each(buffer.len.div_ceil(ROWS_PER_ITEM), x.len() * FLOPS_PER_COPY, |item| {
            let first = item * ROWS_PER_ITEM;
            for row in first..buffer.len.min(first + ROWS_PER_ITEM) {
                // SAFETY: items write disjoint rows.
                unsafe { buffer.write(row, 0, &x[row * width..(row + 1) * width]) };
            }
        });
        buffer
    }

    /// Zeros what lies between the last element of a row and a whole block.
    fn clear_ends(&mut self) {
        let used = self.width % BLOCK;
        if self.form == Form::Bf16 && used > 0 {
            let start: *mut u16 = self.start.cast();
            for row in 0..self.len {
                let at = self.width / BLOCK * self.stride + row * BLOCK;
                // SAFETY: the row's last block lies within the buffer.
                let block = unsafe { std::slice::from_raw_parts_mut(start.add(at), BLOCK) };
                block[used..].fill(0);
            }
        }
    }

    /// Writes elements `column..` of row `row`: of eight bits whole blocks, but for the row's end.
    ///
    /// # Safety
    /// No one else may read or write these elements at the same time.
    pub(super) unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.len && column + values.len() <= self.width);
        match self.form {
            Form::F32 => {
                let to: *mut f32 = self.start.cast();
                // SAFETY: the elements lie within the buffer and are the caller's.
                unsafe {
                    std::ptr::copy_nonoverlapping(values.as_ptr(), to.add(row * self.stride + column), values.len());
                }
            }
            Form::Bf16 => {
                let (head, blocks) = values.split_at(((BLOCK - column % BLOCK) % BLOCK).min(values.len()));
                let out = SharedOut { start: self.start.cast(), len: 2 * self.words.len() };
                let at = |column: usize| column / BLOCK * self.stride + row * BLOCK + column % BLOCK;
                round(head, out, at(column), self.stride);
                round(blocks, out, at(column + head.len()), self.stride);
            }
            Form::Bytes => {
                assert!(column.is_multiple_of(BLOCK), "blocks have one scale");
                assert!(values.len().is_multiple_of(BLOCK) || column + values.len() == self.width);
                let out = SharedOut { start: self.start.cast(), len: self.words.len() / (size_of::<ByteBlock>() / 4) };
                let stride = self.stride / BLOCK;
                write_bytes(values, out, column / BLOCK * stride + row, stride);
            }
        }
    }

    /// All rows.
    pub(super) fn rows(&self) -> Rows<'_> {
        let Self { form, len, stride, width, .. } = *self;
        Rows { start: self.start, form, len, stride, width, lifetime: PhantomData }
    }
}

// SAFETY: the pointer is into `words`, which goes along.
unsafe impl Send for RowBuffer {}
// SAFETY: shared access writes only through `write`, whose callers answer for it.
unsafe impl Sync for RowBuffer {}

impl Drop for RowBuffer {
    fn drop(&mut self) {
        let words = std::mem::take(&mut self.words);
        if words.is_empty() {
            return;
        }
        // At the thread's end the store may be gone before a buffer that the thread has kept.
        let _ = STORE.try_with(|store| {
            let mut store = store.borrow_mut();
            store.push(words);
            if store.len() > STORED_MAX {
                store.sort_unstable_by_key(|stored| std::cmp::Reverse(stored.len()));
                store.truncate(STORED_MAX);
            }
        });
    }
}

/// Rows of a matrix in another order, some at a time. Threads put them together for themselves: what is multiplied over
/// and over then lies in a cache of their own core.
pub(super) struct Gather<'a> {
    x: Rows<'a>,
    id: u64,
}

thread_local! {
    /// What the thread has put together last: of which gather, and which part.
    static GATHERED: Cell<Option<(u64, usize, RowBuffer)>> = const { Cell::new(None) };
}

impl<'a> Gather<'a> {
    /// Rows of `x`.
    pub(super) fn new(x: Rows<'a>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { x, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Calls `f` with rows `from`, in that order; `part` must stand for the same ones always. A thread that asks for the
    /// part it had last has it still.
    pub(super) fn with(&self, part: usize, from: &[u32], f: impl FnOnce(Rows<'_>)) {
        let buffer = match GATHERED.take() {
            Some((id, held, buffer)) if (id, held) == (self.id, part) => buffer,
            other => {
                let words = other.map(|(_, _, mut buffer)| std::mem::take(&mut buffer.words)).unwrap_or_default();
                let buffer = RowBuffer::within(words, self.x.form, from.len(), self.x.width);
                self.copy(from, &buffer);
                buffer
            }
        };
        f(buffer.rows());
        GATHERED.set(Some((self.id, part, buffer)));
    }

    fn copy(&self, from: &[u32], to: &RowBuffer) {
        /// Of a block.
        type Line = [u16; BLOCK];
        let (blocks, whole) = match self.x.form {
            Form::F32 => (1, self.x.width * self.x.form.bytes()),
            Form::Bf16 | Form::Bytes => (self.x.width.div_ceil(BLOCK), size_of::<Line>()),
        };
        for at in 0..blocks {
            for (row, &from) in from.iter().enumerate() {
                let (from, to) = (self.x.block(at, from as usize), to.rows().block(at, row));
                // SAFETY: these are blocks of rows within their buffers, of which the other is not shared yet.
                unsafe {
                    if whole == size_of::<Line>() {
                        // Of a length the compiler knows, without a call.
                        to.cast_mut().cast::<Line>().write_unaligned(from.cast::<Line>().read_unaligned());
                    } else {
                        std::ptr::copy_nonoverlapping(from, to.cast_mut(), whole);
                    }
                }
            }
        }
    }
}

/// Rows that a work item copies.
pub(super) const ROWS_PER_ITEM: usize = 16;
/// What copying a number counts as: it is bound by memory.
pub(super) const FLOPS_PER_COPY: usize = 8;

/// Rounds `x` to elements `at..` of `out`, every [`BLOCK`] of it `stride` after the one before. They are the caller's alone.
pub(super) fn round(x: &[f32], out: SharedOut<u16>, at: usize, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if Isa::get() == Isa::Amx {
        // SAFETY: a processor with tiles has these instructions.
        return unsafe { x86::round(x, out, at, stride) };
    }
    round_plain(x, out, at, stride);
}

multiversion!(fn write_bytes(x: &[f32], out: SharedOut<ByteBlock>, at: usize, stride: usize) = write_bytes_body);

/// Writes blocks to `at` and every `stride` blocks after it. They are the caller's alone.
#[inline(always)]
fn write_bytes_body(x: &[f32], out: SharedOut<ByteBlock>, at: usize, stride: usize) {
    for (i, x) in x.chunks(BLOCK).enumerate() {
        // SAFETY: the block is in the buffer, and the caller's.
        unsafe { out.from(at + i * stride).write(ByteBlock::of(x)) };
    }
}

multiversion!(fn round_plain(x: &[f32], out: SharedOut<u16>, at: usize, stride: usize) = round_plain_body);

#[inline(always)]
fn round_plain_body(x: &[f32], out: SharedOut<u16>, at: usize, stride: usize) {
    for (i, x) in x.chunks(BLOCK).enumerate() {
        // SAFETY: the elements are in the buffer, and the caller's.
        let out = unsafe { std::slice::from_raw_parts_mut(out.from(at + i * stride), x.len()) };
        out.iter_mut().zip(x).for_each(|(out, x)| *out = bf16_bits(*x));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, SharedOut, round_plain_body};
    use std::arch::x86_64::{__m512bh, _mm512_cvtne2ps_pbh, _mm512_loadu_ps};

    /// [`super::round_plain`] by the processor's own conversion.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn round(x: &[f32], out: SharedOut<u16>, at: usize, stride: usize) {
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        for (i, x) in blocks.iter().enumerate() {
            // SAFETY: a block is two vectors of f32 and one of bf16, which lies in the buffer and is the caller's.
            unsafe {
                let low = _mm512_loadu_ps(x.as_ptr());
                let high = _mm512_loadu_ps(x[BLOCK / 2..].as_ptr());
                out.from(at + i * stride).cast::<__m512bh>().write_unaligned(_mm512_cvtne2ps_pbh(high, low));
            }
        }
        round_plain_body(rest, out, at + blocks.len() * stride, stride);
    }
}

/// `x` rounded to bf16, to nearest even. What is no normal number becomes 0, as in the tile unit, so that every
/// instruction set multiplies the same numbers.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    // It wraps for the largest of what is no number, whose sum is not taken.
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let magnitude = bits & 0x7FFF_FFFF;
    let nan = (bits >> 16) | 0x40;
    let normal = if magnitude > 0x7F80_0000 { nan } else { rounded };
    (if magnitude < 0x0080_0000 { (bits >> 16) & 0x8000 } else { normal }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounding_is_to_the_nearest_even_and_of_what_is_too_small_to_zero(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            let found = bf16::from_bits(bf16_bits(x));
            if x.is_nan() {
                prop_assert!(found.is_nan());
            } else if x.is_normal() || x.is_infinite() {
                prop_assert_eq!(found.to_bits(), bf16::from_f32(x).to_bits());
            } else {
                prop_assert_eq!(found.to_f32().to_bits(), 0.0f32.copysign(x).to_bits());
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none_however_large_its_bits() {
        for bits in [0x7F80_0001, 0x7FFF_FFFF, 0xFF80_0001, 0xFFFF_8000, 0xFFFF_FFFF] {
            assert!(bf16::from_bits(bf16_bits(f32::from_bits(bits))).is_nan(), "{bits:x}");
        }
    }

    proptest! {
        #[test]
        fn rows_are_rounded_alike_by_every_instruction(bits in proptest::collection::vec(any::<u32>(), 1..200)) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let buffer = RowBuffer::rounded(Form::Bf16, &x, x.len());
            let rows = buffer.rows();
            for (i, x) in x.iter().enumerate() {
                // SAFETY: the element is in the row.
                let found = unsafe { *rows.bf16().add(i / BLOCK * rows.block_stride() + i % BLOCK) };
                prop_assert_eq!(found, bf16_bits(*x), "{:x}", x.to_bits());
            }
        }
    }

    proptest! {
        #[test]
        fn eight_bits_are_within_half_a_step_and_say_their_sum(x in proptest::collection::vec(-100.0f32..100.0, 1..=BLOCK)) {
            let block = ByteBlock::of(&x);
            let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            for (code, x) in block.codes.iter().zip(&x) {
                prop_assert!((f32::from(*code) * block.scale - x).abs() <= 0.501 * largest / 127.0);
            }
            prop_assert!(block.codes[x.len()..].iter().all(|code| *code == 0));
            prop_assert_eq!(block.sum, block.codes.iter().map(|code| i32::from(*code)).sum::<i32>());
            prop_assert_eq!(block.scaled_sum, block.scale * block.sum as f32);
            let buffer = RowBuffer::rounded(Form::Bytes, &[&x[..], &x].concat(), x.len());
            let (blocks, _) = buffer.rows().bytes();
            // SAFETY: there are two rows of one block each.
            let rows = unsafe { [&*blocks, &*blocks.add(1)] };
            prop_assert_eq!(rows, [&block; 2]);
        }
    }

    #[test]
    fn eight_bits_of_nothing_and_of_too_little_are_zeros_and_of_no_number_none() {
        for x in [0.0, 1e-31, -1e-40] {
            assert_eq!(ByteBlock::of(&[x; 3]).codes, [0; BLOCK]);
        }
        assert_eq!(ByteBlock::of(&[1e-29, 0.0]).codes[..2], [127, 0]);
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(ByteBlock::of(&[1.0, x, 2.0]).scale.is_nan());
        }
    }

    #[test]
    fn gathered_rows_are_those_asked_for_whatever_the_thread_had_before() {
        const WIDTH: usize = 40;
        let x = [0, 100].map(|first| (0..5 * WIDTH).map(|i| (first + i % 77) as f32).collect::<Vec<f32>>());
        let rounded = x.each_ref().map(|x| RowBuffer::rounded(Form::Bf16, x, WIDTH));
        let gathers = rounded.each_ref().map(|buffer| Gather::new(buffer.rows()));
        for (of, part, from) in
            [(0, 0, [3, 1]), (0, 0, [3, 1]), (1, 0, [3, 1]), (1, 1, [0, 4]), (0, 1, [2, 2]), (0, 0, [3, 1])]
        {
            gathers[of].with(part, &from, |rows| {
                assert_eq!((rows.len(), rows.width()), (2, WIDTH));
                for (row, from) in from.into_iter().enumerate() {
                    for i in 0..WIDTH {
                        let at = i / BLOCK * rows.block_stride() + row * rows.row_stride() + i % BLOCK;
                        // SAFETY: the element is in the row.
                        let found = bf16::from_bits(unsafe { *rows.bf16().add(at) }).to_f32();
                        assert_eq!(found, x[of][from as usize * WIDTH + i], "element {i} of row {from} of {of}");
                    }
                }
            });
        }
    }

    #[test]
    fn rows_end_in_zeros_whatever_the_memory_held_before() {
        drop(RowBuffer::rounded(Form::Bf16, &[f32::NAN; 40 * 64], 64));
        let x: Vec<f32> = (0..3 * 37).map(|x| x as f32).collect();
        let buffer = RowBuffer::rounded(Form::Bf16, &x, 37);
        let rows = buffer.rows();
        for (row, block) in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)] {
            let at = block * rows.block_stride() + row * rows.row_stride();
            // SAFETY: rows go on to a whole block.
            let bits = unsafe { std::slice::from_raw_parts(rows.bf16().add(at), BLOCK) };
            let row = &x[row * 37..(row + 1) * 37];
            let want = row.iter().copied().chain(std::iter::repeat(0.0)).skip(block * BLOCK).take(BLOCK);
            assert!(bits.iter().map(|bits| bf16::from_bits(*bits).to_f32()).eq(want));
        }
    }
}
