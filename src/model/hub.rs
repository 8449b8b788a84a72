//! Finds the files of checkpoints and data sets: in a directory, in the Hugging Face cache, or on the hub.
//!
//! Uses hf-hub 0.5 (ureq and rustls: a few small crates) rather than 1.x, whose hf-xet brings a second HTTP stack
//! and an async runtime for a chunked transfer that needs the hub's own servers. Both share the Python cache.

use super::LoadError;
use super::gguf::{self, is_gguf};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The files of one checkpoint.
#[derive(Clone, Debug)]
pub struct Files {
    pub config: PathBuf,
    pub generation_config: Option<PathBuf>,
    pub tokenizer: PathBuf,
    /// May hold the chat template.
    pub tokenizer_config: Option<PathBuf>,
    /// Where newer checkpoints keep it.
    pub chat_template: Option<PathBuf>,
    /// One safetensors or GGUF file, or all shards.
    pub weights: Vec<PathBuf>,
}

/// Where and how to look.
#[derive(Clone, Debug, Default)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` without it.
    pub revision: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    pub token: Option<String>,
    /// The hub's address, for mirrors.
    pub endpoint: Option<String>,
    /// The cache folder (`…/huggingface/hub`).
    pub cache: Option<PathBuf>,
}

impl HubOptions {
    /// From HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT and HF_HUB_OFFLINE; without HF_TOKEN, the
    /// token that `hf auth login` left.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let cache = set("HF_HUB_CACHE").map(PathBuf::from);
        let home = set("HF_HOME").map(PathBuf::from);
        let default = || set("HOME").map(|h| Path::new(&h).join(".cache/huggingface"));
        let token_file = set("HF_TOKEN_PATH").map(PathBuf::from);
        let token_file = token_file.or_else(|| Some(home.clone().or_else(default)?.join("token")));
        let saved = || Some(fs::read_to_string(token_file?).ok()?.trim().to_string()).filter(|t| !t.is_empty());
        Self {
            revision: None,
            offline: set("HF_HUB_OFFLINE")
                .is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")),
            token: set("HF_TOKEN").or_else(saved),
            endpoint: set("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_string()),
            cache: cache.or_else(|| home.map(|home| home.join("hub"))),
        }
    }
}

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Finds the files of `model`: a directory, a GGUF file beside its config.json and tokenizer.json, or a hub id such as `mistralai/Mixtral-8x7B-v0.1`.
///
/// # Errors
/// A directory without a needed file, an id that does not exist, is gated, has no safetensors, or is not in the
/// cache when offline.
pub fn resolve(model: &str, options: &HubOptions, bars: &MultiProgress) -> Result<Files, LoadError> {
    if let Some((dir, file)) = gguf_file(model) {
        if options.revision.is_some() {
            return Err(LoadError::Hub(format!("--revision is for hub ids, but {model} is a file")));
        }
        let mut find = |name: &str| Ok(Some(dir.join(name)).filter(|path| path.is_file()));
        return collect(&dir.display().to_string(), Some(gguf::parts(file)?), &mut find);
    }
    let path = Path::new(model);
    let has = |name: &str| path.join(name).is_file();
    let gguf = if path.is_dir() && !has(SINGLE) && !has(INDEX) { gguf::find(path)? } else { None };
    gather(("--model", model), options, bars, |model, find| collect(model, gguf.clone(), find))
}

/// A GGUF file that is named itself, with its directory.
fn gguf_file(model: &str) -> Option<(&Path, &Path)> {
    let path = Path::new(model);
    let named = is_gguf(path) && path.is_file();
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    named.then_some((dir, path))
}

/// Finds config.json of `model` alone: a file, the directory it is in, or a hub id. `flag` is where it was given.
///
/// # Errors
/// As for [`resolve`].
pub fn resolve_config(
    (flag, model): (&str, &str),
    options: &HubOptions,
    bars: &MultiProgress,
) -> Result<PathBuf, LoadError> {
    if Path::new(model).is_file() {
        return Ok(model.into());
    }
    gather((flag, model), options, bars, |_, find| {
        find(CONFIG)?.ok_or_else(|| LoadError::Hub(format!("{model} has no {CONFIG}")))
    })
}

