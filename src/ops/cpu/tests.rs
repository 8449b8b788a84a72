//! Every kernel against the reference, over ragged shapes.

use super::*;
use crate::ops::testing::{
    ACTIVATIONS, assert_close, check_copied_blocks, exact, experts_of, net_of, numbers, routed, weights,
};
use crate::ops::{Backend, FeedForward, HostTensor, KvCache, KvShape, Linear, Norm, Segment, StepLayout};
use crate::ops::{attention as attend, reference};
use crate::types::{Activation, BlockId};
use candle_core::DType;
use proptest::prelude::*;

fn host_f32(x: &Tensor) -> Result<Vec<f32>> {
    with_f32(x, <[f32]>::to_vec)
}

fn tensor(values: Vec<f32>, rows: usize) -> Tensor {
    let width = values.len() / rows.max(1);
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)]
}

/// How far results may be off a reference that does not round: with weights of bf16, h is rounded to 8 bits before the
/// last projection.
fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::BF16 { 1e-2 } else { 1e-5 }
}

/// Activations, with and without biases.
fn kinds() -> impl Strategy<Value = (Activation, bool)> {
    (proptest::sample::select(ACTIVATIONS.to_vec()), any::<bool>())
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
        masks in proptest::collection::vec(1u8..32, 1..20), d in 1usize..70, f in 1usize..70, kind in kinds(),
        dtype in dtypes(), seed in 0u64..1000,
    ) {
        let (experts, plain) = experts_of(seed, 5, (d, f), kind, &Backend::cpu(dtype));
        let x = exact(seed + 99, masks.len() * d);
        let routing = routed(&masks, 5);
        let y = experts.forward(&tensor(x.clone(), masks.len()), &routing).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::experts(&x, &plain, &routing, d, f), tolerance(dtype));
    }

    #[test]
    fn one_net_for_all_agrees_with_the_reference_and_with_its_rows_alone(
        t in 1usize..60, d in 1usize..70, f in 1usize..70, kind in kinds(), dtype in dtypes(), seed in 0u64..1000,
    ) {
        let (host, plain) = net_of(seed, (d, f), kind);
        let net = FeedForward::new(&host, kind.0, &Backend::cpu(dtype)).unwrap();
        let x = exact(seed + 99, t * d);
        let y = host_f32(&net.forward(&tensor(x.clone(), t)).unwrap()).unwrap();
        assert_close(&y, &reference::feed_forward(&x, &plain, d, f), tolerance(dtype));
        for row in [0, t / 2, t - 1].map(|row| row * d..(row + 1) * d) {
            let alone = net.forward(&tensor(x[row.clone()].to_vec(), 1)).unwrap();
            prop_assert_eq!(&host_f32(&alone).unwrap()[..], &y[row]);
        }
    }

    #[test]
    fn layer_norms_agree_with_the_reference_and_with_their_rows_alone(
        rows in 1usize..6, width in 1usize..100, shift in -50.0f32..50.0, seed in 0u64..1000,
    ) {
        let x: Vec<f32> = numbers(seed, rows * width).iter().map(|x| x + shift).collect();
        let (weight, bias) = (numbers(seed + 1, width), numbers(seed + 2, width));
        let host = |values: &[f32]| HostTensor::from_f32(&[width], values);
        let norm = Norm::layer(&host(&weight), &host(&bias), 1e-3, &Backend::cpu(DType::F32)).unwrap();
        let y = host_f32(&norm.forward(&tensor(x.clone(), rows)).unwrap()).unwrap();
        assert_close(&y, &reference::layer_norm(&x, &weight, &bias, 1e-3), 1e-4);
        for row in (0..rows).map(|row| row * width..(row + 1) * width) {
            let alone = norm.forward(&tensor(x[row.clone()].to_vec(), 1)).unwrap();
            prop_assert_eq!(&host_f32(&alone).unwrap()[..], &y[row]);
        }
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
        let (mut out, mut entropy, mut entropy_t) = (Vec::new(), Vec::new(), Vec::new());
        for (start, len) in [(0, cached), (cached, fresh)] {
            if len == 0 {
                continue;
            }
            let step = StepLayout::new(vec![Segment { start, len, blocks: blocks.clone() }], &kv, &backend).unwrap();
            let at = first_row + start;
            let (q, k, v) = (rows(&q, heads * hd, at, len), rows(&k, kv_width, at, len), rows(&v, kv_width, at, len));
            let y = attend([&q, &k, &v], 1, window, &mut kv, &step, Some(&mut entropy_t)).unwrap();
            out.extend(host_f32(&y).unwrap());
            entropy.extend_from_slice(&entropy_t);
        }
        assert_eq!(entropy.len(), cached + fresh);
        for t in 0..cached + fresh {
            let from = window.map_or(0, |w| (t + 1).saturating_sub(w));
            let mut entropies = 0.0;
            for h in 0..heads {
                let part = |x: &'_ [f32], t: usize| -> Vec<f32> {
                    let at = (first_row + t) * kv_width + h / group * hd;
                    x[at..at + hd].to_vec()
                };
                let keys: Vec<Vec<f32>> = (from..=t).map(|t| part(&k, t)).collect();
                let values: Vec<Vec<f32>> = (from..=t).map(|t| part(&v, t)).collect();
                let at = ((first_row + t) * heads + h) * hd;
                let keys: Vec<_> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<_> = values.iter().map(Vec::as_slice).collect();
                let (q, scale) = (&q[at..at + hd], 1.0 / (hd as f32).sqrt());
                let want = reference::attend(q, &keys, &values, scale);
                assert_close(&out[(t * heads + h) * hd..(t * heads + h + 1) * hd], &want, 1e-5);
                entropies += reference::entropy(&reference::attention_weights(q, &keys, scale));
            }
            assert_close(&entropy[t..=t], &[(entropies / heads as f64) as f32], 1e-5);
        }
        first_row += cached + fresh;
    }
}

