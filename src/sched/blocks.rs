//! The free KV blocks.

use crate::types::BlockId;

/// Hands out blocks and takes them back.
#[derive(Debug)]
pub(super) struct BlockPool {
    free: Vec<BlockId>,
}

impl BlockPool {
    pub(super) fn new(blocks: usize) -> Self {
        // The lowest numbers go first.
        Self { free: (0..blocks as u32).rev().map(BlockId).collect() }
    }

    pub(super) fn available(&self) -> usize {
        self.free.len()
    }

    /// Moves `count` blocks to `to`, or none if there are too few.
    pub(super) fn take(&mut self, count: usize, to: &mut Vec<BlockId>) -> bool {
        if count > self.free.len() {
            return false;
        }
        to.extend(self.free.drain(self.free.len() - count..).rev());
        true
    }

    pub(super) fn free(&mut self, blocks: Vec<BlockId>) {
        self.free.extend(blocks.into_iter().rev());
    }
}
