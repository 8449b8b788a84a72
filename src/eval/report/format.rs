//! Metrics, savings and differences as the evaluation's reports show them.

pub use crate::plot::format::*;

use crate::eval::results::{Comparison, Metric, Saved};

/// A saving in per cent; a cost is negative.
pub fn saving(saved: &Saved) -> String {
    match fixed(100.0 * saved.saved, 1) {
        none if none == MISSING => none,
        text => format!("{text} %"),
    }
}

/// A p-value; small ones as a bound.
pub fn p_value(p: f64) -> String {
    if p < 1e-4 { "<0.0001".into() } else { fixed(p, 4) }
}

/// Name of a metric, its unit, and an arrow where less is better.
pub fn metric_title(metric: &Metric) -> String {
    let unit = if metric.share { " %" } else { "" };
    let arrow = if metric.higher_is_better { "" } else { " ↓" };
    format!("{}{unit}{arrow}", metric.name)
}

/// A value in the metric's unit.
pub fn in_unit(share: bool, value: f64) -> String {
    if share { percent(value) } else { real(value) }
}

/// Value and standard error.
pub fn metric_value(metric: &Metric) -> String {
    let value = in_unit(metric.share, metric.value);
    match metric.stderr {
        Some(stderr) => format!("{value} ± {}", in_unit(metric.share, stderr)),
        None => value,
    }
}

/// `[low, high]`.
pub fn metric_interval(metric: &Metric) -> String {
    format!("[{}, {}]", in_unit(metric.share, metric.low), in_unit(metric.share, metric.high))
}

/// Difference in percentage points or the metric's own unit.
pub fn difference(comparison: &Comparison, share: bool) -> String {
    let unit = if share { " pp" } else { "" };
    format!("{}{unit}", difference_side(comparison.difference, share))
}

/// `[low, high]` of a difference.
pub fn difference_interval(comparison: &Comparison, share: bool) -> String {
    format!("[{}, {}]", difference_side(comparison.low, share), difference_side(comparison.high, share))
}

fn difference_side(value: f64, share: bool) -> String {
    signed(if share { percent(value) } else { short(value) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_keeps_its_minus() {
        let saved = |saved| saving(&Saved { ran: 1, native: 1, saved });
        assert_eq!([saved(-0.922), saved(0.375), saved(-1.5), saved(f64::NAN)], ["-92.2 %", "37.5 %", "-150.0 %", "–"]);
    }

    #[test]
    fn a_small_p_value_is_a_bound() {
        assert_eq!([0.00001, 0.25, 1.0, f64::NAN].map(p_value), ["<0.0001", "0.2500", "1.0000", "–"]);
    }
}