#[test]
fn grouped_experts_handle_one_row_and_all_rows_on_one_expert() {
    let backend = Backend::cpu(DType::F32);
    for masks in [vec![0b100u8], vec![0b010; 50], vec![0b111; 3]] {
        let (experts, plain) = experts_of(1, 3, (33, 65), (Activation::Gelu, true), &backend);
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
    let x = exact(9, m * d);
    for kind in [(Activation::Swiglu, false), (Activation::Relu, true)] {
        let (host, plain) = net_of(1, (d, f), kind);
        let net = FeedForward::new(&host, kind.0, &Backend::cpu(DType::F32)).unwrap();
        let y = net.forward(&tensor(x.clone(), m)).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::feed_forward(&x, &plain, d, f), 1e-5);
    }
}

#[test]
fn projections_of_the_same_rows_together_are_those_alone() {
    let (i, widths) = (70, [200, 33, 1]);
    let bias = HostTensor::from_f32(&[33], &numbers(5, 33));
    for dtype in [DType::F32, DType::BF16] {
        let linear =
            |o: usize| Linear::new(&weights(o as u64, o, i), (o == 33).then_some(&bias), &Backend::cpu(dtype)).unwrap();
        let linears = widths.map(linear);
        for rows in [1, 7, 300] {
            let x = tensor(numbers(8, rows * i), rows);
            let together = Linear::forward_all(linears.each_ref(), &x).unwrap();
            for (linear, y) in linears.iter().zip(together) {
                let alone = host_f32(&linear.forward(&x).unwrap()).unwrap();
                assert_eq!(host_f32(&y).unwrap(), alone, "{dtype:?}, {rows} rows, {:?}", y.shape());
            }
        }
    }
}

#[test]
fn norms_agree_with_the_reference_on_rows_and_heads() {
    for (rows, heads, width) in [(3, 1, 100), (5, 4, 24), (1, 1, 1)] {
        let x = numbers(1, rows * heads * width);
        let weight = numbers(2, width);
        let norm = Norm::rms(&HostTensor::from_f32(&[width], &weight), 1e-6, &Backend::cpu(DType::F32)).unwrap();
        let y = norm.forward(&tensor(x.clone(), rows)).unwrap();
        assert_close(&host_f32(&y).unwrap(), &reference::rms_norm(&x, &weight, 1e-6), 1e-6);
    }
}