/// Finds config.json and tokenizer.json of `model`: all that is needed where another program runs it.
///
/// # Errors
/// As for [`resolve`].
pub fn resolve_tokenizer(
    model: &str,
    options: &HubOptions,
    bars: &MultiProgress,
) -> Result<(PathBuf, PathBuf), LoadError> {
    let missing = |name: &str| LoadError::Hub(format!("{model} has no {name}"));
    gather(("--model", model), options, bars, |_, find| {
        let config = find(CONFIG)?.ok_or_else(|| missing(CONFIG))?;
        Ok((config, find(TOKENIZER)?.ok_or_else(|| missing(TOKENIZER))?))
    })
}

/// Gives the path of a file of a model, or `None` where there is none.
type Find<'a> = &'a mut dyn FnMut(&str) -> Result<Option<PathBuf>, LoadError>;

/// Lets `collect` gather what it needs from where the model is.
fn gather<T>(
    (flag, model): (&str, &str),
    options: &HubOptions,
    bars: &MultiProgress,
    collect: impl Fn(&str, Find<'_>) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    let path = Path::new(model);
    if path.is_dir() {
        if options.revision.is_some() {
            return Err(LoadError::Hub(format!("--revision is for hub ids, but {model} is a directory")));
        }
        return collect(model, &mut |name| Ok(Some(path.join(name)).filter(|p| p.is_file())));
    }
    if path.is_file() {
        return Err(LoadError::Hub(format!("{flag} {model} is a file; give the directory it is in")));
    }
    if !is_hub_id(model) {
        return Err(LoadError::Hub(format!(
            "{flag} {model}: there is no such directory, and it is no hub id of the form organisation/name"
        )));
    }
    let cache = cache_of(options);
    let revision = options.revision.clone().unwrap_or_else(|| MAIN.into());
    let wanted = Wanted { id: model, kind: RepoType::Model, revision: &revision };
    let repo = wanted.repo();
    let cached = collect(model, &mut |name| Ok(find_cached(&cache, &repo, name)));
    match (cached, options.offline) {
        (Ok(files), _) => Ok(files),
        (Err(missing), true) => Err(LoadError::Hub(format!(
            "{model} (revision {revision}) is not complete in the cache {} and --offline (or HF_HUB_OFFLINE) forbids \
             downloading it: {missing}",
            cache.path().display()
        ))),
        (Err(_), false) => download(&wanted, cache, options, bars, |find| collect(model, find)),
    }
}

/// Finds one file of the data set `id`, on its branch `main` whatever revision `options` ask of models.
///
/// # Errors
/// An id or file that does not exist, is gated, or is not in the cache when offline.
pub fn dataset_file(id: &str, file: &str, options: &HubOptions, bars: &MultiProgress) -> Result<PathBuf, LoadError> {
    let cache = cache_of(options);
    let wanted = Wanted { id, kind: RepoType::Dataset, revision: MAIN };
    match (find_cached(&cache, &wanted.repo(), file), options.offline) {
        (Some(path), _) => Ok(path),
        (None, true) => Err(LoadError::Hub(format!(
            "{file} of the data set {id} is not in the cache {} and --offline (or HF_HUB_OFFLINE) forbids downloading it",
            cache.path().display()
        ))),
        (None, false) => download(&wanted, cache, options, bars, |find| {
            find(file)?.ok_or_else(|| LoadError::Hub(format!("the data set {id} has no {file}")))
        }),
    }
}

/// A repository at a revision.
struct Wanted<'a> {
    id: &'a str,
    kind: RepoType,
    revision: &'a str,
}

impl Wanted<'_> {
    fn repo(&self) -> Repo {
        self.at(self.revision)
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.into(), self.kind, revision.into())
    }
}

/// The branch that is meant when none is named.
const MAIN: &str = "main";

fn cache_of(options: &HubOptions) -> Cache {
    options.cache.clone().map_or_else(Cache::from_env, Cache::new)
}

fn is_hub_id(model: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty() && !p.starts_with('.') && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let parts: Vec<&str> = model.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|p| part(p))
}

/// A file of `repo` in the cache, where Python's hub library or this one left it.
fn find_cached(cache: &Cache, repo: &Repo, name: &str) -> Option<PathBuf> {
    let by_ref = cache.repo(repo.clone()).get(name);
    // A commit given in full has no entry under refs/ if Python downloaded it.
    let by_commit = || cache.path().join(repo.folder_name()).join("snapshots").join(repo.revision()).join(name);
    by_ref.or_else(|| Some(by_commit()).filter(|p| p.is_file()))
}

