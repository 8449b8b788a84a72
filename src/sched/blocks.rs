//! KV blocks: who holds them, which are free, and which free ones still have contents worth finding again.

use super::prefix::BlockHash;
use crate::types::BlockId;
use std::collections::{BTreeMap, HashMap};

/// Hands out blocks, counts who holds them, and takes them back.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// Held by no one, and without contents.
    empty: Vec<BlockId>,
    /// Held by no one, but with contents that a prompt may have again; the longest unused first.
    idle: BTreeMap<u64, BlockId>,
    cached: HashMap<BlockHash, BlockId>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: u32,
    hash: Option<BlockHash>,
    /// When it became idle.
    since: u64,
}

impl BlockPool {
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            // The lowest numbers go first.
            empty: (0..blocks as u32).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            cached: HashMap::new(),
            clock: 0,
        }
    }

    fn block(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    /// Blocks that no one holds.
    pub(super) fn available(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// Moves `count` blocks to `to`, or none if there are too few.
    pub(super) fn take(&mut self, count: usize, to: &mut Vec<BlockId>) -> bool {
        if count > self.available() {
            return false;
        }
        for _ in 0..count {
            let Some(id) = self.empty.pop().or_else(|| self.idle.pop_first().map(|(_, id)| id)) else { break };
            if let Some(hash) = self.block(id).hash.take() {
                self.cached.remove(&hash);
            }
            self.block(id).holders = 1;
            to.push(id);
        }
        true
    }

    /// Adds a holder to each of `blocks`.
    pub(super) fn share(&mut self, blocks: &[BlockId]) {
        for id in blocks {
            let block = &mut self.blocks[id.0 as usize];
            if block.holders == 0 {
                self.idle.remove(&block.since);
            }
            block.holders += 1;
        }
    }

    pub(super) fn is_shared(&self, id: BlockId) -> bool {
        self.blocks[id.0 as usize].holders > 1
    }

    /// Whether no one holds it.
    pub(super) fn is_idle(&self, id: BlockId) -> bool {
        self.blocks[id.0 as usize].holders == 0
    }

    /// Takes one holder off each of `blocks`. Of those that become idle, the end of the sequence is forgotten first:
    /// a beginning is of use without its end, an end without its beginning is not.
    pub(super) fn release(&mut self, blocks: Vec<BlockId>) {
        for id in blocks.into_iter().rev() {
            self.clock += 1;
            let block = &mut self.blocks[id.0 as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.hash.is_some() {
                block.since = self.clock;
                self.idle.insert(self.clock, id);
            } else {
                self.empty.push(id);
            }
        }
    }

    /// The block with the contents `hash`.
    pub(super) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.cached.get(hash).copied()
    }

    /// Lets `id`, a full block, be found by `hash`, unless another one with these contents already is.
    pub(super) fn register(&mut self, id: BlockId, hash: BlockHash) {
        if self.block(id).hash.is_none()
            && let std::collections::hash_map::Entry::Vacant(entry) = self.cached.entry(hash)
        {
            entry.insert(id);
            self.block(id).hash = Some(hash);
        }
    }
}
