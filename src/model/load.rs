//! From files to a model: config.json decides the family, the family takes its tensors, nothing may be left over.

use super::config::{Config, cut_layers, max_positions, stored_dtype};
use super::hash::stamp;
use super::hub::Files;
use super::{CausalLm, FAMILIES, LoadError, Loader, Weights};
use crate::ops::{Backend, PackCache};
use crate::types::{DeviceChoice, DtypeChoice, Quantization, TokenId};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How to load.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    pub dtype: DtypeChoice,
    pub device: DeviceChoice,
    /// Longest sequence that will be run; without it the checkpoint's own limit, and at most 131,072.
    pub max_model_len: Option<usize>,
    /// In what forms weights are kept.
    pub quantization: Quantization,
    /// Directory in which packed weights are kept, so that later starts need not pack them.
    pub pack_cache: Option<PathBuf>,
}

/// A model and what else its files say.
#[derive(Debug)]
pub struct Loaded {
    pub model: CausalLm,
    /// Tokens that end a completion.
    pub eos: Vec<TokenId>,
    pub max_model_len: usize,
    /// Fields of config.json that were not understood.
    pub unread_config: Vec<String>,
}

/// Context that is prepared for unless a longer one is asked for: rotary tables take memory by its length.
const DEFAULT_LEN_MAX: usize = 1 << 17;

/// Where a model comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Files(&'a Files),
    /// Weights made up for a config.json: the work is that of a checkpoint of its shape, the text is noise.
    Random {
        config: &'a Path,
        seed: u64,
    },
}

/// Loads the checkpoint in `files`. `on_progress(read, total)` is told bytes.
///
/// # Errors
/// Anything missing, unknown, unsupported or contradictory, by name.
pub fn load(
    files: &Files,
    options: &LoadOptions,
    on_progress: impl FnMut(u64, u64) + 'static,
) -> Result<Loaded, LoadError> {
    load_from(Source::Files(files), options, None, on_progress)
}

/// Loads a model, of `layers` only the first where they are given. `on_progress(read, total)` is told bytes; the total of
/// weights that are made up is not known before, and 0.
///
/// # Errors
/// As [`load`], or layers that the model does not have.
pub fn load_from(
    source: Source<'_>,
    options: &LoadOptions,
    layers: Option<usize>,
    mut on_progress: impl FnMut(u64, u64) + 'static,
) -> Result<Loaded, LoadError> {
    let (config, generation) = match source {
        Source::Files(files) => (&*files.config, files.generation_config.as_deref()),
        Source::Random { config, .. } => (config, None),
    };
    let mut config = read_json(config)?;
    let mut generation = generation.map(read_json).transpose()?;
    let model_type = match config.get("model_type").cloned() {
        Some(Value::String(name)) => name,
        Some(other) => return Err(config.error("model_type", format!("must be a string; got {other}"))),
        None => return Err(config.error("model_type", "is missing")),
    };
    let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type) else {
        let supported: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        return Err(LoadError::Family { found: model_type, supported: supported.join(", ") });
    };
    let max_positions = max_positions(&mut config)?;
    let max_model_len = options.max_model_len.unwrap_or(max_positions.min(DEFAULT_LEN_MAX));
    if max_model_len == 0 || max_model_len > max_positions {
        return Err(LoadError::MaxModelLen { asked: max_model_len, max_positions });
    }

    let mut weights = match source {
        Source::Files(files) => Weights::open(&files.weights)?,
        Source::Random { seed, .. } => Weights::random(seed, stored_dtype(&mut config)?),
    };
    // Frequencies that older files carry and that are computed here.
    weights.ignore(|name| name.ends_with("rotary_emb.inv_freq"));
    if let Some(layers) = layers {
        cut_layers(&mut config, layers)?;
        weights.ignore(|name| layer_of(name).is_some_and(|layer| layer >= layers));
    }
    let (mut read, total) = (0, weights.bytes_left());
    weights.on_read(move |bytes| {
        read += bytes;
        on_progress(read, total);
    });
    let backend = Backend::select(options.device, options.dtype, weights.stored_dtype())?;
    let backend = backend.quantized(options.quantization)?;
    let cache = match &options.pack_cache {
        Some(dir) => {
            let form = format!("{:?} {}", backend.dtype(), backend.quantization());
            let key = stamp(source, &config, &form)?;
            Some(Arc::new(PackCache::open(dir, &key).map_err(LoadError::io(&dir.join(format!("{key}.packed"))))?))
        }
        None => None,
    };
    if cache.as_ref().is_some_and(|cache| cache.reads()) {
        weights.leave_matrices();
    }
    let backend = backend.cached(cache.clone())?;
    let mut model = (family.build)(
        &mut config,
        &mut Loader { weights: &mut weights, backend: &backend, positions: max_model_len },
    )?;
    if let Some(cache) = cache {
        cache.finish().map_err(|problem| LoadError::pack_cache(cache.path(), problem))?;
    }
    let parameters = weights.parameters();
    if model.tied {
        // Some files store the LM head although it is tied.
        weights.ignore(|name| name == "lm_head.weight");
    }
    weights.finish()?;
    // Streams belong to threads, and the engine runs on another: what was copied must be there before it starts.
    backend.device().synchronize()?;
    model.shape.parameters = parameters;

    let mut eos = match &mut generation {
        Some(generation) => generation.eos_token_ids()?,
        None => Vec::new(),
    };
    if eos.is_empty() {
        eos = config.eos_token_ids()?;
    }
    if let Some(id) = eos.iter().find(|id| **id as usize >= model.shape.vocab) {
        let problem = format!("is {id}, but the vocabulary has {} tokens", model.shape.vocab);
        return Err(generation.as_ref().unwrap_or(&config).error("eos_token_id", problem));
    }
    let unread_config = config.unread().into_iter().map(String::from).collect();
    Ok(Loaded { model, eos, max_model_len, unread_config })
}

/// The layer that a tensor is of.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

fn read_json(path: &Path) -> Result<Config, LoadError> {
    let text = std::fs::read_to_string(path).map_err(LoadError::io(path))?;
    let fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| LoadError::file(path, format!("is not a JSON object: {e}")))?;
    let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(Config::new(name, fields))
}
