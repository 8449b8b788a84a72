use super::*;
use crate::ops::HostTensor;
use crate::ops::cpu::pack::{BLOCK, Packing};
use crate::ops::reference;
use crate::ops::testing::{assert_close, exact, numbers, weights};
use crate::types::WeightFormat;
use candle_core::DType;
use proptest::prelude::*;

/// The product as every instruction set of this machine computes it, best first.
fn products(x: &[f32], w: &PackedMatrix) -> Vec<Vec<f32>> {
    let compute = |isa| {
        let mut y = vec![f32::NAN; x.len() / w.inputs() * w.outputs()];
        matmul_on(isa, x, w, &mut y);
        y
    };
    Isa::available().into_iter().map(compute).collect()
}

fn packing(format: WeightFormat) -> Packing {
    Packing { format, ..DType::BF16.into() }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_instruction_set_agrees_with_the_reference(
        m in 1usize..80, i in 1usize..100, o in 1usize..140, seed in 0u64..1000
    ) {
        let w = weights(seed, o, i);
        let x = exact(seed + 7, m * i);
        let want = reference::linear(&x, &w.to_f32(), i, o);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for y in products(&x, &PackedMatrix::pack(&w, &dtype.into())) {
                assert_close(&y, &want, 1e-5);
            }
        }
    }

    #[test]
    fn with_weights_of_16_bits_or_less_all_instruction_sets_agree_to_the_bit(
        m in prop_oneof![1usize..6, 1usize..80], i in 1usize..300, o in 1usize..140, seed in 0u64..1000
    ) {
        let (host, x) = (HostTensor::from_f32(&[o, i], &numbers(seed, o * i)), numbers(seed + 7, m * i));
        for packing in [WeightFormat::Plain, WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4K].map(packing) {
            let all = products(&x, &PackedMatrix::pack(&host, &packing));
            for other in &all {
                prop_assert!(bits(&all[0]) == bits(other), "{:?}", packing);
            }
        }
    }

    #[test]
    fn products_with_quantised_weights_are_those_with_what_they_and_rounded_rows_stand_for(
        m in prop_oneof![1usize..6, 1usize..40], i in 1usize..600, o in 1usize..140, seed in 0u64..1000
    ) {
        let x = numbers(seed + 7, m * i);
        // What eight bits make of rows, block by block.
        let rounded = x.chunks(i).flat_map(|row| row.chunks(BLOCK)).flat_map(|block| {
            let scale = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0;
            block.iter().map(move |x| if scale == 0.0 { 0.0 } else { (x / scale).round() * scale })
        });
        let rounded: Vec<f32> = rounded.collect();
        for format in [WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4K] {
            let w = PackedMatrix::pack(&HostTensor::from_f32(&[o, i], &numbers(seed, o * i)), &packing(format));
            let mut unpacked = vec![0.0; o * i];
            unpacked.chunks_exact_mut(i).enumerate().for_each(|(row, out)| w.unpack_row(row, out));
            let want = reference::linear(&rounded, &unpacked, i, o);
            let scale = want.iter().fold(1.0f32, |largest, y| largest.max(y.abs()));
            for (found, want) in products(&x, &w)[0].iter().zip(&want) {
                // A number half way between two codes may go either way.
                prop_assert!((found - want).abs() <= 0.01 * scale, "{:?}: {} is not {}", format, found, want);
            }
        }
    }
}

#[test]
fn many_rows_and_deep_products_agree_to_the_bit_and_with_the_reference() {
    for (m, i, o) in [(1, 1100, 40), (17, 600, 33), (33, 1056, 64), (300, 520, 70), (257, 1030, 31)] {
        let x = exact(1, m * i);
        let host = weights(2, o, i);
        let w = PackedMatrix::pack(&host, &DType::BF16.into());
        let all = products(&x, &w);
        assert_close(&all[0], &reference::linear(&x, &host.to_f32(), i, o), 1e-5);
        for other in &all {
            assert!(bits(&all[0]) == bits(other), "{m} rows of {i} inputs, {o} outputs");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    let (m, i, o) = (40, 64, 33);
    let mut x = exact(1, m * i);
    x[7 * i + 3] = f32::NAN;
    x[9 * i] = f32::INFINITY;
    let ones = HostTensor::from_f32(&[o, i], &vec![1.0; o * i]);
    for format in [WeightFormat::Plain, WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4K] {
        for y in products(&x, &PackedMatrix::pack(&ones, &packing(format))) {
            for (row, y) in y.chunks(o).enumerate() {
                let right = |y: f32| match row {
                    7 => y.is_nan(),
                    // Eight bits have no infinity.
                    9 => {
                        if format == WeightFormat::Plain {
                            y == f32::INFINITY
                        } else {
                            y.is_nan()
                        }
                    }
                    _ => y.is_finite(),
                };
                assert!(y.iter().all(|y| right(*y)), "{format:?}, row {row}: {y:?}");
            }
        }
    }
}
