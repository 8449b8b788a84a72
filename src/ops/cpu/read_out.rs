//! Entropies of an early read-out, some rows at a time: what lies between stays in the first caches of one core.

use super::aligned::Aligned;
use super::entropy::{FLOPS_PER_EXP, entropies_of};
use super::kernel::{counted_rows, multiply};
use super::pack::{NR, PackedMatrix};
use super::rows::{FLOPS_PER_COPY, Form, RowBuffer, Rows};
use super::{SharedOut, for_each, with_f32};
use candle_core::{Result, Tensor};
use std::cell::RefCell;

/// Rows that are read out at a time.
const ROWS: usize = 64;

/// H(softmax(scaleₜ · w·xₜ)) in nats, for `x [T, I]`: `[T]`.
pub(crate) fn read_out_entropies(x: &Tensor, w: &PackedMatrix, scale_t: &[f32]) -> Result<Vec<f32>> {
    let (tokens, inputs) = x.dims2()?;
    if (tokens, inputs) != (scale_t.len(), w.inputs()) {
        let (scales, wanted) = (scale_t.len(), w.inputs());
        candle_core::bail!("a read-out of {wanted} inputs with {scales} scales was given {tokens} rows of {inputs}");
    }
    let product = 2 * counted_rows(tokens, Form::of(w)) * inputs * w.outputs();
    let flops = product + tokens * (inputs * FLOPS_PER_COPY + w.outputs() * FLOPS_PER_EXP);
    let mut entropy_t = vec![0.0; tokens];
    let out = SharedOut::new(&mut entropy_t);
    with_f32(x, |x| {
        for_each(tokens.div_ceil(ROWS), flops, |item| {
            let rows = item * ROWS..tokens.min((item + 1) * ROWS);
            let x = &x[rows.start * inputs..rows.end * inputs];
            // SAFETY: items write disjoint rows.
            let out = unsafe { std::slice::from_raw_parts_mut(out.from(rows.start), rows.len()) };
            SCRATCH.with_borrow_mut(|scratch| scratch.entropies(x, w, &scale_t[rows], out));
        });
    })?;
    Ok(entropy_t)
}

thread_local! {
    /// Kept from step to step, and touched by no other core meanwhile.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Rows as products read them, where that is not as f32.
    rounded: Option<RowBuffer>,
    logits: Aligned<f32>,
}

impl Scratch {
    fn entropies(&mut self, x: &[f32], w: &PackedMatrix, scales: &[f32], entropies: &mut [f32]) {
        let (inputs, outputs) = (w.inputs(), w.outputs());
        if self.logits.len() < ROWS * outputs {
            self.logits = Aligned::zeroed(ROWS * outputs);
        }
        let logits = &mut self.logits[..scales.len() * outputs];
        let x = match Form::of(w) {
            Form::F32 => Rows::of_f32(x, inputs),
            form => {
                let rounded = match &mut self.rounded {
                    Some(rounded) if rounded.takes(form, inputs) => rounded,
                    other => other.insert(RowBuffer::new(form, ROWS, inputs)),
                };
                // By this thread alone: while one waits for others it may begin another item, which needs the scratch.
                for (row, x) in x.chunks_exact(inputs).enumerate() {
                    // SAFETY: the buffer is borrowed here alone.
                    unsafe { rounded.write(row, 0, x) };
                }
                rounded.rows().slice(0..scales.len())
            }
        };
        // SAFETY: `logits` holds all rows and columns and is borrowed here alone.
        unsafe { multiply(x, w, 0..outputs.div_ceil(NR), logits.as_mut_ptr(), outputs, None) };
        entropies_of(logits, scales, entropies);
    }
}
