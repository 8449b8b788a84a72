//! Reads a router's arguments with one kind of message for every mistake.

use super::RouterEntry;
use crate::types::{RouterSpec, SpecError};
use std::ops::RangeInclusive;
use std::str::FromStr;

/// The arguments of one specification, taken one by one; what is left over is an error.
pub struct SpecArgs<'a> {
    spec: &'a RouterSpec,
    entry: &'a RouterEntry,
    options: Vec<(String, String)>,
    /// Options the router asked for, to list when an unknown one is given.
    known: Vec<&'static str>,
}

impl<'a> SpecArgs<'a> {
    pub(super) fn new(spec: &'a RouterSpec, entry: &'a RouterEntry) -> Self {
        Self { spec, entry, options: spec.options.clone(), known: Vec::new() }
    }

    /// An error that ends with the grammar and an example.
    pub fn error(&self, problem: impl std::fmt::Display) -> SpecError {
        let (usage, example) = (self.entry.usage, self.entry.example);
        self.spec.error(format!("{problem} (usage: {usage}; for example {example})"))
    }

    /// Refuses arguments where the router takes none.
    pub fn no_args(&self) -> Result<(), SpecError> {
        match self.spec.args.as_slice() {
            [] => Ok(()),
            _ => Err(self.error(format!("{} takes no argument", self.spec.name))),
        }
    }

    /// All arguments.
    pub fn args(&self) -> &'a [String] {
        &self.spec.args
    }

    /// The only argument.
    pub fn one_arg(&self, what: &str) -> Result<&'a str, SpecError> {
        match self.spec.args.as_slice() {
            [one] => Ok(one),
            [] => Err(self.error(format!("{what} is missing"))),
            more => Err(self.error(format!("takes one argument, {what}; got {}", more.len()))),
        }
    }

    /// A share: a number in (0, 1].
    pub fn share(&self, what: &str, text: &str) -> Result<f32, SpecError> {
        match text.parse::<f32>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
            _ => Err(self.error(format!("{what} must be a number in (0, 1]; got {text}"))),
        }
    }

    /// A number of experts within `range`.
    pub fn count(&self, what: &str, text: &str, range: RangeInclusive<usize>) -> Result<usize, SpecError> {
        let (low, high) = (*range.start(), *range.end());
        match text.parse() {
            Ok(k) if range.contains(&k) => Ok(k),
            _ => {
                Err(self
                    .error(format!("{what} must be a whole number from {low} to {high} for this model; got {text}")))
            }
        }
    }

    fn take(&mut self, key: &'static str) -> Option<String> {
        self.known.push(key);
        let at = self.options.iter().position(|(k, _)| k == key)?;
        Some(self.options.remove(at).1)
    }

    /// The option `key` as one of `names`.
    pub fn option_of<T: Copy>(&mut self, key: &'static str, names: &[(&str, T)]) -> Result<Option<T>, SpecError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match names.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let names: Vec<&str> = names.iter().map(|n| n.0).collect();
                Err(self.error(format!("{key} must be one of {}; got {text}", names.join(", "))))
            }
        }
    }

    /// The option `key` as a number of any kind.
    pub fn option_number<T: FromStr>(&mut self, key: &'static str) -> Result<Option<T>, SpecError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.error(format!("{key} must be a whole number from 0 up; got {text}")))
    }

    /// The options `min` and `max`: bounds on k, within 1 and `limit`.
    pub fn bounds(&mut self, default_max: usize, limit: usize) -> Result<RangeInclusive<usize>, SpecError> {
        let min = match self.take("min") {
            Some(text) => self.count("min", &text, 1..=limit)?,
            None => 1,
        };
        let max = match self.take("max") {
            Some(text) => self.count("max", &text, 1..=limit)?,
            None => default_max.max(min),
        };
        if min > max {
            return Err(self.error(format!("min must not be above max; got min={min}, max={max}")));
        }
        Ok(min..=max)
    }

    /// Refuses what no one asked for.
    pub(super) fn finish(self) -> Result<(), SpecError> {
        match self.options.first() {
            None => Ok(()),
            Some((key, _)) => Err(self.error(format!("unknown option `{key}`; there are {}", self.known.join(", ")))),
        }
    }
}
