//! Products on bf16 tiles, blocked for the caches.
//!
//! The factor of fewer elements is packed as a whole, by all threads, and shared. A work item packs some panels of the
//! other factor, a block of positions at a time, and multiplies them with all panels of the shared one. Sums run
//! through f32 results from block to block, so blocks change nothing but speed.

use super::amx::{Tiles, usable};
use super::for_each;
use super::matrix::{Out, Product};
use super::pack::{Factor, Line, PANEL, SIDE, Step};
use std::cell::Cell;
use std::ops::Range;

/// Steps of 32 positions in a block: a panel's 24 KB leave room in the first cache for what streams by.
const DEPTH: usize = 12;
/// Panels of the shared factor that are multiplied before the next: at 24 KB each they stay in the second cache.
const WIDTH: usize = 32;
/// Panels of a work item.
const PANELS: Range<usize> = 2..9;
/// Work items for each thread, for balance.
const ITEMS_PER_THREAD: usize = 8;
/// Steps packed at once by a thread, 2 KB each.
const PACKED_STEPS: usize = 64;

/// Packed factors.
#[derive(Default)]
pub(super) struct Scratch {
    shared: Vec<Step>,
    own: Vec<Step>,
}

thread_local! {
    /// Taken while in use: a thread that waits for others may begin another product.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take();
    let result = f(&mut scratch);
    SCRATCH.set(scratch);
    result
}

/// The first `len` steps, which may hold anything.
fn room(steps: &mut Vec<Step>, len: usize) -> &mut [Step] {
    if steps.len() < len {
        steps.resize(len, [Line::ZERO; PANEL]);
    }
    &mut steps[..len]
}

pub(super) fn products(products: &mut [Product<'_>]) {
    let flops = products.iter().map(Product::flops).sum();
    let plans: Vec<Plan<'_>> = products.iter_mut().filter_map(Plan::new).collect();
    let flops_per_item = flops / (ITEMS_PER_THREAD * rayon::current_num_threads());
    with_scratch(|scratch| {
        let shared = room(&mut scratch.shared, plans.iter().map(Plan::shared_steps).sum());
        let (mut parts, mut rest) = (Vec::new(), &mut *shared);
        for plan in &plans {
            let (here, after) = rest.split_at_mut(plan.shared_steps());
            plan.shared_parts(here, |part| parts.push((plan, part)));
            rest = after;
        }
        for_each(parts, flops, |(plan, part)| plan.pack_shared(part));

        let (mut items, mut rest) = (Vec::new(), &*shared);
        for plan in &plans {
            let (here, after) = rest.split_at(plan.shared_steps());
            items.extend(plan.items(flops_per_item).map(|item| (plan, here, item)));
            rest = after;
        }
        for_each(items, flops, |(plan, shared, item)| {
            with_scratch(|scratch| plan.multiply(shared, item, &mut scratch.own));
        });
    });
}

pub(super) fn product_here(product: &mut Product<'_>, scratch: &mut Scratch) {
    let Some(plan) = Plan::new(product) else { return };
    let shared = room(&mut scratch.shared, plan.shared_steps());
    plan.shared_parts(shared, |part| plan.pack_shared(part));
    plan.items(usize::MAX).for_each(|item| plan.multiply(shared, item, &mut scratch.own));
}

/// One product.
struct Plan<'a> {
    left: Factor<'a>,
    right: Factor<'a>,
    shares_left: bool,
    /// Steps of 32 positions.
    depth: usize,
    out: Out<'a>,
}

/// Steps to pack of the shared factor, at some panels and steps.
struct Part<'a> {
    first_panel: usize,
    first_step: usize,
    depth: usize,
    to: &'a mut [Step],
}

impl<'a> Plan<'a> {
    /// The plan of a product, if there is anything to multiply.
    ///
    /// # Panics
    /// If tiles aren't [`usable`].
    fn new<'p: 'a>(product: &'a mut Product<'p>) -> Option<Self> {
        assert!(usable(), "this machine has no bf16 tiles");
        product.begin().then(|| Self {
            left: Factor::left(product.a),
            right: Factor::right(product.b),
            shares_left: product.a.rows() < product.b.cols(),
            depth: product.a.cols().div_ceil(SIDE),
            out: product.out(),
        })
    }

    /// The factor that is packed as a whole, and the other one.
    fn factors(&self) -> (&Factor<'a>, &Factor<'a>) {
        if self.shares_left { (&self.left, &self.right) } else { (&self.right, &self.left) }
    }

    fn shared_steps(&self) -> usize {
        self.factors().0.panels() * self.depth
    }

