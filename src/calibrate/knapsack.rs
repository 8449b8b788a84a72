//! The best choice of one item per layer within a budget: a multiple-choice knapsack, solved by dynamic programming over
//! costs in 1/64.

/// Something a layer can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    pub cost: f64,
    pub loss: f64,
}

/// Units of cost per 1.
const UNITS: f64 = 64.0;
/// What costs are taken to be equal within, in units: rounding of sums.
const SLACK: f64 = 1e-4;

/// All budgets of one problem, solved at once.
pub struct Knapsack {
    /// Cost in units, rounded up, per layer and item.
    units_li: Vec<Vec<usize>>,
    /// The item that layer l takes where the layers up to it spend exactly u units together, `[layers][units + 1]`.
    taken_lu: Vec<Vec<u16>>,
    /// Least loss where exactly u units are spent.
    loss_u: Vec<f64>,
}

impl Knapsack {
    /// For `layers` of at least one item each.
    pub fn new(layers: &[Vec<Item>]) -> Self {
        let units = |item: &Item| (item.cost * UNITS - SLACK).ceil().max(0.0) as usize;
        let units_li: Vec<Vec<usize>> = layers.iter().map(|items| items.iter().map(units).collect()).collect();
        let most: usize = units_li.iter().map(|units_i| units_i.iter().max().copied().unwrap_or(0)).sum();
        let mut loss_u = vec![f64::INFINITY; most + 1];
        loss_u[0] = 0.0;
        let mut taken_lu = Vec::with_capacity(layers.len());
        let mut reached = 0;
        for (items, units_i) in layers.iter().zip(&units_li) {
            let mut next_u = vec![f64::INFINITY; most + 1];
            let mut taken_u = vec![0; most + 1];
            for (i, (item, units)) in items.iter().zip(units_i).enumerate() {
                for (u, loss) in loss_u[..=reached].iter().enumerate() {
                    let with = loss + item.loss;
                    // The first of equals stays.
                    if with < next_u[u + units] {
                        next_u[u + units] = with;
                        taken_u[u + units] = i as u16;
                    }
                }
            }
            reached += units_i.iter().max().copied().unwrap_or(0);
            loss_u = next_u;
            taken_lu.push(taken_u);
        }
        Self { units_li, taken_lu, loss_u }
    }

    /// The items of least loss that cost at most `budget`, the cheapest of equals; if none do, the cheapest there are.
    pub fn solve(&self, budget: f64) -> Vec<usize> {
        let units = ((budget * UNITS + SLACK).floor().max(0.0) as usize).min(self.loss_u.len() - 1);
        let mut best = None;
        for (u, loss) in self.loss_u[..=units].iter().enumerate().filter(|(_, loss)| loss.is_finite()) {
            if best.is_none_or(|(_, least)| *loss < least) {
                best = Some((u, *loss));
            }
        }
        let cheapest = || self.loss_u.iter().position(|loss| loss.is_finite()).unwrap_or(0);
        self.items(best.map_or_else(cheapest, |(u, _)| u))
    }

    /// Every choice that no cheaper one is as good as, from the cheapest up.
    pub fn frontier(&self) -> Vec<Vec<usize>> {
        let mut least = f64::INFINITY;
        let mut found = Vec::new();
        for (u, loss) in self.loss_u.iter().enumerate() {
            if *loss < least {
                least = *loss;
                found.push(self.items(u));
            }
        }
        found
    }

    /// The items with which exactly `units` units are spent.
    fn items(&self, mut units: usize) -> Vec<usize> {
        let mut items: Vec<usize> = Vec::with_capacity(self.taken_lu.len());
        for (taken_u, units_i) in self.taken_lu.iter().zip(&self.units_li).rev() {
            let item = usize::from(taken_u[units]);
            units -= units_i[item];
            items.push(item);
        }
        items.reverse();
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn totals(layers: &[Vec<Item>], items: &[usize]) -> (f64, f64) {
        let chosen = layers.iter().zip(items).map(|(layer, i)| layer[*i]);
        chosen.fold((0.0, 0.0), |(cost, loss), item| (cost + item.cost, loss + item.loss))
    }

    /// The least loss within `budget`, by trying everything.
    fn brute_force(layers: &[Vec<Item>], budget: f64) -> Option<f64> {
        let Some((first, rest)) = layers.split_first() else { return (budget > -1e-9).then_some(0.0) };
        let tries = first.iter().filter_map(|item| Some(item.loss + brute_force(rest, budget - item.cost)?));
        tries.min_by(f64::total_cmp)
    }

    /// Layers of items whose costs are multiples of 1/64.
    fn layers() -> impl Strategy<Value = Vec<Vec<Item>>> {
        let item = (1u32..130, 0u32..50)
            .prop_map(|(cost, loss)| Item { cost: f64::from(cost) / UNITS, loss: f64::from(loss) / 8.0 });
        proptest::collection::vec(proptest::collection::vec(item, 1..5), 1..5)
    }

    proptest! {
        #[test]
        fn nothing_within_the_budget_is_better(layers in layers(), budget in 0.0f64..12.0) {
            let items = Knapsack::new(&layers).solve(budget);
            let (cost, loss) = totals(&layers, &items);
            match brute_force(&layers, budget) {
                Some(least) => {
                    prop_assert!((loss - least).abs() < 1e-9, "{loss} is not {least}");
                    prop_assert!(cost <= budget + 1e-5, "{cost} for {budget}");
                }
                None => prop_assert!(totals(&layers, &items).0 > budget - 1e-5),
            }
        }

        #[test]
        fn more_money_never_buys_less_and_costs_rise(layers in layers()) {
            let frontier: Vec<(f64, f64)> =
                Knapsack::new(&layers).frontier().iter().map(|items| totals(&layers, items)).collect();
            prop_assert!(!frontier.is_empty());
            prop_assert!(frontier.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 > pair[1].1));
        }
    }

    #[test]
    fn costs_between_units_are_rounded_up() {
        let layers = vec![vec![Item { cost: 1.0, loss: 1.0 }, Item { cost: 1.001, loss: 0.0 }]];
        let knapsack = Knapsack::new(&layers);
        assert_eq!(knapsack.solve(1.0), [0]);
        assert_eq!(knapsack.solve(1.001), [0]);
        assert_eq!(knapsack.solve(1.02), [1]);
        assert_eq!(knapsack.solve(0.1), [0], "the cheapest, if nothing is cheap enough");
    }
}