#[test]
fn elementwise_arithmetic_is_that_of_every_element_however_many_there_are() {
    for (rows, width) in [(1, 3), (7, 40), (300, 1000)] {
        let (x, y) = (exact(1, rows * width), exact(2, rows * width));
        let sum = crate::ops::add(&tensor(x.clone(), rows), &tensor(y.clone(), rows)).unwrap();
        assert!(host_f32(&sum).unwrap().into_iter().eq(x.iter().zip(&y).map(|(x, y)| x + y)));
        let clipped = crate::ops::clip(&tensor(x.clone(), rows), 0.25).unwrap();
        assert!(host_f32(&clipped).unwrap().into_iter().eq(x.iter().map(|x| x.clamp(-0.25, 0.25))));
        let (w, bias) = (weights(3, 50, width), HostTensor::from_f32(&[50], &exact(4, 50)));
        let backend = Backend::cpu(DType::F32);
        let [with, without] = [Some(&bias), None].map(|bias| {
            host_f32(&Linear::new(&w, bias, &backend).unwrap().forward(&tensor(x.clone(), rows)).unwrap()).unwrap()
        });
        let bias = bias.to_f32();
        assert!(with.into_iter().eq(without.iter().zip(bias.iter().cycle()).map(|(y, b)| y + b)));
    }
    assert!(crate::ops::add(&tensor(vec![0.0; 6], 2), &tensor(vec![0.0; 6], 3)).is_err());
}

#[test]
fn packed_rows_come_back_as_they_were() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let w = weights(1, 45, 37);
        let packed = PackedMatrix::pack(&w, &dtype.into());
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
/// The step of `segments` over a cache of `shape`.
fn layout(segments: Vec<Segment>, shape: KvShape) -> StepLayout {
    let backend = Backend::cpu(DType::F32);
    StepLayout::new(segments, &KvCache::new(shape, &backend).unwrap(), &backend).unwrap()
}

/// What attention gave to a sequence: `[T, heads·hd]`, and `[T]` where entropies were asked for.
#[derive(Clone, Debug, Default, PartialEq)]
struct Attended {
    out: Vec<f32>,
    entropy_t: Vec<f32>,
}

/// Sequences of random keys and values in scattered blocks, and queries for all their tokens.
struct Sequences {
    shape: KvShape,
    group: usize,
    window: Option<usize>,
    entropies: bool,
    blocks: Vec<Vec<BlockId>>,
    lens: Vec<usize>,
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

impl Sequences {
    fn new(lens: &[usize], group: usize, kv_heads: usize, head_dim: usize, block_size: usize, seed: u64) -> Self {
        let count: usize = lens.iter().map(|len| len.div_ceil(block_size)).sum();
        // Blocks of all sequences take turns, from the last one down.
        let mut blocks: Vec<Vec<BlockId>> = vec![Vec::new(); lens.len()];
        let mut free = (0..count as u32).rev().map(BlockId);
        for turn in 0..count {
            for (blocks, _) in blocks.iter_mut().zip(lens).filter(|(_, len)| turn * block_size < **len) {
                blocks.extend(free.next());
            }
        }
        let rows = |seed: u64, width: usize| -> Vec<Vec<f32>> {
            lens.iter().enumerate().map(|(i, len)| exact(seed + 10 * i as u64, len * width)).collect()
        };
        let width = kv_heads * head_dim;
        Self {
            shape: KvShape { layers: 2, blocks: count, block_size, kv_heads, head_dim },
            group,
            window: None,
            entropies: true,
            blocks,
            lens: lens.to_vec(),
            // Large enough for some weights to vanish.
            q: rows(seed, width * group).into_iter().map(|q| q.iter().map(|x| 8.0 * x).collect()).collect(),
            k: rows(seed + 1, width),
            v: rows(seed + 2, width),
        }
    }

