//! One optimizer step of a training with every term of the loss, as the trainer takes it.

use tch::{Device, Kind, Tensor};

use super::super::report::Findings;
use super::Mode;
use super::numbers::relative;
use crate::cli::bench::train::pictures;
use crate::concept::ConceptKind;
use crate::model::LuminaMgpt;
use crate::picture::RgbPicture;
use crate::training::{Advance, Graph, Preset, StepLosses, Trainer, TrainingSpec};

/// A subject with an image context token, so that the prior term and the regularisation have a gradient.
fn spec(layers: usize) -> TrainingSpec {
    let preset = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "bench", Some("cat"), layers);
    TrainingSpec {
        steps: 1,
        batch_size: 2,
        image_tokens: 1,
        prior_weight: 0.5,
        regularisation_weight: 1e-2,
        prior_pictures: 1,
        start_words: vec![],
        ..preset
    }
}

/// A snapshot with the class image drawn, before the first step: every model goes on from the same codes.
fn before_the_step(model: &LuminaMgpt, images: &[RgbPicture]) -> anyhow::Result<Vec<u8>> {
    let spec = spec(model.transformer.config().num_hidden_layers);
    let mut trainer = Trainer::new(model, spec, images)?;
    loop {
        match trainer.advance(model)? {
            Advance::DrawingPrior { done, total } if done >= total => return Ok(trainer.checkpoint()?),
            Advance::Step(_) | Advance::Finished => anyhow::bail!("no class image was drawn"),
            _ => {}
        }
    }
}

/// Losses of the step, and its gradients by name, on the CPU.
fn step(
    model: &LuminaMgpt,
    images: &[RgbPicture],
    snapshot: &[u8],
    graph: Graph,
) -> anyhow::Result<(StepLosses, Vec<(&'static str, Tensor)>)> {
    let spec = spec(model.transformer.config().num_hidden_layers);
    let mut trainer = Trainer::resume(model, spec, images, snapshot)?;
    trainer.set_graph(graph);
    let losses = loop {
        match trainer.advance(model)? {
            Advance::Step(losses) => break losses,
            Advance::Finished => anyhow::bail!("the training ended before its step"),
            _ => {}
        }
    };
    let here = |(name, tensor): &(&'static str, Tensor)| {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        Ok((*name, tensor))
    };
    Ok((
        losses,
        trainer.gradients().iter().map(here).collect::<anyhow::Result<_>>()?,
    ))
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&LuminaMgpt, &LuminaMgpt),
) -> anyhow::Result<()> {
    let (width, height) = reference.sizes()[0];
    let images = &pictures(width, height)[..2];
    let snapshot = before_the_step(reference, images)?;
    let (expected, gradients) = step(reference, images, &snapshot, Graph::Kept)?;
    for graph in [Graph::Kept, Graph::Recomputed { segment: 2 }] {
        let name = match graph {
            Graph::Kept => format!("{label}: training step"),
            Graph::Recomputed { .. } => format!("{label}: training step, layers recomputed"),
        };
        findings.attempt(&name, || {
            let (found, its) = step(device, images, &snapshot, graph)?;
            let terms = [
                ("total", Some(found.total), Some(expected.total)),
                ("next token", Some(found.next_token), Some(expected.next_token)),
                ("prior", found.prior, expected.prior),
                ("regularisation", found.regularisation, expected.regularisation),
            ];
            for (term, found, expected) in terms {
                // A term that is absent on one side has no number and fails.
                let apart = found
                    .zip(expected)
                    .map_or(f64::NAN, |(found, expected)| apart(found, expected));
                findings.check(format!("{name}, {term}"), apart, mode.relative);
            }
            anyhow::ensure!(
                its.len() == gradients.len() && !its.is_empty(),
                "{} gradients; expected {}",
                its.len(),
                gradients.len()
            );
            for ((which, found), (_, expected)) in its.iter().zip(&gradients) {
                findings.check(
                    format!("{name}, gradient of {which}"),
                    relative(found, expected)?,
                    mode.gradient,
                );
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Relative, but for losses near zero, as the regularisation is at the start.
fn apart(found: f32, expected: f32) -> f64 {
    f64::from((found - expected).abs()) / f64::from(expected.abs()).max(1e-3)
}
