//! Families against Hugging Face transformers, the in-repo one against a plain model of its own: logits and greedy
//! continuations made by `tests/golden/make.py` and `tests/golden/moe_lm.py`.

use crate::support::{Runner, argmax, files, repo, try_load, try_load_on};
use moe_serve::model::{FAMILIES, LoadError, LoadOptions, load};
use moe_serve::types::{DeviceChoice, DtypeChoice};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

struct Golden {
    name: String,
    dir: PathBuf,
    input: Vec<u32>,
    logits_f32: Vec<f32>,
    logits_bf16: Vec<f32>,
    greedy: Vec<u32>,
}

fn ids(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn read(dir: &Path) -> Golden {
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
    Golden {
        name: dir.file_name().unwrap().to_string_lossy().into_owned(),
        dir: dir.to_path_buf(),
        input: ids(&data("input_ids")),
        logits_f32: floats(&data("logits_f32")),
        logits_bf16: floats(&data("logits_bf16")),
        greedy: ids(&data("greedy_ids")),
    }
}

fn goldens() -> Vec<Golden> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(repo("tests/golden"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("config.json").is_file())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 16, "goldens are missing: {dirs:?}");
    dirs.iter().map(|d| read(d)).collect()
}

fn differences(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let squares: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    let max = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    (max, (squares / a.len() as f64).sqrt() as f32)
}

#[test]
fn every_family_has_a_golden() {
    let all = goldens();
    for family in FAMILIES {
        let named = |g: &&Golden| {
            std::fs::read_to_string(g.dir.join("config.json")).unwrap().contains(&format!("\"{}\"", family.model_type))
        };
        assert!(all.iter().filter(named).count() >= 2, "{}", family.model_type);
    }
}

#[test]
fn logits_in_f32_match_transformers_within_1e_4() {
    for golden in goldens() {
        let loaded = try_load(&golden.dir, DtypeChoice::F32).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        assert_eq!(loaded.unread_config, Vec::<String>::new(), "{}: unread config fields", golden.name);
        let logits = Runner::new(&loaded.model, 1, 64, "native").step(&[(0, &golden.input)]).concat();
        let (max, _) = differences(&logits, &golden.logits_f32);
        assert!(max < 1e-4, "{}: logits differ by {max}", golden.name);
    }
}

#[test]
fn logits_in_bf16_are_as_close_to_f32_as_transformers_bf16() {
    for golden in goldens() {
        let loaded = try_load(&golden.dir, DtypeChoice::Bf16).unwrap();
        let logits = Runner::new(&loaded.model, 1, 64, "native").step(&[(0, &golden.input)]).concat();
        let (_, ours) = differences(&logits, &golden.logits_f32);
        let (_, theirs) = differences(&golden.logits_bf16, &golden.logits_f32);
        assert!(ours <= theirs, "{}: rms error {ours} in bf16, transformers has {theirs}", golden.name);
    }
}

#[test]
fn greedy_continuations_of_64_tokens_are_identical_to_transformers() {
    for golden in goldens() {
        let loaded = try_load(&golden.dir, DtypeChoice::F32).unwrap();
        let mut runner = Runner::new(&loaded.model, 1, 96, "native");
        let mut logits = runner.step(&[(0, &golden.input[..16])]);
        let mut greedy = Vec::new();
        for _ in 0..64 {
            let next = argmax(logits.last().unwrap());
            greedy.push(next);
            logits = runner.step(&[(0, &[next])]);
        }
        assert_eq!(greedy, golden.greedy, "{}", golden.name);
    }
}

#[test]
fn prefill_equals_decode_and_batched_equals_single_bit_for_bit() {
    for golden in goldens() {
        let plain = [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::F16].map(|dtype| (dtype, "none"));
        let quantised = ["q8_0", "q4_0", "experts=q4_k"].map(|format| (DtypeChoice::Bf16, format));
        for (dtype, format) in plain.into_iter().chain(quantised) {
            let options = LoadOptions { dtype, quantization: format.parse().unwrap(), ..Default::default() };
            let loaded = load(&files(&golden.dir), &options, |_, _| {}).unwrap();
            let (a, b) = golden.input.split_at(23);
            let single = |ids: &[u32]| Runner::new(&loaded.model, 1, 64, "native").step(&[(0, ids)]);
            let (want_a, want_b) = (single(a), single(b));

            let mut one_by_one = Runner::new(&loaded.model, 1, 64, "native");
            let decoded: Vec<Vec<f32>> = a.iter().flat_map(|id| one_by_one.step(&[(0, &[*id])])).collect();
            assert_eq!(decoded, want_a, "{} {dtype} {format}: prefill and decode differ", golden.name);

            let mut chunked = Runner::new(&loaded.model, 2, 64, "native");
            let mut got_a = chunked.step(&[(0, &a[..5])]);
            let both = chunked.step(&[(1, &b[..9]), (0, &a[5..6])]);
            let mut got_b = both[..9].to_vec();
            got_a.extend_from_slice(&both[9..]);
            let both = chunked.step(&[(0, &a[6..]), (1, &b[9..])]);
            got_a.extend_from_slice(&both[..a.len() - 6]);
            got_b.extend_from_slice(&both[a.len() - 6..]);
            assert_eq!((got_a, got_b), (want_a, want_b), "{} {dtype} {format}: batched and single differ", golden.name);
        }
    }
}

#[test]
fn on_a_cuda_device_logits_match_transformers_too() {
    for golden in goldens() {
        for dtype in [DtypeChoice::F32, DtypeChoice::Bf16] {
            let loaded = match try_load_on(&golden.dir, dtype, DeviceChoice::Cuda(0)) {
                Ok(loaded) => loaded,
                Err(LoadError::Backend(why)) => {
                    eprintln!("SKIPPED: no CUDA device ({why})");
                    return;
                }
                Err(error) => panic!("{}: {error}", golden.name),
            };
            let logits = Runner::new(&loaded.model, 1, 64, "native").step(&[(0, &golden.input)]).concat();
            let (max, rms) = differences(&logits, &golden.logits_f32);
            // Rounding in bf16 differs from transformers' in place, not in kind.
            let (_, theirs) = differences(&golden.logits_bf16, &golden.logits_f32);
            let fine = if dtype == DtypeChoice::F32 { max < 1e-3 } else { rms <= 2.0 * theirs };
            assert!(fine, "{} {dtype}: logits differ by {max}, rms {rms}", golden.name);
        }
    }
}
