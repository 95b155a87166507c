//! Whole images of a mixed batch: prefill, sampler and row ends together.

use super::super::report::Findings;
use super::super::workload::concept_tensors;
use super::Mode;
use coar_core::concept::ConceptKind;
use coar_core::engine::SamplingParams;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::LuminaMgpt;
use coar_engine::model::decoding::{Decoding, DecodingRequest};
use coar_engine::plan::{DrawSettings, PlannedConcept, plan_sequence};

/// The images of a batch.
#[derive(Debug, Clone, Copy)]
enum Batch {
    Mixed,
    Alike,
}

/// Requests with and without concepts and guidance, of several sizes, top-k values and temperatures.
fn requests(model: &LuminaMgpt, batch: Batch) -> anyhow::Result<Vec<DecodingRequest>> {
    let config = model.transformer.config();
    let concepts = (0..2)
        .map(|index| {
            let tensors = concept_tensors(config.num_hidden_layers / 2, config.hidden_size as usize, index);
            DeviceConcept::upload(&tensors, model.transformer.device())
        })
        .collect::<Result<Vec<_>, _>>()?;
    let planned = ["one", "two"].map(|name| PlannedConcept {
        name: name.to_owned(),
        kind: ConceptKind::Subject,
        text_tokens: 1,
        image_tokens: 1,
    });
    let sizes = model.sizes();
    let settings = |index: usize, guidance_scale, temperature, top_k| DrawSettings {
        sampling: SamplingParams {
            width: sizes[index % sizes.len()].0,
            height: sizes[index % sizes.len()].1,
            seed: 7,
            guidance_scale,
            temperature,
            top_k,
            identity_mask: true,
        },
        images: index as u64..index as u64 + 1,
    };
    let mixed = [
        ("a photo of <one> cat and <two> dog", settings(0, 2.0, 1.0, 20)),
        ("a photo of <two> cat", settings(1, 3.5, 0.7, 0)),
        ("a photo of a red cat", settings(2, 1.0, 0.0, 20)),
        ("a photo of a blue dog on the beach", settings(0, 2.0, 0.0, 0)),
        ("a photo of a green fish", settings(1, 1.0, 1.3, 5)),
    ];
    // One k for all rows uses a separate code path; a small one leaves few choices.
    let alike = [
        ("a photo of <one> cat", settings(0, 2.0, 1.0, 3)),
        ("a photo of a red cat", settings(0, 2.0, 1.0, 3)),
    ];
    let chosen = match batch {
        Batch::Mixed => mixed.to_vec(),
        Batch::Alike => alike.to_vec(),
    };
    chosen
        .into_iter()
        .map(|(prompt, settings)| {
            let named: Vec<usize> = (0..2)
                .filter(|&index| prompt.contains(&format!("<{}>", planned[index].name)))
                .collect();
            let own: Vec<PlannedConcept> = named.iter().map(|&index| planned[index].clone()).collect();
            let used: Vec<&DeviceConcept> = named.iter().map(|&index| &concepts[index]).collect();
            Ok(plan_sequence(model, prompt, &own, settings.sampling.size())?.request(model, &used, &settings)?)
        })
        .collect()
}

fn draw(model: &LuminaMgpt, batch: Batch) -> anyhow::Result<Vec<Vec<i64>>> {
    let mut decoding = Decoding::start(&model.transformer, &model.vocabulary, &requests(model, batch)?)?;
    while !decoding.is_done() {
        decoding.step(&model.transformer)?;
    }
    Ok(decoding.codes().to_vec())
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&LuminaMgpt, &LuminaMgpt),
) -> anyhow::Result<()> {
    for (what, batch) in [("a mixed batch", Batch::Mixed), ("a batch of one kind", Batch::Alike)] {
        let expected = draw(reference, batch)?;
        let name = format!("{label}: images of {what}");
        findings.attempt(&name, || {
            let found = draw(device, batch)?;
            let other = found
                .iter()
                .zip(&expected)
                .filter(|(found, expected)| found != expected);
            let other = other.count();
            match mode.absolute {
                Some(_) => findings.check(format!("{name}, number that differ"), other as f64, 0.0),
                // If rounding decides between two codes, the rest of the image differs.
                None => findings.figure(&format!("{name}, number that differ"), other as u64),
            }
            Ok(())
        })?;
    }
    Ok(())
}
