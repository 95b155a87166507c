//! A decode step of several tokens per row through libtorch, for speculative decoding. Which guesses were right is
//! decided on the host, so each step waits for the codes it has drawn.

use tch::{Kind, Tensor};

use super::step::{Feed, Observe, Prediction, StepPart};
use crate::model::accelerator::Pack;
use crate::model::attention::{Pairs, Starts, StepTokens};
use crate::model::kv_cache::{KvCache, whole_blocks};
use crate::model::sampling::{DeviceSampler, Draw};
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};

/// `[draws, codes]` f32: scores with guidance.
pub(super) struct DeviceScores(Tensor);

/// Samples a code for each of `draws` from `hidden` `[predictions of all rows, hidden]`.
pub(super) fn draw(
    head: &CodeHead,
    hidden: &Tensor,
    draws: &[Prediction],
    observe: &mut Observe,
) -> Result<(Vec<i64>, DeviceScores), ModelError> {
    let mut pack = Pack::default();
    let conditional = pack.ints(draws.iter().map(|one| one.conditional as i64));
    let guided = draws.iter().any(|one| one.unconditional.is_some());
    let guidance = guided.then(|| {
        // An image without guidance is its own unconditional branch: c + 1 * (c - c).
        let other = |one: &Prediction| one.unconditional.unwrap_or(one.conditional) as i64;
        (
            pack.ints(draws.iter().map(other)),
            pack.floats(draws.iter().map(|one| one.guidance_scale)),
        )
    });
    let sampler = DeviceSampler::plan(
        &draws.iter().map(|one| one.draw).collect::<Vec<_>>(),
        head.codes(),
        &mut pack,
    );
    let keys = pack.ints(draws.iter().map(|one| one.draw.key.cast_signed()));
    let sent = pack.send(hidden.device())?;
    observe(StepPart::Upload)?;
    let logits = head.logits(hidden)?;
    observe(StepPart::Head)?;
    let conditional = logits.f_index_select(0, &sent.get(&conditional)?)?;
    let scores = match guidance {
        None => conditional,
        Some((other, scale)) => {
            let scale = sent.get(&scale)?.f_to_kind(Kind::Float)?.f_view([-1, 1])?;
            let unconditional = logits.f_index_select(0, &sent.get(&other)?)?;
            unconditional.f_add(&conditional.f_sub(&unconditional)?.f_mul(&scale)?)?
        }
    };
    let drawn = sampler.on(&sent)?.draw(&scores, &sent.get(&keys)?)?;
    let drawn = Vec::try_from(&drawn)?;
    observe(StepPart::Sampling)?;
    Ok((drawn, DeviceScores(scores)))
}

/// Samples more codes from some of the same scores, each given by the index of its draw.
pub(super) fn draw_again(scores: &DeviceScores, draws: &[(usize, Draw)]) -> Result<Vec<i64>, ModelError> {
    if draws.is_empty() {
        return Ok(vec![]);
    }
    let mut pack = Pack::default();
    let rows = pack.ints(draws.iter().map(|(row, _)| *row as i64));
    let keys = pack.ints(draws.iter().map(|(_, draw)| draw.key.cast_signed()));
    let only: Vec<Draw> = draws.iter().map(|(_, draw)| *draw).collect();
    let sampler = DeviceSampler::plan(&only, scores.0.size2()?.1, &mut pack);
    let sent = pack.send(scores.0.device())?;
    let rows = scores.0.f_index_select(0, &sent.get(&rows)?)?;
    Ok(Vec::try_from(&sampler.on(&sent)?.draw(&rows, &sent.get(&keys)?)?)?)
}

/// Feeds every row its window; returns the hidden states of the predicting tokens, row after row, `[predictions,
/// hidden]`. `ids` has the vocabulary's id of each code.
pub(super) fn advance(
    model: &Transformer,
    feeds: &[Feed],
    (codes, row_end): (&[i64], i64),
    cache: &mut KvCache,
    observe: &mut Observe,
) -> Result<Tensor, ModelError> {
    let (mut ids, mut slots, mut positions, mut wanted, mut starts) = (vec![], vec![], vec![], vec![], vec![0]);
    for feed in feeds {
        wanted.extend(feed.window.predicting.iter().map(|token| (ids.len() + token) as i64));
        ids.extend(feed.window.ids(codes, row_end));
        slots.resize(ids.len(), feed.slot);
        positions.extend(feed.position..feed.position + feed.window.tokens.len() as i64);
        starts.push(ids.len() as i64);
    }
    let highest = positions.iter().copied().max().unwrap_or(0);
    let queries = feeds.iter().map(|feed| feed.window.tokens.len()).max().unwrap_or(1);
    let by_length = model.reads_by_length();
    // The queries of a row that has fewer are filled up with its last token, at the end. Read by length they are
    // not: only the last query's position counts.
    let fill = |row: usize, query: usize| (starts[row] + query as i64).min(starts[row + 1] - 1);
    let places = (0..feeds.len()).flat_map(|row| (0..queries).map(move |query| (row, query)));
    let of_query: Vec<i64> = places.map(|(row, query)| fill(row, query)).collect();
    let mut pack = Pack::default();
    let spans = [
        pack.ints(ids.iter().copied()),
        pack.ints(slots),
        pack.ints(positions.iter().copied()),
        pack.ints(of_query.iter().map(|&token| positions[token as usize])),
        pack.ints(wanted),
    ];
    let ragged = !by_length && of_query.len() != ids.len();
    let pairs = ragged.then(|| {
        let answer = (0..feeds.len()).flat_map(|row| {
            let count = starts[row + 1] - starts[row];
            (0..count).map(move |query| (row * queries) as i64 + query)
        });
        let answer: Vec<i64> = answer.collect();
        [pack.ints(of_query.iter().copied()), pack.ints(answer)]
    });
    let ranges = by_length.then(|| {
        let keys = feeds.iter().map(|feed| cache.start_of(feed.slot)).chain([0]);
        let keys: Vec<i64> = keys.collect();
        [pack.ints(starts.iter().copied()), pack.ints(keys)]
    });
    let sent = pack.send(model.device())?;
    let [ids, slot, position, seen, wanted] = spans.map(|span| sent.get(&span));
    let small = |span| Ok::<_, ModelError>(sent.get(span)?.f_to_kind(Kind::Int)?);
    observe(StepPart::Upload)?;
    let tokens = StepTokens {
        sequences: feeds.len() as i64,
        length: whole_blocks(highest + 1).min(cache.max_seq()),
        slot: slot?,
        position: position?,
        seen: seen?.f_view([feeds.len() as i64, queries as i64])?,
        pairs: match &pairs {
            None => None,
            Some([query, answer]) => Some(Pairs {
                query: sent.get(query)?,
                answer: sent.get(answer)?,
            }),
        },
        starts: match &ranges {
            None => None,
            Some([queries, keys]) => Some(Starts {
                queries: small(queries)?,
                keys: small(keys)?,
            }),
        },
    };
    let all = model.decode(&ids?, &tokens, cache, highest)?;
    let hidden = all.f_index_select(0, &wanted?)?;
    observe(StepPart::Layers)?;
    Ok(hidden)
}
