//! Forward and backward of everything in training that is no plain matrix product, on row-major f32 slices.
//!
//! Legend: T tokens, D model width, F width of a feed-forward net, R routed rows, E experts, V vocabulary.
//!
//! No result depends on the number of threads: what is summed over rows is summed in chunks of a fixed size, and
//! the sums of chunks are added in their order. Nor does it depend on the instruction set, but for the products.
//! Slices whose lengths contradict each other, and indices outside of what they index, panic: who calls has
//! checked them.

pub(crate) mod activation;
pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod bias;
pub(crate) mod combine;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod routing;

#[cfg(test)]
mod testing;

/// Elements of a chunk: enough work to be worth handing to a thread, few enough for the second-level cache.
const CHUNK: usize = 1 << 15;

/// Rows of `width` elements in a chunk.
fn chunk_rows(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// Elements in a chunk of whole rows.
fn chunk_elements(width: usize) -> usize {
    chunk_rows(width) * width.max(1)
}

/// The sum of all chunks' sums, added in order.
fn add_in_order(parts: impl IntoIterator<Item = Vec<f32>>, width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    for part in parts {
        total.iter_mut().zip(&part).for_each(|(t, p)| *t += p);
    }
    total
}
