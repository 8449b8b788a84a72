//! [`Routing`]: which token rows each expert computes, and with which weight.
//!
//! Legend: T tokens in the step, E experts, R routed rows (varies with the router).

/// One layer's routing of one step, as compressed sparse rows sorted by expert. Nothing downstream knows k.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Row r computes this token; ascending within an expert.
    token_r: Vec<u32>,
    /// What row r's output is multiplied by.
    weight_r: Vec<f32>,
    /// Rows of expert e are `offsets_e1[e]..offsets_e1[e + 1]`.
    offsets_e1: Vec<u32>,
    /// Rows of token t are `row_of[starts_t1[t]..starts_t1[t + 1]]`, ascending, so that a token's sum over
    /// its experts is taken in the same order whatever else is in the step.
    starts_t1: Vec<u32>,
    row_of: Vec<u32>,
}

/// An invariant of [`Routing`] that does not hold.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RoutingError {
    #[error("token {token} has no expert")]
    NoExpert { token: usize },
    #[error("token {token} was given expert {expert}, but the layer has {experts}")]
    UnknownExpert { token: usize, expert: usize, experts: usize },
    #[error("token {token} was given expert {expert} twice")]
    Twice { token: usize, expert: usize },
    #[error("token {token} was routed twice or is outside the step's {tokens} tokens")]
    UnexpectedToken { token: usize, tokens: usize },
    #[error("a router reads {name}, which there is none of here")]
    Signal { name: &'static str },
    #[error("the weight of expert {expert} for token {token} is {weight}")]
    Weight { token: usize, expert: usize, weight: f32 },
}

impl Routing {
    /// T.
    pub fn tokens(&self) -> usize {
        self.starts_t1.len() - 1
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.offsets_e1.len() - 1
    }

    /// R, the rows that experts compute.
    pub fn rows(&self) -> usize {
        self.token_r.len()
    }

    /// Token of every row, `[R]`.
    pub fn token_r(&self) -> &[u32] {
        &self.token_r
    }

    /// Weight of every row, `[R]`.
    pub fn weight_r(&self) -> &[f32] {
        &self.weight_r
    }

    /// Row offsets of the experts, `[E + 1]`.
    pub fn offsets_e1(&self) -> &[u32] {
        &self.offsets_e1
    }

    /// The rows of expert `e`.
    pub fn expert_rows(&self, e: usize) -> std::ops::Range<usize> {
        self.offsets_e1[e] as usize..self.offsets_e1[e + 1] as usize
    }

    /// Where the rows of the tokens begin in [`Self::row_of`], `[T + 1]`.
    pub fn starts_t1(&self) -> &[u32] {
        &self.starts_t1
    }

    /// The rows of all tokens, token by token, `[R]`.
    pub fn row_of(&self) -> &[u32] {
        &self.row_of
    }

    /// The rows of token `t`, ascending by expert.
    pub fn token_rows(&self, t: usize) -> &[u32] {
        &self.row_of[self.starts_t1[t] as usize..self.starts_t1[t + 1] as usize]
    }

    /// The same with at most `capacity` rows per expert, the earliest tokens': what is over is dropped, and a token may be
    /// left with no row at all. For training alone (Fedus et al., arXiv 2101.03961, §2.2).
    pub fn capped(&self, capacity: usize) -> Self {
        let experts = self.experts();
        let mut kept = Self {
            token_r: Vec::with_capacity(self.rows()),
            weight_r: Vec::with_capacity(self.rows()),
            offsets_e1: vec![0],
            starts_t1: vec![0],
            row_of: Vec::with_capacity(self.rows()),
        };
        // New place of every row, or none.
        let mut place_r = vec![None; self.rows()];
        for e in 0..experts {
            for row in self.expert_rows(e).take(capacity) {
                place_r[row] = Some(kept.token_r.len() as u32);
                kept.token_r.push(self.token_r[row]);
                kept.weight_r.push(self.weight_r[row]);
            }
            kept.offsets_e1.push(kept.token_r.len() as u32);
        }
        for t in 0..self.tokens() {
            kept.row_of.extend(self.token_rows(t).iter().filter_map(|&row| place_r[row as usize]));
            kept.starts_t1.push(kept.row_of.len() as u32);
        }
        kept
    }

