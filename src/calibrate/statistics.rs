//! What is written of a layer.

use super::{LayerTrace, Signal, Steps, Trace};
use crate::moe::calibration::{Curves, LayerStatistics, QUANTILE_STEPS};
use std::collections::BTreeMap;

/// The statistics of every layer of `trace`.
pub(super) fn statistics(trace: &Trace) -> Vec<LayerStatistics> {
    trace.layers.iter().map(|layer| of_layer(layer, &trace.estimators)).collect()
}

fn of_layer(layer: &LayerTrace, estimators: &[&str]) -> LayerStatistics {
    let expert_norms_e = layer.expert_norms();
    let curve = |signal| Steps::of(layer, signal, &expert_norms_e).curve();
    let curves = Curves {
        score: curve(Signal::Score),
        contribution: curve(Signal::Contribution),
        threshold: curve(Signal::Threshold),
    };
    // An output of zeros is as good as any multiple of it.
    let gamma = |(cross, square): &(f64, f64)| if *square > 0.0 { (cross / square) as f32 } else { 1.0 };
    let gamma_k = layer.products_k.iter().map(gamma).collect();
    let mut ratios: Vec<f32> = layer.probs_tk.chunks_exact(layer.top_k).map(|p_k| p_k[1] / p_k[0]).collect();
    let ratio_median = quantiles(&mut ratios, 2).map_or(1.0, |q| q[1]);
    let mut tables = BTreeMap::new();
    for (name, measures_t) in estimators.iter().zip(&layer.measures) {
        // What a measure is not defined for (the first token's surprisal, a signal that the model does not give) is left
        // out; nothing at all of an estimator that measured nothing.
        if let Some(table) = quantiles(&mut measures_t.clone(), QUANTILE_STEPS) {
            tables.insert(name.to_string(), table);
        }
    }
    LayerStatistics { expert_norms_e, gamma_k, ratio_median, curves, quantiles: tables }
}

/// Quantiles 0, 1/steps, …, 1 of the finite ones of `values`, interpolated; none of nothing.
fn quantiles(values: &mut Vec<f32>, steps: usize) -> Option<Vec<f32>> {
    values.retain(|v| v.is_finite());
    values.sort_by(f32::total_cmp);
    let last = values.len().checked_sub(1)?;
    let at = |i: usize| {
        let place = (i * last) as f64 / steps as f64;
        let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
        below + (above - below) * place.fract() as f32
    };
    Some((0..=steps).map(at).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated_and_know_only_numbers() {
        let mut values = vec![4.0, f32::NAN, 0.0, f32::INFINITY, 1.0, 2.0];
        assert_eq!(quantiles(&mut values, 2).unwrap(), [0.0, 1.5, 4.0]);
        assert_eq!(quantiles(&mut vec![f32::NAN], 2), None);
        assert_eq!(quantiles(&mut vec![7.0], 2).unwrap(), [7.0; 3]);
    }
}
