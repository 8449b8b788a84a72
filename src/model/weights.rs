//! Reads tensors out of safetensors or GGUF files, or makes them up, one at a time, and keeps account of what was read.

use super::LoadError;
use super::gguf::{self, is_gguf};
use super::random::RandomWeights;
use crate::ops::HostTensor;
use candle_core::DType;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of header accepted, as in the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The tensors of a checkpoint, or made-up ones. Nothing is mapped: a tensor's bytes are read when it is taken and freed when it
/// is packed, so that loading never holds more than the packed weights and one tensor.
pub struct Weights {
    files: Vec<(PathBuf, File)>,
    /// Tensors not taken yet.
    left: HashMap<String, Entry>,
    /// Has every tensor that is asked for, beside the files.
    random: Option<RandomWeights>,
    /// Whether only their shapes are wanted of matrices.
    leaves_matrices: bool,
    stored: DType,
    parameters: usize,
    on_read: Box<dyn FnMut(u64)>,
}

struct Entry {
    file: usize,
    form: Form,
    shape: Vec<usize>,
    start: u64,
    bytes: usize,
}

/// How a tensor's bytes are to be understood.
#[derive(Clone, Copy)]
enum Form {
    Safetensors(Dtype),
    Gguf(gguf::Form),
}

impl Form {
    /// What a model of such weights runs in, if it can.
    fn float(self) -> Option<DType> {
        match self {
            Self::Safetensors(Dtype::BF16) => Some(DType::BF16),
            Self::Safetensors(Dtype::F16) => Some(DType::F16),
            Self::Safetensors(Dtype::F32) => Some(DType::F32),
            Self::Safetensors(_) => None,
            Self::Gguf(form) => Some(form.dtype()),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Safetensors(dtype) => format!("{dtype:?}"),
            Self::Gguf(form) => format!("{form:?}"),
        }
    }
}

impl Weights {
    /// Opens `paths` and checks their headers against their sizes.
    ///
    /// # Errors
    /// A file that cannot be read, is truncated, or whose header lies.
    pub fn open(paths: &[PathBuf]) -> Result<Self, LoadError> {
        let mut weights = Self::empty(DType::F32);
        let mut first = None;
        for path in paths {
            let file = File::open(path).map_err(LoadError::io(path))?;
            let index = weights.files.len();
            let entries = if is_gguf(path) {
                let (header, tensors) = gguf::read(path, &file, first.as_ref())?;
                first = first.or(header);
                let entry = |tensor: gguf::Stored| {
                    let gguf::Stored { name, shape, start, bytes, form } = tensor;
                    (name, Entry { file: index, form: Form::Gguf(form), shape, start, bytes })
                };
                tensors.into_iter().map(entry).collect()
            } else {
                safetensors_entries(path, &file, index)?
            };
            weights.files.push((path.clone(), file));
            for (name, entry) in entries {
                if let Some(first) = weights.left.insert(name.clone(), entry) {
                    let first = &weights.files[first.file].0;
                    return Err(LoadError::file(path, format!("tensor `{name}` is in {} too", first.display())));
                }
            }
        }
        let mut bytes_of = BTreeMap::<String, (usize, Form)>::new();
        for entry in weights.left.values() {
            bytes_of.entry(entry.form.name()).or_insert((0, entry.form)).0 += entry.bytes;
        }
        let most = bytes_of.into_values().max_by_key(|(bytes, _)| *bytes);
        let nameless = Path::new("model.safetensors");
        let path = paths.first().map_or(nameless, |path| path);
        let (_, most) = most.ok_or_else(|| LoadError::file(path, "holds no tensors"))?;
        weights.stored = most.float().ok_or_else(|| weights.not_a_float(&most.name()))?;
        Ok(weights)
    }

    /// Tensors that are made up when they are taken, of whatever name and shape; `stored` is what is said of their dtype.
    pub fn random(seed: u64, stored: DType) -> Self {
        Self { random: Some(RandomWeights { seed }), ..Self::empty(stored) }
    }

    fn empty(stored: DType) -> Self {
        let on_read = Box::new(|_| {});
        Self {
            files: Vec::new(),
            left: HashMap::new(),
            random: None,
            leaves_matrices: false,
            stored,
            parameters: 0,
            on_read,
        }
    }

    fn not_a_float(&self, form: &str) -> LoadError {
        let with_it = self.left.iter().filter(|(_, e)| e.form.name() == form);
        let name = with_it.map(|(name, _)| name.clone()).min().unwrap_or_default();
        LoadError::TensorDtype { name, found: form.into() }
    }

    /// Matrices are not read from now on: they are packed already.
    pub fn leave_matrices(&mut self) {
        self.leaves_matrices = true;
    }

