//! Which tokens of a step are routed by one another, and what a set of experts that they share leaves each of them.
//!
//! Together are the tokens of one policy and one tenant, as far as the scope goes. In decoding, a step's time follows the
//! experts whose weights it reads, so tokens that agree on a few experts are cheaper than their number tells.

use super::{GateView, SpecArgs, TokenGate, choose_top};
use crate::moe::RoutingBuilder;
use crate::types::{MoeShape, SpecError};

/// Which of a step's tokens are routed by one another; the others get their k0 most probable experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Tokens that are decoded. A prompt's step reads most experts anyway, and its keys and values stay native.
    Decode,
    All,
}

impl Scope {
    /// The option `scope`.
    pub(super) fn option(args: &mut SpecArgs<'_>) -> Result<Self, SpecError> {
        let names = [("decode", Self::Decode), ("all", Self::All)];
        Ok(args.option_of("scope", &names)?.unwrap_or(Self::Decode))
    }

    fn covers(self, token: &TokenGate<'_>) -> bool {
        self == Self::All || token.decodes
    }

    /// Routes the tokens that are together to their k0 most probable of the experts that `open` opens to them, or to all
    /// of these where there are fewer. It is called once per tenant, with that tenant's tokens alone and no expert
    /// open, and must open at least one.
    pub(super) fn route(
        self,
        gate: &GateView<'_>,
        out: &mut RoutingBuilder,
        mut open: impl FnMut(&GateView<'_>, &mut [bool]),
    ) {
        let top_k = gate.shape.top_k;
        // (tenant, row)
        let mut members: Vec<(u32, u32)> = Vec::with_capacity(gate.rows.len());
        for token in gate.tokens() {
            if self.covers(&token) {
                members.push((token.tenant, token.row as u32));
            } else {
                choose_top(&token, top_k, out);
            }
        }
        members.sort_unstable();
        let mut open_e = vec![false; gate.shape.experts];
        let mut chosen = Vec::with_capacity(top_k);
        for tenant in members.chunk_by(|a, b| a.0 == b.0) {
            let rows: Vec<u32> = tenant.iter().map(|member| member.1).collect();
            let together = GateView { rows: &rows, ..*gate };
            open_e.fill(false);
            open(&together, &mut open_e);
            for token in together.tokens() {
                chosen.clear();
                chosen.extend(token.order_e.iter().filter(|&&e| open_e[e as usize]).take(top_k));
                out.choose(token.row, &chosen);
            }
        }
    }

    /// Whom a rule is about, for its description.
    pub(super) fn describe(self, shape: &MoeShape) -> String {
        match self {
            Self::Decode => format!("in decoding (prompts: k = {})", shape.top_k),
            Self::All => "in prompts and decoding".into(),
        }
    }
}
