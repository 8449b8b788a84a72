//! Packed weights kept on disk, so that the next start maps them instead of packing anew.

use super::aligned::Aligned;
use memmap2::{Advice, Mmap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Raised whenever packed weights change their layout. Files begin with it, in this machine's byte order.
const LAYOUT: u64 = u64::from_be_bytes(*b"moepack3");
/// What files begin with, and every buffer's announcement, take a page, so that buffers begin at one: products with
/// weights from a mere cache line on were 4 % slower.
const PAGE: usize = 4096;
/// Bytes of a huge page. Linux keeps a file in pages as large as the pieces it is written in, and maps them as they are.
const PIECE: usize = 2 << 20;

/// The packed weights of one checkpoint, in one file: buffer after buffer in the order they are packed in, each behind its
/// length. Which checkpoint and which form is in the file's name.
#[derive(Debug)]
pub struct PackCache {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Reads {
        map: Arc<Mmap>,
        at: usize,
    },
    /// To a file of another name, which is given its own when it is whole.
    Writes(PathBuf, Pieces),
    Closed,
    /// What was read did not fit, or writing failed.
    Failed(String),
}

impl PackCache {
    /// The weights called `key` in `dir`, to be read if they are there and written if not.
    ///
    /// # Errors
    /// A directory or file that cannot be made or read, or a file that is no cache.
    pub fn open(dir: &Path, key: &str) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let path = dir.join(format!("{key}.packed"));
        let state = match File::open(&path) {
            Ok(file) => read(file)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let partial = dir.join(format!("{key}.{}.partial", std::process::id()));
                let mut pieces = Pieces { file: File::create(&partial)?, piece: Vec::with_capacity(PIECE) };
                pieces.write(&page(LAYOUT))?;
                State::Writes(partial, pieces)
            }
            Err(error) => return Err(error),
        };
        Ok(Self { path, state: Mutex::new(state) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the weights are there, so that the checkpoint's need not be read.
    pub fn reads(&self) -> bool {
        matches!(*self.state(), State::Reads { .. } | State::Failed(_))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends reading, or gives what was written its name.
    ///
    /// # Errors
    /// What was read does not fit the checkpoint, or something could not be written.
    pub fn finish(&self) -> Result<(), String> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Closed) {
            State::Reads { map, at } if at != map.len() => Err(format!("{} bytes were read of {}", at, map.len())),
            State::Writes(partial, pieces) => {
                let named = pieces.finish().and_then(|()| std::fs::rename(&partial, &self.path));
                named.map_err(|error| {
                    remove(&partial);
                    error.to_string()
                })
            }
            State::Failed(problem) => Err(problem),
            State::Reads { .. } | State::Closed => Ok(()),
        }
    }

    /// The next buffer, of `len` words, if the weights are there.
    fn next<W: Word>(&self, len: usize) -> Option<Packed<W>> {
        let mut state = self.state();
        match &mut *state {
            State::Reads { map, at } => {
                let bytes = len * size_of::<W>();
                let start = *at + PAGE;
                let end = start + bytes.next_multiple_of(PAGE);
                let announced = map.get(*at..*at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
                if announced == Some(bytes as u64) && end <= map.len() {
                    *at = end;
                    return Some(Packed::Mapped { map: map.clone(), start, len });
                }
                let problem = format!("a buffer of {bytes} bytes was expected at {at}, where there is {announced:?}");
                *state = State::Failed(problem);
                Some(Packed::Own(Aligned::zeroed(len)))
            }
            // Loading goes on with zeros to where `finish` tells.
            State::Failed(_) => Some(Packed::Own(Aligned::zeroed(len))),
            State::Writes(..) | State::Closed => None,
        }
    }

    fn write<W: Word>(&self, words: &[W]) {
        let mut state = self.state();
        let State::Writes(partial, pieces) = &mut *state else { return };
        // SAFETY: plain numbers, all bytes of which are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words)) };
        let padding = bytes.len().next_multiple_of(PAGE) - bytes.len();
        let written = [&page(bytes.len() as u64), bytes, &[0; PAGE][..padding]];
        let written = written.into_iter().try_for_each(|bytes| pieces.write(bytes));
        if let Err(error) = written {
            tracing::warn!("{}: {error}; the next start packs the weights anew", self.path.display());
            remove(partial);
            *state = State::Closed;
        }
    }
}

impl Drop for PackCache {
    fn drop(&mut self) {
        if let State::Writes(partial, _) = &*self.state() {
            remove(partial);
        }
    }
}

/// A file that is written in whole pieces.
#[derive(Debug)]
struct Pieces {
    file: File,
    /// What is not written yet: less than a piece.
    piece: Vec<u8>,
}

impl Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((first, later)) = bytes.split_at_checked(PIECE - self.piece.len()) else {
            self.piece.extend_from_slice(bytes);
            return Ok(());
        };
        self.piece.extend_from_slice(first);
        self.file.write_all(&self.piece)?;
        let (whole, rest) = later.split_at(later.len() / PIECE * PIECE);
        self.file.write_all(whole)?;
        self.piece.clear();
        self.piece.extend_from_slice(rest);
        Ok(())
    }

    /// Writes the rest, and comes back when all of it is on disk.
    fn finish(mut self) -> io::Result<()> {
        self.file.write_all(&self.piece)?;
        self.file.sync_all()
    }
}

