//! Router specifications, and what they mean for models of several shapes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::moe::Policy;
use moe_serve::types::{MoeShape, RouterSpec};

fuzz_target!(|text: &str| {
    let Ok(spec) = text.parse::<RouterSpec>() else { return };
    assert_eq!(spec.to_string().parse::<RouterSpec>().as_ref(), Ok(&spec));
    for (experts, top_k, layers) in [(8, 2, 4), (64, 8, 16), (1, 1, 1)] {
        let shape = MoeShape { experts, top_k, expert_width: 16, shared_width: None, renormalise: true, layers };
        if let Ok(policy) = Policy::build(&spec, &shape) {
            assert!((1..=experts).contains(&policy.experts_max()));
            let _ = policy.describe();
        }
    }
});
