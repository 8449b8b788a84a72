//! Packed weights on disk: the same model, without a look at the checkpoint's matrices.

use crate::checkpoint::Checkpoint;
use crate::support::{Runner, files};
use moe_serve::model::{LoadOptions, Loaded, load};
use moe_serve::types::{DtypeChoice, Quantization};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn open(dir: &Path, cache: Option<&Path>, dtype: DtypeChoice, quantization: &str) -> Result<Loaded, String> {
    let quantization: Quantization = quantization.parse().unwrap();
    let pack_cache = cache.map(Path::to_path_buf);
    let options = LoadOptions { dtype, quantization, pack_cache, ..Default::default() };
    load(&files(dir), &options, |_, _| {}).map_err(|e| e.to_string())
}

fn logits(loaded: &Loaded) -> Vec<Vec<f32>> {
    Runner::new(&loaded.model, 1, 32, "native").step(&[(0, &[1, 5, 9, 44, 7, 7, 60, 2][..])])
}

fn caches(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn modified(path: &Path) -> SystemTime {
    path.metadata().unwrap().modified().unwrap()
}

fn set_modified(path: &Path, time: SystemTime) {
    std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

/// Zeroes the matrices of the golden checkpoint that was written to `dir`, and keeps the file's time. Vectors, which are
/// read all the same, stay.
fn hollow(golden: &str, dir: &Path) {
    let path = dir.join("model.safetensors");
    let time = modified(&path);
    let mut hollow = Checkpoint::golden(golden);
    for tensor in hollow.tensors.values_mut().filter(|tensor| tensor.shape.len() == 2) {
        tensor.bytes.fill(0);
    }
    hollow.write_to(dir);
    set_modified(&path, time);
}

#[test]
fn a_second_start_computes_the_same_without_reading_the_matrices() {
    for family in ["mixtral_gqa", "olmoe_mha", "qwen2_shared", "qwen3_gqa"] {
        for (dtype, quant) in [(DtypeChoice::F32, "none"), (DtypeChoice::Bf16, "none"), (DtypeChoice::Bf16, "q4_k")] {
            let dir = Checkpoint::golden(family).write();
            let cache = tempfile::tempdir().unwrap();
            let want = logits(&open(dir.path(), None, dtype, quant).unwrap());
            let packed = open(dir.path(), Some(cache.path()), dtype, quant).unwrap();
            assert_eq!(logits(&packed), want);
            hollow(family, dir.path());
            let cached = open(dir.path(), Some(cache.path()), dtype, quant).unwrap();
            assert_eq!(logits(&cached), want, "{family} {dtype:?} {quant}");
            assert_eq!(cached.model.bytes(), packed.model.bytes());
            assert_eq!(cached.model.shape().parameters, packed.model.shape().parameters);
            assert_eq!(caches(cache.path()).len(), 1);
        }
    }
}

#[test]
fn another_form_and_a_changed_checkpoint_are_packed_anew() {
    let dir = Checkpoint::golden("mixtral_gqa").write();
    let cache = tempfile::tempdir().unwrap();
    let weights = dir.path().join("model.safetensors");
    let first = logits(&open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").unwrap());
    for (i, quant) in ["q8_0", "q4_0", "experts=q4_k,dense=q8_0"].into_iter().enumerate() {
        assert_ne!(logits(&open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, quant).unwrap()), first);
        assert_eq!(caches(cache.path()).len(), 2 + i);
    }
    hollow("mixtral_gqa", dir.path());
    assert_eq!(logits(&open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").unwrap()), first);
    set_modified(&weights, modified(&weights) + Duration::from_secs(1));
    assert_ne!(logits(&open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").unwrap()), first);
    assert_eq!(caches(cache.path()).len(), 5);
}

#[test]
fn a_damaged_cache_is_refused_by_name_with_what_to_do() {
    let dir = Checkpoint::golden("mixtral_gqa").write();
    let cache = tempfile::tempdir().unwrap();
    open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").unwrap();
    let file = caches(cache.path()).remove(0);
    let whole = std::fs::read(&file).unwrap();
    for (what, bytes) in [
        ("cut", &whole[..whole.len() - 64]),
        ("cut within the first line", &whole[..20]),
        ("empty", &[][..]),
        ("longer", &[&whole[..], &[0; 64]].concat()),
        ("another layout", &[&b"packmoe9"[..], &whole[8..]].concat()),
        ("other lengths", &[&whole[..64], &[7; 64], &whole[128..]].concat()),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let error = open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").map(drop).expect_err(what);
        assert!(error.contains(file.to_str().unwrap()) && error.contains("remove"), "{what}: {error}");
    }
    std::fs::remove_file(&file).unwrap();
    open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").unwrap();
    let not_a_directory = dir.path().join("config.json");
    let error = open(dir.path(), Some(&not_a_directory), DtypeChoice::Bf16, "none").map(drop).unwrap_err();
    assert!(error.contains("config.json"), "{error}");
}

#[test]
fn a_checkpoint_that_does_not_load_leaves_no_cache() {
    let mut damaged = Checkpoint::golden("mixtral_gqa");
    damaged.tensors.remove("model.norm.weight").unwrap();
    let (dir, cache) = (damaged.write(), tempfile::tempdir().unwrap());
    assert!(open(dir.path(), Some(cache.path()), DtypeChoice::Bf16, "none").is_err());
    assert!(caches(cache.path()).is_empty());
}