fn remove(partial: &Path) {
    // What cannot be removed is in no one's way: it is never read.
    let _ = std::fs::remove_file(partial);
}

fn read(mut file: File) -> io::Result<State> {
    let mut first = [0; PAGE];
    let read = file.read(&mut first)?;
    if read < PAGE || first != page(LAYOUT) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "is no cache of this version's; remove it"));
    }
    // SAFETY: files of this name are written under another one and renamed when whole, and no one writes to them again.
    let map = Arc::new(unsafe { Mmap::map(&file)? });
    fetch(map.clone());
    Ok(State::Reads { map, at: PAGE })
}

/// Asks for the pages, huge ones if may be, while the start goes on. All of it may be refused without harm: pages that
/// are not there come when they are used.
#[cfg(target_os = "linux")]
fn fetch(map: Arc<Mmap>) {
    let _ = map.advise(Advice::HugePage);
    // Unlike `WillNeed`, which reads small pages whatever was asked for.
    let fetch = move || map.advise(Advice::PopulateRead);
    let _ = std::thread::Builder::new().name("pack-cache".into()).spawn(fetch);
}

#[cfg(not(target_os = "linux"))]
fn fetch(map: Arc<Mmap>) {
    let _ = map.advise(Advice::WillNeed);
}

fn page(number: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&number.to_ne_bytes());
    page
}

/// Numbers of which any bytes are one.
///
/// # Safety
/// There must be no bytes that are none, and no padding.
pub(super) unsafe trait Word: Copy + Default {}
// SAFETY: plain numbers.
unsafe impl Word for u8 {}
// SAFETY: as above.
unsafe impl Word for u16 {}
// SAFETY: as above.
unsafe impl Word for u32 {}
// SAFETY: as above.
unsafe impl Word for f32 {}

/// Words from the start of a cache line on: packed by this process, or mapped from a cache.
#[derive(Debug)]
pub(super) enum Packed<W> {
    Own(Aligned<W>),
    Mapped {
        map: Arc<Mmap>,
        /// Byte of the first word.
        start: usize,
        /// Words.
        len: usize,
    },
}

impl<W: Word> Packed<W> {
    /// `len` words out of `cache`, if it has them.
    pub(super) fn cached(cache: Option<&PackCache>, len: usize) -> Option<Self> {
        cache?.next(len)
    }

    /// `words`, which `cache` shall keep.
    pub(super) fn keep(words: Aligned<W>, cache: Option<&PackCache>) -> Self {
        if let Some(cache) = cache {
            cache.write(&words);
        }
        Self::Own(words)
    }
}

impl<W: Word> Deref for Packed<W> {
    type Target = [W];