    /// The results of every sequence; a step takes from each the next of its parts, in turn.
    fn run(&self, isa: isa::Isa, dtype: DType, parts: &[Vec<usize>]) -> Vec<Attended> {
        let mut store = KvStore::new_for(isa, &self.shape, dtype);
        let kv_width = self.shape.kv_heads * self.shape.head_dim;
        let (mut done, mut out) = (vec![0; parts.len()], vec![Attended::default(); parts.len()]);
        for turn in 0..parts.iter().map(Vec::len).max().unwrap_or(0) {
            let (mut segments, mut rows) = (Vec::new(), Vec::new());
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for (i, parts) in parts.iter().enumerate() {
                let Some(&len) = parts.get(turn) else { continue };
                let start = done[i];
                done[i] += len;
                segments.push(Segment { start, len, blocks: self.blocks[i].clone() });
                rows.push((i, len));
                let part = |x: &[f32], width: usize| x[start * width..(start + len) * width].to_vec();
                q.extend(part(&self.q[i], kv_width * self.group));
                k.extend(part(&self.k[i], kv_width));
                v.extend(part(&self.v[i], kv_width));
            }
            let step = layout(segments, self.shape);
            store.write(1, &k, &v, &step);
            let mut entropy_t = Vec::new();
            let y = store.attend_on(isa, 1, &q, &step, self.window, self.entropies.then_some(&mut entropy_t));
            let (mut y, mut entropy_t) = (y.as_slice(), entropy_t.as_slice());
            for (i, len) in rows {
                out[i].out.extend_from_slice(y.split_off(..len * kv_width * self.group).unwrap());
                out[i].entropy_t.extend_from_slice(entropy_t.split_off(..len.min(entropy_t.len())).unwrap());
            }
        }
        out
    }

    /// Every sequence as one part.
    fn whole(&self, isa: isa::Isa, dtype: DType) -> Vec<Attended> {
        self.run(isa, dtype, &self.lens.iter().map(|len| vec![*len]).collect::<Vec<_>>())
    }

