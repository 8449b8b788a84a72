//! Where the time of forward passes goes: a guard to put around any of them.
//!
//! ```
//! use moe_serve::ops::profile::{Part, Profiler, timed};
//!
//! let profiler = Profiler::start(None);
//! let sum: u32 = timed(Part::Attention, 0, || (0..1000).sum());
//! let profile = profiler.finish();
//! assert_eq!(sum, 499500);
//! assert!(profile.seconds(Part::Attention) <= profile.wall.as_secs_f64());
//! ```

use candle_core::Device;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Norm, projections, rotation, scores and values, output projection.
    Attention,
    /// Gate logits, and the router's choice on the host.
    Routing,
    /// The routed experts.
    Experts,
    /// Shared experts and dense feed-forward nets.
    Dense,
    /// Logits.
    LmHead,
    /// Scores, draws, grammars, text.
    Sampling,
}

impl Part {
    /// Every part there is, in the order of a step.
    pub const ALL: [Self; 6] =
        [Self::Attention, Self::Routing, Self::Experts, Self::Dense, Self::LmHead, Self::Sampling];

    /// Its name in series and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Routing => "routing",
            Self::Experts => "experts",
            Self::Dense => "dense",
            Self::LmHead => "lm_head",
            Self::Sampling => "sampling",
        }
    }
}

/// Times the parts of what this thread does from its start to its finish. Dropping it unfinished forgets them.
///
/// Profilers nest, and only the innermost one times: a thread of the pool that waits for its own work may meanwhile take
/// up another engine's step.
pub struct Profiler {
    started: Instant,
    outer: Option<Recorder>,
}

/// What was timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// From start to finish; more than all parts together.
    pub wall: Duration,
    /// By part and layer. Layers are counted among those that have the part.
    pub parts: BTreeMap<(Part, usize), Duration>,
}

struct Recorder {
    device: Option<Device>,
    parts: BTreeMap<(Part, usize), Duration>,
}

thread_local! {
    static CURRENT: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

impl Profiler {
    /// Begins to time the parts of what this thread does. A `device` that works asynchronously is waited for after each
    /// part: times are then true, and the whole takes longer.
    pub fn start(device: Option<&Device>) -> Self {
        let device = device.filter(|d| !d.is_cpu()).cloned();
        let outer = CURRENT.replace(Some(Recorder { device, parts: BTreeMap::new() }));
        Self { started: Instant::now(), outer }
    }

    /// Times nothing, and keeps what follows from any profiler around it.
    pub fn off() -> Self {
        Self { started: Instant::now(), outer: CURRENT.take() }
    }

    /// What was timed.
    pub fn finish(self) -> Profile {
        let parts = CURRENT.take().map(|recorder| recorder.parts).unwrap_or_default();
        Profile { wall: self.started.elapsed(), parts }
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        CURRENT.set(self.outer.take());
    }
}

impl Profile {
    /// Seconds of one part in all layers.
    pub fn seconds(&self, part: Part) -> f64 {
        self.parts.iter().filter(|((p, _), _)| *p == part).map(|(_, time)| time.as_secs_f64()).sum()
    }
}

/// Does `work`, and times it as `part` of `layer` if this thread is profiled.
pub fn timed<T>(part: Part, layer: usize, work: impl FnOnce() -> T) -> T {
    let profiled = CURRENT.with_borrow(Option::is_some);
    if !profiled {
        return work();
    }
    let started = Instant::now();
    let done = work();
    CURRENT.with_borrow_mut(|current| {
        if let Some(recorder) = current {
            // A device that failed says so to the next one who asks it for something.
            let _ = recorder.device.as_ref().map(Device::synchronize);
            *recorder.parts.entry((part, layer)).or_default() += started.elapsed();
        }
    });
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_timed_between_start_and_finish_on_this_thread_alone() {
        timed(Part::Experts, 0, || ());
        let profiler = Profiler::start(None);
        timed(Part::Experts, 1, || std::thread::sleep(Duration::from_millis(2)));
        timed(Part::Experts, 1, || std::thread::sleep(Duration::from_millis(2)));
        std::thread::scope(|s| drop(s.spawn(|| timed(Part::Dense, 0, || ()))));
        let profile = profiler.finish();
        assert_eq!(profile.parts.keys().collect::<Vec<_>>(), [&(Part::Experts, 1)]);
        assert!(profile.seconds(Part::Experts) >= 0.004 && profile.wall >= Duration::from_millis(4));
        timed(Part::Experts, 0, || ());
        assert_eq!(Profiler::start(None).finish().parts.len(), 0);
    }

    #[test]
    fn a_profiler_within_another_takes_nothing_from_it_and_gives_it_nothing() {
        let profiler = Profiler::start(None);
        timed(Part::Attention, 0, || {
            let inner = Profiler::start(None);
            timed(Part::Experts, 3, || ());
            assert_eq!(inner.finish().parts.keys().collect::<Vec<_>>(), [&(Part::Experts, 3)]);
            let off = Profiler::off();
            timed(Part::Dense, 0, || ());
            assert!(off.finish().parts.is_empty());
            drop(Profiler::off());
        });
        assert_eq!(profiler.finish().parts.keys().collect::<Vec<_>>(), [&(Part::Attention, 0)]);
    }
}
