//! Weight files, whole: header, offsets, shapes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::model::hub::Files;
use moe_serve::model::{LoadOptions, load};
use moe_serve::types::DeviceChoice;
use std::path::Path;
use std::sync::LazyLock;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|weights: &[u8]| {
    let path = FOLDER.path().join("model.safetensors");
    std::fs::write(&path, weights).expect("room");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mixtral_gqa/config.json");
    let files = Files {
        tokenizer: config.clone(),
        config,
        generation_config: None,
        tokenizer_config: None,
        chat_template: None,
        weights: vec![path],
    };
    let options = LoadOptions { device: DeviceChoice::Cpu, ..Default::default() };
    let _ = load(&files, &options, |_, _| {});
});
