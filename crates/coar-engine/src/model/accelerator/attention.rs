//! Attention by row lengths.

use tch::{Kind, Tensor};

use super::native::{checked, coar_attend_lengths, index_of};
use crate::model::ModelError;

/// Offsets of the queries and keys of sequences in flat tensors, all `i32` on a CUDA device.
#[derive(Debug)]
pub(in crate::model) struct Ranges {
    /// `[sequences + 1]`
    pub query_starts: Tensor,
    /// `[sequences + 1]`; the last one is not read.
    pub key_starts: Tensor,
    /// `[sequences]`
    pub key_lengths: Tensor,
    pub most_queries: i64,
    pub most_keys: i64,
}

/// Attention of sequences with different numbers of keys: `query` `[1, tokens, 1, head_dim]`, `key` and `value` `[1,
/// all, heads, head_dim]`. A sequence's last query sees all of its keys, the one before one less. On the CPU it runs
/// one sequence after the other: for correctness checks, not for speed.
///
/// # Errors
/// When the device fails.
pub(in crate::model) fn attend_lengths(
    query: &Tensor,
    (key, value): (&Tensor, &Tensor),
    ranges: &Ranges,
    scale: f64,
) -> Result<Tensor, ModelError> {
    if index_of(query.device()).is_none() {
        return attend_one_by_one(query, (key, value), ranges, scale);
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: reads live tensors, writes a pointer to a new one.
    checked(|text, room| unsafe {
        coar_attend_lengths(
            query.as_ptr(),
            key.as_ptr(),
            value.as_ptr(),
            ranges.query_starts.as_ptr(),
            ranges.key_starts.as_ptr(),
            ranges.key_lengths.as_ptr(),
            ranges.most_queries,
            ranges.most_keys,
            scale,
            &raw mut out,
            text,
            room,
        )
    })?;
    // SAFETY: the tensor is new and has no other owner.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn attend_one_by_one(
    query: &Tensor,
    (key, value): (&Tensor, &Tensor),
    ranges: &Ranges,
    scale: f64,
) -> Result<Tensor, ModelError> {
    let numbers = |tensor: &Tensor| Ok::<_, ModelError>(Vec::<i64>::try_from(&tensor.f_to_kind(Kind::Int64)?)?);
    let (queries, keys) = (numbers(&ranges.query_starts)?, numbers(&ranges.key_starts)?);
    let mut mixed = vec![];
    for (sequence, length) in numbers(&ranges.key_lengths)?.into_iter().enumerate() {
        let count = queries[sequence + 1] - queries[sequence];
        let part = |of: &Tensor, from: i64, count: i64| of.f_narrow(1, from, count)?.f_transpose(1, 2);
        let own = part(query, queries[sequence], count)?;
        let seen = |of: &Tensor| part(of, keys[sequence], length);
        // Query i sees the keys up to length - count + i.
        let mask = Tensor::f_full([count, length], f64::NEG_INFINITY, (query.kind(), query.device()))?
            .f_triu(length - count + 1)?;
        let attended = Tensor::f_scaled_dot_product_attention(
            &own,
            &seen(key)?,
            &seen(value)?,
            Some(&mask),
            0.0,
            false,
            scale,
            false,
        )?;
        mixed.push(attended.f_transpose(1, 2)?);
    }
    Ok(Tensor::f_cat(&mixed, 1)?)
}
