//! The constraint on the next token: a pure state machine over ids (`inference_solver.py`).

use coar_core::tokenizer::Vocabulary;

/// The tokens that may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Outside images and for the two size tokens nothing is masked.
    Any,
    /// One of the image codes.
    Code,
    /// This id only.
    Forced(i64),
}

/// Position of the image start that is still open.
fn open_image(vocabulary: &Vocabulary, ids: &[i64]) -> Option<usize> {
    let count = |id: i64| ids.iter().filter(|&&other| other == id).count();
    let (starts, ends) = (count(vocabulary.image_start()), count(vocabulary.image_end()));
    if starts == ends + 1 {
        ids.iter().rposition(|&id| id == vocabulary.image_start())
    } else {
        None
    }
}

/// Whether an image is open: the image's top-k applies then, to the size tokens too.
pub fn image_is_open(vocabulary: &Vocabulary, ids: &[i64]) -> bool {
    open_image(vocabulary, ids).is_some()
}

/// The constraint on the token after `ids`.
pub fn next(vocabulary: &Vocabulary, ids: &[i64]) -> Next {
    let Some(start) = open_image(vocabulary, ids) else {
        return Next::Any;
    };
    let [height, width, drawn @ ..] = &ids[start + 1..] else {
        return Next::Any;
    };
    let (Some(h), Some(w)) = (vocabulary.grids_of_id(*height), vocabulary.grids_of_id(*width)) else {
        return Next::Any;
    };
    let (row, place) = (2 * w as usize + 1, drawn.len() + 1);
    if place == row * 2 * h as usize + 1 {
        Next::Forced(vocabulary.image_end())
    } else if place.is_multiple_of(row) {
        Next::Forced(vocabulary.row_end())
    } else {
        Next::Code
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coar_core::tokenizer::{CONTROL_NAMES, code_name, grid_name};
    use std::collections::BTreeMap;

    #[test]
    fn grammar_covers_a_whole_image_and_restarts() {
        let names: BTreeMap<String, i64> = CONTROL_NAMES
            .map(str::to_owned)
            .into_iter()
            .chain([grid_name(1), grid_name(2), code_name(0), code_name(1)])
            .zip(0..)
            .collect();
        let vocabulary = Vocabulary::from_names(&names).unwrap();
        let (start, end, row_end, one, two, code) = (3, 2, 5, 6, 7, 8);
        for (height, width, h, w) in [(one, two, 2, 4), (two, one, 4, 2)] {
            let mut ids = vec![0, start, end, start];
            assert_eq!(next(&vocabulary, &ids), Next::Any);
            ids.extend([height, width]);
            for _ in 0..h {
                for _ in 0..w {
                    assert_eq!(next(&vocabulary, &ids), Next::Code);
                    ids.push(code);
                }
                assert_eq!(next(&vocabulary, &ids), Next::Forced(row_end));
                ids.push(row_end);
            }
            assert_eq!(next(&vocabulary, &ids), Next::Forced(end));
            ids.push(end);
            assert_eq!(next(&vocabulary, &ids), Next::Any);
            assert!(!image_is_open(&vocabulary, &ids));
        }
    }
}
