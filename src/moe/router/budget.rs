//! `budget:share`: a calibrated policy whose rung follows what the served traffic costs.
//!
//! The rule itself is the policy's at the budget; the server's controller (`engine/budget.rs`) moves it from there.

use super::policy::calibrated;
use super::{RouterEntry, SpecArgs};
use crate::moe::calibration::{Calibration, Calibrations, PolicyTable};
use crate::types::{MoeShape, RouterSpec, SpecError};
use std::sync::Arc;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "budget",
    usage: "budget:share,policy=FILE[,scope=experts|forward]",
    summary: "calibrated: a policy that the server adapts, so that its traffic comes to a share of native routing's FLOPs",
    formula: "policy:FILE at the dearest rung whose measured share is within the budget; one rung per 4096 tokens",
    example: "budget:0.7,policy=policy.json",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let (spec, calibration) = read(args, shape)?;
        calibrated(args, shape, &calibration, &spec.table, Some(spec.target))
    },
};

/// What a `budget:…` asks for.
pub struct BudgetSpec {
    /// Share of native routing's FLOPs.
    pub target: f64,
    pub scope: BudgetScope,
    /// The policy's file.
    pub file: String,
    pub table: PolicyTable,
}

/// The FLOPs that a budget is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetScope {
    Experts,
    Forward,
}

impl BudgetSpec {
    /// Reads a specification of this router.
    ///
    /// # Errors
    /// A value out of range, or a file that does not suit the model.
    pub fn read(spec: &RouterSpec, shape: &MoeShape, files: &Calibrations) -> Result<Self, SpecError> {
        let mut args = SpecArgs::new(spec, &ENTRY, Some(files));
        let (read, _) = read(&mut args, shape)?;
        args.finish()?;
        Ok(read)
    }
}

fn read(args: &mut SpecArgs<'_>, shape: &MoeShape) -> Result<(BudgetSpec, Arc<Calibration>), SpecError> {
    let text = args.one_arg("the budget")?;
    let checked = args.share("the budget", text)?;
    // As it was typed: 0.7 is to be told as 0.7.
    let target = text.parse().unwrap_or(f64::from(checked));
    let scopes = [("experts", BudgetScope::Experts), ("forward", BudgetScope::Forward)];
    let scope = args.option_of("scope", &scopes)?.unwrap_or(BudgetScope::Experts);
    let Some(file) = args.option_text("policy") else {
        return Err(args.error("budget needs policy=FILE, which moe-calibrate makes"));
    };
    let calibration = args.open(&file, shape)?;
    let table = args.policy_of(&file, &calibration)?.clone();
    Ok((BudgetSpec { target, scope, file, table }, calibration))
}
