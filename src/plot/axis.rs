//! Axes: a range, round ticks in it, and where a value lies.

/// One axis of a drawing.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub title: String,
    low: f64,
    high: f64,
    /// Equal factors are equally long; `low` is above zero.
    log: bool,
}

/// Magnitudes beyond this are no measurement, and would overflow.
const VALUE_MAX: f64 = 1e100;

impl Axis {
    /// Covers all of `values` that are finite, with some air.
    pub fn around(title: impl Into<String>, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values);
        let air = if high > low { 0.06 * (high - low) } else { (0.05 * high.abs()).max(1e-3) };
        Self::between(title, low - air, high + air)
    }

    /// Covers zero and `values`; for bars, whose length is the value.
    pub fn from_zero(title: impl Into<String>, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values.into_iter().chain([0.0]));
        Self::between(title, low, if high > low { high } else { low + 1.0 })
    }

    /// From `low` to `high`, widened to hold something if they are equal.
    pub fn between(title: impl Into<String>, low: f64, high: f64) -> Self {
        let (low, high) = range([low, high]);
        let high =
            if high - low > 1e-12 * low.abs().max(high.abs()).max(1e-6) { high } else { low + 1f64.max(low.abs()) };
        Self { title: title.into(), low, high, log: false }
    }

    /// Covers all of `values` that are above zero, on a logarithmic scale.
    pub fn log(title: impl Into<String>, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values.into_iter().filter(|v| *v > 1.0 / VALUE_MAX));
        let (low, high) = if low > 0.0 { (low, high) } else { (1.0, 10.0) };
        let air = (high / low).powf(0.06).max(1.02);
        Self { title: title.into(), low: low / air, high: high * air, log: true }
    }

    /// Where `value` lies on a line from `start` (the axis' low end) to `end`; beyond the ends at them.
    pub fn at(&self, value: f64, start: f64, end: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        let share = share.clamp(0.0, 1.0);
        start + share * (end - start)
    }

    /// Round values within the range, about `count` of them, with their labels.
    pub fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        if self.log && self.high / self.low > 5.0 {
            return self.log_ticks(count);
        }
        let step = round_step((self.high - self.low) / count.max(1) as f64);
        let first = (self.low / step - 1e-9).ceil();
        let ticks = (0..2 * count + 2).map(|i| (first + i as f64) * step);
        ticks.take_while(|v| *v <= self.high + 1e-9 * step).map(|v| (v, self.tick_label(v, step))).collect()
    }

    /// Values of 1, 2, 5 × 10^n while that is not too many, else powers of ten.
    fn log_ticks(&self, count: usize) -> Vec<(f64, String)> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let within = |v: &f64| (self.low..=self.high).contains(v);
        let exponents = || first..=last;
        let fine: Vec<f64> =
            exponents().flat_map(|n| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(n))).filter(within).collect();
        let ticks = if fine.len() <= count + 2 {
            fine
        } else {
            let every = ((last - first) as usize).div_ceil(count.max(1)).max(1);
            exponents().step_by(every).map(|n| 10f64.powi(n)).filter(within).collect()
        };
        let label =
            |v: f64| if (1e-4..1e6).contains(&v) { format!("{}", (v * 1e6).round() / 1e6) } else { format!("{v:.0e}") };
        ticks.into_iter().map(|v| (v, label(v))).collect()
    }

    fn tick_label(&self, value: f64, step: f64) -> String {
        if value.abs() < 1e-9 * step {
            return "0".into();
        }
        if self.low.abs().max(self.high.abs()) >= 1e6 || step < 1e-5 {
            return format!("{value:.1e}");
        }
        let decimals = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

/// Smallest and greatest finite value; 0 to 1 of none.
fn range(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let finite = values.into_iter().filter(|v| v.abs() < VALUE_MAX);
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// The one of 1, 2, 5 × 10^n that is nearest to `step`.
fn round_step(step: f64) -> f64 {
    let unit = 10f64.powf(step.log10().floor());
    let nearest = [(1.5, 1.0), (3.5, 2.0), (7.5, 5.0)].into_iter().find(|(below, _)| step < below * unit);
    nearest.map_or(10.0, |(_, round)| round) * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks(5).into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(labels(&Axis::between("", 0.0, 100.0)), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(&Axis::between("", 0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&Axis::between("", -0.03, 0.07)), ["-0.02", "0", "0.02", "0.04", "0.06"]);
        assert_eq!(labels(&Axis::between("", 62.0, 71.5)), ["62", "64", "66", "68", "70"]);
        assert_eq!(labels(&Axis::between("", 0.0, 8.5)), ["0", "2", "4", "6", "8"]);
    }

    #[test]
    fn ticks_of_a_logarithmic_axis_are_round_too() {
        assert_eq!(labels(&Axis::log("", [30.0, 900.0])), ["50", "100", "200", "500", "1000"]);
        assert_eq!(labels(&Axis::log("", [20.0, 90_000.0])), ["100", "1000", "10000", "100000"]);
        assert_eq!(
            labels(&Axis::log("", [36.0, 41.0])),
            ["36", "37", "38", "39", "40", "41"],
            "little to see: as on any axis"
        );
        assert_eq!(labels(&Axis::log("", [-1.0, 0.0, f64::NAN])), ["1", "2", "5", "10"]);
        let axis = Axis::log("", [1.0, 100.0]);
        assert!((axis.at(10.0, 0.0, 400.0) - 200.0).abs() < 1e-9, "half of the factors");
        assert_eq!(axis.at(-5.0, 0.0, 400.0), 0.0);
    }

    #[test]
    fn an_axis_of_nothing_or_of_one_value_still_has_a_length() {
        for axis in [
            Axis::around("", []),
            Axis::around("", [f64::NAN]),
            Axis::around("", [5.0, 5.0]),
            Axis::from_zero("", [0.0]),
            Axis::log("", []),
            Axis::log("", [3.0]),
        ] {
            assert!(axis.high > axis.low && !axis.ticks(5).is_empty(), "{axis:?}");
        }
    }

    proptest! {
        #[test]
        fn ticks_lie_within_and_positions_are_finite(low: f64, high: f64, value: f64) {
            for axis in [
                Axis::between("", low, high),
                Axis::around("", [low, high]),
                Axis::from_zero("", [low]),
                Axis::log("", [low, high]),
            ] {
                prop_assert!(axis.ticks(5).len() <= 12);
                for (tick, _) in axis.ticks(5) {
                    let at = axis.at(tick, 0.0, 400.0);
                    prop_assert!((0.0..=400.0).contains(&at));
                }
                if value.is_finite() {
                    prop_assert!((0.0..=400.0).contains(&axis.at(value, 0.0, 400.0)));
                }
            }
        }
    }
}
