//! Bytes that a step has to move, whatever the kernels do beyond: what bounds it from below by the speed of memory.
//!
//! A weight counts once a step, however many tokens use it: of routed experts those that some token was given, of the
//! embeddings the tokens' rows, and everything else. Keys and values count once as written, and once per sequence and layer
//! as read where some token sees them. Activations are not counted: they fit caches, or could.

use crate::model::CausalLm;
use crate::moe::StepTrace;
use crate::moe::cost::ExpertReads;
use crate::ops::Segment;

/// The price list of one model.
#[derive(Clone, Debug)]
pub(super) struct Traffic {
    dense: u64,
    expert: u64,
    embedding_row: u64,
    /// Keys and values of one position in one layer.
    kv_position: u64,
    /// How far back every layer sees.
    windows: Vec<usize>,
}

impl Traffic {
    pub(super) fn new(model: &CausalLm) -> Self {
        let (shape, size) = (model.shape(), model.backend().dtype().size_in_bytes() as u64);
        let kv_width = (shape.attention.kv_heads * shape.attention.head_dim) as u64;
        Self {
            dense: model.dense_bytes() as u64,
            expert: model.expert_bytes() as u64,
            embedding_row: shape.hidden as u64 * size,
            kv_position: 2 * kv_width * size,
            windows: shape.layers.iter().map(|layer| layer.sliding_window.unwrap_or(usize::MAX)).collect(),
        }
    }

    /// Bytes of a step over `segments`.
    pub(super) fn step(&self, segments: &[Segment], trace: &StepTrace) -> u64 {
        let tokens: usize = segments.iter().map(|segment| segment.len).sum();
        let seen = |segment: &Segment, window: usize| {
            // The first token sees `window` positions back, the others begin where it ends.
            (segment.start + segment.len).min(window.saturating_add(segment.len - 1))
        };
        let kv: usize = self.windows.iter().map(|&w| segments.iter().map(|s| seen(s, w) + s.len).sum::<usize>()).sum();
        let experts = ExpertReads::of(trace, self.expert).bytes_ran;
        self.dense + experts + tokens as u64 * self.embedding_row + kv as u64 * self.kv_position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_moves_what_a_hand_count_says() {
        let traffic =
            Traffic { dense: 1000, expert: 100, embedding_row: 8, kv_position: 4, windows: vec![usize::MAX, 3] };
        let trace = StepTrace { unique_experts: 5, ..StepTrace::default() };
        let segment = |start, len| Segment { start, len, blocks: Vec::new() };
        // Decoding at position 9: 10 positions in the first layer, 3 in the second; one written in each.
        assert_eq!(traffic.step(&[segment(9, 1)], &trace), 1000 + 500 + 8 + 4 * (10 + 3 + 2));
        // A prompt of 6: all that it writes is read, in the second layer too, by one token or another.
        assert_eq!(traffic.step(&[segment(0, 6)], &trace), 1000 + 500 + 6 * 8 + 4 * (6 + 6 + 12));
        // Of several sequences only keys and values, and their own rows, count for each.
        let two = [segment(9, 1), segment(1, 1)];
        assert_eq!(traffic.step(&two, &trace), 1000 + 500 + 2 * 8 + 4 * (10 + 3 + 2 + 2 + 2 + 2));
    }
}
