//! Which device and dtype the model runs on.

use super::PackCache;
use super::cpu::Packing;
use crate::types::{DeviceChoice, DtypeChoice, Quantization, WeightFormat};
use candle_core::{DType, Device};
use std::sync::Arc;

/// A device and the dtype that weights are kept in.
#[derive(Clone, Debug)]
pub struct Backend {
    pub(super) device: Device,
    dtype: DType,
    quantization: Quantization,
    pack_cache: Option<Arc<PackCache>>,
}

/// Why no backend fits the choices.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(
        "--device {0}: this binary was built without CUDA; build it with `cargo build --release --features cuda` or \
         use --device cpu"
    )]
    NotBuilt(DeviceChoice),
    #[error("--device {0}: no such CUDA device could be opened ({1}); use --device cpu or check the driver")]
    NoDevice(DeviceChoice, String),
    #[error("the checkpoint stores its weights as {0:?}; supported are BF16, F16 and F32")]
    Stored(DType),
    #[error("--quant {0}: weights are quantised on the CPU alone; on {1} use --quant none")]
    Quantized(Quantization, String),
    #[error("--pack-cache: weights are packed on the CPU alone; leave it out on {0}")]
    PackCache(String),
}

impl Backend {
    /// Resolves what was asked for against this build, this machine and the dtype the checkpoint is `stored` in.
    ///
    /// # Errors
    /// A CUDA device that was asked for by name and is not there; a stored dtype that is not a float of 16 or 32 bits.
    pub fn select(device: DeviceChoice, dtype: DtypeChoice, stored: DType) -> Result<Self, BackendError> {
        let dtype = match (dtype, stored) {
            (DtypeChoice::Bf16, _) => DType::BF16,
            (DtypeChoice::F16, _) => DType::F16,
            (DtypeChoice::F32, _) => DType::F32,
            (DtypeChoice::Auto, DType::BF16 | DType::F16 | DType::F32) => stored,
            (DtypeChoice::Auto, other) => return Err(BackendError::Stored(other)),
        };
        Ok(Self { device: open(device)?, dtype, quantization: Quantization::default(), pack_cache: None })
    }

    /// The CPU with weights kept as `dtype`.
    pub fn cpu(dtype: DType) -> Self {
        Self { device: Device::Cpu, dtype, quantization: Quantization::default(), pack_cache: None }
    }

    /// The same with weights kept in the forms of `quantization`.
    ///
    /// # Errors
    /// Quantised weights on CUDA.
    pub fn quantized(self, quantization: Quantization) -> Result<Self, BackendError> {
        if quantization != Quantization::default() && !self.device.is_cpu() {
            return Err(BackendError::Quantized(quantization, self.describe()));
        }
        Ok(Self { quantization, ..self })
    }

    /// The same with packed weights kept in `cache`, or taken from it.
    ///
    /// # Errors
    /// CUDA, where nothing is packed.
    pub fn cached(self, cache: Option<Arc<PackCache>>) -> Result<Self, BackendError> {
        if cache.is_some() && !self.device.is_cpu() {
            return Err(BackendError::PackCache(self.describe()));
        }
        Ok(Self { pack_cache: cache, ..self })
    }

    /// Where tensors live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What weights are kept in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// In what forms weights are kept.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// What routed experts are packed as.
    pub(super) fn expert_packing(&self) -> Packing {
        self.packing(self.dtype, self.quantization.experts)
    }

    /// What all other projections are packed as.
    pub(super) fn dense_packing(&self) -> Packing {
        self.packing(self.dtype, self.quantization.dense)
    }

    /// What is packed in f32 whatever the backend's dtype.
    pub(super) fn f32_packing(&self) -> Packing {
        self.packing(DType::F32, WeightFormat::Plain)
    }

    fn packing(&self, dtype: DType, format: WeightFormat) -> Packing {
        Packing { dtype, format, cache: self.pack_cache.clone() }
    }

    /// Bytes of memory the device has free, where that can be told.
    pub fn free_memory(&self) -> Option<u64> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return super::cuda::free_memory();
        }
        let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(kib * 1024)
    }

    /// What weights are kept in: `bf16`, `bf16, quantised to q8_0`.
    pub fn describe_weights(&self) -> String {
        let dtype = format!("{:?}", self.dtype).to_lowercase();
        if self.quantization == Quantization::default() {
            return dtype;
        }
        format!("{dtype}, quantised to {}", self.quantization)
    }

    /// `cpu (AMX, 2 threads)`, `cuda:0`.
    pub fn describe(&self) -> String {
        match self.device.location() {
            candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            _ => super::cpu::describe(),
        }
    }
}

#[cfg(feature = "cuda")]
fn open(choice: DeviceChoice) -> Result<Device, BackendError> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(Device::new_cuda(0).unwrap_or_else(|e| {
            tracing::info!("no CUDA device could be opened ({}); running on the CPU", first_line(&e));
            Device::Cpu
        })),
        DeviceChoice::Cuda(n) => Device::new_cuda(n).map_err(|e| BackendError::NoDevice(choice, first_line(&e))),
    }
}

/// The message without the backtrace that candle may append.
#[cfg(feature = "cuda")]
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(not(feature = "cuda"))]
fn open(choice: DeviceChoice) -> Result<Device, BackendError> {
    match choice {
        DeviceChoice::Cpu | DeviceChoice::Auto => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) => Err(BackendError::NotBuilt(choice)),
    }
}
