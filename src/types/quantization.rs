//! `--quant` as typed.

use std::fmt;
use std::str::FromStr;

/// In what form a matrix of weights is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// In the backend's dtype.
    #[default]
    Plain,
    /// 32 inputs share a scale, 8 bits each: 8.5 bits a weight.
    Q8_0,
    /// 32 inputs share a scale, 4 bits each: 4.5 bits a weight.
    Q4_0,
    /// 32 inputs share a step and an offset of 6 bits each, kept in 8, and 256 their scales; 4 bits each: 4.625 bits a weight.
    Q4K,
}

/// In what form the two kinds of weights are kept. Gates, norms and biases are never quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantization {
    /// Routed experts.
    pub experts: WeightFormat,
    /// All other projections, and the embeddings.
    pub dense: WeightFormat,
}

const FORMATS: [(&str, WeightFormat); 4] = [
    ("none", WeightFormat::Plain),
    ("q8_0", WeightFormat::Q8_0),
    ("q4_0", WeightFormat::Q4_0),
    ("q4_k", WeightFormat::Q4K),
];

impl FromStr for WeightFormat {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let known = FORMATS.iter().find(|(name, _)| *name == s);
        known.map(|(_, format)| *format).ok_or_else(|| format!("unknown format `{s}`: use none, q8_0, q4_k or q4_0"))
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = FORMATS.iter().find(|(_, format)| format == self);
        f.write_str(known.map_or("none", |(name, _)| name))
    }
}

impl FromStr for Quantization {
    type Err = String;

    /// `q8_0` for all weights, or `experts=q4_0,dense=q8_0`, of which what is left out stays as it is.
    fn from_str(s: &str) -> Result<Self, String> {
        if !s.contains('=') {
            let format = s.parse()?;
            return Ok(Self { experts: format, dense: format });
        }
        let (mut experts, mut dense) = (None, None);
        for part in s.split(',') {
            let (kind, format) = part.split_once('=').unwrap_or((part, ""));
            let slot = match kind {
                "experts" => &mut experts,
                "dense" => &mut dense,
                _ => return Err(format!("unknown weights `{kind}`: use a format, or experts=FORMAT,dense=FORMAT")),
            };
            if slot.replace(format.parse()?).is_some() {
                return Err(format!("`{kind}` is given twice"));
            }
        }
        Ok(Self { experts: experts.unwrap_or_default(), dense: dense.unwrap_or_default() })
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.experts == self.dense {
            return self.experts.fmt(f);
        }
        write!(f, "experts={},dense={}", self.experts, self.dense)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_read_back_what_they_print_and_refuse_the_rest() {
        for s in ["none", "q8_0", "q4_0", "q4_k", "experts=q4_0,dense=q8_0", "experts=none,dense=q4_0"] {
            assert_eq!(s.parse::<Quantization>().unwrap().to_string(), s);
        }
        let experts = Quantization { experts: WeightFormat::Q4_0, dense: WeightFormat::Plain };
        assert_eq!("experts=q4_0".parse(), Ok(experts));
        for (s, problem) in [
            ("q5_k", "use none, q8_0, q4_k or q4_0"),
            ("experts=int8", "use none, q8_0, q4_k or q4_0"),
            ("experts=", "unknown format ``"),
            ("heads=q8_0", "experts=FORMAT"),
            ("dense=q8_0,dense=none", "given twice"),
        ] {
            let error = s.parse::<Quantization>().unwrap_err();
            assert!(error.contains(problem), "{s}: {error}");
        }
    }
}
