//! Reads a router's arguments with one kind of message for every mistake.

use super::{RouterEntry, Weights};
use crate::moe::calibration::{Calibration, Calibrations, PolicyTable};
use crate::types::{MoeShape, RouterSpec, SpecError};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;

/// The arguments of one specification, taken one by one; what is left over is an error.
pub struct SpecArgs<'a> {
    spec: &'a RouterSpec,
    entry: &'a RouterEntry,
    options: Vec<(String, String)>,
    /// Options the router asked for, to list when an unknown one is given.
    known: Vec<&'static str>,
    /// The files that may be named; none in what a request asks for.
    files: Option<&'a Calibrations>,
    /// The file that was read, and where.
    calibration: Option<(String, Arc<Calibration>)>,
    /// How outputs are weighed unless the specification says otherwise.
    pub(super) weights: Weights,
}

impl<'a> SpecArgs<'a> {
    pub(super) fn new(spec: &'a RouterSpec, entry: &'a RouterEntry, files: Option<&'a Calibrations>) -> Self {
        let options = spec.options.clone();
        Self { spec, entry, options, known: Vec::new(), files, calibration: None, weights: Weights::Native }
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

    /// The calibration that the option `cal` names, or none without it.
    pub fn option_calibration(&mut self, shape: &MoeShape) -> Result<Option<Arc<Calibration>>, SpecError> {
        if let Some(path) = self.take("cal") {
            self.open(&path, shape)?;
        }
        Ok(self.calibration.as_ref().map(|(_, calibration)| calibration.clone()))
    }

    /// The calibration that the option `cal` names.
    pub fn calibration(&mut self, what_for: &str, shape: &MoeShape) -> Result<Arc<Calibration>, SpecError> {
        self.calibration_file(what_for, shape).map(|(_, calibration)| calibration)
    }

    /// The calibration that the option `cal` or the router itself names, with its path.
    pub(super) fn calibration_file(
        &mut self,
        what_for: &str,
        shape: &MoeShape,
    ) -> Result<(String, Arc<Calibration>), SpecError> {
        self.option_calibration(shape)?;
        let found = self.calibration.clone();
        found.ok_or_else(|| self.error(format!("{what_for} needs cal=FILE, which moe-calibrate makes")))
    }

    /// Reads the calibration at `path`.
    pub fn open(&mut self, path: &str, shape: &MoeShape) -> Result<Arc<Calibration>, SpecError> {
        let files = self.files.ok_or_else(|| self.error("names a file, which requests may not"))?;
        let calibration = files.open(path, shape).map_err(|problem| self.error(problem))?;
        self.calibration = Some((path.into(), calibration.clone()));
        Ok(calibration)
    }

    /// The policy of the calibration that was read from `file`.
    pub fn policy_of<'c>(&self, file: &str, calibration: &'c Calibration) -> Result<&'c PolicyTable, SpecError> {
        let table = calibration.policy.as_ref();
        table.ok_or_else(|| self.error(format!("{file} has statistics alone: give moe-calibrate a --target-flops")))
    }

    /// The option `key` as it is.
    pub fn option_text(&mut self, key: &'static str) -> Option<String> {
        self.take(key)
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

    /// Whether the option `key` is given and not taken yet.
    pub fn has(&self, key: &str) -> bool {
        self.options.iter().any(|(k, _)| k == key)
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

    /// The option `key` as a share.
    pub fn option_share(&mut self, key: &'static str) -> Result<Option<f32>, SpecError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        self.share(key, &text).map(Some)
    }

    /// Refuses what no one asked for.
    pub(super) fn finish(self) -> Result<(), SpecError> {
        match self.options.first() {
            None => Ok(()),
            Some((key, _)) => Err(self.error(format!("unknown option `{key}`; there are {}", self.known.join(", ")))),
        }
    }
}
