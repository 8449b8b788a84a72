//! The built binary as a process: started, talked to, ended.

use crate::support::{Series, client};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A process of the binary; killed when dropped.
pub struct Process {
    child: Child,
    pub stdout: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts the binary, without what this environment might tell it.
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[])
    }

    /// The same with these variables set.
    pub fn start_with(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_binary(env!("CARGO_BIN_EXE_moe-serve"), args, env)
    }

    /// Another binary, in the repository's root.
    pub fn start_binary(binary: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary);
        for (name, _) in std::env::vars() {
            if ["MOE_", "RUST_", "HF_", "OTEL_", "OPENAI_"].iter().any(|p| name.starts_with(p)) {
                command.env_remove(name);
            }
        }
        command.args(args).envs(env.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (lines, stdout) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let mut err = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            err.read_to_string(&mut text).unwrap();
            text
        });
        Self { child, stdout, stderr: Some(stderr) }
    }

    /// Waits until the process ends by itself; its exit status and what it wrote to stderr.
    pub fn end(&mut self, limit: Duration) -> (ExitStatus, String) {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "still running after {limit:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        (status, self.stderr.take().unwrap().join().unwrap())
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The binary while it serves.
pub struct Serving {
    pub process: Process,
    /// What it printed up to the address.
    pub lines: Vec<String>,
    pub url: String,
}

impl Serving {
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[])
    }

    /// With these variables set.
    pub fn start_with(args: &[&str], env: &[(&str, &str)]) -> Self {
        let process = Process::start_with(&[&["--port", "0"], args].concat(), env);
        let mut lines = Vec::new();
        let url = loop {
            let line = process.stdout.recv_timeout(Duration::from_secs(60)).expect("the address line in time");
            lines.push(line.clone());
            if let Some(address) = line.strip_prefix("address") {
                break address.split_whitespace().next().unwrap().to_string();
            }
        };
        Self { process, lines, url }
    }

    /// What it printed on `name`.
    pub fn line(&self, name: &str) -> &str {
        let line = self.lines.iter().find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("no line on {name} in {:?}", self.lines))
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        self.url.split_once("://").unwrap().1
    }

    pub async fn post(&self, body: Value) -> reqwest::Response {
        let response = client().post(format!("{}/v1/completions", self.url)).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        response
    }

    /// Status and answer, whatever they are.
    pub async fn ask(&self, path: &str, body: Value) -> (u16, Value) {
        let response = client().post(format!("{}{path}", self.url)).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn series(&self) -> Series {
        Series::read(&client().get(format!("{}/metrics", self.url)).send().await.unwrap().text().await.unwrap())
    }

    /// Reads the metrics until they are as `wanted`.
    pub async fn series_when(&self, what: &str, wanted: impl Fn(&Series) -> bool) -> Series {
        Series::when(Duration::from_secs(60), what, async || self.series().await, wanted).await
    }

    /// Ends it in order; all that it wrote, and what of that went to stderr.
    pub fn finish(mut self) -> (String, String) {
        self.process.signal("TERM");
        let (status, stderr) = self.process.end(Duration::from_secs(60));
        assert_eq!(status.code(), Some(0), "{stderr}");
        let stdout: Vec<String> = self.lines.drain(..).chain(self.process.stdout.iter()).collect();
        (stdout.join("\n") + &stderr, stderr)
    }
}

/// stderr of a start that must fail with `code`.
pub fn refusal(args: &[&str], code: i32) -> String {
    refusal_with(args, &[], code)
}

/// The same with these variables set.
pub fn refusal_with(args: &[&str], env: &[(&str, &str)], code: i32) -> String {
    let mut process = Process::start_with(args, env);
    let (status, stderr) = process.end(Duration::from_secs(60));
    assert_eq!(status.code(), Some(code), "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("backtrace"), "{args:?}: {stderr}");
    assert!(stderr.len() < 1500 && stderr.lines().count() < 12, "{args:?}: not a short message: {stderr}");
    stderr
}
