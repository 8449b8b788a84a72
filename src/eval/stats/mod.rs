//! Statistics of an evaluation: means and standard errors as lm-eval 0.4.13 gives them, bootstrap intervals, and
//! tests of two arms on the same samples.

mod bootstrap;
mod significance;

pub use bootstrap::{Estimate, Window, bootstrap, resampled};
pub use bootstrap::{bits_per_byte, perplexity, perplexity_difference};
pub use bootstrap::{mean_difference, mean_interval};
pub use significance::{holm, mcnemar, sign_flip};

/// Arithmetic mean; none of nothing. Of subtasks' values it is the macro average.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Standard error of the mean: the sample's standard deviation (n − 1) over √n. None under two values, where lm-eval
/// says N/A.
pub fn mean_stderr(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt())
}

/// A subtask's share in its group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    pub samples: usize,
    /// None where the subtask has none.
    pub stderr: Option<f64>,
}

/// Standard error of a group's mean over all samples from the pooled variance, √(Σ(n−1)·n·s² / (Σn − groups) / Σn): lm-eval's
/// `pooled_sample_stderr`. None where a subtask has no standard error, where lm-eval says N/A.
pub fn pooled_stderr(parts: &[Part]) -> Option<f64> {
    let samples: usize = parts.iter().map(|p| p.samples).sum();
    let mut squares = 0.0;
    for part in parts {
        let n = part.samples as f64;
        squares += (n - 1.0) * part.stderr?.powi(2) * n;
    }
    let freedom = samples.checked_sub(parts.len()).filter(|f| *f > 0)?;
    Some((squares / freedom as f64 / samples as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: Option<f64>, b: f64) -> bool {
        a.is_some_and(|a| (a - b).abs() <= 1e-14 * b.abs().max(1.0))
    }

    fn part(samples: usize, stderr: Option<f64>) -> Part {
        Part { samples, stderr }
    }

    #[test]
    fn means_and_errors_are_those_of_lm_eval() {
        assert!(close(mean(&[1.0, 0.0, 1.0, 1.0]), 0.75));
        assert!(close(mean_stderr(&[1.0, 0.0, 1.0, 1.0]), 0.25));
        assert!(close(mean_stderr(&[0.3, 1.7, -2.0, 5.5, 0.25, 0.0, 9.0]), 1.4409995113936487));
        assert_eq!(mean_stderr(&[3.0, 3.0]), Some(0.0));
        assert_eq!((mean(&[]), mean_stderr(&[]), mean_stderr(&[1.0])), (None, None, None));
    }

    #[test]
    fn groups_are_those_of_lm_eval() {
        let parts = [part(100, Some(0.05025189076296059)), part(3, Some(0.1)), part(2, Some(0.5))];
        assert!(close(pooled_stderr(&parts), 0.048852375805570995));
        assert!(close(pooled_stderr(&parts[..1]), 0.05025189076296059), "a group of one has its subtask's error");
    }

    #[test]
    fn groups_without_samples_or_errors_give_none() {
        assert_eq!(pooled_stderr(&[]), None);
        assert_eq!(pooled_stderr(&[part(10, Some(0.1)), part(1, None)]), None, "lm-eval: N/A");
        assert_eq!(pooled_stderr(&[part(1, Some(0.0)), part(1, Some(0.0))]), None, "no freedom left");
        assert_eq!(pooled_stderr(&[part(0, Some(0.1))]), None);
    }

    proptest! {
        #[test]
        fn a_group_of_one_keeps_its_error(values in proptest::collection::vec(-5.0f64..5.0, 2..40)) {
            let stderr = mean_stderr(&values);
            let pooled = pooled_stderr(&[part(values.len(), stderr)]).unwrap();
            prop_assert!((pooled - stderr.unwrap()).abs() < 1e-12);
        }
    }
}
