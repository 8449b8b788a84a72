//! A checkpoint held in memory, which tests change before they write it to a folder.

use crate::support::{repo, try_load};
use indicatif::{MultiProgress, ProgressDrawTarget};
use moe_serve::model::{LoadError, Loaded};
use moe_serve::types::DtypeChoice;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// A tensor as the header describes it, right or wrong.
#[derive(Clone, Debug)]
pub struct Stored {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Stored>;

#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub config: Map<String, Value>,
    pub tensors: Tensors,
}

impl Checkpoint {
    /// One of `tests/golden`.
    pub fn golden(name: &str) -> Self {
        let dir = repo("tests/golden").join(name);
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let stored = |name: &str, view: safetensors::tensor::TensorView<'_>| {
            let dtype = format!("{:?}", view.dtype());
            (name.to_string(), Stored { dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec() })
        };
        let tensors = SafeTensors::deserialize(&bytes).unwrap().iter().map(|(n, v)| stored(n, v)).collect();
        Self { config, tensors }
    }

    /// Sets a field of config.json.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.config.insert(field.into(), value);
        self
    }

    /// Removes a field of config.json.
    pub fn without(mut self, field: &str) -> Self {
        assert!(self.config.remove(field).is_some(), "there is no `{field}`");
        self
    }

    pub fn config_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.config).unwrap()
    }

    /// config.json and one model.safetensors.
    pub fn write_to(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config_json()).unwrap();
        std::fs::write(dir.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
    }

    pub fn write(&self) -> TempDir {
        let dir = TempDir::new().unwrap();
        self.write_to(dir.path());
        dir
    }

    pub fn try_load(&self) -> Result<Loaded, LoadError> {
        try_load(self.write().path(), DtypeChoice::F32)
    }

    /// What the loader says against this checkpoint.
    #[track_caller]
    pub fn refusal(&self) -> String {
        match self.try_load() {
            Ok(_) => panic!("this checkpoint must not load: {}", Value::Object(self.config.clone())),
            Err(error) => error.to_string(),
        }
    }

    /// Every other tensor to one of two shards, and the index that says so.
    pub fn shards(&self) -> BTreeMap<String, Vec<u8>> {
        let name = |i: usize| format!("model-0000{}-of-00002.safetensors", i + 1);
        let mut parts = [Tensors::new(), Tensors::new()];
        let mut map = Map::new();
        for (i, (tensor, stored)) in self.tensors.iter().enumerate() {
            parts[i % 2].insert(tensor.clone(), stored.clone());
            map.insert(tensor.clone(), json!(name(i % 2)));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string().into_bytes();
        let mut files: BTreeMap<_, _> = parts.iter().enumerate().map(|(i, p)| (name(i), safetensors(p))).collect();
        files.insert("model.safetensors.index.json".into(), index);
        files
    }
}

/// A safetensors file that holds what it says.
pub fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for (name, stored) in tensors {
        let start = data.len();
        data.extend_from_slice(&stored.bytes);
        let entry = json!({"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    raw_safetensors(Value::Object(header).to_string().as_bytes(), &data)
}

/// A safetensors file with any header.
pub fn raw_safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// Progress that no one sees.
pub fn quiet() -> MultiProgress {
    MultiProgress::with_draw_target(ProgressDrawTarget::hidden())
}

/// The bundled model's tokenizer.json.
pub fn tokenizer_json() -> Vec<u8> {
    std::fs::read(repo("models/stories/tokenizer.json")).unwrap()
}
