//! Buffers that begin at a cache line, so that no vector or tile row straddles two.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;
/// From this size on, the system is asked for huge pages: fewer address translations while weights stream by.
const HUGE_PAGES_MIN: usize = 4 << 20;

/// `len` words from the start of a cache line on.
#[derive(Debug)]
pub(super) struct Aligned<W> {
    words: Vec<W>,
    start: usize,
    len: usize,
}

impl<W: Copy + Default> Aligned<W> {
    /// Zeros, which the system hands out as they are touched: by whoever fills them first.
    pub(super) fn zeroed(len: usize) -> Self {
        let words = vec![W::default(); len + LINE / size_of::<W>()];
        let start = words.as_ptr().align_offset(LINE);
        let aligned = Self { words, start, len };
        advise_huge_pages(&aligned);
        aligned
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
    const PAGE: usize = 4096;
    let (start, bytes) = (words.as_ptr() as usize, size_of_val(words));
    if bytes >= HUGE_PAGES_MIN {
        let first = start.next_multiple_of(PAGE);
        let len = (start + bytes - first) / PAGE * PAGE;
        // SAFETY: whole pages within a buffer of ours, whose content the advice does not change. It may be refused
        // without harm.
        unsafe { libc::madvise(first as *mut libc::c_void, len, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages<W>(_: &[W]) {}
