//! Plain values shared by every module: ids, shapes, requests with their limits, and the
//! parsed (not yet resolved) command-line choices. Knows neither candle nor tokio.

mod choice;
mod request;
mod router_spec;
mod shape;
mod work;

pub use choice::{DeviceChoice, DtypeChoice};
pub use request::{
    FinishReason, GenerateRequest, GrammarSpec, LOGPROBS_MAX, LimitError, Limits, N_MAX, PromptScoring, SamplingParams,
    Usage,
};
pub use router_spec::{RouterSpec, SpecError};
pub use shape::{Activation, AttentionShape, FfnShape, LayerShape, ModelShape, MoeShape};
pub use work::{Flops, Work};

/// Bytes as hexadecimal digits: how sums are written.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A token of the checkpoint's vocabulary.
pub type TokenId = u32;

/// One sequence in the engine; unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A block of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
