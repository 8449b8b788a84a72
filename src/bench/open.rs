//! From what was named on the command line to a loaded model.

use super::{BenchError, Settings};
use crate::engine::{calibrations, default_name};
use crate::model::hub::{HubOptions, bar_style, resolve, resolve_config};
use crate::model::{LoadError, LoadOptions, Loaded, Source, load_from};
use crate::moe::calibration::Calibrations;
use indicatif::{MultiProgress, ProgressBar};
use std::path::Path;
use std::time::Instant;

/// The model that is measured, as named.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A directory or hub id.
    Model(String),
    /// The same, or a file, of which config.json alone is read.
    RandomWeights(String),
}

/// A loaded model and what is said of it.
pub struct Opened {
    pub(super) name: String,
    pub(super) random_weights: bool,
    pub(super) loaded: Loaded,
    pub(super) calibrations: Calibrations,
    pub(super) load_s: f64,
}

/// Loads `subject`, of which only the first `layers` if they are given, for as many positions as the tests of `settings` take.
///
/// # Errors
/// A model that is not there or cannot be loaded, or has too few positions or layers.
pub fn open(
    subject: &Subject,
    hub: &HubOptions,
    options: LoadOptions,
    layers: Option<usize>,
    settings: &Settings,
) -> Result<Opened, BenchError> {
    settings.tests()?;
    let bars = MultiProgress::new();
    let len = settings.prompt_max().max(settings.decode_positions());
    let options = LoadOptions { max_model_len: Some(len), ..options };
    let load = |source: Source<'_>| -> Result<(Loaded, f64), BenchError> {
        let started = Instant::now();
        let bar = bars.add(ProgressBar::new(0).with_style(bar_style()).with_message("loading weights"));
        let loaded = load_from(source, &options, layers, {
            let bar = bar.clone();
            move |read, total| {
                // What is made up has no known end.
                bar.set_length(total.max(read));
                bar.set_position(read);
            }
        });
        bar.finish_and_clear();
        let loaded = loaded.map_err(|error| too_long(error, settings))?;
        for field in &loaded.unread_config {
            tracing::warn!("config.json has a field `{field}` that this program does not know; it was ignored");
        }
        Ok((loaded, started.elapsed().as_secs_f64()))
    };
    match subject {
        Subject::Model(model) => {
            let files = resolve(model, hub, &bars)?;
            let (loaded, load_s) = load(Source::Files(&files))?;
            let calibrations = calibrations(&files);
            Ok(Opened { name: default_name(model), random_weights: false, loaded, calibrations, load_s })
        }
        Subject::RandomWeights(model) => {
            let config = resolve_config(("--random-weights", model), hub, &bars)?;
            let (loaded, load_s) = load(Source::Random { config: &config, seed: settings.seed })?;
            let calibrations = Calibrations::new(|| Err("no file was calibrated on weights that are made up".into()));
            Ok(Opened { name: name(model), random_weights: true, loaded, calibrations, load_s })
        }
    }
}

/// What to call a model that is a config.json: as its directory is called.
fn name(model: &str) -> String {
    let path = Path::new(model);
    match (path.is_file(), path.file_stem(), path.parent()) {
        (true, Some(stem), Some(parent)) if stem == "config" => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            default_name(&parent.display().to_string())
        }
        (true, Some(stem), _) => stem.to_string_lossy().into_owned(),
        _ => default_name(model),
    }
}

/// The flag that asked for more positions than there are.
fn too_long(error: LoadError, settings: &Settings) -> BenchError {
    match error {
        LoadError::MaxModelLen { max_positions, .. } if settings.prompt_max() > max_positions => {
            BenchError::Prompt { prompt: settings.prompt_max(), max_positions }
        }
        LoadError::MaxModelLen { max_positions, .. } => {
            BenchError::Context { context: settings.context, generate: settings.generate, max_positions }
        }
        other => other.into(),
    }
}
