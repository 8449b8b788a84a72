use super::super::testing::*;
use super::*;

fn shape(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, seq, heads, kv_heads, head_dim }
}

/// Tables for `seq` positions, cosines first.
fn tables(seq: usize, head_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    let angle = |at: usize| (at / half) as f32 * 100.0f32.powf(-((at % half) as f32) / half as f32);
    (0..seq * half).map(|at| (angle(at).cos(), angle(at).sin())).unzip()
}

fn turned(head: &[f64], position: usize, rope: Option<RopeTable<'_>>) -> Vec<f64> {
    let half = head.len() / 2;
    let Some(rope) = rope else { return head.to_vec() };
    (0..head.len())
        .map(|i| {
            let at = position * half + i % half;
            let (cos, sin) = (f64::from(rope.cos[at]), f64::from(rope.sin[at]));
            if i < half { head[i] * cos - head[i + half] * sin } else { head[i] * cos + head[i - half] * sin }
        })
        .collect()
}

fn reference(qkv: &[f64], shape: AttentionShape, rope: Option<RopeTable<'_>>) -> Vec<f64> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let head = |b: usize, s: usize, h: usize| {
        let at = (b * seq + s) * shape.qkv_width() + h * head_dim;
        &qkv[at..at + head_dim]
    };
    let mut out = Vec::new();
    for (b, s, h) in (0..batch * seq * heads).map(|i| (i / heads / seq, i / heads % seq, i % heads)) {
        let kv = h / (heads / kv_heads);
        let q = turned(head(b, s, h), s, rope);
        let weight = |j: usize| {
            let k = turned(head(b, j, heads + kv), j, rope);
            (q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = (0..=s).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let column = |i| (0..=s).map(|j| weights[j] / sum * head(b, j, heads + kv_heads + kv)[i]).sum::<f64>();
        out.extend((0..head_dim).map(column));
    }
    out
}

#[test]
fn attention_and_its_gradient_match_the_reference() {
    for (shape, with_rope) in [
        (shape(2, 5, 2, 2, 4), false),
        (shape(2, 5, 4, 2, 4), true),
        (shape(1, 19, 3, 1, 6), true),
        (shape(1, 1, 1, 1, 2), false),
    ] {
        let (cos, sin) = tables(shape.seq, shape.head_dim);
        let rope = with_rope.then_some(RopeTable { cos: &cos, sin: &sin });
        let qkv: Vec<f32> = random(shape.tokens() * shape.qkv_width(), 1).iter().map(|x| 2.0 * x).collect();
        let d_out = random(shape.tokens() * shape.out_width(), 2);
        assert_close(&attention(&qkv, shape, rope, Precision::F32), &reference(&wide(&qkv), shape, rope));
        let want = numeric_gradient(&qkv, |qkv| inner(&reference(qkv, shape, rope), &d_out));
        assert_close(&attention_backward(&qkv, &d_out, shape, rope, Precision::F32), &want);
    }
}

/// Over several blocks the reference has too many inputs to vary each: directions are taken instead.
#[test]
fn many_blocks_match_the_reference() {
    for seq in [64, 130] {
        let shape = shape(1, seq, 2, 1, 8);
        let (cos, sin) = tables(seq, 8);
        let rope = Some(RopeTable { cos: &cos, sin: &sin });
        let qkv: Vec<f32> = random(seq * shape.qkv_width(), 1).iter().map(|x| 2.0 * x).collect();
        let d_out = random(seq * shape.out_width(), 2);
        assert_close(&attention(&qkv, shape, rope, Precision::F32), &reference(&wide(&qkv), shape, rope));
        let d_qkv = attention_backward(&qkv, &d_out, shape, rope, Precision::F32);
        for seed in 0..8 {
            let direction = random(qkv.len(), 10 + seed);
            let along = |step: f64| {
                let moved: Vec<f64> =
                    qkv.iter().zip(&direction).map(|(x, d)| f64::from(*x) + step * f64::from(*d)).collect();
                inner(&reference(&moved, shape, rope), &d_out)
            };
            let want = (along(1e-5) - along(-1e-5)) / 2e-5;
            let got = inner(&wide(&d_qkv), &direction);
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got} {want}");
        }
    }
}

#[test]
fn no_position_sees_a_later_one() {
    let shape = shape(1, 70, 1, 1, 4);
    let mut qkv = random(70 * shape.qkv_width(), 1);
    let before = attention(&qkv, shape, None, Precision::F32);
    qkv[66 * shape.qkv_width()..].fill(9.0);
    let after = attention(&qkv, shape, None, Precision::F32);
    assert_eq!(before[..66 * 4], after[..66 * 4]);
    assert_ne!(before[66 * 4..], after[66 * 4..]);
}

#[test]
fn a_gradient_that_overflowed_leaves_nothing_behind() {
    let shape = shape(1, 70, 1, 1, 4);
    let (qkv, d_out) = (random(70 * shape.qkv_width(), 1), random(70 * 4, 2));
    let want = attention_backward(&qkv, &d_out, shape, None, Precision::F32);
    attention_backward(&vec![f32::NAN; qkv.len()], &d_out, shape, None, Precision::F32);
    assert_eq!(attention_backward(&qkv, &d_out, shape, None, Precision::F32), want);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let shape = shape(5, 70, 4, 2, 16);
    let (cos, sin) = tables(70, 16);
    let rope = Some(RopeTable { cos: &cos, sin: &sin });
    let qkv = random(shape.tokens() * shape.qkv_width(), 1);
    let d_out = random(shape.tokens() * shape.out_width(), 2);
    assert_same_bits_on_any_threads(|| {
        let mut all = attention(&qkv, shape, rope, Precision::F32);
        all.extend(attention_backward(&qkv, &d_out, shape, rope, Precision::F32));
        all
    });
}

#[test]
fn rounded_factors_give_nearly_the_same() {
    let shape = shape(2, 100, 4, 2, 32);
    let (cos, sin) = tables(100, 32);
    let rope = Some(RopeTable { cos: &cos, sin: &sin });
    let (qkv, d_out) = (random(shape.tokens() * shape.qkv_width(), 1), random(shape.tokens() * shape.out_width(), 2));
    let near = |a: Vec<f32>, b: Vec<f32>| {
        let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        let difference: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        assert!(square(&difference) < 1e-4 * square(&b));
    };
    let forward = |precision| attention(&qkv, shape, rope, precision);
    near(forward(Precision::Bf16), forward(Precision::F32));
    let backward = |precision| attention_backward(&qkv, &d_out, shape, rope, precision);
    near(backward(Precision::Bf16), backward(Precision::F32));
}
