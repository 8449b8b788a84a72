//! Every kernel against the reference, over ragged shapes.

use super::*;
use crate::ops::testing::{assert_close, check_copied_blocks, exact, experts_of, numbers, routed, weights};
use crate::ops::{Backend, HostTensor, KvCache, KvShape, Linear, RmsNorm, Segment, StepLayout, Swiglu};
use crate::ops::{attention as attend, reference};
use crate::types::BlockId;
use candle_core::DType;
use proptest::prelude::*;

fn tensor(values: Vec<f32>, rows: usize) -> Tensor {
    let width = values.len() / rows.max(1);
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn linear_agrees_with_the_reference(
        m in 1usize..30, i in 1usize..70, o in 1usize..200, dtype in dtypes(), seed in 0u64..1000
    ) {
        let w = weights(seed, o, i);
        let x = exact(seed + 7, m * i);
        let linear = Linear::new(&w, None, &Backend::cpu(dtype)).unwrap();
        let y = linear.forward(&tensor(x.clone(), m)).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::linear(&x, &w.to_f32(), i, o), 1e-5);
    }

    #[test]
    fn every_instruction_set_agrees_with_the_reference(m in 1usize..30, i in 1usize..40, o in 1usize..70, seed in 0u64..1000) {
        let w = weights(seed, o, i);
        let x = exact(seed + 7, m * i);
        let want = reference::linear(&x, &w.to_f32(), i, o);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let packed = PackedMatrix::pack(&w, dtype);
            for isa in isa::Isa::available() {
                let mut y = vec![f32::NAN; m * o];
                kernel::matmul_on(isa, &x, &packed, &mut y);
                assert_close(&y, &want, 1e-5);
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_the_rows_beside_them(
        m in 2usize..30, i in 1usize..70, o in 1usize..200, dtype in dtypes(), seed in 0u64..1000
    ) {
        let linear = Linear::new(&HostTensor::from_f32(&[o, i], &numbers(seed, o * i)), None, &Backend::cpu(dtype)).unwrap();
        let x = numbers(seed + 7, m * i);
        let together = host_f32(&linear.forward(&tensor(x.clone(), m)).unwrap()).unwrap();
        for row in 0..m {
            let alone = linear.forward(&tensor(x[row * i..(row + 1) * i].to_vec(), 1)).unwrap();
            prop_assert_eq!(&host_f32(&alone).unwrap()[..], &together[row * o..(row + 1) * o]);
        }
    }

    #[test]
    fn grouped_experts_agree_with_the_reference(
        masks in proptest::collection::vec(1u8..32, 1..20), d in 1usize..70, f in 1usize..70, dtype in dtypes(), seed in 0u64..1000
    ) {
        let (experts, plain) = experts_of(seed, 5, d, f, &Backend::cpu(dtype));
        let x = exact(seed + 99, masks.len() * d);
        let routing = routed(&masks, 5);
        let y = experts.forward(&tensor(x.clone(), masks.len()), &routing).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::experts(&x, &plain, &routing, d, f), 1e-5);
    }

    #[test]
    fn paged_attention_agrees_with_the_reference(
        lens in proptest::collection::vec((0usize..20, 1usize..6), 1..4),
        group in 1usize..4, kv_heads in 1usize..3, half in 1usize..20,
        window in proptest::option::of(1usize..12), seed in 0u64..1000,
    ) {
        check_attention(&lens, group, kv_heads, half * 2, window, seed);
    }
}