    fn deref(&self) -> &[W] {
        match self {
            Self::Own(words) => words,
            Self::Mapped { map, start, len } => {
                let bytes = &map[*start..*start + len * size_of::<W>()];
                // SAFETY: a whole number of words that begin at a cache line, and any bytes are a word.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), *len) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aligned(words: &[f32]) -> Aligned<f32> {
        let mut aligned = Aligned::zeroed(words.len());
        aligned.copy_from_slice(words);
        aligned
    }

    fn files(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn what_was_kept_comes_back_in_order_and_at_pages() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PackCache::open(dir.path(), "key").unwrap();
        assert!(!cache.reads());
        assert!(Packed::<f32>::cached(Some(&cache), 3).is_none());
        Packed::keep(aligned(&[1.0, 2.0, 3.0]), Some(&cache));
        Packed::keep(Aligned::<u8>::zeroed(0), Some(&cache));
        Packed::keep(aligned(&[4.0; 17]), Some(&cache));
        cache.finish().unwrap();
        assert_eq!(files(dir.path()), ["key.packed"]);

        let cache = PackCache::open(dir.path(), "key").unwrap();
        assert!(cache.reads());
        let first = Packed::<f32>::cached(Some(&cache), 3).unwrap();
        assert!(Packed::<u8>::cached(Some(&cache), 0).unwrap().is_empty());
        let second = Packed::<f32>::cached(Some(&cache), 17).unwrap();
        cache.finish().unwrap();
        drop(cache);
        assert_eq!((&first[..], &second[..]), (&[1.0, 2.0, 3.0][..], &[4.0; 17][..]));
        assert_eq!((first.as_ptr() as usize % PAGE, second.as_ptr() as usize % PAGE), (0, 0));
    }

    #[test]
    fn a_file_grows_by_whole_pieces_and_comes_back_as_it_was() {
        let buffer = |from: u32, len: u32| {
            let mut words = Aligned::zeroed(len as usize);
            words.iter_mut().zip(from..).for_each(|(word, value)| *word = value);
            words
        };
        let sizes = [5u32, (PIECE / 4) as u32 - 1024, 3, (PIECE / 4 * 5 / 2) as u32, 1];
        let dir = tempfile::tempdir().unwrap();
        let cache = PackCache::open(dir.path(), "key").unwrap();
        let mut lengths = Vec::new();
        for (from, len) in (1..).zip(sizes) {
            Packed::keep(buffer(from, len), Some(&cache));
            let partial = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
            lengths.push(partial.metadata().unwrap().len());
        }
        assert!(lengths.iter().all(|len| len % PIECE as u64 == 0) && lengths[4] > 0, "{lengths:?}");
        cache.finish().unwrap();

        let cache = PackCache::open(dir.path(), "key").unwrap();
        for (from, len) in (1..).zip(sizes) {
            let words = Packed::<u32>::cached(Some(&cache), len as usize).unwrap();
            assert!(words[..] == buffer(from, len)[..], "a buffer of {len} words changed");
        }
        cache.finish().unwrap();
    }

    #[test]
    fn what_does_not_fit_is_told_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PackCache::open(dir.path(), "key").unwrap();
        Packed::keep(aligned(&[1.0; 3]), Some(&cache));
        cache.finish().unwrap();

        let too_few = PackCache::open(dir.path(), "key").unwrap();
        assert!(too_few.finish().unwrap_err().contains("4096 bytes were read of 12288"));
        let wrong = PackCache::open(dir.path(), "key").unwrap();
        assert_eq!(Packed::<f32>::cached(Some(&wrong), 5).unwrap().len(), 5);
        assert!(wrong.reads());
        assert!(wrong.finish().unwrap_err().contains("20 bytes was expected at 4096, where there is Some(12)"));
        let beyond = PackCache::open(dir.path(), "key").unwrap();
        Packed::<f32>::cached(Some(&beyond), 3).unwrap();
        assert_eq!(Packed::<f32>::cached(Some(&beyond), 3).unwrap().len(), 3);
        assert!(beyond.finish().unwrap_err().contains("at 12288, where there is None"));
        std::fs::write(dir.path().join("other.packed"), "something else").unwrap();
        assert!(PackCache::open(dir.path(), "other").unwrap_err().to_string().contains("no cache"));
    }

    #[test]
    fn a_start_that_ends_early_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = PackCache::open(dir.path(), "key").unwrap();
        Packed::keep(aligned(&[1.0; 3]), Some(&cache));
        drop(cache);
        assert!(files(dir.path()).is_empty());
    }
}
