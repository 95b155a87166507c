//! Compares prefill and decode steps of a changing batch with a pass over the same tokens as whole sequences: the
//! hidden states that predict each code.

use tch::{Device, Tensor};

use super::super::report::Findings;
use super::Mode;
use super::sequences::Sequences;
use coar_core::tokenizer::{Vocabulary, image_block};
use coar_engine::model::decoding::{BatchImageId, BatchOptions, DecodeBatch, DecodingRequest, Speculation};
use coar_engine::model::{ModelError, Transformer};

/// An image, and the step before which it joins the batch.
struct Planned {
    request: DecodingRequest,
    joins: usize,
}

/// Three images of different sizes and ages: guided with two concepts, unguided, guided.
fn plan(sequences: &Sequences, device: Device) -> Result<[Planned; 3], ModelError> {
    let concepts = sequences.upload(device, false)?;
    let prompt = |row: usize| sequences.ids[row][..sequences.prompt[row]].to_vec();
    let image = |index: u64, row: usize, (rows, columns), guidance_scale| DecodingRequest {
        prompt: prompt(row),
        unconditional: prompt(1)[..5].to_vec(),
        context: None,
        rows,
        columns,
        guidance_scale,
        temperature: 1.0,
        top_k: 20,
        streams: vec![(3, index)],
    };
    let first = DecodingRequest {
        context: Some(sequences.context_of_first(&concepts, device)?),
        ..image(0, 0, (4, 6), 3.0)
    };
    let planned = |joins, request| Planned { request, joins };
    Ok([
        planned(0, first),
        planned(3, image(1, 1, (6, 4), 1.0)),
        planned(7, image(2, 1, (8, 2), 2.0)),
    ])
}

/// The predictors of one image's codes, and the codes.
struct Seen {
    id: BatchImageId,
    /// One per code: `[1 or 2, hidden]`.
    hidden: Vec<Tensor>,
    codes: Vec<i64>,
}

fn draw(
    model: &Transformer,
    vocabulary: &Vocabulary,
    planned: &[Planned],
    fixed_shapes: bool,
) -> Result<Vec<Seen>, ModelError> {
    let requests = || planned.iter().map(|planned| &planned.request);
    let options = BatchOptions {
        rows: requests().map(DecodingRequest::rows_per_image).sum::<usize>() + 1,
        max_seq: requests().map(DecodingRequest::tokens).max().unwrap_or(0),
        fixed_shapes,
        speculation: Speculation::Off,
    };
    let mut batch = DecodeBatch::new(model, vocabulary, options)?;
    let mut seen: Vec<Seen> = vec![];
    for step in 0.. {
        for image in planned.iter().filter(|image| image.joins == step) {
            for id in batch.add(model, &image.request)? {
                seen.push(Seen {
                    id,
                    hidden: vec![],
                    codes: vec![],
                });
            }
        }
        if batch.is_empty() {
            break;
        }
        for one in seen.iter_mut().filter(|one| one.codes.is_empty()) {
            one.hidden.push(batch.hidden_of(one.id)?);
        }
        for drawn in batch.step(model)? {
            if let Some(one) = seen.iter_mut().find(|one| one.id == drawn.id) {
                one.codes = drawn.codes?;
            }
        }
    }
    Ok(seen)
}

/// The final hidden states `[codes, hidden]` that predict the codes of an image, in one pass over the sequence.
fn read(
    model: &Transformer,
    vocabulary: &Vocabulary,
    (request, prompt): (&DecodingRequest, &[i64]),
    codes: &[i64],
) -> Result<Tensor, ModelError> {
    let (_, image) = image_block(vocabulary, codes, request.rows as usize, request.columns as usize)?;
    let ids = Tensor::f_from_slice(&[prompt, &image].concat())?.f_view([1, -1])?;
    let context = request.context.as_ref().filter(|_| prompt == request.prompt);
    let first = prompt.len() as i64 - 1;
    let at: Vec<i64> = (0..codes.len() as i64)
        .map(|code| first + code + code / request.columns)
        .collect();
    let hidden = model.forward(&ids, context)?.f_get(0)?;
    Ok(hidden.f_index_select(0, &Tensor::f_from_slice(&at)?)?)
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&Transformer, &Transformer),
    (sequences, vocabulary): (&Sequences, &Vocabulary),
) -> anyhow::Result<()> {
    let here = plan(sequences, Device::Cpu)?;
    let there = plan(sequences, device.device())?;
    for (way, fixed_shapes) in [("", false), (", fixed shapes", true)] {
        let name = format!("{label}: prefill and steps{way}");
        findings.attempt(&name, || {
            let seen = draw(device, vocabulary, &there, fixed_shapes)?;
            let (mut found, mut expected) = (vec![], vec![]);
            for (one, Planned { request, .. }) in seen.iter().zip(&here) {
                // [codes, 1 or 2, hidden]
                let hidden = Tensor::f_stack(&one.hidden, 0)?;
                for (branch, prompt) in [&request.prompt, &request.unconditional].into_iter().enumerate() {
                    if branch < request.rows_per_image() {
                        found.push(device.logits(&hidden.f_select(1, branch as i64)?)?);
                        let whole = read(reference, vocabulary, (request, prompt), &one.codes)?;
                        expected.push(reference.logits(&whole)?);
                    }
                }
            }
            let (found, expected) = (Tensor::f_cat(&found, 0)?, Tensor::f_cat(&expected, 0)?);
            mode.compare(findings, &name, &found, &expected, false)
        })?;
    }
    Ok(())
}