    /// First steps of all blocks, and their numbers of steps.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let depth = self.depth;
        (0..depth).step_by(DEPTH).map(move |first| (first, DEPTH.min(depth - first)))
    }

    /// Splits the packed shared factor, which has block after block and in a block panel after panel.
    fn shared_parts<'s>(&self, mut shared: &'s mut [Step], mut each: impl FnMut(Part<'s>)) {
        let panels = self.factors().0.panels();
        for (first_step, depth) in self.blocks() {
            let (block, rest) = shared.split_at_mut(panels * depth);
            shared = rest;
            let at_once = PACKED_STEPS.div_ceil(depth);
            for (i, to) in block.chunks_mut(at_once * depth).enumerate() {
                each(Part { first_panel: i * at_once, first_step, depth, to });
            }
        }
    }

    fn pack_shared(&self, part: Part<'_>) {
        // SAFETY: a plan is made where tiles are usable, which includes AVX-512 with bf16.
        unsafe { self.factors().0.pack(part.first_panel, part.first_step, part.depth, part.to) };
    }

    /// Panels of each work item, of `flops` or so.
    fn items(&self, flops: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (shared, own) = self.factors();
        let flops_per_panel = 2 * SIDE * SIDE * SIDE * shared.panels() * self.depth;
        let (panels, at_once) = (own.panels(), (flops / flops_per_panel).clamp(PANELS.start, PANELS.end - 1));
        (0..panels).step_by(at_once).map(move |first| first..panels.min(first + at_once))
    }

    /// Multiplies panels `own` of the factor that isn't shared with all of the shared one.
    fn multiply(&self, shared: &[Step], own: Range<usize>, scratch: &mut Vec<Step>) {
        let tiles = Tiles::configure();
        let (shared_factor, own_factor) = self.factors();
        let panels = shared_factor.panels();
        for (first_step, depth) in self.blocks() {
            let packed = room(scratch, own.len() * depth);
            // SAFETY: as in `pack_shared`.
            unsafe { own_factor.pack(own.start, first_step, depth, packed) };
            let packed = Panels { steps: packed, first: own.start, depth };
            let accumulate = self.out.accumulate || first_step > 0;
            for first in (0..panels).step_by(WIDTH) {
                let steps =
                    first_step * panels + first * depth..first_step * panels + panels.min(first + WIDTH) * depth;
                let shared = Panels { steps: &shared[steps], first, depth };
                let (left, right) = if self.shares_left { (shared, packed) } else { (packed, shared) };
                multiply_panels(&tiles, left, right, self.out, accumulate);
            }
        }
    }
}

/// Packed panels from `first` on.
#[derive(Clone, Copy)]
struct Panels<'a> {
    steps: &'a [Step],
    first: usize,
    depth: usize,
}

impl<'a> Panels<'a> {
    fn iter(self) -> impl Iterator<Item = (usize, &'a [Step])> {
        self.steps.chunks_exact(self.depth).enumerate().map(move |(i, steps)| ((self.first + i) * SIDE, steps))
    }
}

fn multiply_panels(tiles: &Tiles, left: Panels<'_>, right: Panels<'_>, out: Out<'_>, accumulate: bool) {
    for (row, a) in left.iter() {
        for (col, b) in right.iter() {
            let (rows, cols) = ((out.rows - row).min(SIDE), (out.cols - col).min(SIDE));
            if rows == SIDE && cols == SIDE {
                // SAFETY: the square lies within the product, and no other work item has it.
                unsafe { tiles.multiply(a, b, out.at(row, col), out.stride, accumulate) };
            } else {
                multiply_at_edge(tiles, a, b, out, (row, rows), (col, cols), accumulate);
            }
        }
    }
}

/// The part of a square that lies within the product.
fn multiply_at_edge(
    tiles: &Tiles,
    a: &[Step],
    b: &[Step],
    out: Out<'_>,
    (row, rows): (usize, usize),
    (col, cols): (usize, usize),
    accumulate: bool,
) {
    let mut square = [[0.0_f32; SIDE]; SIDE];
    if accumulate {
        for (i, square) in square[..rows].iter_mut().enumerate() {
            // SAFETY: `cols` elements of the row from `col` on are within it, and no other work item has them.
            unsafe { std::ptr::copy_nonoverlapping(out.at(row + i, col), square.as_mut_ptr(), cols) };
        }
    }
    // SAFETY: the square is this thread's.
    unsafe { tiles.multiply(a, b, square.as_mut_ptr().cast(), SIDE, accumulate) };
    for (i, square) in square[..rows].iter().enumerate() {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(square.as_ptr(), out.at(row + i, col), cols) };
    }
}
