//! The whole of it: the machine, then every test with every router in turns.

use super::memory::{forget_peak, peak_bytes};
use super::open::Opened;
use super::report::{Report, RunReport};
use super::settings::Test;
use super::steps::{Measured, Steps};
use super::{BenchError, Settings};
use crate::moe::Policy;
use crate::ops::{Backend, Machine};
use crate::types::RouterSpec;
use std::sync::Arc;

/// Memory that is read to learn how fast that goes: more than the caches of any processor of today hold.
const BUFFER_BYTES: u64 = 1 << 30;

/// Measures `opened`. `on_progress` is told what is being done.
///
/// # Errors
/// A router that does not suit the model, too little memory, a failure of the device.
pub fn run(opened: &Opened, settings: &Settings, mut on_progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let model = &opened.loaded.model;
    let (shape, backend) = (model.shape(), model.backend());
    let policies = settings.routers.iter().map(|spec| policy(spec, opened)).collect::<Result<Vec<_>, _>>()?;
    let tests = settings.tests()?;
    let mut steps = Steps::new(model, settings)?;
    // What loading took: measuring the machine begins anew.
    let loading_peak = peak_bytes();
    let machine = machine(backend, settings.roofline, &mut on_progress);
    let mut runs = Vec::new();
    let mut filled = false;
    for test in tests {
        if let (Test::Decode { .. }, false) = (test, filled) {
            on_progress("filling contexts");
            let batch = settings.batches.iter().copied().max().unwrap_or(0);
            steps.fill(batch, &policies[0])?;
            filled = true;
        }
        let measured = alternate(&mut steps, test, &policies, settings.repeat, &mut on_progress)?;
        let lines = settings.routers.iter().zip(&measured);
        runs.extend(lines.map(|(router, measured)| RunReport::new(router, test, settings, measured, machine.as_ref())));
    }
    Ok(Report {
        model: opened.name.clone(),
        random_weights: opened.random_weights,
        layers: shape.layers.len(),
        dtype: backend.describe_weights(),
        device: backend.describe(),
        threads: rayon::current_num_threads(),
        load_s: opened.load_s,
        peak_rss_bytes: peak_bytes().max(loading_peak),
        weight_bytes: model.bytes() as u64,
        kv_bytes: steps.kv_bytes(),
        read_bytes_per_s: machine.map(|machine| machine.read_bytes_per_s),
        peak_flops_per_s: machine.map(|machine| machine.flops_per_s),
        runs,
    })
}

fn policy(spec: &RouterSpec, opened: &Opened) -> Result<Arc<Policy>, BenchError> {
    let policy = Policy::build_with(spec, &opened.loaded.model.shape().moe, &opened.calibrations)?;
    if policy.signals().surprisal {
        return Err(BenchError::Surprisal(spec.to_string()));
    }
    Ok(Arc::new(policy))
}

/// Runs `test` once with each of `policies` to warm up, and then `repeat` times, in turns, so that what else the machine does
/// falls on all alike: the runs of every policy.
fn alternate(
    steps: &mut Steps<'_>,
    test: Test,
    policies: &[Arc<Policy>],
    repeat: usize,
    on_progress: &mut impl FnMut(&str),
) -> Result<Vec<Vec<Measured>>, BenchError> {
    let mut measured = vec![Vec::with_capacity(repeat); policies.len()];
    for round in 0..=repeat {
        for (policy, runs) in policies.iter().zip(&mut measured) {
            let name = if round == 0 { "warm-up".into() } else { format!("run {round} of {repeat}") };
            on_progress(&format!("{test}  {}  {name}", policy.spec()));
            let run = steps.run(test, policy)?;
            if round > 0 {
                runs.push(run);
            }
        }
    }
    Ok(measured)
}

/// Measures what the machine can do, if that is asked for and known how.
fn machine(backend: &Backend, asked: bool, on_progress: &mut impl FnMut(&str)) -> Option<Machine> {
    if !asked {
        return None;
    }
    if !backend.device().is_cpu() {
        on_progress("the ceilings of this device are not measured: shares of them are left out");
        return None;
    }
    on_progress("measuring the machine");
    let free = backend.free_memory().unwrap_or(BUFFER_BYTES);
    let machine = Machine::measure(backend.dtype(), BUFFER_BYTES.min(free / 2) as usize);
    // The buffer is none of the model's memory.
    forget_peak();
    let giga = |rate: f64| rate / 1e9;
    on_progress(&format!(
        "the machine reads {:.1} GB/s and does {:.0} GFLOP/s ({})",
        giga(machine.read_bytes_per_s),
        giga(machine.flops_per_s),
        machine.arithmetic
    ));
    Some(machine)
}
