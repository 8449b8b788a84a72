//! `native`: the checkpoint's own router, the baseline every rule must beat.

use super::RouterEntry;
use super::topk::TopK;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "native",
    usage: "native",
    summary: "the checkpoint's own top-k0 (default)",
    formula: "k = k0",
    example: "native",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        args.no_args()?;
        Ok(Box::new(TopK { k: shape.top_k }))
    },
};