    /// Experts with at least one row: the expert weights this layer must read.
    pub fn unique_experts(&self) -> usize {
        self.offsets_e1.windows(2).filter(|w| w[0] < w[1]).count()
    }
}

/// Collects every token's experts, in any order of tokens, and sorts them into a [`Routing`].
#[derive(Debug)]
pub struct RoutingBuilder {
    experts: usize,
    /// Chosen experts and their weights, token by token as they came.
    chosen: Vec<(u16, f32)>,
    /// Where token t's experts lie in `chosen`; `None` until it is routed.
    span_t: Vec<Option<(u32, u32)>>,
}

impl RoutingBuilder {
    /// For `tokens` tokens over `experts` experts (at most 65,536).
    pub fn new(tokens: usize, experts: usize) -> Self {
        Self { experts, chosen: Vec::with_capacity(tokens * 2), span_t: vec![None; tokens] }
    }

    /// Routes `token` to `experts`, most preferred first, with weights to be set by [`Self::weigh`].
    pub fn choose(&mut self, token: usize, experts: &[u16]) {
        let start = self.chosen.len() as u32;
        self.chosen.extend(experts.iter().map(|&e| (e, 0.0)));
        // A second choice for the same token is kept out of the spans and found by `finish`.
        match self.span_t.get_mut(token) {
            Some(span @ None) => *span = Some((start, experts.len() as u32)),
            _ => self.span_t.push(Some((start, experts.len() as u32))),
        }
    }

    /// The experts chosen for `token` with their weights, for setting the latter.
    pub fn weigh(&mut self, token: usize) -> &mut [(u16, f32)] {
        match self.span_t.get(token).copied().flatten() {
            Some((start, len)) => &mut self.chosen[start as usize..(start + len) as usize],
            None => &mut [],
        }
    }

