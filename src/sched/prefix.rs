//! Names of full KV blocks: a chain of hashes, each over its parent and the block's tokens.
//!
//! Keys and values depend on everything before them and on the router that computed them, so the chain begins with
//! the router's policy and the tenant's salt. The hash is cryptographic: no one can make two prompts collide.

use crate::types::TokenId;
use sha2::{Digest, Sha256};

/// The name of a block's contents, or of the beginning of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The beginning of the chains of one policy and one tenant: only they share blocks.
    pub fn root(policy: &str, salt: &str) -> Self {
        let mut hasher = Sha256::new();
        // With its length in front, no policy can run into a salt.
        hasher.update((policy.len() as u64).to_le_bytes());
        hasher.update(policy);
        hasher.update(salt);
        Self(hasher.finalize().into())
    }

    /// The block of `tokens` after this one.
    pub(super) fn next(&self, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        tokens.iter().for_each(|t| hasher.update(t.to_le_bytes()));
        Self(hasher.finalize().into())
    }
}
