//! The server as seen from outside: its series and its process.

use crate::client::{Client, Failure};
use std::time::{Duration, Instant};

/// What the server says of itself at one time.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<(String, f64)>);

impl Series {
    pub async fn fetch(client: &Client) -> Result<Self, Failure> {
        Self::read(&client.get("/metrics").await?)
    }

    fn read(text: &str) -> Result<Self, Failure> {
        let pair = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_string(), value.parse().ok()?))
        };
        let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
        let pairs = lines.map(|l| pair(l).ok_or_else(|| Failure::Corrupted(format!("no series: {l}"))));
        pairs.collect::<Result<_, _>>().map(Self)
    }

    /// The sum of all series called `name`; 0 where there is none.
    pub fn sum(&self, name: &str) -> f64 {
        let called = |series: &str| series.strip_prefix(name).is_some_and(|r| r.is_empty() || r.starts_with('{'));
        self.0.iter().filter(|(s, _)| called(s)).map(|(_, value)| value).sum()
    }

    /// Every series called `name`: its labels, and its value.
    pub fn labelled(&self, name: &str) -> Vec<(&str, f64)> {
        let labels = |s: &'_ String| s.strip_prefix(name).is_some_and(|r| r.starts_with('{'));
        self.0.iter().filter(|(s, _)| labels(s)).map(|(s, value)| (&s[name.len()..], *value)).collect()
    }

    pub fn running(&self) -> f64 {
        self.sum("moe_requests_running")
    }

    pub fn waiting(&self) -> f64 {
        self.sum("moe_requests_waiting")
    }

    /// The share of KV blocks in use.
    pub fn kv_usage(&self) -> f64 {
        self.sum("moe_kv_cache_usage_ratio")
    }

    pub fn idle(&self) -> bool {
        self.running() == 0.0 && self.waiting() == 0.0 && self.kv_usage() == 0.0
    }
}

/// The series once nothing runs, waits or holds KV blocks; or, after `patience`, those of a server that is not idle.
pub async fn when_idle(client: &Client, patience: Duration) -> Result<Series, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let series = Series::fetch(client).await?;
        if series.idle() || Instant::now() >= deadline {
            return Ok(series);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What the kernel says of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    pub rss_mib: f64,
    pub threads: u64,
    pub files: u64,
}

impl Process {
    /// # Errors
    /// A process that is not there, or a system without `/proc`.
    pub fn read(pid: u32) -> Result<Self, String> {
        let path = format!("/proc/{pid}/status");
        let status = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let number = |field: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(field))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let need = |field: &str| number(field).ok_or_else(|| format!("no {field} in {path}"));
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| format!("/proc/{pid}/fd: {e}"))?;
        let (rss_kib, threads) = (need("VmRSS:")?, need("Threads:")?);
        Ok(Self { rss_mib: rss_kib as f64 / 1024.0, threads, files: files.count() as u64 })
    }
}