    /// Sorts by expert. `tokens` is T, as given to [`Self::new`].
    ///
    /// # Errors
    /// When an invariant of [`Routing`] does not hold: a router that is wrong, never a request.
    pub fn finish(self, tokens: usize) -> Result<Routing, RoutingError> {
        if self.span_t.len() != tokens {
            return Err(RoutingError::UnexpectedToken { token: tokens, tokens });
        }
        let experts = self.experts;
        let rows = self.chosen.len();
        let mut offsets_e1 = vec![0u32; experts + 1];
        for &(e, _) in &self.chosen {
            let e = e as usize;
            if e < experts {
                offsets_e1[e + 1] += 1;
            }
        }
        for e in 0..experts {
            offsets_e1[e + 1] += offsets_e1[e];
        }
        let mut next_e = offsets_e1.clone();
        let mut routing = Routing {
            token_r: vec![0; rows],
            weight_r: vec![0.0; rows],
            offsets_e1,
            starts_t1: Vec::with_capacity(tokens + 1),
            row_of: Vec::with_capacity(rows),
        };
        routing.starts_t1.push(0);
        for (token, span) in self.span_t.iter().enumerate() {
            let (start, len) = span.filter(|s| s.1 > 0).ok_or(RoutingError::NoExpert { token })?;
            let first = routing.row_of.len();
            for &(e, weight) in &self.chosen[start as usize..(start + len) as usize] {
                let expert = e as usize;
                if expert >= experts {
                    return Err(RoutingError::UnknownExpert { token, expert, experts });
                }
                if !weight.is_finite() {
                    return Err(RoutingError::Weight { token, expert, weight });
                }
                let row = next_e[expert] as usize;
                if row > routing.offsets_e1[expert] as usize && routing.token_r[row - 1] == token as u32 {
                    return Err(RoutingError::Twice { token, expert });
                }
                next_e[expert] += 1;
                routing.token_r[row] = token as u32;
                routing.weight_r[row] = weight;
                routing.row_of.push(row as u32);
            }
            routing.row_of[first..].sort_unstable();
            routing.starts_t1.push(routing.row_of.len() as u32);
        }
        Ok(routing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn built(experts: usize, chosen: &[&[u16]]) -> Result<Routing, RoutingError> {
        let mut builder = RoutingBuilder::new(chosen.len(), experts);
        for (t, c) in chosen.iter().enumerate() {
            builder.choose(t, c);
            for slot in builder.weigh(t) {
                slot.1 = t as f32 + 0.25;
            }
        }
        builder.finish(chosen.len())
    }

    #[test]
    fn rows_are_sorted_by_expert_then_token() {
        let routing = built(4, &[&[3, 0], &[0], &[3, 1]]).unwrap();
        assert_eq!(routing.offsets_e1(), [0, 2, 3, 3, 5]);
        assert_eq!(routing.token_r(), [0, 1, 2, 0, 2]);
        assert_eq!(routing.token_rows(0), [0, 3]);
        assert_eq!(routing.token_rows(2), [2, 4]);
        assert_eq!(routing.unique_experts(), 3);
        assert_eq!(routing.weight_r()[3], 0.25);
    }

    #[test]
    fn a_wrong_router_is_found_not_believed() {
        assert_eq!(built(4, &[&[]]), Err(RoutingError::NoExpert { token: 0 }));
        assert_eq!(built(4, &[&[4]]), Err(RoutingError::UnknownExpert { token: 0, expert: 4, experts: 4 }));
        assert_eq!(built(4, &[&[1, 1]]), Err(RoutingError::Twice { token: 0, expert: 1 }));
        let mut twice = RoutingBuilder::new(1, 4);
        twice.choose(0, &[1]);
        twice.choose(0, &[2]);
        assert!(matches!(twice.finish(1), Err(RoutingError::UnexpectedToken { .. })));
        let mut nan = RoutingBuilder::new(1, 4);
        nan.choose(0, &[1]);
        nan.weigh(0)[0].1 = f32::NAN;
        assert!(matches!(nan.finish(1), Err(RoutingError::Weight { .. })));
    }

    #[test]
    fn capacity_keeps_the_earliest_tokens_of_every_expert() {
        let capped = built(4, &[&[0, 1], &[0], &[0, 3]]).unwrap().capped(1);
        assert_eq!(capped.offsets_e1(), [0, 1, 2, 2, 3]);
        assert_eq!(capped.token_r(), [0, 0, 2]);
        assert_eq!(
            (capped.token_rows(0), capped.token_rows(1), capped.token_rows(2)),
            (&[0, 1][..], &[][..], &[2][..])
        );
        assert_eq!(capped.weight_r(), [0.25, 0.25, 2.25]);
    }

    proptest! {
        #[test]
        fn every_row_of_every_token_is_found_from_both_sides(
            masks in proptest::collection::vec(1u16..256, 1..20)
        ) {
            let chosen: Vec<Vec<u16>> =
                masks.iter().map(|m| (0..8).filter(|e| m >> e & 1 == 1).collect()).collect();
            let views: Vec<&[u16]> = chosen.iter().map(Vec::as_slice).collect();
            let routing = built(8, &views).unwrap();
            prop_assert_eq!(routing.rows(), masks.iter().map(|m| m.count_ones() as usize).sum::<usize>());
            prop_assert_eq!(*routing.offsets_e1().last().unwrap() as usize, routing.rows());
            for (t, want) in chosen.iter().enumerate() {
                let mut got = Vec::new();
                for &row in routing.token_rows(t) {
                    prop_assert_eq!(routing.token_r()[row as usize] as usize, t);
                    let e = (0..8).find(|&e| routing.expert_rows(e).contains(&(row as usize))).unwrap();
                    got.push(e as u16);
                }
                prop_assert_eq!(&got, want);
            }
        }
    }
}
