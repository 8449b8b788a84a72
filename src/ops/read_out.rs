//! The early read-out of a logit lens: the final norm and some rows of the LM head, for every layer's residual stream.

use super::{Backend, HostTensor, Linear, Norm, cpu, on_host, softmax_entropy, to_host};
use candle_core::{Result, Tensor};

/// The softmax of `norm(x)·Wᵀ` for some rows W of the LM head.
///
/// An RMS norm divides every row by one number and weighs its columns: with weights multiplied into W, what is left of it
/// is a factor per row of results, which the layer's own norm has found already. That counts where layers are small.
#[derive(Debug)]
pub struct ReadOut {
    form: Form,
    /// M.
    outputs: usize,
}

#[derive(Debug)]
enum Form {
    Folded(cpu::PackedMatrix),
    Normed(Linear, Norm),
}

impl ReadOut {
    /// `rows` of the LM head are `[M, D]`; `norm` is as wide.
    pub fn new(rows: &Tensor, norm: &Norm, backend: &Backend) -> Result<Self> {
        let (outputs, width) = rows.dims2()?;
        let mut w = to_host(rows)?;
        let form = if let Some(weight) = norm.as_rms_on_cpu() {
            w.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(weight).for_each(|(w, by)| *w *= by));
            let w = HostTensor::from_f32(&[outputs, width], &w);
            Form::Folded(cpu::PackedMatrix::pack(&w, &backend.dense_packing()))
        } else {
            Form::Normed(Linear::new(&HostTensor::from_f32(&[outputs, width], &w), None, backend)?, norm.clone())
        };
        Ok(Self { form, outputs })
    }

    /// Entropies for `x [T, D]`, each by that of M equal probabilities: `[T]`, on the host. `scale_t` is what a norm of the
    /// same kind and epsilon as this one told of `x`: see [`Norm::forward_telling`].
    ///
    /// # Errors
    /// A failure of the device; a `scale_t` that is not there for an RMS norm on the CPU.
    pub fn entropies(&self, x: &Tensor, scale_t: Option<&[f32]>) -> Result<Vec<f32>> {
        let mut entropies = match (&self.form, scale_t) {
            (Form::Folded(w), Some(scale_t)) => cpu::read_out_entropies(x, w, scale_t)?,
            (Form::Folded(_), None) => {
                candle_core::bail!("a read-out by an RMS norm needs what the layer's own multiplies with")
            }
            (Form::Normed(w, norm), _) => {
                let logits = w.forward(&norm.forward(x)?)?;
                on_host(&logits, |z| z.chunks_exact(self.outputs).map(softmax_entropy).collect())?
            }
        };
        let most = (self.outputs.max(2) as f32).ln();
        entropies.iter_mut().for_each(|entropy| *entropy /= most);
        Ok(entropies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;
    use crate::ops::testing::{assert_close, numbers};
    use candle_core::{DType, Device};

    #[test]
    fn a_read_out_is_of_the_normed_rows_by_either_norm() {
        let (tokens, width, count) = (150, 50, 20);
        // Rows of very different lengths: every one has a factor of its own.
        let x: Vec<f32> = numbers(1, tokens * width).iter().zip(0..).map(|(x, i)| x * (1 + i / width) as f32).collect();
        let [weight, bias] = [2, 3].map(|seed| numbers(seed, width));
        let w = numbers(4, count * width);
        let backend = Backend::cpu(DType::F32);
        let host = |values: &[f32]| HostTensor::from_f32(&[width], values);
        let rms = |weight: &[f32]| Norm::rms(&host(weight), 1e-5, &backend).unwrap();
        let layer = |weight: &[f32]| Norm::layer(&host(weight), &host(&bias), 1e-5, &backend).unwrap();
        let tensor = |values: &[f32], rows| Tensor::from_slice(values, (rows, width), &Device::Cpu).unwrap();
        // Beside a layer's norm, whose weights are others.
        let cases = [
            (rms(&weight), rms(&bias), reference::rms_norm(&x, &weight, 1e-5)),
            (layer(&weight), layer(&bias), reference::layer_norm(&x, &weight, &bias, 1e-5)),
        ];
        let [exact, rounded] = [DType::F32, DType::BF16].map(Backend::cpu);
        let dtypes = [(&exact, 1e-5), (&rounded, 0.02)];
        for ((norm, beside, normed), (packed_for, tolerance)) in cases.iter().flat_map(|case| dtypes.map(|d| (case, d)))
        {
            let read_out = ReadOut::new(&tensor(&w, count), norm, packed_for).unwrap();
            let x = tensor(&x, tokens);
            let (y, scale_t) = beside.forward_telling(&x).unwrap();
            assert_eq!(to_host(&y).unwrap(), to_host(&beside.forward(&x).unwrap()).unwrap());
            let logits = reference::linear(normed, &w, width, count);
            let shares = logits.chunks_exact(count).map(|z| softmax_entropy(z) / (count as f32).ln());
            assert_close(&read_out.entropies(&x, scale_t.as_deref()).unwrap(), &shares.collect::<Vec<_>>(), tolerance);
        }
        let read_out = ReadOut::new(&tensor(&w, count), &rms(&weight), &backend).unwrap();
        assert!(read_out.entropies(&tensor(&x, tokens), None).is_err());
    }
}
