//! Buffers that begin at a cache line, so that no vector or tile row straddles two.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// From this size on, the system is asked for huge pages: fewer address translations while weights stream by.
const HUGE_PAGES_MIN: usize = 2 * HUGE_PAGE;

/// `len` words from the start of a cache line on; many, from that of a huge page on.
#[derive(Debug, Default)]
pub(super) struct Aligned<W> {
    words: Vec<W>,
    start: usize,
    len: usize,
}

impl<W: Copy + Default> Aligned<W> {
    /// Zeros, which the system hands out as they are touched: by whoever fills them first.
    pub(super) fn zeroed(len: usize) -> Self {
        let aligned = Self::from(if len * size_of::<W>() < HUGE_PAGES_MIN { LINE } else { HUGE_PAGE }, len);
        advise_huge_pages(&aligned);
        aligned
    }

    /// Zeros in pages of any size, for what is filled here and there: memory is taken page by page.
    pub(super) fn sparse(len: usize) -> Self {
        Self::from(LINE, len)
    }

    fn from(align: usize, len: usize) -> Self {
        // Memory before the start is never touched, and so takes none.
        let words = vec![W::default(); len + align / size_of::<W>()];
        let start = words.as_ptr().align_offset(align);
        Self { words, start, len }
    }
}

impl<W> Deref for Aligned<W> {
    type Target = [W];
    fn deref(&self) -> &[W] {
        &self.words[self.start..self.start + self.len]
    }
}

impl<W> DerefMut for Aligned<W> {
    fn deref_mut(&mut self) -> &mut [W] {
        &mut self.words[self.start..self.start + self.len]
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages<W>(words: &[W]) {
    let bytes = size_of_val(words);
    if bytes >= HUGE_PAGES_MIN {
        let start = words.as_ptr().cast_mut().cast();
        // SAFETY: whole pages within a buffer of ours, whose content the advice does not change. It may be refused
        // without harm.
        unsafe { libc::madvise(start, bytes / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages<W>(_: &[W]) {}
