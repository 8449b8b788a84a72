//! The router grammar: `name[:argument,…][,key=value,…]`, parsed but not yet resolved against a model.

use std::fmt;
use std::str::FromStr;

/// What was typed after `--router`: syntax only. `moe::router` gives it a meaning for a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouterSpec {
    pub name: String,
    /// Arguments without a key, in order: `layers:2,1,2` has three.
    pub args: Vec<String>,
    /// Options with a key, in order; keys are unique.
    pub options: Vec<(String, String)>,
}

/// Why a router specification was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("router `{spec}`: {problem}")]
pub struct SpecError {
    pub spec: String,
    pub problem: String,
}

/// Longest specification accepted, in bytes; `layers:` on the deepest known model needs under 300.
const SPEC_BYTES_MAX: usize = 1024;

impl RouterSpec {
    /// The checkpoint's own router.
    pub fn native() -> Self {
        Self { name: "native".into(), args: Vec::new(), options: Vec::new() }
    }

    /// An error about this specification.
    pub fn error(&self, problem: impl Into<String>) -> SpecError {
        SpecError { spec: self.to_string(), problem: problem.into() }
    }
}

impl FromStr for RouterSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.len() > SPEC_BYTES_MAX {
            let head: String = text.chars().take(40).collect();
            return Err(SpecError {
                spec: format!("{head}…"),
                problem: format!("is {} bytes long; the limit is {SPEC_BYTES_MAX}", text.len()),
            });
        }
        let refuse = |problem: String| SpecError { spec: text.to_string(), problem };
        let text = text.trim();
        // `native,weights=keep` has options but no argument, so the name ends at the first of the two.
        let end = text.find([':', ',']).unwrap_or(text.len());
        let name = text[..end].trim();
        if name.is_empty() {
            return Err(refuse("no router name; write for example `native` or `dynk:0.8`".into()));
        }
        let mut spec = Self { name: name.into(), args: Vec::new(), options: Vec::new() };
        if end == text.len() {
            return Ok(spec);
        }
        for part in text[end + 1..].split(',') {
            let part = part.trim();
            match part.split_once('=') {
                _ if part.is_empty() => {
                    return Err(refuse("an argument is empty; write `name:argument,key=value`".into()));
                }
                None if spec.options.is_empty() => spec.args.push(part.into()),
                None => {
                    return Err(refuse(format!("`{part}` stands after an option; arguments come first")));
                }
                Some((key, value)) => {
                    let (key, value) = (key.trim(), value.trim());
                    if key.is_empty() || value.is_empty() {
                        return Err(refuse(format!("`{part}` is not of the form key=value")));
                    }
                    if spec.options.iter().any(|(k, _)| k == key) {
                        return Err(refuse(format!("option `{key}` is given twice")));
                    }
                    spec.options.push((key.into(), value.into()));
                }
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for RouterSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        let parts = self.args.iter().cloned();
        let parts = parts.chain(self.options.iter().map(|(k, v)| format!("{k}={v}")));
        for (i, part) in parts.enumerate() {
            let separator = if i == 0 && !self.args.is_empty() { ":" } else { "," };
            write!(f, "{separator}{part}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_grammar_reads_names_arguments_and_options() {
        let spec: RouterSpec = "dynk:0.8,mass=full,min=1".parse().unwrap();
        assert_eq!(spec.name, "dynk");
        assert_eq!(spec.args, ["0.8"]);
        assert_eq!(spec.options, [("mass".into(), "full".into()), ("min".into(), "1".into())]);
        let bare: RouterSpec = "native,weights=keep".parse().unwrap();
        assert_eq!((bare.name.as_str(), bare.options.len()), ("native", 1));
        assert_eq!("layers:2,1,2".parse::<RouterSpec>().unwrap().args.len(), 3);
    }

    #[test]
    fn malformed_specs_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "no router name"),
            (":0.8", "no router name"),
            ("dynk:", "empty"),
            ("dynk:0.8,", "empty"),
            ("dynk:mass=full,0.8", "arguments come first"),
            ("dynk:0.8,mass=", "key=value"),
            ("dynk:0.8,min=1,min=2", "twice"),
        ] {
            let error = text.parse::<RouterSpec>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?} gave {error:?}");
        }
        let long = "x".repeat(5000).parse::<RouterSpec>().unwrap_err().to_string();
        assert!(long.contains("5000 bytes") && long.len() < 200);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<RouterSpec>();
        }

        #[test]
        fn what_is_printed_is_read_back(
            name in "[a-z]{1,8}",
            args in proptest::collection::vec("[0-9.]{1,5}", 0..4),
            options in proptest::collection::btree_map("[a-z]{1,5}", "[a-z0-9.]{1,5}", 0..3),
        ) {
            let spec = RouterSpec { name, args, options: options.into_iter().collect() };
            prop_assert_eq!(spec.to_string().parse::<RouterSpec>().unwrap(), spec);
        }
    }
}
