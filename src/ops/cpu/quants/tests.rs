use super::*;
use crate::ops::testing::numbers;
use proptest::prelude::*;

const FORMATS: [Format; 3] = [Format::Q8_0, Format::Q4_0, Format::Q4K];

/// Largest error of a weight, as a share of the largest magnitude among those that share scales: half a step, and the
/// rounding of scales.
fn bound(format: Format) -> f32 {
    let rounded = 1.0 / 1024.0;
    match format {
        Format::Q8_0 => 0.5 / 127.0 + rounded,
        // The code 8 is cut to 7.
        Format::Q4_0 => 1.0 / 8.0 + rounded,
        // A block spans up to twice the magnitude: half a fourteenth, and as much again where the fit cuts the rarer ends;
        // 15 steps and an offset, each off by half of a 63rd.
        Format::Q4K => 2.0 * (1.0 / 14.0 + 1.0 / 126.0 + 0.5 / 126.0) + rounded,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn weights_come_back_within_half_a_step(
        outputs in 1usize..70, inputs in 1usize..600, matrices in 1usize..3, seed in 0u64..1000,
    ) {
        let values: Vec<_> = (0..matrices as u64).map(|m| numbers(seed + m, outputs * inputs)).collect();
        let hosts: Vec<_> = values.iter().map(|v| HostTensor::from_f32(&[outputs, inputs], v)).collect();
        for format in FORMATS {
            let quants = Quants::interleave(&hosts.iter().collect::<Vec<_>>(), format, None);
            let mut row = vec![0.0; inputs];
            let group = if format == Format::Q4K { SUPER * BLOCK } else { BLOCK };
            for (m, values) in values.iter().enumerate() {
                for o in 0..outputs {
                    quants.unpack_row((o / NR * matrices + m) * NR + o % NR, &mut row);
                    let want = &values[o * inputs..(o + 1) * inputs];
                    for (want, found) in want.chunks(group).zip(row.chunks(group)) {
                        let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                        for (want, found) in want.iter().zip(found) {
                            prop_assert!((want - found).abs() <= bound(format) * largest, "{} is not {}", found, want);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_of_zeros_stays_one() {
    for format in FORMATS {
        let quants = Quants::interleave(&[&HostTensor::from_f32(&[2, 40], &[0.0; 80])], format, None);
        let mut row = [1.0; 40];
        quants.unpack_row(1, &mut row);
        assert_eq!(row, [0.0; 40]);
    }
}

#[test]
fn constant_blocks_and_blocks_of_one_sign_are_kept_by_q4_k() {
    for value in [0.75, -0.75] {
        let quants = Quants::interleave(&[&HostTensor::from_f32(&[1, 64], &[value; 64])], Format::Q4K, None);
        let mut row = [0.0; 64];
        quants.unpack_row(0, &mut row);
        assert!(row.iter().all(|x| (x - value).abs() < 0.005), "{value} became {}", row[0]);
    }
}

#[test]
fn an_offset_and_a_fitted_step_err_less_than_a_scale_alone_on_weights_as_they_occur() {
    // Nearly normal: sums of uniform numbers.
    let parts: Vec<_> = (0..6).map(|seed| numbers(seed, 64 * 512)).collect();
    let weights: Vec<f32> = (0..64 * 512).map(|i| parts.iter().map(|part| part[i]).sum()).collect();
    let error = |format: Format| {
        let quants = Quants::interleave(&[&HostTensor::from_f32(&[64, 512], &weights)], format, None);
        let mut row = [0.0; 512];
        let mut sum = 0.0;
        for (o, weights) in weights.chunks(512).enumerate() {
            quants.unpack_row(o, &mut row);
            sum += row.iter().zip(weights).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        sum
    };
    let [q8_0, q4_0, q4_k] = FORMATS.map(error);
    assert!(q4_k < 0.8 * q4_0, "{q4_k} against {q4_0}");
    assert!(q8_0 < 0.05 * q4_k, "{q8_0} against {q4_k}");
}
