//! The offline harness: tasks as lm-eval has them, run on the engine that serves (or on any OpenAI server), every router
//! beside its static control.
//!
//! ```text
//! task (samples) ─► question (token ids) ─► run ─► Lm ─► log (samples.jsonl) ─► summary ─► compare ─► Results ─► report
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `task/` | prompts, data, judgements: one file per task, one line each in `TASKS` |
//! | `lm.rs`, `in_process.rs`, `http.rs` | the model that is asked |
//! | `run.rs`, `log.rs` | asking many questions at a time, and going on after a stop |
//! | `compare.rs`, `summary.rs`, `stats/`, `findings.rs` | static controls, figures, tests, sentences |
//! | `results.rs`, `report/` | the document, and how it is shown |
//! | `profile.rs` | what a workload costs, part by part |

pub mod compare;
pub mod document;
mod findings;
mod http;
mod in_process;
mod lm;
mod log;
mod profile;
mod question;
pub mod report;
pub mod results;
mod run;
pub mod stats;
mod suite;
mod summary;
pub mod task;

pub use findings::findings;
pub use http::{Http, HttpOptions};
pub use in_process::InProcess;
pub use lm::{Chosen, Generated, How, Lm, LmError, Reads, Routed, Scored};
pub use log::{Key, Log, LogError, Outcome, Said};
pub use profile::{ProfileReport, Workload, profile};
pub use question::{Question, TokenAsk};
pub use run::{RunError, Runner, kl_divergence};
pub use suite::{Material, PERPLEXITY, SuiteError, SuiteOptions, Task, TextOptions, read};
pub use summary::Bootstrap;
