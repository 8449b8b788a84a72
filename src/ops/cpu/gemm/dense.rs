//! Products with f32 arithmetic, by the gemm crate. Factors are copied where rows are gathered or to be rounded.

use super::for_each;
use super::matrix::{Matrix, Out, Product};
use half::bf16;
use rayon::prelude::*;

/// Rows and columns of a tile, which one thread computes by itself. Fixed: the order of sums depends on it.
const TILE: (usize, usize) = (128, 256);

/// Copies of the two factors.
#[derive(Default)]
pub(super) struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
}

pub(super) fn products(products: &mut [Product<'_>], rounding: bool) {
    let flops = products.iter().map(Product::flops).sum();
    let mut scratch: Vec<Scratch> = products.iter().map(|_| Scratch::default()).collect();
    let mut tiles = Vec::new();
    for (product, scratch) in products.iter_mut().zip(&mut scratch) {
        if product.begin() {
            let (a, b) = (product.a, product.b);
            let a = contiguous(a, rounding, &mut scratch.a, flops);
            let b = contiguous(b, rounding, &mut scratch.b, flops);
            let out = product.out();
            tiles.extend(tile_starts(out).map(|start| (a, b, out, start)));
        }
    }
    for_each(tiles, flops, |(a, b, out, start)| multiply_tile(a, b, out, start));
}

pub(super) fn product_here(product: &mut Product<'_>, rounding: bool, scratch: &mut Scratch) {
    if product.begin() {
        let a = contiguous(product.a, rounding, &mut scratch.a, 0);
        let b = contiguous(product.b, rounding, &mut scratch.b, 0);
        let out = product.out();
        tile_starts(out).for_each(|start| multiply_tile(a, b, out, start));
    }
}

/// First rows and columns of all tiles.
fn tile_starts(out: Out<'_>) -> impl Iterator<Item = (usize, usize)> {
    let rows = (0..out.rows).step_by(TILE.0);
    rows.flat_map(move |row| (0..out.cols).step_by(TILE.1).map(move |col| (row, col)))
}

/// `matrix`, copied to `to` if its rows are gathered or its elements rounded to bf16.
fn contiguous<'a>(matrix: Matrix<'a>, rounding: bool, to: &'a mut Vec<f32>, flops: usize) -> Matrix<'a> {
    if !matrix.is_gathered() && !rounding {
        return matrix;
    }
    let (lines, len) = matrix.lines();
    if to.len() < lines * len {
        to.resize(lines * len, 0.0);
    }
    let copy = |(row, to): (usize, &mut [f32])| {
        let line = matrix.line(row);
        if rounding {
            to.iter_mut().zip(line).for_each(|(to, x)| *to = bf16::from_f32(*x).to_f32());
        } else {
            to.copy_from_slice(line);
        }
    };
    let to = &mut to[..lines * len];
    if flops >= super::PARALLEL_FLOPS_MIN {
        to.par_chunks_exact_mut(len).with_min_len(16).enumerate().for_each(copy);
    } else {
        to.chunks_exact_mut(len).enumerate().for_each(copy);
    }
    let copied = Matrix::new(to, lines, len);
    if matrix.is_transposed() { copied.t() } else { copied }
}

fn multiply_tile(a: Matrix<'_>, b: Matrix<'_>, out: Out<'_>, (row, col): (usize, usize)) {
    let (rows, cols) = ((out.rows - row).min(TILE.0), (out.cols - col).min(TILE.1));
    let depth = a.cols();
    let (a, a_rs, a_cs) = a.strides(row, 0);
    let (b, b_rs, b_cs) = b.strides(0, col);
    // SAFETY: views were found within their data when they were made, the tile lies within the product, and no other
    // tile has an element of this one.
    unsafe {
        gemm::gemm(
            rows,
            cols,
            depth,
            out.at(row, col),
            1,
            out.stride as isize,
            out.accumulate,
            a.as_ptr(),
            a_cs,
            a_rs,
            b.as_ptr(),
            b_cs,
            b_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
