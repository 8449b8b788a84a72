//! A trained checkpoint with another router in place of its own: what it writes, and what that saved, beside native routing.
//!
//! ```console
//! $ cargo run --release --example retrofit
//! $ cargo run --release --example retrofit -- ratio:0.5 "Lily and Tom went to the park."
//! $ cargo run --release --example retrofit -- dynk:0.8 "The capital of France is" allenai/OLMoE-1B-7B-0924
//! ```

use anyhow::{Error, Result};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, Found, KvSize, RequestRouters};
use moe_serve::model::LoadOptions;
use moe_serve::model::hub::HubOptions;
use moe_serve::types::{DeviceChoice, DtypeChoice, GenerateRequest, RouterSpec};

const TOKENS: usize = 32;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let router: RouterSpec = args.next().as_deref().unwrap_or("dynk:0.8").parse()?;
    let prompt = args.next().unwrap_or_else(|| "Once upon a time".into());

    // A hub id or a directory; without one, the checkpoint that comes with the source.
    let found = Found::find(args.next().as_deref(), &HubOptions::from_env())?;
    let options = LoadOptions { dtype: DtypeChoice::Auto, device: DeviceChoice::Auto, ..Default::default() };
    // Requests may name a router of their own: that is how the same engine answers natively as well.
    let config = EngineConfig {
        request_routers: Some(RequestRouters::default()),
        kv_size: Some(KvSize::Blocks(64)),
        ..Default::default()
    };
    let launched = found.launch(&options, &router, config)?;
    let engine = &launched.engine;
    println!("{}", launched.describe());
    println!("router     {router}: {}", engine.info().router_means);

    let ids = engine.encode(&prompt, true).map_err(Error::msg)?;
    for spec in [RouterSpec::native(), router] {
        let request = GenerateRequest { router: Some(spec.clone()), ..GenerateRequest::greedy(ids.clone(), TOKENS) };
        let (text, _, usage) = engine.submit(request)?.wait().map_err(Error::msg)?;
        println!("\n{spec}: {prompt}{}", text.replace('\n', " "));
        // Prompt and completion together. Below zero is a cost.
        let work = usage.work;
        println!(
            "  {:.3} experts per token; FLOPs saved: {:+.1} % of the experts', {:+.1} % of the whole forward pass",
            work.experts_per_token(),
            100.0 * work.experts.saved(),
            100.0 * work.forward.saved()
        );
    }
    Ok(())
}
