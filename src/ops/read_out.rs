//! The early read-out of a logit lens: the final norm and some rows of the LM head, for every layer's residual stream.

use super::{Backend, HostTensor, Linear, Norm, cpu, softmax_entropies, to_host};
use candle_core::{Result, Tensor};

/// The softmax of `norm(x)·Wᵀ` for some rows W of the LM head.
///
/// An RMS norm divides every row by one number and weighs its columns: with weights multiplied into W, what is left of it
/// is a factor per row of results. On the CPU that saves a pass over `x`, which counts where layers are small.
#[derive(Debug)]
pub struct ReadOut {
    form: Form,
    /// M.
    outputs: usize,
}

#[derive(Debug)]
enum Form {
    Folded { w: cpu::PackedMatrix, eps: f32 },
    Normed { w: Linear, norm: Norm },
}

impl ReadOut {
    /// `rows` of the LM head are `[M, D]`; `norm` is as wide.
    pub fn new(rows: &Tensor, norm: &Norm, backend: &Backend) -> Result<Self> {
        let (outputs, width) = rows.dims2()?;
        let mut w = to_host(rows)?;
        let Some((weight, eps)) = norm.as_rms_on_cpu() else {
            let w = Linear::new(&HostTensor::from_f32(&[outputs, width], &w), None, backend)?;
            return Ok(Self { form: Form::Normed { w, norm: norm.clone() }, outputs });
        };
        w.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(weight).for_each(|(w, by)| *w *= by));
        let w = cpu::PackedMatrix::pack(&HostTensor::from_f32(&[outputs, width], &w), &backend.dense_packing());
        Ok(Self { form: Form::Folded { w, eps }, outputs })
    }

    /// Entropies for `x [T, D]`, each by that of M equal probabilities: `[T]`, on the host.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn entropies(&self, x: &Tensor) -> Result<Vec<f32>> {
        let mut entropies = softmax_entropies(&self.logits(x)?, self.outputs);
        let most = (self.outputs.max(2) as f32).ln();
        entropies.iter_mut().for_each(|entropy| *entropy /= most);
        Ok(entropies)
    }

    /// `x [T, D]` to logits on the host, `[T, M]`.
    fn logits(&self, x: &Tensor) -> Result<Vec<f32>> {
        match &self.form {
            Form::Folded { w, eps } => cpu::normed_linear(x, w, *eps),
            Form::Normed { w, norm } => to_host(&w.forward(&norm.forward(x)?)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, numbers};
    use crate::ops::{reference, softmax_entropy};
    use candle_core::{DType, Device};

    #[test]
    fn a_read_out_is_of_the_normed_rows_by_either_norm() {
        let (tokens, width, count) = (37, 50, 20);
        // Rows of very different lengths: every one has a factor of its own.
        let x: Vec<f32> = numbers(1, tokens * width).iter().zip(0..).map(|(x, i)| x * (1 + i / width) as f32).collect();
        let [weight, bias] = [2, 3].map(|seed| numbers(seed, width));
        let w = numbers(4, count * width);
        let backend = Backend::cpu(DType::F32);
        let host = |values: &[f32]| HostTensor::from_f32(&[width], values);
        let rms = Norm::rms(&host(&weight), 1e-5, &backend).unwrap();
        let layer = Norm::layer(&host(&weight), &host(&bias), 1e-5, &backend).unwrap();
        let tensor = |values: &[f32], rows| Tensor::from_slice(values, (rows, width), &Device::Cpu).unwrap();
        for (norm, normed) in
            [(rms, reference::rms_norm(&x, &weight, 1e-5)), (layer, reference::layer_norm(&x, &weight, &bias, 1e-5))]
        {
            let read_out = ReadOut::new(&tensor(&w, count), &norm, &backend).unwrap();
            let logits = read_out.logits(&tensor(&x, tokens)).unwrap();
            assert_close(&logits, &reference::linear(&normed, &w, width, count), 1e-5);
            let shares: Vec<f32> =
                logits.chunks_exact(count).map(|z| softmax_entropy(z) / (count as f32).ln()).collect();
            assert_close(&read_out.entropies(&tensor(&x, tokens)).unwrap(), &shares, 1e-5);
        }
    }
}
