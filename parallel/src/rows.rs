//! Partition of a weight's rows over ranks.

use std::ops::Range;

/// Returns the rows, of `rows`, that rank `rank` of `ranks` owns.
///
/// Ranks own consecutive rows in the order of their numbers; the last ranks may own fewer or none.
pub fn own_rows(rows: i64, rank: usize, ranks: usize) -> Range<i64> {
    let rank = rank as i64;
    let ranks = ranks as i64;
    let per_rank = (rows + ranks - 1) / ranks;
    let start = per_rank * rank;
    let end = per_rank * (rank + 1);
    start.min(rows)..end.min(rows)
}

/// Returns the rows and columns of a weight as a matrix: the columns are its last dimension.
///
/// A vector is one column.
pub fn matrix_shape(shape: &[i64]) -> (i64, i64) {
    match shape {
        [] => (1, 1),
        [len] => (*len, 1),
        [rows @ .., cols] => (rows.iter().product(), *cols),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_row_has_one_rank_and_the_first_has_the_most(
            rows in 0i64..100,
            ranks in 1usize..17,
        ) {
            let parts: Vec<_> = (0..ranks)
                .map(|rank| own_rows(rows, rank, ranks))
                .collect();
            let all: Vec<i64> = parts
                .iter()
                .flat_map(Clone::clone)
                .collect();
            prop_assert_eq!(all, (0..rows).collect::<Vec<_>>());
            let most = parts[0].end;
            prop_assert!(
                parts
                    .iter()
                    .all(|part| part.end - part.start <= most)
            );
        }
    }
}
