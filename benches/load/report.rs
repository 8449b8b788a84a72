//! Figures over many answers.

use serde_json::{Value, json};
use std::time::Duration;

/// Durations of one kind.
#[derive(Default)]
pub struct Durations(Vec<f64>);

impl Durations {
    pub fn add(&mut self, duration: Duration) {
        self.0.push(duration.as_secs_f64() * 1e3);
    }

    pub fn extend(&mut self, durations: &[Duration]) {
        durations.iter().for_each(|d| self.add(*d));
    }

    /// The smallest that at least `share` of all do not exceed, in milliseconds, for every share asked for.
    fn percentiles(&mut self, shares: &[f64]) -> Vec<f64> {
        self.0.sort_by(f64::total_cmp);
        let at = |share: &f64| {
            let rank = (share * self.0.len() as f64).ceil() as usize;
            self.0.get(rank.max(1) - 1).copied().unwrap_or_default()
        };
        shares.iter().map(at).collect()
    }

    /// Prints a row of a table and gives the same as JSON.
    pub fn row(&mut self, name: &str) -> Value {
        let p = self.percentiles(&[0.5, 0.95, 0.99, 1.0]);
        println!("{name:<24} {:>10.1} {:>10.1} {:>10.1} {:>10.1}", p[0], p[1], p[2], p[3]);
        json!({"p50_ms": round(p[0]), "p95_ms": round(p[1]), "p99_ms": round(p[2]), "max_ms": round(p[3])})
    }

    pub fn head() {
        println!("{:<24} {:>10} {:>10} {:>10} {:>10}", "milliseconds", "p50", "p95", "p99", "max");
    }
}

/// Three decimals are more than any of this is good for.
pub fn round(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

/// What went wrong: all counted, the first few kept to be shown.
#[derive(Default)]
pub struct Faults {
    pub lost: usize,
    pub corrupted: usize,
    pub different: usize,
    shown: Vec<String>,
}

impl Faults {
    const SHOWN_MAX: usize = 20;

    pub fn show(&mut self, what: String) {
        if self.shown.len() < Self::SHOWN_MAX {
            eprintln!("FAULT {what}");
            self.shown.push(what);
        }
    }
}