/// Gathers the files of a checkpoint through `find`, which gives the path of a file or `None` where there is none; its
/// weights unless they are given.
fn collect(model: &str, weights: Option<Vec<PathBuf>>, find: Find<'_>) -> Result<Files, LoadError> {
    let missing = |name: &str| LoadError::Hub(format!("{model} has no {name}"));
    let config = find(CONFIG)?.ok_or_else(|| missing(CONFIG))?;
    let tokenizer = find(TOKENIZER)?.ok_or_else(|| {
        LoadError::Hub(format!("{model} has no {TOKENIZER}; a fast tokenizer file is needed (a tokenizer.model alone can be converted with transformers)"))
    })?;
    let generation_config = find(GENERATION)?;
    let (tokenizer_config, chat_template) = (find(TOKENIZER_CONFIG)?, find(CHAT_TEMPLATE)?);
    if let Some(weights) = weights {
        return Ok(Files { config, generation_config, tokenizer, tokenizer_config, chat_template, weights });
    }
    let weights = match find(INDEX)? {
        Some(index) => {
            let mut shards = Vec::new();
            for name in shard_names(&index)? {
                shards.push(
                    find(&name)?
                        .ok_or_else(|| LoadError::Hub(format!("{model} has no {name}, which {INDEX} lists")))?,
                );
            }
            shards
        }
        None => vec![find(SINGLE)?.ok_or_else(|| {
            LoadError::Hub(format!(
                "{model} has neither {SINGLE} nor {INDEX}; only safetensors weights are loaded, and GGUF files of this machine (no pickle)"
            ))
        })?],
    };
    Ok(Files { config, generation_config, tokenizer, tokenizer_config, chat_template, weights })
}

/// The distinct files that an index maps tensors to.
fn shard_names(index: &Path) -> Result<BTreeSet<String>, LoadError> {
    let text = fs::read_to_string(index).map_err(LoadError::io(index))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| LoadError::file(index, format!("is not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| LoadError::file(index, "has no object `weight_map`"))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        // A plain name: an index must not lead out of its folder.
        match file.as_str().filter(|f| f.ends_with(".safetensors") && !f.contains(['/', '\\'])) {
            Some(file) => names.insert(file.to_string()),
            None => {
                return Err(LoadError::file(
                    index,
                    format!(
                        "`weight_map` gives {file} as the file of `{tensor}`; a .safetensors file name was expected"
                    ),
                ));
            }
        };
    }
    if names.is_empty() {
        return Err(LoadError::file(index, "`weight_map` is empty"));
    }
    Ok(names)
}

/// Fetches what `collect` asks its argument for: the path of a file, or `None` where the repository has no such file.
fn download<T>(
    wanted: &Wanted<'_>,
    cache: Cache,
    options: &HubOptions,
    bars: &MultiProgress,
    collect: impl FnOnce(Find<'_>) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    let token = options.token.clone().or_else(|| cache.token());
    let endpoint = options.endpoint.as_deref().unwrap_or(HUB);
    let explain = |error: ApiError| explain(wanted, endpoint, token.is_some(), &error);
    let repo = wanted.repo();
    // Without retries: hf-hub's own append at the wrong place when the first request of a resumed file fails.
    let builder = ApiBuilder::from_cache(cache.clone()).with_token(token.clone()).with_retries(0);
    let api = builder.with_endpoint(endpoint.into()).build().map_err(explain)?;
    let info = api.repo(repo.clone()).info().map_err(explain)?;
    tracing::info!(repository = wanted.id, commit = info.sha, "downloading into {}", cache.path().display());
    // By commit from here on: a branch that moves, now or between two starts, must not mix two checkpoints.
    let pinned = wanted.at(&info.sha);
    let remote = Remote { repo: api.repo(pinned.clone()), api, cache: cache.repo(pinned.clone()), bars };
    cache.repo(repo).create_ref(&info.sha).map_err(LoadError::io(cache.path()))?;
    collect(&mut |name| {
        if !info.siblings.iter().any(|s| s.rfilename == name) {
            return Ok(None);
        }
        match find_cached(&cache, &pinned, name) {
            Some(path) => Ok(Some(path)),
            None => remote.fetch(name).map(Some).map_err(explain),
        }
    })
}

/// Where models come from when nothing else is said.
const HUB: &str = "https://huggingface.co";
/// Requests for one file beyond the first, each taking up where the one before broke off.
const RETRIES: u32 = 3;

/// One commit on the hub and its place in the cache.
struct Remote<'a> {
    api: Api,
    repo: ApiRepo,
    cache: CacheRepo,
    bars: &'a MultiProgress,
}

impl Remote<'_> {
    fn fetch(&self, name: &str) -> Result<PathBuf, ApiError> {
        tracing::info!("downloading {name}");
        let mut attempt = 0;
        loop {
            match self.fetch_once(name) {
                Err(error) if attempt < RETRIES && is_transient(&error) => {
                    attempt += 1;
                    tracing::warn!("downloading {name}: {error}; trying again ({attempt} of {RETRIES})");
                    std::thread::sleep(Duration::from_millis(200 << attempt));
                }
                result => return result,
            }
        }
    }

    /// Downloads the rest of a file. What is not as long as announced is thrown away: hf-hub does not look.
    fn fetch_once(&self, name: &str) -> Result<PathBuf, ApiError> {
        let expected = Arc::new(AtomicU64::new(0));
        let bar = Bar { bar: self.bars.add(ProgressBar::new(0)), expected: expected.clone() };
        let path = match self.repo.download_with_progress(name, bar) {
            Err(error) if matches!(error, ApiError::InvalidResume) || status_of(&error) == Some(416) => {
                // What an earlier start left is no beginning of this file.
                let etag = self.api.metadata(&self.repo.url(name))?.etag().to_string();
                fs::remove_file(self.cache.blob_path(&etag).with_extension("part"))?;
                return Err(error);
            }
            result => result?,
        };
        let (got, expected) = (fs::metadata(&path)?.len(), expected.load(Ordering::Relaxed));
        if got != expected {
            fs::remove_file(fs::canonicalize(&path)?)?;
            fs::remove_file(&path)?;
            let problem = format!("{name} has {expected} bytes, but {got} came");
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, problem).into());
        }
        Ok(path)
    }
}