    /// Has `on_read` told the bytes of every tensor read from now on.
    pub fn on_read(&mut self, on_read: impl FnMut(u64) + 'static) {
        self.on_read = Box::new(on_read);
    }

    /// The dtype most of the bytes are stored in.
    pub fn stored_dtype(&self) -> DType {
        self.stored
    }

    /// Elements of the tensors taken so far.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Bytes of all tensors of files not taken yet.
    pub fn bytes_left(&self) -> u64 {
        self.left.values().map(|e| e.bytes as u64).sum()
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.random.is_some() || self.left.contains_key(name)
    }

    /// Reads or makes up the tensor `name`, which must have `shape`.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape, is no float, or cannot be read.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, LoadError> {
        let tensor = match &self.random {
            Some(_) if self.leaves(shape) => HostTensor::unread(DType::BF16, shape.to_vec()),
            Some(random) => random.tensor(name, shape),
            None => self.read(name.to_string(), shape)?,
        };
        self.parameters += shape.iter().product::<usize>();
        (self.on_read)(tensor.bytes() as u64);
        Ok(tensor)
    }

    fn leaves(&self, shape: &[usize]) -> bool {
        self.leaves_matrices && shape.len() == 2
    }

    fn read(&mut self, name: String, shape: &[usize]) -> Result<HostTensor, LoadError> {
        let Some(entry) = self.left.remove(&name) else {
            return Err(LoadError::MissingTensor { name, expected: shape.to_vec() });
        };
        if entry.shape != shape {
            return Err(LoadError::TensorShape { name, found: entry.shape, expected: shape.to_vec() });
        }
        let Some(dtype) = entry.form.float() else {
            return Err(LoadError::TensorDtype { name, found: entry.form.name() });
        };
        if self.leaves(shape) {
            return Ok(HostTensor::unread(dtype, entry.shape));
        }
        let mut bytes = vec![0; entry.bytes];
        let (path, file) = &self.files[entry.file];
        file.read_exact_at(&mut bytes, entry.start).map_err(LoadError::io(path))?;
        match entry.form {
            Form::Safetensors(_) => Ok(HostTensor::new(dtype, entry.shape, bytes)),
            Form::Gguf(form) => {
                let widened = form.widen(entry.shape, bytes);
                widened.map_err(|error| LoadError::file(path, format!("tensor `{name}`: {error}")))
            }
        }
    }

    /// Drops tensors that inference has no use for.
    pub fn ignore(&mut self, useless: impl Fn(&str) -> bool) {
        self.left.retain(|name, _| !useless(name));
    }

    /// Checks that every tensor was taken: one left over means that config.json and weights disagree.
    ///
    /// # Errors
    /// The tensors left over, the first few by name.
    pub fn finish(self) -> Result<(), LoadError> {
        let mut names: Vec<String> = self.left.into_keys().collect();
        let count = names.len();
        if count == 0 {
            return Ok(());
        }
        names.sort_unstable();
        names.truncate(5);
        Err(LoadError::ExtraTensors { count, names: names.join(", ") })
    }
}

fn safetensors_entries(path: &Path, file: &File, index: usize) -> Result<Vec<(String, Entry)>, LoadError> {
    let (metadata, data_start) = read_header(path, file)?;
    let entry = |(name, info): (String, &TensorInfo)| {
        let (start, end) = info.data_offsets;
        let (form, shape) = (Form::Safetensors(info.dtype), info.shape.clone());
        (name, Entry { file: index, form, shape, start: data_start + start as u64, bytes: end - start })
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}

/// The header, and where the data begins.
fn read_header(path: &Path, mut file: &File) -> Result<(Metadata, u64), LoadError> {
    let size = file.metadata().map_err(LoadError::io(path))?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(LoadError::file(path, format!("is no safetensors file: it has {size} bytes")));
    }
    file.read_exact(&mut length).map_err(LoadError::io(path))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX || header_bytes > size - 8 {
        let problem = format!(
            "is no safetensors file or is truncated: it announces a header of {header_bytes} bytes and has {size} in all"
        );
        return Err(LoadError::file(path, problem));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(LoadError::io(path))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| LoadError::file(path, format!("the safetensors header is invalid: {e}")))?;
    let data = size - 8 - header_bytes;
    let mut ends = 0;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, d| n.checked_mul(*d));
        if end < start || bits != (end - start).checked_mul(8) {
            let problem = format!(
                "tensor `{name}` of shape {:?} is said to lie at bytes {start} to {end}, which does not fit it",
                info.shape
            );
            return Err(LoadError::file(path, problem));
        }
        ends = ends.max(end as u64);
    }
    if ends != data {
        let problem = format!(
            "is truncated or has trailing bytes: the header describes {ends} bytes of data, the file holds {data}"
        );
        return Err(LoadError::file(path, problem));
    }
    Ok((metadata, 8 + header_bytes))
}
