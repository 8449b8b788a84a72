//! Rotary frequencies, with the scalings that real checkpoints of our families use.
//!
//! Formulas as Hugging Face transformers computes them (`modeling_rope_utils`); YaRN is Peng et al., arXiv
//! 2309.00071, llama3 is the scaling of the Llama 3.1 release.

use super::LoadError;
use super::config::Config;
use serde_json::{Map, Value};

/// Base frequency and scaling.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RopeConfig {
    theta: f64,
    head_dim: usize,
    scaling: Scaling,
}

#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    Yarn { factor: f64, original: f64, beta_fast: f64, beta_slow: f64, truncate: bool, attention_factor: f64 },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    pub(super) fn read(config: &mut Config, head_dim: usize, max_positions: usize) -> Result<Self, LoadError> {
        let top_theta = config.opt_positive("rope_theta")?;
        let top_original = config.opt_positive("original_max_position_embeddings")?;
        // As in transformers, a non-empty `rope_scaling` replaces `rope_parameters`.
        let old = object(config, "rope_scaling")?.filter(|map| !map.is_empty());
        let field = if old.is_some() { "rope_scaling" } else { "rope_parameters" };
        let new = object(config, "rope_parameters")?;
        let map = old.or(new).unwrap_or_default();
        let rope = Fields { config, field, map: &map };
        let theta = match rope.opt("rope_theta")?.or(top_theta) {
            Some(theta) if theta > 0.0 => theta,
            Some(theta) => return Err(rope.error("rope_theta", format!("must be above 0; got {theta}"))),
            None => return Err(config.error("rope_theta", "is missing, here and in `rope_parameters`")),
        };
        if rope.opt("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(rope.error("partial_rotary_factor", "only 1.0 is supported"));
        }
        let original = match top_original {
            Some(n) => n,
            None => rope.opt("original_max_position_embeddings")?.unwrap_or(max_positions as f64),
        };
        let scaling = match rope.kind()? {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: rope.need("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: rope.need("factor")?,
                low: rope.need("low_freq_factor")?,
                high: rope.need("high_freq_factor")?,
                original,
            },
            "yarn" => rope.yarn(original)?,
            other => {
                return Err(rope.error(
                    "rope_type",
                    format!("`{other}` is not supported; supported are default, linear, llama3 and yarn"),
                ));
            }
        };
        Ok(Self { theta, head_dim, scaling })
    }

    /// Frequencies `[hd/2]`, and what cos and sin are multiplied by.
    pub(super) fn frequencies(&self) -> (Vec<f32>, f32) {
        let d = self.head_dim as f64;
        let half = self.head_dim / 2;
        let base: Vec<f64> = (0..half).map(|i| self.theta.powf(-2.0 * i as f64 / d)).collect();
        let tau = std::f64::consts::TAU;
        let (scaled, attention_factor) = match self.scaling {
            Scaling::None => (base, 1.0),
            Scaling::Linear { factor } => (base.iter().map(|f| f / factor).collect(), 1.0),
            Scaling::Llama3 { factor, low, high, original } => {
                let scale = |f: &f64| {
                    let wavelength = tau / f;
                    if wavelength < original / high {
                        *f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (base.iter().map(scale).collect(), 1.0)
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => {
                // The dimension whose wave turns `r` times within the original context.
                let dim = |r: f64| d * (original / (r * tau)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dim(beta_fast), dim(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(d - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scale = |(i, f): (usize, &f64)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                };
                (base.iter().enumerate().map(scale).collect(), attention_factor)
            }
        };
        (scaled.into_iter().map(|f| f as f32).collect(), attention_factor as f32)
    }
}

fn object(config: &mut Config, field: &'static str) -> Result<Option<Map<String, Value>>, LoadError> {
    match config.get(field).cloned() {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(value) => Err(config.error(field, format!("must be an object; got {value}"))),
    }
}

/// The rope object's own fields.
struct Fields<'a> {
    config: &'a Config,
    field: &'static str,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn error(&self, name: &str, problem: impl ToString) -> LoadError {
        self.config.error(&format!("{}.{name}", self.field), problem)
    }

    /// The scaling's name, under its new or its old key.
    fn kind(&self) -> Result<&str, LoadError> {
        match ["rope_type", "type"].into_iter().find_map(|key| self.map.get(key).filter(|v| !v.is_null())) {
            None => Ok("default"),
            Some(Value::String(kind)) => Ok(kind),
            Some(other) => Err(self.error("rope_type", format!("must be a string; got {other}"))),
        }
    }

    /// A number of zero or more; absent and null are the same.
    fn opt(&self, name: &str) -> Result<Option<f64>, LoadError> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x >= 0.0 => Ok(Some(x)),
                _ => Err(self.error(name, format!("must be a number of at least 0; got {value}"))),
            },
        }
    }

    fn need(&self, name: &str) -> Result<f64, LoadError> {
        match self.opt(name)? {
            Some(x) if x > 0.0 => Ok(x),
            Some(x) => Err(self.error(name, format!("must be above 0; got {x}"))),
            None => Err(self.error(name, "is missing")),
        }
    }

    fn yarn(&self, original: f64) -> Result<Scaling, LoadError> {
        let factor = self.need("factor")?;
        let nonzero = |name| Ok::<_, LoadError>(self.opt(name)?.filter(|x| *x != 0.0));
        let gain = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let attention_factor = match (self.opt("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(m), Some(all)) => gain(m) / gain(all),
            _ => gain(1.0),
        };
        Ok(Scaling::Yarn {
            factor,
            original,
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: match self.map.get("truncate") {
                None | Some(Value::Null) => true,
                Some(Value::Bool(truncate)) => *truncate,
                Some(other) => return Err(self.error("truncate", format!("must be true or false; got {other}"))),
            },
            attention_factor,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(fields: Value) -> Result<RopeConfig, LoadError> {
        let Value::Object(map) = fields else { panic!("an object") };
        RopeConfig::read(&mut Config::new("config.json", map), 8, 64)
    }

    #[test]
    fn old_and_new_spellings_mean_the_same() {
        let old = read(json!({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        let new = read(json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(old, new);
        let plain = read(json!({"rope_theta": 10000.0, "rope_scaling": null})).unwrap();
        assert_eq!(plain, read(json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})).unwrap());
        let (freqs, factor) = plain.frequencies();
        assert_eq!((freqs[0], freqs[1], factor), (1.0, 0.1, 1.0));
    }

    #[test]
    fn what_is_unsupported_or_missing_is_named() {
        for (fields, want) in [
            (json!({}), "`rope_theta`: is missing"),
            (json!({"rope_theta": 0}), "above 0"),
            (
                json!({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
                "`dynamic` is not supported",
            ),
            (json!({"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}), "rope_scaling.factor`: is missing"),
            (json!({"rope_theta": 1e4, "rope_scaling": [1]}), "must be an object"),
            (json!({"rope_parameters": {"rope_theta": 0.0}}), "above 0"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}), "true or false"),
            (json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}), "only 1.0"),
        ] {
            let error = read(fields.clone()).unwrap_err().to_string();
            assert!(error.contains(want), "{fields}: {error}");
        }
    }
}
