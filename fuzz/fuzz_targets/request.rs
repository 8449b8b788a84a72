//! Bodies of every endpoint: any bytes are a request or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::wire::{ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest};

fuzz_target!(|body: &[u8]| {
    if let Ok(request) = CompletionRequest::parse(body) {
        let _ = request.common.biases();
    }
    let _ = ChatRequest::parse(body);
    let _ = TokenizeRequest::parse(body);
    let _ = DetokenizeRequest::parse(body);
});
