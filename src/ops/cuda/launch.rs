//! From candle tensors to kernel launches and back.

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchArgs, LaunchConfig,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

/// `kernels/ops.cu`, compiled by `build.rs`.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/ops.ptx"));

/// What the kernels are compiled for.
pub(super) trait Element: CudaDType + DeviceRepr {
    /// Ends the names of this dtype's kernels.
    const NAME: &'static str;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
}

impl Element for f16 {
    const NAME: &'static str = "f16";
}

/// Calls a function of one type parameter, an [`Element`], for a dtype known at run time.
macro_rules! for_dtype {
    ($dtype:expr, $($function:ident).+ ($($arg:expr),* $(,)?)) => {
        match $dtype {
            candle_core::DType::F32 => $($function).+::<f32>($($arg),*),
            candle_core::DType::BF16 => $($function).+::<half::bf16>($($arg),*),
            candle_core::DType::F16 => $($function).+::<half::f16>($($arg),*),
            other => candle_core::bail!("the CUDA kernels take F32, BF16 and F16, not {other:?}"),
        }
    };
}
pub(super) use for_dtype;

/// The CUDA device of a tensor's or backend's device.
pub(super) fn cuda(device: &Device) -> Result<&CudaDevice> {
    match device {
        Device::Cuda(device) => Ok(device),
        other => candle_core::bail!("a CUDA tensor was expected, got one on {:?}", other.location()),
    }
}

/// `x` as `dtype`, dense from the start of its allocation: kernels see no strides or offsets, and load aligned pairs.
pub(super) fn packed(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let x = x.to_dtype(dtype)?;
    if x.is_contiguous() && x.layout().start_offset() == 0 { Ok(x) } else { x.force_contiguous() }
}

/// A [`packed`] tensor, kept from changing while a launch refers to it.
pub(super) struct Held<'a>(StorageRef<'a>);

impl<'a> Held<'a> {
    pub(super) fn new(x: &'a Tensor) -> Self {
        debug_assert!(x.is_contiguous() && x.layout().start_offset() == 0);
        Self(x.storage_and_layout().0)
    }

    pub(super) fn elements<E: Element>(&self) -> Result<&CudaSlice<E>> {
        match &*self.0 {
            Storage::Cuda(storage) => storage.as_cuda_slice(),
            other => candle_core::bail!("a CUDA tensor was expected, got one on {:?}", other.device().location()),
        }
    }
}

/// A tensor of what a kernel wrote.
pub(super) fn tensor<E: Element>(elements: CudaSlice<E>, shape: impl Into<Shape>, device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(elements, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// A kernel and the device's stream.
pub(super) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// The kernel `name` for elements `E`; the first call compiles all of them for the device.
    pub(super) fn new<E: Element>(name: &str, device: &CudaDevice) -> Result<Self> {
        let function = device.get_or_load_custom_func(&format!("{name}_{}", E::NAME), "moe_serve_ops", PTX)?;
        Ok(Self { function: function.into_cuda_function(), stream: device.cuda_stream() })
    }

    /// An empty list of arguments, to be filled for [`launch`].
    pub(super) fn args(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

/// Launches with `threads` threads in each block of `grid`.
///
/// # Safety
/// The arguments must match the kernel's parameters in number, order and type, and reach as far as it reads and writes.
pub(super) unsafe fn launch(args: &mut LaunchArgs<'_>, grid: (usize, usize, usize), threads: u32) -> Result<()> {
    let grid_dim = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
    let config = LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the caller's word.
    unsafe { args.launch(config) }.w()?;
    Ok(())
}
