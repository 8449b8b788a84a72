//! Rows of a table by identifier.

use super::super::isa::multiversion;
use super::chunk_rows;
use rayon::prelude::*;

/// Row `ids[t]` of `table [V, D]` for every token: `[T, D]`.
pub(crate) fn gather(table: &[f32], width: usize, ids: &[u32]) -> Vec<f32> {
    let mut x = vec![0.0; ids.len() * width];
    let rows = chunk_rows(width);
    x.par_chunks_mut(rows * width.max(1)).zip(ids.par_chunks(rows)).for_each(|(x, ids)| {
        for (x, id) in x.chunks_exact_mut(width).zip(ids) {
            x.copy_from_slice(&table[*id as usize * width..(*id as usize + 1) * width]);
        }
    });
    x
}

/// Adds row t of `dx [T, D]` to row `ids[t]` of `d_table [V, D]`, for each row in the order of tokens.
pub(crate) fn scatter_add(dx: &[f32], width: usize, ids: &[u32], d_table: &mut [f32]) {
    /// Work items at most, however many threads there are.
    const ITEMS: usize = 64;
    let rows = d_table.len() / width.max(1);
    assert!(ids.iter().all(|id| (*id as usize) < rows), "an identifier is not below {rows}");
    let mut sorted: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(id, t)| (*id, t)).collect();
    sorted.sort_unstable();
    // A few tokens are not worth a second thread.
    let items = ids.len().div_ceil(chunk_rows(width)).clamp(1, ITEMS);
    let rows = rows.div_ceil(items).max(1);
    d_table.par_chunks_mut(rows * width.max(1)).enumerate().for_each(|(item, d_table)| {
        let first = item * rows;
        let from = sorted.partition_point(|s| (s.0 as usize) < first);
        let to = sorted.partition_point(|s| (s.0 as usize) < first + rows);
        add_rows(dx, width, &sorted[from..to], first, d_table);
    });
}

multiversion!(
    fn add_rows(dx: &[f32], width: usize, sorted: &[(u32, u32)], first: usize, d_table: &mut [f32]) = add_rows_body
);

#[inline(always)]
fn add_rows_body(dx: &[f32], width: usize, sorted: &[(u32, u32)], first: usize, d_table: &mut [f32]) {
    for (id, token) in sorted {
        let (row, token) = (*id as usize - first, *token as usize);
        let from = &dx[token * width..(token + 1) * width];
        d_table[row * width..(row + 1) * width].iter_mut().zip(from).for_each(|(d, x)| *d += x);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn rows_come_from_the_table_and_their_gradients_go_back() {
        let (vocab, width) = (11, 7);
        let ids = [3u32, 0, 3, 10, 3, 7];
        let (table, dx) = (random(vocab * width, 1), random(ids.len() * width, 2));
        let x = gather(&table, width, &ids);
        for (t, id) in ids.iter().enumerate() {
            assert_eq!(x[t * width..(t + 1) * width], table[*id as usize * width..(*id as usize + 1) * width]);
        }
        let mut d_table = vec![0.0; table.len()];
        scatter_add(&dx, width, &ids, &mut d_table);
        let loss = |table: &[f64]| {
            let row = |id: &u32| table[*id as usize * width..(*id as usize + 1) * width].to_vec();
            inner(&ids.iter().flat_map(row).collect::<Vec<_>>(), &dx)
        };
        assert_close(&d_table, &numeric_gradient(&table, loss));
    }

    #[test]
    fn gradients_are_added_to_what_is_there_with_the_same_bits_on_any_threads() {
        let (vocab, width, tokens) = (50, 300, 1000);
        let ids: Vec<u32> = (0..tokens as u32).map(|t| t * t % vocab as u32).collect();
        let (dx, before) = (random(tokens * width, 1), random(vocab * width, 2));
        let run = || {
            let mut d_table = before.clone();
            scatter_add(&dx, width, &ids, &mut d_table);
            d_table
        };
        let mut want = before.clone();
        for (t, id) in ids.iter().enumerate() {
            for i in 0..width {
                want[*id as usize * width + i] += dx[t * width + i];
            }
        }
        assert_eq!(run(), want);
        assert_same_bits_on_any_threads(run);
    }
}