    /// What the reference computes for sequence `i`.
    fn want(&self, i: usize) -> Attended {
        let (hd, kv_heads) = (self.shape.head_dim, self.shape.kv_heads);
        let (mut out, mut entropies) = (Vec::new(), Vec::new());
        for (row, q) in self.q[i].chunks_exact(hd).enumerate() {
            let (t, head) = (row / (kv_heads * self.group), row % (kv_heads * self.group) / self.group);
            let from = self.window.map_or(0, |w| (t + 1).saturating_sub(w));
            let part = |x: &'_ [f32], t: usize| x[(t * kv_heads + head) * hd..][..hd].to_vec();
            let keys: Vec<Vec<f32>> = (from..=t).map(|t| part(&self.k[i], t)).collect();
            let values: Vec<Vec<f32>> = (from..=t).map(|t| part(&self.v[i], t)).collect();
            let keys: Vec<_> = keys.iter().map(Vec::as_slice).collect();
            let values: Vec<_> = values.iter().map(Vec::as_slice).collect();
            let scale = 1.0 / (hd as f32).sqrt();
            out.extend(reference::attend(q, &keys, &values, scale));
            entropies.push(reference::entropy(&reference::attention_weights(q, &keys, scale)));
        }
        let tokens = entropies.chunks_exact(kv_heads * self.group);
        Attended { out, entropy_t: tokens.map(|h| (h.iter().sum::<f64>() / h.len() as f64) as f32).collect() }
    }
}

/// Cuts `len` tokens into parts of the sizes that `sizes` gives in turn.
fn cut(len: usize, sizes: &[usize]) -> Vec<usize> {
    let mut left = len;
    let parts = sizes.iter().cycle().map_while(|size| {
        let part = left.min(*size);
        left -= part;
        (part > 0).then_some(part)
    });
    parts.collect()
}

fn head_dims() -> impl Strategy<Value = usize> {
    proptest::sample::select(vec![2, 8, 12, 16, 32, 64, 80, 128])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_of_every_instruction_set_agrees_with_the_reference(
        lens in proptest::collection::vec(1usize..150, 1..4), group in 1usize..9, kv_heads in 1usize..3,
        hd in head_dims(), block_size in proptest::sample::select(vec![4, 5, 16, 32, 128]),
        window in proptest::option::of(1usize..100), dtype in dtypes(), seed in 0u64..1000,
    ) {
        let sequences = Sequences { window, ..Sequences::new(&lens, group, kv_heads, hd, block_size, seed) };
        for isa in isa::Isa::available() {
            for (i, got) in sequences.whole(isa, dtype).iter().enumerate() {
                let want = sequences.want(i);
                // In pairs, weights are rounded to bf16.
                let pairs = dtype == DType::BF16 && attention_kernel::takes_pairs(isa, hd, block_size);
                assert_close(&got.out, &want.out, if pairs { 2e-3 } else { 1e-5 });
                assert_close(&got.entropy_t, &want.entropy_t, 1e-5);
                prop_assert!(got.entropy_t.iter().all(|h| *h >= 0.0), "{isa:?}");
            }
        }
    }

    #[test]
    fn asking_for_entropies_changes_no_bit_of_attention(
        lens in proptest::collection::vec(1usize..150, 1..4), group in 1usize..9, kv_heads in 1usize..3,
        hd in head_dims(), window in proptest::option::of(1usize..100), dtype in dtypes(), seed in 0u64..1000,
    ) {
        let asked = Sequences { window, ..Sequences::new(&lens, group, kv_heads, hd, 16, seed) };
        let unasked = Sequences { window, entropies: false, ..Sequences::new(&lens, group, kv_heads, hd, 16, seed) };
        for isa in isa::Isa::available() {
            for (asked, unasked) in asked.whole(isa, dtype).iter().zip(unasked.whole(isa, dtype)) {
                prop_assert!(asked.out == unasked.out, "{isa:?}");
                prop_assert!(unasked.entropy_t.is_empty());
            }
        }
    }

    #[test]
    fn attention_of_a_token_does_not_depend_on_the_tokens_beside_it(
        lens in proptest::collection::vec(1usize..150, 1..4), group in 1usize..9, kv_heads in 1usize..3,
        hd in head_dims(), block_size in proptest::sample::select(vec![4, 16]),
        window in proptest::option::of(1usize..100), dtype in dtypes(), seed in 0u64..1000,
        sizes in proptest::collection::vec(1usize..70, 1..4),
    ) {
        let sequences = Sequences { window, ..Sequences::new(&lens, group, kv_heads, hd, block_size, seed) };
        for isa in isa::Isa::available() {
            let whole = sequences.whole(isa, dtype);
            for sizes in [&sizes[..], &[1]] {
                let parts: Vec<_> = lens.iter().map(|len| cut(*len, sizes)).collect();
                prop_assert!(sequences.run(isa, dtype, &parts) == whole, "{isa:?} in parts of {sizes:?}");
            }
        }
    }

    #[test]
    fn attention_does_not_see_what_comes_later_nor_other_sequences(
        len in 2usize..150, share in 0.0f64..1.0, group in 1usize..6, hd in head_dims(),
        block_size in proptest::sample::select(vec![4, 16]), window in proptest::option::of(1usize..100),
        bad in proptest::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]), dtype in dtypes(),
        seed in 0u64..1000,
    ) {
        let first_bad = 1 + ((len - 1) as f64 * share) as usize;
        let sequences = Sequences { window, ..Sequences::new(&[len, 40], group, 1, hd, block_size, seed) };
        let mut spoiled = Sequences { window, ..Sequences::new(&[len, 40], group, 1, hd, block_size, seed) };
        for x in [&mut spoiled.k, &mut spoiled.v] {
            x[0][first_bad * hd..].fill(bad);
            x[1].fill(bad);
        }
        for isa in isa::Isa::available() {
            let (good, spoiled) = (sequences.whole(isa, dtype), spoiled.whole(isa, dtype));
            let upto = first_bad * group * hd;
            let (good, spoiled) = (&good[0], &spoiled[0]);
            prop_assert!(good.out[..upto] == spoiled.out[..upto], "{isa:?}");
            prop_assert!(good.entropy_t[..first_bad] == spoiled.entropy_t[..first_bad], "{isa:?}");
            prop_assert!(spoiled.out[upto..].iter().all(|x| !x.is_finite()));
        }
    }
}

#[test]
fn attention_on_all_threads_agrees_with_attention_on_one() {
    // Enough work for a parallel region only where all tokens are in one step.
    let sequences = Sequences::new(&[300, 40], 3, 2, 32, 16, 5);
    let alone: Vec<_> = sequences.lens.iter().map(|len| vec![1; *len]).collect();
    let isa = isa::Isa::get();
    assert!(sequences.whole(isa, DType::BF16) == sequences.run(isa, DType::BF16, &alone));
}

