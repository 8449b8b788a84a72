//! A tensor as it lies in a checkpoint file, on its way into a kernel's layout.

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};

/// Row-major little-endian bytes with dtype and shape.
#[derive(Clone, Debug)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// `bytes` must hold exactly the elements of `shape`; `dtype` is BF16, F16 or F32.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        assert!(matches!(dtype, DType::BF16 | DType::F16 | DType::F32), "no float of 16 or 32 bits: {dtype:?}");
        assert_eq!(shape.iter().product::<usize>() * dtype.size_in_bytes(), bytes.len(), "bytes do not fill {shape:?}");
        Self { dtype, shape, bytes }
    }

    /// One whose elements were not read, as they are wanted packed alone and lie so in a cache.
    pub fn unread(dtype: DType, shape: Vec<usize>) -> Self {
        Self { dtype, shape, bytes: Vec::new() }
    }

    /// From f32 values, for tests and made-up weights.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Self {
        Self::new(DType::F32, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes its elements take.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// Rows and columns of a matrix.
    pub(super) fn dims2(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, columns] => (rows, columns),
            _ => panic!("a matrix was asked of a tensor of shape {:?}", self.shape),
        }
    }

    /// Elements `start..start + out.len()` as f32, exactly.
    pub(super) fn read_f32(&self, start: usize, out: &mut [f32]) {
        assert!(self.bytes.len() == self.bytes(), "a tensor of shape {:?} was not read", self.shape);
        let size = self.dtype.size_in_bytes();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        match self.dtype {
            DType::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            _ => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
        }
    }

    /// A matrix of the same shape whose every row is the one that `from(row, rows)` names.
    pub fn map_rows(self, from: impl Fn(usize, usize) -> usize) -> Self {
        let (rows, _) = self.dims2();
        let size = self.bytes.len() / rows.max(1);
        let row = |row: usize| &self.bytes[from(row, rows) * size..][..size];
        let bytes = (0..rows).flat_map(row).copied().collect();
        Self { bytes, ..self }
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        self.read_f32(0, &mut out);
        out
    }

    /// As a candle tensor of `dtype` on `device`.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::from_raw_buffer(&self.bytes, self.dtype, &self.shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }
}
