//! Every kernel against the reference or the CPU backend; skipped, loudly, where there is no device.

use crate::ops::testing::{ACTIVATIONS, exact, experts_of, net_of, routed, weights};
use crate::ops::{
    Backend, Embedding, FeedForward, HostTensor, KvCache, KvShape, Linear, Norm, Rotary, Segment, StepLayout,
    attention, reference, testing, to_host,
};
use crate::types::{Activation, BlockId, DeviceChoice, DtypeChoice};
use candle_core::{DType, Tensor};
use std::io::Write;
use std::sync::Arc;

/// The first CUDA device in every dtype. Without one the test has nothing to run, and says so past the capture of
/// test output.
fn backends() -> Vec<Backend> {
    let mut backends = Vec::new();
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::F16] {
        match Backend::select(DeviceChoice::Cuda(0), dtype, DType::F32) {
            Ok(backend) => backends.push(backend),
            Err(e) => {
                let (thread, why) = (std::thread::current(), e.to_string());
                // Candle appends a backtrace where those are on.
                let (test, why) = (thread.name().unwrap_or("test"), why.lines().next().unwrap_or_default());
                writeln!(std::io::stderr().lock(), "SKIPPED: no CUDA device: {test} ({why})").unwrap();
                return Vec::new();
            }
        }
    }
    backends
}

/// `[rows, width]` on the backend, in its dtype.
fn tensor(values: &[f32], rows: usize, backend: &Backend) -> Tensor {
    HostTensor::from_f32(&[rows, values.len() / rows], values).to_tensor(backend.dtype(), backend.device()).unwrap()
}

