//! What was measured, as a table and as JSON.

use super::Settings;
use super::settings::Test;
use super::steps::Measured;
use crate::ops::Machine;
use crate::plot::format::fixed;
use crate::plot::table::{Table, name, plain};
use crate::types::RouterSpec;
use indicatif::HumanBytes;
use serde::Serialize;
use std::fmt;

/// All of it. Its fields are the JSON document's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub model: String,
    pub random_weights: bool,
    pub layers: usize,
    /// What weights are kept in.
    pub dtype: String,
    pub device: String,
    pub threads: usize,
    /// From opening the first file to the packed model.
    pub load_s: f64,
    /// The most memory that was resident, loading included; nothing where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    /// What the machine reads and computes at most; nothing where that was not measured.
    pub read_bytes_per_s: Option<f64>,
    pub peak_flops_per_s: Option<f64>,
    pub runs: Vec<RunReport>,
}

/// A test with a router. What is not said to be of all runs is of the median one (of an even number, the slower of the two).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunReport {
    pub router: String,
    /// `pp512`: a prompt of 512 tokens in one step. `tg32@b16`: 32 steps of 16 sequences.
    pub test: String,
    /// Tokens of the prompt; nothing in decoding.
    pub prompt: Option<usize>,
    /// Steps; nothing for prompts.
    pub generate: Option<usize>,
    /// Sequences.
    pub batch: usize,
    /// Over all sequences.
    pub tokens_per_s: f64,
    /// Of all runs, in order.
    pub tokens_per_s_all: Vec<f64>,
    /// Experts per token and mixture.
    pub mean_k: f64,
    /// That had to be read or written, over all steps.
    pub bytes_moved: u64,
    pub flops: u64,
    /// Of the time, what moving the bytes at the machine's speed would take.
    pub bandwidth_share: Option<f64>,
    /// Of the time, what the FLOPs at the machine's speed would take.
    pub flops_share: Option<f64>,
    /// The larger of the two.
    pub roofline_share: Option<f64>,
}

impl RunReport {
    pub(super) fn new(
        router: &RouterSpec,
        test: Test,
        settings: &Settings,
        measured: &[Measured],
        machine: Option<&Machine>,
    ) -> Self {
        let (prompt, generate, batch) = match test {
            Test::Prefill { prompt } => (Some(prompt), None, 1),
            Test::Decode { batch, .. } => (None, Some(settings.generate), batch),
        };
        let rate = |run: &Measured| test.tokens() as f64 / run.seconds;
        let mut sorted = measured.to_vec();
        sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let median = sorted[sorted.len() / 2];
        let share = |least_s: Option<f64>| least_s.map(|least_s| least_s / median.seconds);
        let flops = median.work.forward.ran;
        let bandwidth_share = share(machine.map(|machine| median.bytes as f64 / machine.read_bytes_per_s));
        let flops_share = share(machine.map(|machine| flops as f64 / machine.flops_per_s));
        Self {
            router: router.to_string(),
            test: test.to_string(),
            prompt,
            generate,
            batch,
            tokens_per_s: rate(&median),
            tokens_per_s_all: measured.iter().map(rate).collect(),
            mean_k: median.work.experts_per_token(),
            bytes_moved: median.bytes,
            flops,
            bandwidth_share,
            flops_share,
            roofline_share: bandwidth_share.zip(flops_share).map(|(bytes, flops)| bytes.max(flops)),
        }
    }

    /// The slowest and the fastest run.
    fn range(&self) -> (f64, f64) {
        let rates = self.tokens_per_s_all.iter().copied();
        (rates.clone().fold(f64::INFINITY, f64::min), rates.fold(0.0, f64::max))
    }
}

/// Tokens a second with about four digits.
fn rate(rate: f64) -> String {
    fixed(rate, if rate < 100.0 { 2 } else { 1 })
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".into(), |share| format!("{:.0} %", 100.0 * share))
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new(&[("test", true), ("router", true)]);
        for title in ["tokens/s", "slowest", "fastest", "to first", "mean k", "of memory", "of FLOP/s", "of roofline"] {
            table.column(title);
        }
        for run in &self.runs {
            // Every test begins with the first router.
            let first = self.runs.iter().find(|first| first.test == run.test).map_or(1.0, |first| first.tokens_per_s);
            let (slowest, fastest) = run.range();
            let mut row = vec![name(&run.test), name(&run.router)];
            row.extend([rate(run.tokens_per_s), rate(slowest), rate(fastest)].map(plain));
            row.extend([format!("{:.2}×", run.tokens_per_s / first), format!("{:.2}", run.mean_k)].map(plain));
            row.extend([run.bandwidth_share, run.flops_share, run.roofline_share].map(|s| plain(percent(s))));
            table.rows.push(row);
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = if self.random_weights { "random weights" } else { "its own weights" };
        writeln!(f, "model      {}: {} layers, {weights}, loaded in {:.1} s", self.model, self.layers, self.load_s)?;
        writeln!(f, "runs on    {} with {} weights", self.device, self.dtype)?;
        write!(f, "memory     {} weights, {} KV cache", HumanBytes(self.weight_bytes), HumanBytes(self.kv_bytes))?;
        match self.peak_rss_bytes {
            Some(peak) => writeln!(f, ", {} at most in all", HumanBytes(peak))?,
            None => writeln!(f)?,
        }
        if let (Some(bytes), Some(flops)) = (self.read_bytes_per_s, self.peak_flops_per_s) {
            writeln!(f, "machine    reads {:.1} GB/s, does {:.0} GFLOP/s", bytes / 1e9, flops / 1e9)?;
        }
        write!(f, "\n{}", self.table().aligned())
    }
}
