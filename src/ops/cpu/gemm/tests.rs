use super::*;
use half::bf16;
use proptest::prelude::*;

/// A factor and how it is viewed, with everything random.
#[derive(Clone, Debug)]
struct Stored {
    data: Vec<f32>,
    stored_rows: usize,
    cols: usize,
    stride: usize,
    index: Option<Vec<u32>>,
    transposed: bool,
}

impl Stored {
    fn view(&self) -> Matrix<'_> {
        let view = Matrix::new(&self.data, self.stored_rows, self.cols).strided(self.stride);
        let view = self.index.as_ref().map_or(view, |index| view.gathered(index));
        if self.transposed { view.t() } else { view }
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        let (line, position) = if self.transposed { (col, row) } else { (row, col) };
        let line = self.index.as_ref().map_or(line, |index| index[line] as usize);
        self.data[line * self.stride + position]
    }
}

fn stored(rows: usize, cols: usize, seed: u64) -> impl Strategy<Value = Stored> {
    (any::<bool>(), any::<bool>(), 0..5_usize, 1..9_usize).prop_map(move |(transposed, gathered, gap, more)| {
        let (lines, cols) = if transposed { (cols, rows) } else { (rows, cols) };
        let mut random = Random(seed);
        let stored_rows = if gathered { lines.div_ceil(2) + more } else { lines };
        let index = gathered.then(|| (0..lines).map(|_| random.next() as u32 % stored_rows as u32).collect());
        let stride = cols + gap;
        let data = random.floats(stored_rows * stride);
        Stored { data, stored_rows, cols, stride, index, transposed }
    })
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next() as f32 / (1_u64 << 30) as f32 - 1.0).collect()
    }
}

#[derive(Clone, Debug)]
struct Case {
    a: Stored,
    b: Stored,
    c: Vec<f32>,
    c_stride: usize,
    accumulate: bool,
}

impl Case {
    fn product<'a>(&'a self, c: &'a mut [f32]) -> Product<'a> {
        let product = Product::new(self.a.view(), self.b.view(), c).strided(self.c_stride);
        if self.accumulate { product.accumulate() } else { product }
    }

    fn shape(&self) -> (usize, usize, usize) {
        (self.a.view().rows(), self.a.view().cols(), self.b.view().cols())
    }

    fn compute(&self, kernel: Kernel) -> Vec<f32> {
        let mut c = self.c.clone();
        products_by(kernel, &mut [self.product(&mut c)]);
        c
    }

    /// What differs from the result in f64 by more than sums of f32 do, or was written outside of it.
    fn wrong(&self, kernel: Kernel, found: &[f32]) -> Option<String> {
        let (rows, depth, cols) = self.shape();
        let rounding = kernel != Kernel::Dense { rounding: false };
        let round = |x: f32| if rounding { bf16::from_f32(x).to_f64() } else { x.into() };
        for (at, (found, before)) in found.iter().zip(&self.c).enumerate() {
            let (row, col) = (at / self.c_stride, at % self.c_stride);
            if row >= rows || col >= cols {
                if found.to_bits() != before.to_bits() {
                    return Some(format!("{before} outside, at {row}, {col}, was overwritten with {found}"));
                }
                continue;
            }
            let before = if self.accumulate { f64::from(*before) } else { 0.0 };
            let terms = (0..depth).map(|i| round(self.a.at(row, i)) * round(self.b.at(i, col)));
            let (sum, size) = terms.fold((before, before.abs()), |(sum, size), x| (sum + x, size + x.abs()));
            let bound = (depth + 1) as f64 * f64::from(f32::EPSILON) * size + 1e-30;
            if (f64::from(*found) - sum).abs() > bound {
                return Some(format!("{found} at {row}, {col} instead of {sum}"));
            }
        }
        None
    }
}

fn case(rows: usize, depth: usize, cols: usize) -> impl Strategy<Value = Case> {
    let parts = (any::<u64>(), 0..5_usize, any::<bool>());
    parts.prop_flat_map(move |(seed, gap, accumulate)| {
        let factors = (stored(rows, depth, seed), stored(depth, cols, seed ^ 1));
        factors.prop_map(move |(a, b)| {
            let c_stride = cols + gap;
            Case { a, b, c: Random(seed ^ 2).floats(rows * c_stride), c_stride, accumulate }
        })
    })
}

fn cases() -> impl Strategy<Value = Case> {
    let side = || prop_oneof![1..200_usize, Just(32), Just(64), Just(16)];
    (side(), prop_oneof![4 => side(), 1 => 300..900_usize], side()).prop_flat_map(|(m, k, n)| case(m, k, n))
}