/// Whether asking again may help.
fn is_transient(error: &ApiError) -> bool {
    match status_of(error) {
        Some(status) => status >= 500 || status == 416,
        None => matches!(error, ApiError::RequestError(_) | ApiError::IoError(_) | ApiError::InvalidResume),
    }
}

/// Says what to do about a failed request.
fn explain(wanted: &Wanted<'_>, endpoint: &str, has_token: bool, error: &ApiError) -> LoadError {
    let status = status_of(error);
    let access = match has_token {
        true => {
            "the token given has no access: accept the terms on its page and check that the token may read gated repositories"
        }
        false => {
            "no token was given: accept the terms on its page, make a token at /settings/tokens of the hub and pass it as HF_TOKEN"
        }
    };
    let Wanted { id, revision, .. } = wanted;
    let local = match wanted.kind {
        RepoType::Model => format!("there is no directory {id} here, and "),
        _ => String::new(),
    };
    LoadError::Hub(match status {
        Some(401 | 403) => format!("{id} does not exist, or is private or gated, and {access}"),
        Some(404) => format!("{id} has no revision {revision}, or does not exist on the hub"),
        Some(429) => {
            format!("the hub refuses more requests for now (429) while fetching {id}; try again later or give HF_TOKEN")
        }
        _ => format!(
            "{local}fetching {id} (revision {revision}) from {endpoint} failed: {error}; what was \
             downloaded is kept, and the next start goes on from there"
        ),
    })
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(e) => match **e {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(inner) => status_of(inner),
        _ => None,
    }
}

/// A download's progress bar; drawn on a terminal only.
struct Bar {
    bar: ProgressBar,
    /// Bytes the whole file has, by the hub's word.
    expected: Arc<AtomicU64>,
}

impl hf_hub::api::Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.expected.store(size as u64, Ordering::Relaxed);
        self.bar.reset();
        self.bar.set_length(size as u64);
        self.bar.set_message(filename.to_string());
        self.bar.set_style(bar_style());
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// How bars of bytes look, in downloading and in loading.
pub fn bar_style() -> ProgressStyle {
    let template = "{msg:34!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["gpt2", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B", "a_b/c.d"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["", "/", "./model", "../x", "/data/model", "a/b/c", "a//b", "a b", "~/x"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
