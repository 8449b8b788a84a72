//! config.json beside the weights of a tiny model: a model or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::model::hub::Files;
use moe_serve::model::{LoadOptions, load};
use moe_serve::types::DeviceChoice;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fn weights() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mixtral_gqa/model.safetensors")
}

fuzz_target!(|config: &[u8]| {
    let path = FOLDER.path().join("config.json");
    std::fs::write(&path, config).expect("room");
    let files = Files {
        config: path.clone(),
        generation_config: Some(path.clone()),
        tokenizer: path,
        tokenizer_config: None,
        chat_template: None,
        weights: vec![weights()],
    };
    let options = LoadOptions { device: DeviceChoice::Cpu, ..Default::default() };
    let _ = load(&files, &options, |_, _| {});
});
