//! Weights that no one trained, for measuring the speed of models whose checkpoint is not at hand.

use crate::ops::HostTensor;
use crate::types::split_mix;
use candle_core::DType;
use half::bf16;
use rayon::prelude::*;

/// What is random of four bf16: signs, mantissas and the lowest bits of exponents.
const DRAWN: u64 = 0x80FF_80FF_80FF_80FF;
/// The rest of their exponents: magnitudes from 2^-7 to 2^-5.
const FIXED: u64 = 0x3C00_3C00_3C00_3C00;
/// Bytes a work item draws.
const BYTES_PER_ITEM: usize = 1 << 16;

/// Draws tensors by seed and name: the same whatever else is drawn, in whatever order, on however many threads.
pub(super) struct RandomWeights {
    pub seed: u64,
}

impl RandomWeights {
    /// The tensor `name` in bf16: weights of norms are 1, biases 0, everything else has mean 0 and a
    /// standard deviation of 0.019, about what families begin their training with.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> HostTensor {
        let count: usize = shape.iter().product();
        let bytes = match shape {
            [_] => bf16::from_f32(f32::from(u8::from(name.ends_with("norm.weight")))).to_le_bytes().repeat(count),
            _ => self.draw(name, count),
        };
        HostTensor::new(DType::BF16, shape.to_vec(), bytes)
    }

    fn draw(&self, name: &str, count: usize) -> Vec<u8> {
        let seed = name.bytes().fold(self.seed, |seed, byte| split_mix(seed, byte.into()));
        let mut bytes = vec![0; 2 * count];
        bytes.par_chunks_mut(BYTES_PER_ITEM).enumerate().for_each(|(item, bytes)| {
            let first = item * (BYTES_PER_ITEM / 8);
            for (i, four) in bytes.chunks_mut(8).enumerate() {
                let word = split_mix(seed, (first + i) as u64) & DRAWN | FIXED;
                four.copy_from_slice(&word.to_le_bytes()[..four.len()]);
            }
        });
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_depend_on_seed_and_name_and_spread_as_said() {
        let weights = RandomWeights { seed: 7 };
        let shape = [301, 333];
        let values = weights.tensor("lm_head.weight", &shape).to_f32();
        assert_eq!(values, weights.tensor("lm_head.weight", &shape).to_f32());
        assert_ne!(values, weights.tensor("model.embed_tokens.weight", &shape).to_f32());
        assert_ne!(values, RandomWeights { seed: 8 }.tensor("lm_head.weight", &shape).to_f32());
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 3e-4 && (std - 0.0188).abs() < 3e-4, "mean {mean}, standard deviation {std}");
    }

    #[test]
    fn norms_are_one_and_biases_zero() {
        let weights = RandomWeights { seed: 0 };
        for name in
            ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"]
        {
            assert_eq!(weights.tensor(name, &[3]).to_f32(), [1.0; 3], "{name}");
        }
        assert_eq!(weights.tensor("model.layers.0.self_attn.q_proj.bias", &[2]).to_f32(), [0.0; 2]);
    }
}