/// Sequences of (tokens already cached, tokens of this step), each over scattered blocks of 4 positions.
fn check_attention(
    lens: &[(usize, usize)],
    group: usize,
    kv_heads: usize,
    hd: usize,
    window: Option<usize>,
    seed: u64,
) {
    let backend = Backend::cpu(DType::F32);
    let (heads, kv_width) = (group * kv_heads, kv_heads * hd);
    let shape = KvShape { layers: 2, blocks: 40, block_size: 4, kv_heads, head_dim: hd };
    let mut kv = KvCache::new(shape, &backend).unwrap();
    let total: usize = lens.iter().map(|(a, b)| a + b).sum();
    let (q, k, v) =
        (numbers(seed, total * heads * hd), numbers(seed + 1, total * kv_width), numbers(seed + 2, total * kv_width));
    let mut next_block = 39u32;
    let mut first_row = 0;
    let rows = |x: &[f32], width: usize, from: usize, n: usize| tensor(x[from * width..(from + n) * width].to_vec(), n);
    for &(cached, fresh) in lens {
        let blocks: Vec<BlockId> = (0..(cached + fresh).div_ceil(4))
            .map(|_| {
                next_block -= 1;
                BlockId(next_block)
            })
            .collect();
        let mut out = Vec::new();
        for (start, len) in [(0, cached), (cached, fresh)] {
            if len == 0 {
                continue;
            }
            let step = StepLayout::new(vec![Segment { start, len, blocks: blocks.clone() }], &kv, &backend).unwrap();
            let at = first_row + start;
            let (q, k, v) = (rows(&q, heads * hd, at, len), rows(&k, kv_width, at, len), rows(&v, kv_width, at, len));
            out.extend(host_f32(&attend(&q, &k, &v, 1, window, &mut kv, &step).unwrap()).unwrap());
        }
        for t in 0..cached + fresh {
            let from = window.map_or(0, |w| (t + 1).saturating_sub(w));
            for h in 0..heads {
                let part = |x: &'_ [f32], t: usize| -> Vec<f32> {
                    let at = (first_row + t) * kv_width + h / group * hd;
                    x[at..at + hd].to_vec()
                };
                let keys: Vec<Vec<f32>> = (from..=t).map(|t| part(&k, t)).collect();
                let values: Vec<Vec<f32>> = (from..=t).map(|t| part(&v, t)).collect();
                let at = ((first_row + t) * heads + h) * hd;
                let want = reference::attend(
                    &q[at..at + hd],
                    &keys.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                    &values.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                    1.0 / (hd as f32).sqrt(),
                );
                assert_close(&out[(t * heads + h) * hd..(t * heads + h + 1) * hd], &want, 1e-5);
            }
        }
        first_row += cached + fresh;
    }
}

#[test]
fn grouped_experts_handle_one_row_and_all_rows_on_one_expert() {
    let backend = Backend::cpu(DType::F32);
    for masks in [vec![0b100u8], vec![0b010; 50], vec![0b111; 3]] {
        let (experts, plain) = experts_of(1, 3, 33, 65, &backend);
        let x = exact(5, masks.len() * 33);
        let routing = routed(&masks, 3);
        let y = experts.forward(&tensor(x.clone(), masks.len()), &routing).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::experts(&x, &plain, &routing, 33, 65), 1e-5);
    }
}

#[test]
fn large_products_on_all_threads_agree_with_the_reference() {
    let (m, i, o) = (64, 300, 500);
    let w = weights(3, o, i);
    let x = exact(4, m * i);
    let y = Linear::new(&w, None, &Backend::cpu(DType::F32)).unwrap().forward(&tensor(x.clone(), m)).unwrap();
    assert_close(&host_f32(&y).unwrap(), &reference::linear(&x, &w.to_f32(), i, o), 1e-5);
    let (d, f) = (200, 300);
    let (gate, up, down) = (weights(1, f, d), weights(2, f, d), weights(3, d, f));
    let net = Swiglu::new(&gate, &up, &down, &Backend::cpu(DType::F32)).unwrap();
    let x = exact(9, m * d);
    let y = net.forward(&tensor(x.clone(), m)).unwrap();
    let want = reference::swiglu(&x, &gate.to_f32(), &up.to_f32(), &down.to_f32(), d, f);
    assert_close(&host_f32(&y).unwrap(), &want, 1e-5);
}

#[test]
fn norms_agree_with_the_reference_on_rows_and_heads() {
    for (rows, heads, width) in [(3, 1, 100), (5, 4, 24), (1, 1, 1)] {
        let x = numbers(1, rows * heads * width);
        let weight = numbers(2, width);
        let norm = RmsNorm::new(&HostTensor::from_f32(&[width], &weight), 1e-6, &Backend::cpu(DType::F32)).unwrap();
        let y = norm.forward(&tensor(x.clone(), rows)).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::rms_norm(&x, &weight, 1e-6), 1e-6);
    }
}

#[test]
fn packed_rows_come_back_as_they_were() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let w = weights(1, 45, 37);
        let packed = PackedMatrix::pack(&w, dtype);
        let rows = host_f32(&embed(&[44, 0, 31, 32], &packed).unwrap()).unwrap();
        for (row, id) in rows.chunks_exact(37).zip([44, 0, 31, 32]) {
            assert_eq!(row, &w.to_f32()[id * 37..(id + 1) * 37]);
        }
    }
}

#[test]
fn copied_blocks_hold_what_their_sources_hold() {
    [DType::F32, DType::BF16, DType::F16].map(Backend::cpu).iter().for_each(check_copied_blocks);
}
