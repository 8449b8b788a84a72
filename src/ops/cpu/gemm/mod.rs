//! Products of f32 matrices for training: factors as they are or rounded to bf16, sums in f32.
//!
//! Every element of a product is summed by one thread over ascending positions in fixed blocks, so that neither the
//! number of threads nor the other products of a call change a bit.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod blocks;
mod dense;
mod matrix;
#[cfg(target_arch = "x86_64")]
mod pack;

pub use matrix::{Matrix, Product};

/// What the factors of a product are rounded to; sums are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Factors are taken as they are.
    F32,
    /// Factors are rounded to the nearest bf16, ties to even; subnormal ones may count as 0.
    Bf16,
}

/// Buffers of [`product_here`], kept from call to call.
#[derive(Default)]
pub struct Scratch {
    dense: dense::Scratch,
    #[cfg(target_arch = "x86_64")]
    packed: blocks::Scratch,
}

/// Computes all products in one parallel region on the current rayon pool, balanced over its threads.
pub fn products(products: &mut [Product<'_>], precision: Precision) {
    products_by(Kernel::best(precision), products);
}

/// Computes one product on this thread, for callers that are work items themselves. The result has the bits of
/// [`products`].
pub fn product_here(product: &mut Product<'_>, precision: Precision, scratch: &mut Scratch) {
    product_here_by(Kernel::best(precision), product, scratch);
}

/// Whether bf16 products run on the tile unit (AMX) of this machine. The first call asks the system to let this
/// process use it.
pub fn has_amx() -> bool {
    #[cfg(target_arch = "x86_64")]
    return amx::usable();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Multiplies tiles that stay in registers, `rounds` times as many as keep the unit busy, on this thread; the FLOPs of
/// that. For measuring how fast the unit is, where there [is one](has_amx).
#[cfg(target_arch = "x86_64")]
pub(super) fn multiply_tiles(rounds: usize) -> u64 {
    amx::Tiles::configure().spin(rounds)
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// With f32 arithmetic.
    Dense { rounding: bool },
    /// With bf16 tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Kernel {
    fn best(precision: Precision) -> Self {
        match precision {
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 if has_amx() => Self::Amx,
            _ => Self::Dense { rounding: precision == Precision::Bf16 },
        }
    }
}

fn products_by(kernel: Kernel, products: &mut [Product<'_>]) {
    match kernel {
        Kernel::Dense { rounding } => dense::products(products, rounding),
        #[cfg(target_arch = "x86_64")]
        Kernel::Amx => blocks::products(products),
    }
}

fn product_here_by(kernel: Kernel, product: &mut Product<'_>, scratch: &mut Scratch) {
    match kernel {
        Kernel::Dense { rounding } => dense::product_here(product, rounding, &mut scratch.dense),
        #[cfg(target_arch = "x86_64")]
        Kernel::Amx => blocks::product_here(product, &mut scratch.packed),
    }
}

/// Below this many FLOPs a parallel region costs more than it saves.
const PARALLEL_FLOPS_MIN: usize = 1 << 20;

/// Runs `f` for every one of `items`, on all threads if `flops` in all are worth it.
fn for_each<T: Send>(items: Vec<T>, flops: usize, f: impl Fn(T) + Sync + Send) {
    use rayon::prelude::*;
    if items.len() > 1 && flops >= PARALLEL_FLOPS_MIN {
        items.into_par_iter().with_max_len(1).for_each(f);
    } else {
        items.into_iter().for_each(f);
    }
}

#[cfg(test)]
mod tests;