/// All that this machine can do.
fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![Kernel::Dense { rounding: false }, Kernel::Dense { rounding: true }];
    kernels.extend(Some(Kernel::best(Precision::Bf16)).filter(|best| *best != kernels[1]));
    kernels
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool")
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn products_are_those_of_f64_but_for_sums_in_f32(case in cases()) {
        for kernel in kernels() {
            let wrong = case.wrong(kernel, &case.compute(kernel));
            prop_assert_eq!(wrong, None, "{:?}, {:?}", kernel, case.shape());
        }
    }

    #[test]
    fn neither_threads_nor_other_products_nor_the_entry_point_change_a_bit(
        case in cases(),
        others in prop::collection::vec(cases(), 0..4),
    ) {
        let (one, two) = (pool(1), pool(2));
        let mut scratch = Scratch::default();
        for kernel in kernels() {
            let alone = bits(&one.install(|| case.compute(kernel)));
            prop_assert!(alone == bits(&two.install(|| case.compute(kernel))), "{:?}: threads", kernel);

            let mut here = case.c.clone();
            product_here_by(kernel, &mut case.product(&mut here), &mut scratch);
            prop_assert!(alone == bits(&here), "{:?}: on this thread", kernel);

            let mut results: Vec<_> = others.iter().chain([&case]).map(|case| case.c.clone()).collect();
            let all = others.iter().chain([&case]).zip(&mut results);
            let mut all: Vec<_> = all.map(|(case, c)| case.product(c)).collect();
            two.install(|| products_by(kernel, &mut all));
            prop_assert!(alone == bits(&results[others.len()]), "{:?}: among others", kernel);
        }
    }
}

#[test]
fn products_of_many_blocks_are_right_in_all_orientations_on_two_threads() {
    for (rows, depth, cols) in [(600, 40, 70), (40, 900, 50), (33, 70, 1100), (1100, 9, 1090)] {
        for orientation in 0..4 {
            let factor = |rows, cols, transposed, seed| {
                let (lines, cols) = if transposed { (cols, rows) } else { (rows, cols) };
                let data = Random(seed).floats(lines * cols);
                Stored { data, stored_rows: lines, cols, stride: cols, index: None, transposed }
            };
            let (a, b) = (factor(rows, depth, orientation & 1 > 0, 1), factor(depth, cols, orientation & 2 > 0, 2));
            let case = Case { a, b, c: vec![f32::NAN; rows * cols], c_stride: cols, accumulate: false };
            for kernel in kernels() {
                let found = pool(2).install(|| case.compute(kernel));
                assert_eq!(case.wrong(kernel, &found), None, "{kernel:?} {:?} {orientation}", case.shape());
            }
        }
    }
}

#[test]
fn a_product_over_no_positions_is_zero_and_one_without_elements_writes_nothing() {
    for kernel in kernels() {
        for (rows, depth, cols) in [(3, 0, 2), (0, 4, 2), (3, 4, 0), (0, 0, 0)] {
            for (accumulate, zeroed) in [(false, depth == 0), (true, false)] {
                let (a, b) = (vec![1.0; rows * depth], vec![1.0; depth * cols]);
                let (a, b) = (Matrix::new(&a, rows, depth), Matrix::new(&b, cols, depth).t());
                let (mut c, mut here) = (vec![7.0; rows * 5], vec![7.0; rows * 5]);
                let product = |c| {
                    let product = Product::new(a, b, c).strided(5);
                    if accumulate { product.accumulate() } else { product }
                };
                products_by(kernel, &mut [product(&mut c)]);
                product_here_by(kernel, &mut product(&mut here), &mut Scratch::default());
                let expected = (0..rows * 5).map(|i| if zeroed && i % 5 < cols { 0.0 } else { 7.0 });
                assert!(c.iter().copied().eq(expected), "{kernel:?} {rows} {depth} {cols}: {c:?}");
                assert_eq!(c, here);
            }
        }
    }
}

#[test]
fn infinities_and_nans_reach_the_results_they_belong_to_only() {
    for kernel in kernels() {
        let (mut a, b) = (vec![1.0; 40 * 50], vec![1.0; 50 * 60]);
        a[7 * 50 + 49] = f32::INFINITY;
        a[8 * 50] = f32::NAN;
        let mut c = vec![0.0; 40 * 60];
        products_by(kernel, &mut [Product::new(Matrix::new(&a, 40, 50), Matrix::new(&b, 50, 60), &mut c)]);
        for (row, c) in c.chunks(60).enumerate() {
            let right = |c: f32| match row {
                7 => c == f32::INFINITY,
                8 => c.is_nan(),
                _ => c == 50.0,
            };
            assert!(c.iter().all(|c| right(*c)), "{kernel:?}: row {row} is {c:?}");
        }
    }
}

#[test]
#[should_panic(expected = "row 3 was picked of a matrix of 3 rows")]
fn rows_outside_of_a_matrix_are_not_picked() {
    let _ = Matrix::new(&[0.0; 6], 3, 2).gathered(&[0, 3]);
}

#[test]
#[should_panic(expected = "does not fit into 6 elements")]
fn a_view_reaches_no_further_than_its_data() {
    let _ = Matrix::new(&[0.0; 6], 3, 2).strided(3);
}

#[test]
#[should_panic(expected = "a result of 3 rows")]
fn a_result_reaches_no_further_than_its_slice() {
    let _ = Product::new(Matrix::new(&[0.0; 6], 3, 2), Matrix::new(&[0.0; 4], 2, 2), &mut [0.0; 5]);
}