#[test]
fn attention_to_one_position_gives_back_its_value() {
    let (hd, bits) = (128, 0..=u16::MAX);
    let values: Vec<f32> = bits.map(|bits| half::f16::from_bits(bits).to_f32()).filter(|x| !x.is_nan()).collect();
    let tokens = values.len() / hd;
    let values = &values[..tokens * hd];
    let shape = KvShape { layers: 1, blocks: tokens, block_size: 4, kv_heads: 1, head_dim: hd };
    let mut store = KvStore::new(&shape, DType::F16);
    let segments = (0..tokens as u32).map(|i| Segment { start: 0, len: 1, blocks: vec![BlockId(i)] });
    let step = layout(segments.collect(), shape);
    let zeros = vec![0.0; values.len()];
    store.write(0, &zeros, values, &step);
    let mut entropy_t = Vec::new();
    assert_eq!(store.attend(0, &zeros, &step, None, Some(&mut entropy_t)), values);
    assert_eq!(entropy_t, vec![0.0; tokens]);
}

/// Entropy of the last of the tokens whose scores, on one head, are `scores`.
fn entropy_of_last(isa: isa::Isa, scores: &[f32], window: Option<usize>) -> f32 {
    let tokens = scores.len();
    let shape = KvShape { layers: 1, blocks: tokens.div_ceil(16), block_size: 16, kv_heads: 1, head_dim: 1 };
    let blocks: Vec<_> = (0..shape.blocks as u32).map(BlockId).collect();
    let mut store = KvStore::new(&shape, DType::F32);
    let all = Segment { start: 0, len: tokens, blocks: blocks.clone() };
    store.write(0, scores, scores, &layout(vec![all], shape));
    let last = layout(vec![Segment { start: tokens - 1, len: 1, blocks }], shape);
    let mut entropy_t = Vec::new();
    store.attend_on(isa, 0, &[1.0], &last, window, Some(&mut entropy_t));
    entropy_t[0]
}

#[test]
fn entropy_of_equal_scores_is_the_logarithm_of_their_number() {
    for isa in isa::Isa::available() {
        for score in [0.0, -3.0, 1000.0] {
            for n in [1, 2, 15, 16, 17, 64, 65, 1000, 40_000] {
                assert_eq!(
                    entropy_of_last(isa, &vec![score; n], None),
                    (n as f32).ln(),
                    "{isa:?}, {n} scores of {score}"
                );
                let window = entropy_of_last(isa, &vec![score; n], Some(100));
                assert_eq!(window, (n.min(100) as f32).ln(), "{isa:?}, the last 100 of {n} scores of {score}");
            }
        }
    }
}

#[test]
fn entropy_of_a_long_context_survives_any_course_of_the_largest_score() {
    let n = 40_000;
    let noise = numbers(1, n);
    // Rising, falling, wavering, and with steps so high that all before them vanishes.
    let courses: [fn(usize) -> f32; 5] = [
        |i| i as f32 * 1e-3,
        |i| i as f32 * -1e-3,
        |i| 5.0 * (i as f32 * 1e-3).sin(),
        |i| (i / 10_000) as f32 * 200.0,
        |i| if i == 20_000 { 300.0 } else { 0.0 },
    ];
    for (course, seen) in courses.iter().zip(["rising", "falling", "wavering", "steps", "one"]) {
        let scores: Vec<f32> = (0..n).map(|i| course(i) + noise[i]).collect();
        let keys: Vec<&[f32]> = scores.chunks(1).collect();
        let want = reference::entropy(&reference::attention_weights(&[1.0], &keys, 1.0)) as f32;
        for isa in isa::Isa::available() {
            let got = entropy_of_last(isa, &scores, None);
            assert!((got - want).abs() <= 1e-4, "{isa:?}, {seen}: {got} is not {want}");
        }
    }
}

#[test]
fn exponentials_are_close_exact_at_0_and_gone_below_the_normal_numbers() {
    for fused in [false, true] {
        let exp2 = |x: f32| attention_kernel::exp2(fused, x);
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-0.0), 1.0);
        assert_eq!((exp2(-126.01), exp2(-3e38), exp2(f32::NEG_INFINITY)), (0.0, 0.0, 0.0));
        assert!(exp2(f32::NAN).is_nan());
        for x in (0..=1_260_000).map(|i| i as f32 * -1e-4) {
            let want = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) - want).abs() <= 2e-7 * want, "2^{x} is not {}", exp2(x));
        }
    }
}
