//! Cross-entropy over the vocabulary, from hidden states, without holding the logits of all tokens.

use super::{Precision, Score, composed_product, output, slice};
use crate::ops::cpu::train::loss::{Head, IGNORED};
use crate::ops::cpu::with_f32;
use candle_core::{CpuStorage, CustomOp2, D, Device, Layout, Result, Shape, Tensor};
use std::sync::Mutex;

/// `scale · Σ −log softmax(hidden·headᵀ)[target]`, a scalar: `hidden [T, D]`, `head [V, D]`, `targets [T]`, where `u32::MAX`
/// is not scored. With scale `1 / scored` it is the mean.
///
/// # Errors
/// A target outside the vocabulary, or a failure of the device.
pub fn cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    scale: f64,
    precision: Precision,
) -> Result<Tensor> {
    check(head, targets)?;
    if !hidden.device().is_cpu() {
        return cross_entropy_composed(hidden, head, targets, scale, precision);
    }
    let op = CrossEntropy { targets: targets.to_vec(), scale: scale as f32, precision, grads: Mutex::new(None) };
    hidden.contiguous()?.apply_op2(head, op)
}

fn check(head: &Tensor, targets: &[u32]) -> Result<()> {
    let vocab = head.dims()[0];
    match targets.iter().find(|&&t| t != IGNORED && t as usize >= vocab) {
        Some(t) => candle_core::bail!("target {t} is outside the vocabulary of {vocab}"),
        None => Ok(()),
    }
}

pub(super) fn cross_entropy_composed(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    scale: f64,
    precision: Precision,
) -> Result<Tensor> {
    let device = hidden.device();
    let log_p = candle_nn::ops::log_softmax(&composed_product(hidden, head, precision)?, D::Minus1)?;
    let ids: Vec<u32> = targets.iter().map(|&t| if t == IGNORED { 0 } else { t }).collect();
    let weights: Vec<f32> = targets.iter().map(|&t| if t == IGNORED { 0.0 } else { -scale as f32 }).collect();
    let picked = log_p.gather(&Tensor::new(ids, device)?.unsqueeze(1)?, 1)?.squeeze(1)?;
    (picked * Tensor::new(weights, device)?)?.sum_all()
}

/// Gradients are taken in the forward pass, where the logits are: a second product with the head is saved.
struct CrossEntropy {
    targets: Vec<u32>,
    scale: f32,
    precision: Precision,
    /// Of hidden states and head.
    grads: Mutex<Option<(Vec<f32>, Vec<f32>)>>,
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (hidden, head) = (slice(s1, l1)?, slice(s2, l2)?);
        let d = l1.dims()[1];
        let head = Head { x: hidden, w: head, width: d, targets: &self.targets, precision: self.precision };
        let found = head.gradients(self.scale);
        if let Ok(mut grads) = self.grads.lock() {
            *grads = Some((found.dx, found.dw));
        }
        let sum: f64 = found.nll.iter().map(|n| f64::from(*n)).sum();
        output(vec![(sum * f64::from(self.scale)) as f32], ())
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _loss: &Tensor,
        d_loss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let taken = self.grads.lock().ok().and_then(|mut grads| grads.take());
        let Some((dx, dw)) = taken else { candle_core::bail!("a loss can be differentiated once") };
        let factor = f64::from(d_loss.to_scalar::<f32>()?);
        let tensor = |values: Vec<f32>, like: &Tensor| {
            let tensor = Tensor::from_vec(values, like.shape(), &Device::Cpu)?;
            if factor == 1.0 { Ok(tensor) } else { tensor * factor }
        };
        Ok((Some(tensor(dx, hidden)?), Some(tensor(dw, head)?)))
    }
}

/// Every token's loss and its target's rank; no gradients. Shapes as in [`cross_entropy`]; tokens that are not scored
/// have a loss of 0.
///
/// # Errors
/// A target outside the vocabulary, or a failure of the device.
pub fn scores(hidden: &Tensor, head: &Tensor, targets: &[u32], precision: Precision) -> Result<Vec<Score>> {
    check(head, targets)?;
    let (hidden, head) = (hidden.detach().to_device(&Device::Cpu)?, head.detach().to_device(&Device::Cpu)?);
    let d = hidden.dim(1)?;
    with_f32(&hidden.contiguous()?, |x| with_f32(&head, |w| Head { x, w, width: d, targets, precision }.scores()))?
}
