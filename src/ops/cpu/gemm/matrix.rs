//! What products are made of: views of f32 matrices.

use std::marker::PhantomData;

/// A view of a row-major f32 matrix, perhaps of rows picked by an index, perhaps transposed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    /// Rows and columns before transposition.
    rows: usize,
    cols: usize,
    stride: usize,
    index: Option<&'a [u32]>,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    /// `data` as `[rows, cols]`.
    ///
    /// # Panics
    /// If `data` is too short. Like every panic in this module, that is a mistake of the caller.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols, index: None, transposed: false }.strided(cols)
    }

    /// The same with rows that start `stride` elements after each other.
    ///
    /// # Panics
    /// If rows would overlap or lie outside of the data, or the view is gathered or transposed already.
    pub fn strided(self, stride: usize) -> Self {
        assert!(self.index.is_none() && !self.transposed, "the stride of a matrix is set before anything else");
        check_extent("matrix", self.data.len(), self.rows, self.cols, stride);
        Self { stride, ..self }
    }

    /// The matrix whose row `i` is row `index[i]` of this one.
    ///
    /// # Panics
    /// If an index is no row, or the view is gathered or transposed already.
    pub fn gathered(self, index: &'a [u32]) -> Self {
        assert!(self.index.is_none() && !self.transposed, "rows of a matrix are picked once, before transposition");
        let largest = index.iter().max().map_or(0, |largest| *largest as usize + 1);
        assert!(largest <= self.rows, "row {} was picked of a matrix of {} rows", largest - 1, self.rows);
        Self { rows: index.len(), index: Some(index), ..self }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    pub fn rows(&self) -> usize {
        if self.transposed { self.cols } else { self.rows }
    }

    pub fn cols(&self) -> usize {
        if self.transposed { self.rows } else { self.cols }
    }

    pub(super) fn is_transposed(&self) -> bool {
        self.transposed
    }

    pub(super) fn is_gathered(&self) -> bool {
        self.index.is_some()
    }

    /// Row `row` of the matrix before transposition; it is contiguous.
    #[inline(always)]
    pub(super) fn line(&self, row: usize) -> &'a [f32] {
        let row = self.index.map_or(row, |index| index[row] as usize);
        &self.data[row * self.stride..][..self.cols]
    }

    /// Lines and elements of one.
    pub(super) fn lines(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The element at `row`, `col` of a view that is not gathered, and what is between rows and between columns.
    pub(super) fn strides(&self, row: usize, col: usize) -> (&'a [f32], isize, isize) {
        assert!(self.index.is_none());
        let (row, col, rs, cs) = if self.transposed { (col, row, 1, self.stride) } else { (row, col, self.stride, 1) };
        (&self.data[row * self.stride + col..], rs as isize, cs as isize)
    }
}

fn check_extent(what: &str, len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(stride >= cols, "rows of a {what} of {cols} columns start {stride} elements after each other");
    let needed = if rows == 0 || cols == 0 { Some(0) } else { (rows - 1).checked_mul(stride).map(|n| n + cols) };
    assert!(
        needed.is_some_and(|needed| needed <= len),
        "a {what} of {rows} rows, {stride} elements apart, and {cols} columns does not fit into {len} elements"
    );
}

/// One product: `c [m, n] = a [m, k] · b [k, n]`, or `c += a · b`.
#[derive(Debug)]
pub struct Product<'a> {
    pub(super) a: Matrix<'a>,
    pub(super) b: Matrix<'a>,
    c: &'a mut [f32],
    c_stride: usize,
    accumulate: bool,
}

impl<'a> Product<'a> {
    /// `c [m, n] = a [m, k] · b [k, n]`.
    ///
    /// # Panics
    /// If shapes don't fit.
    pub fn new(a: Matrix<'a>, b: Matrix<'a>, c: &'a mut [f32]) -> Self {
        assert_eq!(a.cols(), b.rows(), "columns of the left factor, rows of the right one");
        let c_stride = b.cols();
        Self { a, b, c, c_stride, accumulate: false }.strided(c_stride)
    }

    /// The same with rows of `c` that start `c_stride` elements after each other; what is between them is kept.
    ///
    /// # Panics
    /// If rows would overlap or lie outside of `c`.
    pub fn strided(self, c_stride: usize) -> Self {
        check_extent("result", self.c.len(), self.a.rows(), self.b.cols(), c_stride);
        Self { c_stride, ..self }
    }

    /// The same, adding to what `c` holds.
    pub fn accumulate(self) -> Self {
        Self { accumulate: true, ..self }
    }

    /// Whether there is anything to multiply. A product of no elements is written here.
    pub(super) fn begin(&mut self) -> bool {
        let (rows, cols) = (self.a.rows(), self.b.cols());
        if rows > 0 && cols > 0 && self.a.cols() == 0 && !self.accumulate {
            self.c.chunks_mut(self.c_stride).take(rows).for_each(|row| row[..cols].fill(0.0));
        }
        self.flops() > 0
    }

    pub(super) fn flops(&self) -> usize {
        2 * self.a.rows() * self.a.cols() * self.b.cols()
    }

    /// The result, for work items that write disjoint parts of it.
    pub(super) fn out(&mut self) -> Out<'_> {
        Out {
            start: self.c.as_mut_ptr(),
            stride: self.c_stride,
            rows: self.a.rows(),
            cols: self.b.cols(),
            accumulate: self.accumulate,
            lifetime: PhantomData,
        }
    }
}

/// The result of a product, which work items write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Out<'a> {
    start: *mut f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) accumulate: bool,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: work items write disjoint parts only; see `Out::at`.
unsafe impl Send for Out<'_> {}
// SAFETY: as above.
unsafe impl Sync for Out<'_> {}

impl Out<'_> {
    /// Where the element at `row`, `col` is. Who writes there must be the only work item that does.
    #[inline(always)]
    pub(super) fn at(self, row: usize, col: usize) -> *mut f32 {
        assert!(row < self.rows && col < self.cols);
        // SAFETY: `Product::strided` found every element within the slice.
        unsafe { self.start.add(row * self.stride + col) }
    }
}
