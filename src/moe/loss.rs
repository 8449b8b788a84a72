//! Auxiliary losses of one mixture, on its gate logits `z [T, E]`. Returned one by one, never summed in here.

use super::Routing;
use candle_core::{D, Result, Tensor};
use candle_nn::ops::{log_softmax, softmax};

/// The unweighted losses of one mixture; scalars that gradients flow through.
#[derive(Clone, Debug)]
pub struct AuxLosses {
    /// See [`load_balance`].
    pub balance: Tensor,
    /// See [`z_loss`].
    pub z_loss: Tensor,
    /// See [`entropy`], in nats.
    pub entropy: Tensor,
}

impl AuxLosses {
    /// Of gate logits `z [T, E]` and the rows they were routed to.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn of(z: &Tensor, routing: &Routing) -> Result<Self> {
        Ok(Self { balance: load_balance(z, routing)?, z_loss: z_loss(z)?, entropy: entropy(z)? })
    }
}

/// `E · Σ f_e P_e`: f_e is the share of routed rows that expert e computes, P_e its mean probability; 1 when both are
/// even (Fedus et al., arXiv 2101.03961, eq. 4, with rows in the place of tokens so that k may vary). Gradients flow through P.
///
/// # Errors
/// A failure of the device.
pub fn load_balance(z: &Tensor, routing: &Routing) -> Result<Tensor> {
    let experts = routing.experts();
    let rows = routing.rows().max(1) as f32;
    let share_e: Vec<f32> = (0..experts).map(|e| routing.expert_rows(e).len() as f32 / rows * experts as f32).collect();
    let share_e = Tensor::from_vec(share_e, experts, z.device())?;
    softmax(z, D::Minus1)?.mean(0)?.mul(&share_e)?.sum_all()
}

/// `mean_t logsumexp(z_t)²` (Zoph et al., arXiv 2202.08906, eq. 5).
///
/// # Errors
/// A failure of the device.
pub fn z_loss(z: &Tensor) -> Result<Tensor> {
    z.log_sum_exp(D::Minus1)?.sqr()?.mean_all()
}

/// `mean_t H(p_t)` in nats, p the softmax over all experts (Huang et al., arXiv 2403.07652, eq. 6, per token).
///
/// # Errors
/// A failure of the device.
pub fn entropy(z: &Tensor) -> Result<Tensor> {
    let log_p = log_softmax(z, D::Minus1)?;
    (log_p.exp()? * &log_p)?.sum(D::Minus1)?.mean_all()?.neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::RoutingBuilder;
    use candle_core::{Device, Var};

    fn routing(chosen: &[&[u16]]) -> Routing {
        let mut builder = RoutingBuilder::new(chosen.len(), 4);
        chosen.iter().enumerate().for_each(|(t, c)| builder.choose(t, c));
        builder.finish(chosen.len()).unwrap()
    }

    fn scalar(t: Tensor) -> f32 {
        t.to_scalar().unwrap()
    }

    #[test]
    fn even_routing_of_even_gates_costs_one_and_collapse_costs_the_number_of_experts() {
        let even = Tensor::zeros((4, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let spread = routing(&[&[0], &[1], &[2], &[3]]);
        assert!((scalar(load_balance(&even, &spread).unwrap()) - 1.0).abs() < 1e-6);
        let sure = Tensor::new(&[[50f32, 0.0, 0.0, 0.0]; 4], &Device::Cpu).unwrap();
        let collapsed = routing(&[&[0], &[0], &[0], &[0]]);
        assert!((scalar(load_balance(&sure, &collapsed).unwrap()) - 4.0).abs() < 1e-5);
    }

    #[test]
    fn values_are_those_of_the_formulas() {
        let z = Tensor::new(&[[1f32, 2.0, 0.0, -1.0]], &Device::Cpu).unwrap();
        let exp: Vec<f64> = [1f64, 2.0, 0.0, -1.0].iter().map(|z| z.exp()).collect();
        let sum: f64 = exp.iter().sum();
        let h: f64 = exp.iter().map(|e| -(e / sum) * (e / sum).ln()).sum();
        assert!((f64::from(scalar(z_loss(&z).unwrap())) - sum.ln().powi(2)).abs() < 1e-5);
        assert!((f64::from(scalar(entropy(&z).unwrap())) - h).abs() < 1e-6);
    }

    #[test]
    fn every_loss_moves_the_gate_as_finite_differences_say() {
        let values = [0.3f32, -0.2, 0.9, 0.1, -0.5, 0.4, 0.2, 0.7];
        let chosen = routing(&[&[2, 0], &[3]]);
        let losses: [fn(&Tensor, &Routing) -> Result<Tensor>; 3] = [load_balance, |z, _| z_loss(z), |z, _| entropy(z)];
        for loss in losses {
            let at = |v: &[f32]| {
                let z = Tensor::from_slice(v, (2, 4), &Device::Cpu).unwrap();
                f64::from(scalar(loss(&z, &chosen).unwrap()))
            };
            let z = Var::from_slice(&values, (2, 4), &Device::Cpu).unwrap();
            let grads = loss(&z, &chosen).unwrap().backward().unwrap();
            let grad: Vec<f32> = grads.get(&z).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            for i in 0..values.len() {
                let (mut up, mut down) = (values, values);
                (up[i], down[i]) = (up[i] + 1e-2, down[i] - 1e-2);
                let numeric = (at(&up) - at(&down)) / 2e-2;
                assert!((numeric - f64::from(grad[i])).abs() < 2e-3, "{i}: {numeric} against {}", grad[i]);
            }
        }
    }
}
