//! From a model's name to a running engine: what every program that runs models does first.

use super::api::Generate;
use super::budget::Budget;
use super::core::{EngineConfig, StartError};
use super::text::{Text, TextError};
use super::worker::Engine;
use crate::model::hub::{Files, HubOptions, bar_style, resolve};
use crate::model::{LoadError, LoadOptions, Loaded, hash, load};
use crate::moe::Policy;
use crate::moe::calibration::Calibrations;
use crate::types::{ModelShape, RouterSpec, SpecError};
use indicatif::{HumanCount, MultiProgress, ProgressBar};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// A model whose files are there.
pub struct Found {
    /// See [`default_name`].
    pub name: String,
    pub files: Files,
    bars: MultiProgress,
}

/// A model that is loaded and not running yet.
pub struct Opened {
    pub name: String,
    pub files: Files,
    pub loaded: Loaded,
    /// Its tokenizer.
    pub text: Text,
}

/// A running engine, and what its model is.
pub struct Launched {
    pub engine: Engine,
    pub files: Files,
    pub shape: ModelShape,
    /// `cpu (AVX-512, 2 threads) with bf16 weights`
    pub runs_on: String,
    /// What weights are kept in: `bf16`.
    pub dtype: String,
    /// Its tokenizer.
    pub text: Text,
    pub weight_bytes: u64,
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("the bundled checkpoint {BUNDLED} is not here; give --model ID|DIR")]
    NotBundled,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Router(#[from] SpecError),
    #[error(transparent)]
    Start(#[from] StartError),
}

/// The checkpoint that comes with the source.
const BUNDLED: &str = "models/stories";

impl Found {
    /// Finds `model`, a hub id or directory, downloading what is missing; the bundled checkpoint without one.
    ///
    /// # Errors
    /// A model that is not there, or whose files are not complete.
    pub fn find(model: Option<&str>, hub: &HubOptions) -> Result<Self, LaunchError> {
        let model = model.map_or_else(bundled, |model| Ok(model.into()))?;
        let bars = MultiProgress::new();
        let files = resolve(&model, hub, &bars)?;
        Ok(Self { name: default_name(&model), files, bars })
    }

    /// Loads it and starts an engine, in which requests call it by its name.
    ///
    /// # Errors
    /// A model that cannot be loaded, a router that does not suit it, too little memory.
    pub fn launch(
        self,
        options: &LoadOptions,
        router: &RouterSpec,
        config: EngineConfig,
    ) -> Result<Launched, LaunchError> {
        self.load(options)?.start(router, config)
    }

    /// Loads it.
    ///
    /// # Errors
    /// A model that cannot be loaded.
    pub fn load(self, options: &LoadOptions) -> Result<Opened, LaunchError> {
        let bar = self.bars.add(ProgressBar::new(0).with_style(bar_style()).with_message("loading weights"));
        let loaded = load(&self.files, options, {
            let bar = bar.clone();
            move |read, total| {
                bar.set_length(total);
                bar.set_position(read);
            }
        })?;
        bar.finish_and_clear();
        for field in &loaded.unread_config {
            tracing::warn!("config.json has a field `{field}` that this program does not know; it was ignored");
        }
        let text = Text::read(&self.files.tokenizer, loaded.model.shape().vocab)?;
        Ok(Opened { name: self.name, files: self.files, loaded, text })
    }
}

impl Opened {
    /// Starts an engine, in which requests call the model by its name.
    ///
    /// # Errors
    /// A router that does not suit the model, too little memory.
    pub fn start(self, router: &RouterSpec, config: EngineConfig) -> Result<Launched, LaunchError> {
        let Self { name, files, loaded, text } = self;
        let shape = loaded.model.shape().clone();
        let backend = loaded.model.backend();
        let dtype = backend.describe_weights();
        let runs_on = format!("{} with {dtype} weights", backend.describe());
        let weight_bytes = loaded.model.bytes() as u64;
        let calibrations = calibrations(&files);
        let policy = Policy::build_with(router, &shape.moe, &calibrations)?;
        let budget = match (router.name.as_str(), config.load_shed) {
            ("budget", shed_to) => Some(Budget::new(router, &shape.moe, &calibrations, shed_to)?),
            (_, None) => None,
            (_, Some(_)) => {
                return Err(router.error("keeps no budget that --load-shed could lower; use budget:…").into());
            }
        };
        let engine = Engine::with_budget(name, loaded, text.clone(), (policy, budget), config)?;
        let engine = engine.with_files(calibrations);
        Ok(Launched { engine, files, shape, runs_on, dtype, text, weight_bytes })
    }
}

impl Launched {
    /// Lines that say what the model is and what it runs on.
    pub fn describe(&self) -> String {
        let (name, shape) = (&self.engine.info().name, &self.shape);
        let mixtures = match &shape.moe {
            moe if moe.layers == 0 => "none of them a mixture".into(),
            moe => {
                let shared = if moe.shared_width.is_some() { " and a shared one" } else { "" };
                format!("{} of them mixtures of {} experts{shared}", moe.layers, moe.experts)
            }
        };
        format!(
            "model      {name}: {} parameters, {} layers, {mixtures}\nruns on    {}",
            HumanCount(shape.parameters as u64),
            shape.layers.len(),
            self.runs_on,
        )
    }
}

/// The calibrations of the checkpoint in `files`.
pub fn calibrations(files: &Files) -> Calibrations {
    let files = files.clone();
    Calibrations::new(move || hash(&files).map_err(|e| e.to_string()))
}

fn bundled() -> Result<String, LaunchError> {
    let places = [PathBuf::from(BUNDLED), Path::new(env!("CARGO_MANIFEST_DIR")).join(BUNDLED)];
    let found = places.iter().find(|p| p.is_dir()).ok_or(LaunchError::NotBundled)?;
    Ok(found.display().to_string())
}

/// Name of a model that is given none: a directory's last part, a file's without its extension, or the hub id as it is.
pub fn default_name(model: &str) -> String {
    let path = Path::new(model);
    let name = match path.canonicalize() {
        Ok(dir) if dir.is_dir() => dir.file_name().map(OsStr::to_os_string),
        Ok(file) if file.is_file() => path.file_stem().map(OsStr::to_os_string),
        _ => None,
    };
    name.map_or_else(|| model.into(), |name| name.to_string_lossy().into_owned())
}
