//! Compiles the CUDA kernels to PTX under the feature `cuda`; without it there is nothing to do.
//!
//! `NVCC`, else `CUDA_HOME/bin/nvcc`, else `CUDA_PATH/bin/nvcc`, else `nvcc` on PATH; `CUDA_COMPUTE_CAP` (default 80)
//! is the least compute capability the kernels run on, because drivers compile PTX for newer ones.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const SOURCE: &str = "src/ops/cuda/kernels/ops.cu";

/// The oldest compute capability with bf16 matrix products, which candle's kernels need.
const COMPUTE_CAP_MIN: u32 = 80;

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed={SOURCE}");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let out = Path::new(&env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("ops.ptx");
    let nvcc = nvcc();
    let result = Command::new(&nvcc)
        .args(["--ptx", "-O3", "-std=c++17", "-arch"])
        .arg(format!("compute_{}", compute_cap()?))
        .arg("-o")
        .args([out.as_path(), Path::new(SOURCE)])
        .output()
        .map_err(|e| {
            format!(
                "the feature `cuda` needs the CUDA toolkit, but {} could not be run ({e}); set NVCC or CUDA_HOME, or \
                 put nvcc on PATH",
                nvcc.display()
            )
        })?;
    if result.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&result.stderr);
    Err(format!("{} failed on {SOURCE} ({}): {}", nvcc.display(), result.status, said.replace('\n', " | ")))
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin").join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .unwrap_or_else(|| "nvcc".into())
}

/// `90`, `sm_90` and `90a` all mean 90: PTX for an architecture-specific target would not run on newer devices.
fn compute_cap() -> Result<u32, String> {
    let Ok(asked) = env::var("CUDA_COMPUTE_CAP") else { return Ok(COMPUTE_CAP_MIN) };
    let digits = asked.trim().trim_start_matches("sm_").trim_end_matches(['a', 'f']);
    match digits.parse() {
        Ok(cap) if cap >= COMPUTE_CAP_MIN => Ok(cap),
        Ok(cap) => Err(format!("CUDA_COMPUTE_CAP={cap}: the kernels need at least {COMPUTE_CAP_MIN}")),
        Err(_) => Err(format!("CUDA_COMPUTE_CAP={asked} is no compute capability like 80 or 90a")),
    }
}
