//! What several test modules need.

use moe_serve::model::hub::Files;
use moe_serve::model::{CausalLm, LoadError, LoadOptions, Loaded, StepInput, load};
use moe_serve::moe::router::StepTokens;
use moe_serve::moe::{Policy, RouteCtx, StepTrace};
use moe_serve::ops::{KvCache, KvShape, Segment, StepLayout, to_host};
use moe_serve::types::{BlockId, DtypeChoice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file or folder of this repository.
pub fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The files of a checkpoint folder; one without a tokenizer gets the bundled model's.
pub fn files(dir: &Path) -> Files {
    let file = |name: &str| Some(dir.join(name)).filter(|p| p.is_file());
    Files {
        config: dir.join("config.json"),
        generation_config: file("generation_config.json"),
        tokenizer: file("tokenizer.json").unwrap_or_else(|| repo("models/stories-mixtral/tokenizer.json")),
        tokenizer_config: file("tokenizer_config.json"),
        weights: vec![dir.join("model.safetensors")],
    }
}

pub fn try_load(dir: &Path, dtype: DtypeChoice) -> Result<Loaded, LoadError> {
    load(&files(dir), &LoadOptions { dtype, ..Default::default() }, |_, _| {})
}

/// Sequences run by hand, without engine and scheduler: each has its own scattered KV blocks.
pub struct Runner<'a> {
    pub model: &'a CausalLm,
    kv: KvCache,
    block_size: usize,
    blocks: Vec<Vec<BlockId>>,
    lens: Vec<usize>,
    policies: Vec<Arc<Policy>>,
    pub last_trace: StepTrace,
}

impl<'a> Runner<'a> {
    /// Room for `sequences` sequences of `len_max` tokens, routed by `router`.
    pub fn new(model: &'a CausalLm, sequences: usize, len_max: usize, router: &str) -> Self {
        let (shape, block_size) = (model.shape(), 16);
        let each = len_max.div_ceil(block_size);
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: each * sequences,
            block_size,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        // Interleaved from the back, so that a wrong block table cannot look right.
        let block = |s: usize, b: usize| BlockId((each * sequences - 1 - (b * sequences + s)) as u32);
        Self {
            model,
            kv: KvCache::new(kv_shape, model.backend()).unwrap(),
            block_size,
            blocks: (0..sequences).map(|s| (0..each).map(|b| block(s, b)).collect()).collect(),
            lens: vec![0; sequences],
            policies: vec![Arc::new(Policy::build(&router.parse().unwrap(), &shape.moe).unwrap())],
            last_trace: StepTrace::default(),
        }
    }

    /// Appends tokens to sequences in one step and gives the logits of every new token, in order.
    pub fn step(&mut self, parts: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
        let mut tokens = StepTokens::default();
        let mut segments = Vec::new();
        for &(s, ids) in parts {
            let start = self.lens[s];
            let blocks = self.blocks[s][..(start + ids.len()).div_ceil(self.block_size)].to_vec();
            segments.push(Segment { start, len: ids.len(), blocks });
            tokens.token_t.extend(ids);
            tokens.position_t.extend((start..start + ids.len()).map(|p| p as u32));
            tokens.policy_t.extend(ids.iter().map(|_| 0));
            self.lens[s] += ids.len();
        }
        let layout = StepLayout::new(segments, &self.kv, self.model.backend()).unwrap();
        let rows: Vec<u32> = (0..tokens.token_t.len() as u32).collect();
        let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &rows };
        let mut routes = RouteCtx::new(self.model.shape().moe, &self.policies, &tokens);
        let logits = self.model.forward(&input, &mut self.kv, &mut routes).unwrap().unwrap();
        self.last_trace = routes.into_trace();
        to_host(&logits).unwrap().chunks(self.model.shape().vocab).map(<[f32]>::to_vec).collect()
    }
}

/// The index of the largest value, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}