/// What rounding to the backend's dtype a few times on the way may cost.
fn tolerance(backend: &Backend) -> f32 {
    match backend.dtype() {
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

fn assert_close(got: &Tensor, want: &[f32], tolerance: f32) {
    testing::assert_close(&to_host(got).unwrap(), want, tolerance);
}

#[test]
fn linear_agrees_with_the_reference() {
    for backend in backends() {
        for (t, i, o) in [(1, 64, 1), (5, 70, 33), (130, 256, 512)] {
            let (w, bias, x) = (weights(1, o, i), exact(2, o), exact(3, t * i));
            let bias_host = HostTensor::from_f32(&[o], &bias);
            let y = Linear::new(&w, Some(&bias_host), &backend).unwrap().forward(&tensor(&x, t, &backend)).unwrap();
            let product = reference::linear(&x, &w.to_f32(), i, o);
            let want: Vec<f32> = product.iter().zip(bias.iter().cycle()).map(|(y, b)| y + b).collect();
            assert_eq!(y.dtype(), backend.dtype());
            assert_close(&y, &want, tolerance(&backend));
            // A gate is f32 whatever comes in.
            let y = Linear::full_precision(&w, &backend).unwrap().forward(&tensor(&x, t, &backend)).unwrap();
            assert_eq!(y.dtype(), DType::F32);
            assert_close(&y, &product, 1e-5);
        }
    }
}

#[test]
fn embedding_gives_the_rows_of_its_table() {
    for backend in backends() {
        let w = weights(1, 9, 20);
        let table = Arc::new(Linear::new(&w, None, &backend).unwrap());
        let y = Embedding::new(table, 9).forward(&[8, 0, 8]).unwrap();
        let want: Vec<f32> = [8, 0, 8].iter().flat_map(|r| w.to_f32()[r * 20..(r + 1) * 20].to_vec()).collect();
        assert_close(&y, &want, 0.0);
    }
}

#[test]
fn experts_agree_with_the_reference() {
    let ragged: Vec<u8> = (0..50).map(|t| [0b00001, 0b11001, 0b00011, 0b01000, 0b11011][t % 5]).collect();
    for backend in backends() {
        // Widths that `moe_gemm` takes in whole tiles, in parts of tiles, and not at all.
        for (d, f) in [(64, 96), (40, 24), (20, 12)] {
            // No rows for the third expert; one row in all; all rows on one; experts of more than a tile of rows.
            for masks in [&ragged[..], &[0b00100], &[0b00010; 40], &[0b11111; 70]] {
                let (experts, plain) = experts_of(0, 5, (d, f), (Activation::Swiglu, false), &backend);
                let x = exact(99, masks.len() * d);
                let routing = routed(masks, 5);
                let y = experts.forward(&tensor(&x, masks.len(), &backend), &routing).unwrap();
                assert_eq!(y.dtype(), backend.dtype());
                assert_close(&y, &reference::experts(&x, &plain, &routing, d, f), tolerance(&backend));
            }
        }
    }
}

#[test]
fn a_token_has_the_same_experts_sum_in_any_step() {
    // In f32 the products are cuBLAS's, which promises no such thing.
    for backend in backends().into_iter().filter(|b| b.dtype() != DType::F32) {
        let (d, masks) = (64, [0b0111u8, 0b1000, 0b1111, 0b0101].repeat(20));
        let (experts, _) = experts_of(0, 4, (d, 96), (Activation::Swiglu, false), &backend);
        let x = exact(5, masks.len() * d);
        let together =
            to_host(&experts.forward(&tensor(&x, masks.len(), &backend), &routed(&masks, 4)).unwrap()).unwrap();
        for t in [0, 1, 2, 3, 79] {
            let row = t * d..(t + 1) * d;
            let alone = experts.forward(&tensor(&x[row.clone()], 1, &backend), &routed(&masks[t..=t], 4)).unwrap();
            assert_eq!(to_host(&alone).unwrap(), together[row]);
        }
    }
}

#[test]
fn nets_of_every_activation_agree_with_the_reference() {
    let (d, f, masks) = (48, 72, [0b001, 0b101, 0b111, 0b100, 0b001]);
    for backend in backends() {
        for kind in ACTIVATIONS.into_iter().flat_map(|activation| [(activation, false), (activation, true)]) {
            let x = exact(4, masks.len() * d);
            let input = tensor(&x, masks.len(), &backend);
            let (host, plain) = net_of(1, (d, f), kind);
            let y = FeedForward::new(&host, kind.0, &backend).unwrap().forward(&input).unwrap();
            assert_close(&y, &reference::feed_forward(&x, &plain, d, f), tolerance(&backend));
            let (experts, plain) = experts_of(1, 3, (d, f), kind, &backend);
            let routing = routed(&masks, 3);
            let y = experts.forward(&input, &routing).unwrap();
            assert_eq!(y.dtype(), backend.dtype());
            assert_close(&y, &reference::experts(&x, &plain, &routing, d, f), tolerance(&backend));
        }
    }
}

#[test]
fn norms_agree_with_the_reference_on_rows_and_heads() {
    for backend in backends() {
        for (rows, heads, width) in [(3, 1, 100), (5, 4, 24), (1, 1, 1), (2, 1, 2048)] {
            let (x, weight) = (exact(1, rows * heads * width), exact(2, width));
            let norm = Norm::rms(&HostTensor::from_f32(&[width], &weight), 1e-6, &backend).unwrap();
            let y = norm.forward(&tensor(&x, rows, &backend)).unwrap();
            assert_close(&y, &reference::rms_norm(&x, &weight, 1e-6), tolerance(&backend));
            let bias = exact(3, width);
            let host = |values: &[f32]| HostTensor::from_f32(&[width], values);
            let norm = Norm::layer(&host(&weight), &host(&bias), 1e-3, &backend).unwrap();
            let y = norm.forward(&tensor(&x, rows, &backend)).unwrap();
            assert_close(&y, &reference::layer_norm(&x, &weight, &bias, 1e-3), tolerance(&backend));
        }
    }
}

#[test]
fn kernels_take_views_of_tensors() {
    for backend in backends() {
        let (x, weight) = (exact(1, 6 * 11), exact(2, 11));
        let norm = Norm::rms(&HostTensor::from_f32(&[11], &weight), 1e-6, &backend).unwrap();
        let y = norm.forward(&tensor(&x, 6, &backend).narrow(0, 3, 2).unwrap()).unwrap();
        assert_close(&y, &reference::rms_norm(&x[33..55], &weight, 1e-6), tolerance(&backend));
        // Columns 4.. of every row.
        let norm = Norm::rms(&HostTensor::from_f32(&[7], &weight[4..]), 1e-6, &backend).unwrap();
        let y = norm.forward(&tensor(&x, 6, &backend).narrow(1, 4, 7).unwrap()).unwrap();
        let columns: Vec<f32> = x.chunks_exact(11).flat_map(|row| row[4..].to_vec()).collect();
        assert_close(&y, &reference::rms_norm(&columns, &weight[4..], 1e-6), tolerance(&backend));
    }
}

/// A segment over blocks of `block_size` that count down from `last`, so that neighbours are not in order.
fn segment(start: usize, len: usize, last: u32, block_size: usize) -> Segment {
    let blocks = (0..(start + len).div_ceil(block_size) as u32).map(|b| BlockId(last - b)).collect();
    Segment { start, len, blocks }
}

#[test]
fn rotary_agrees_with_the_cpu() {
    for backend in backends() {
        let inv_freq: Vec<f32> = (0..12).map(|i| 10_000f32.powf(-i as f32 / 12.0)).collect();
        let x = exact(1, 7 * 3 * 24);
        let run = |backend: &Backend| {
            let shape = KvShape { layers: 1, blocks: 300, block_size: 4, kv_heads: 1, head_dim: 24 };
            let kv = KvCache::new(shape, backend).unwrap();
            let segments = vec![segment(1000, 4, 299, 4), segment(0, 3, 20, 4)];
            let step = StepLayout::new(segments, &kv, backend).unwrap();
            let rotary = Rotary::new(&inv_freq, 1.5, 1004, backend).unwrap();
            rotary.forward(&tensor(&x, 7, backend), &step).unwrap()
        };
        let want = to_host(&run(&Backend::cpu(DType::F32))).unwrap();
        assert_close(&run(&backend), &want, tolerance(&backend));
    }
}

/// Sizes of an attention test: sequences of (tokens already cached, tokens of the step).
#[derive(Clone)]
struct Case {
    lens: Vec<(usize, usize)>,
    group: usize,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    window: Option<usize>,
}

impl Case {
    /// The step's attention, after caching `chunk` tokens at a time what came before it; outputs per sequence.
    fn run(&self, backend: &Backend, chunk: usize) -> Vec<Vec<f32>> {
        let Self { group, kv_heads, head_dim, block_size, window, .. } = *self;
        let blocks_of = |(cached, fresh): (usize, usize)| (cached + fresh).div_ceil(block_size) as u32;
        let blocks: u32 = self.lens.iter().map(|&l| blocks_of(l)).sum();
        let shape = KvShape { layers: 2, blocks: blocks as usize, block_size, kv_heads, head_dim };
        let mut kv = KvCache::new(shape, backend).unwrap();
        // (last block, tokens done, all tokens' q, k and v) of every sequence
        let (kv_width, q_width) = (kv_heads * head_dim, group * kv_heads * head_dim);
        let mut last = 0;
        let mut sequences = Vec::new();
        for (i, &len) in self.lens.iter().enumerate() {
            last += blocks_of(len);
            let (seed, n) = (10 * i as u64, len.0 + len.1);
            let qkv = (exact(seed, n * q_width), exact(seed + 1, n * kv_width), exact(seed + 2, n * kv_width));
            sequences.push((last - 1, len, qkv));
        }
        let mut forward = |parts: &[(usize, usize, usize)]| {
            let segments = parts.iter().map(|&(s, from, n)| segment(from, n, sequences[s].0, block_size)).collect();
            let step = StepLayout::new(segments, &kv, backend).unwrap();
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for &(s, from, n) in parts {
                let qkv = &sequences[s].2;
                q.extend_from_slice(&qkv.0[from * q_width..(from + n) * q_width]);
                k.extend_from_slice(&qkv.1[from * kv_width..(from + n) * kv_width]);
                v.extend_from_slice(&qkv.2[from * kv_width..(from + n) * kv_width]);
            }
            let t = step.tokens();
            let (q, k, v) = (tensor(&q, t, backend), tensor(&k, t, backend), tensor(&v, t, backend));
            to_host(&attention([&q, &k, &v], 1, window, &mut kv, &step, None).unwrap()).unwrap()
        };
        for (s, (_, (cached, _), _)) in sequences.iter().enumerate() {
            for from in (0..*cached).step_by(chunk) {
                forward(&[(s, from, chunk.min(cached - from))]);
            }
        }
        let parts: Vec<_> = self.lens.iter().enumerate().map(|(s, l)| (s, l.0, l.1)).collect();
        let out = forward(&parts);
        let mut at = 0;
        let mut take = |rows: usize| {
            at += rows * q_width;
            out[at - rows * q_width..at].to_vec()
        };
        self.lens.iter().map(|l| take(l.1)).collect()
    }
}

/// Plain shapes, odd shapes, windows, and sequences that take one split beside sequences that take several.
fn cases() -> Vec<Case> {
    let case = |lens: &[(usize, usize)], group, kv_heads, head_dim, block_size, window| Case {
        lens: lens.to_vec(),
        group,
        kv_heads,
        head_dim,
        block_size,
        window,
    };
    vec![
        case(&[(0, 5), (7, 1)], 1, 2, 8, 4, None),
        case(&[(0, 3), (130, 2), (40, 1)], 3, 2, 6, 16, None),
        case(&[(30, 20)], 2, 1, 128, 16, Some(9)),
        case(&[(20, 2)], 12, 1, 256, 5, None),
        case(&[(600, 2), (3, 2), (1100, 40)], 4, 2, 96, 16, None),
        case(&[(1100, 2), (0, 90)], 8, 1, 64, 32, Some(80)),
        case(&[(511, 3)], 1, 2, 2, 16, Some(600)),
    ]
}

#[test]
fn paged_attention_agrees_with_the_cpu() {
    for backend in backends() {
        for case in cases() {
            let want = case.run(&Backend::cpu(DType::F32), 64).concat();
            let got = case.run(&backend, 64).concat();
            let got = Tensor::new(got, &candle_core::Device::Cpu).unwrap();
            assert_close(&got, &want, tolerance(&backend));
        }
    }
}

#[test]
fn chunks_steps_and_neighbours_do_not_change_a_bit_of_attention() {
    for backend in backends() {
        for case in cases() {
            let want = case.run(&backend, 64);
            assert_eq!(case.run(&backend, 7), want, "other chunks");
            for (s, &(cached, fresh)) in case.lens.iter().enumerate() {
                // The seeds hang on a sequence's place, so the others stay and their steps shrink to one token.
                let mut one = case.clone();
                one.lens = case.lens.iter().map(|&(c, f)| (c + f - 1, 1)).collect();
                one.lens[s] = (cached, fresh);
                assert_eq!(one.run(&backend, 64)[s], want[s], "other neighbours");
                one.lens.truncate(s + 1);
                assert_eq!(one.run(&backend, 64)[s], want[s], "fewer neighbours");
                one.lens[s] = (cached + fresh - 1, 1);
                let last = want[s].len() - want[s].len() / fresh;
                assert_eq!(one.run(&backend, 64)[s], want[s][last..], "decode");
            }
        }
    }
}

#[test]
fn copied_blocks_hold_what_their_sources_hold() {
    backends().iter().for_each(testing::check_copied_blocks);
}
