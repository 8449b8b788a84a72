//! How many threads compute.

use crate::types::Threads;

/// Why the threads could not be had.
#[derive(Debug, thiserror::Error)]
#[error("--threads {threads}: {source}")]
pub struct ThreadsError {
    threads: Threads,
    source: rayon::ThreadPoolBuildError,
}

/// Lets this process compute on `threads` threads; without a number on as many as RAYON_NUM_THREADS says, or one per core.
/// For the beginning of `main`: threads that compute already stay as many as they are.
///
/// # Errors
/// A pool that is there already, or a system that has no room for so many threads.
pub fn use_threads(threads: Option<Threads>) -> Result<(), ThreadsError> {
    let Some(threads) = threads else { return Ok(()) };
    if alone() {
        // candle has pools of its own, whose size is asked of this variable (and of CANDLE_NUM_THREADS before it).
        // SAFETY: no other thread is there that could read the environment.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get());
    pool.build_global().map_err(|source| ThreadsError { threads, source })
}

/// Whether this thread is known to be the only one of the process.
fn alone() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}
