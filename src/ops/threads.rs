//! How many threads compute.

use crate::types::Threads;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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

/// How long a thread looks for work before it goes to sleep: longer than what is computed by one thread between two things
/// that all compute. To be woken takes a thread some tens of microseconds.
const AWAKE: Duration = Duration::from_micros(200);

/// Runs `f`, which is a step or several, on a thread of the pool, while the others stay awake.
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    keep_freed_memory();
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let own = rayon::current_thread_index();
        let done = &done;
        scope.spawn_broadcast(move |_, thread| {
            if Some(thread.index()) != own {
                keep_awake(done);
            }
        });
        let _done = Done(done);
        f()
    })
}

/// Lets the process keep what activations give back: the next ones take the same. Else the C library returns much of it
/// to the system after every operation, and the next one waits for pages that come again as zeros. It is for steps, after
/// weights are loaded: what loading frees does go back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    /// The most that the library allows: what is larger goes back as soon as it is freed.
    const MMAP_THRESHOLD: libc::c_int = 32 << 20;
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: the settings hold for what is allocated from now on, on all threads; a refusal does no harm.
    ONCE.call_once(|| unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    });
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

/// Does what work there is until `done`, or until there was none for a while.
fn keep_awake(done: &AtomicBool) {
    let mut since = Instant::now();
    while !done.load(Ordering::Relaxed) && since.elapsed() < AWAKE {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => since = Instant::now(),
            // Whatever else wants the core shall have it.
            _ => std::thread::yield_now(),
        }
    }
}

/// Says so when it is dropped, be it by a panic.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whether this thread is known to be the only one of the process.
fn alone() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn what_runs_on_the_pool_runs_there_gives_its_result_and_may_panic_or_nest() {
        assert!(rayon::current_thread_index().is_none());
        for _ in 0..100 {
            let sum = on_pool(|| {
                assert!(rayon::current_thread_index().is_some());
                on_pool(|| (0..1000u32).into_par_iter().with_max_len(1).sum::<u32>())
            });
            assert_eq!(sum, 499_500);
        }
        let panicked = std::panic::catch_unwind(|| on_pool::<()>(|| panic!("as tests do")));
        assert!(panicked.is_err());
        // Those that were awake meanwhile are there again.
        assert_eq!(on_pool(|| (0..1000u32).into_par_iter().sum::<u32>()), 499_500);
    }

    #[test]
    fn threads_that_find_nothing_to_do_go_to_sleep_before_a_long_step_is_over() {
        let done = AtomicBool::new(false);
        let started = Instant::now();
        keep_awake(&done);
        assert!(started.elapsed() >= AWAKE);
        done.store(true, Ordering::Relaxed);
        keep_awake(&done);
    }
}
