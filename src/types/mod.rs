//! Plain values shared by every module: ids, shapes, requests with their limits, and the
//! parsed (not yet resolved) command-line choices. Knows neither candle nor tokio.

mod budget;
mod choice;
mod quantization;
mod request;
mod router_spec;
mod shape;
mod work;

pub use budget::BudgetState;
pub use choice::{DeviceChoice, DtypeChoice, Threads};
pub use quantization::{Quantization, WeightFormat};
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

/// Number `index` of the SplitMix64 sequence that starts from `seed` (Steele et al., 2014): draws that depend on nothing
/// but their place.
pub fn split_mix(seed: u64, index: u64) -> u64 {
    let x = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A token of the checkpoint's vocabulary.
pub type TokenId = u32;

/// One sequence in the engine; unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A block of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
