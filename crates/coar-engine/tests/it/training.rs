//! Concept training on the shipped pocket model, in this process.

use coar_core::concept::ConceptKind;
use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_core::training::{Preset, TrainingSpec};
use coar_engine::model::LuminaMgpt;
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::pocket::unpack_shipped;
use coar_engine::training::{Advance, Graph, Trainer};
use tch::{Device, Kind};

use crate::support::rex;

fn model() -> LuminaMgpt {
    let cache = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
    LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap()
}

fn references() -> Vec<RgbImage> {
    rex(3)
        .iter()
        .map(|png| decode(png, &ImageLimits::default()).unwrap())
        .collect()
}

fn finish(trainer: &mut Trainer, model: &LuminaMgpt) {
    while trainer.next_step(model).unwrap().is_some() {}
}

#[test]
fn interrupted_training_ends_with_the_same_tensors() {
    let model = model();
    let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
    (spec.steps, spec.prior_pictures, spec.image_tokens, spec.seed) = (9, 2, 1, 5);
    let mut whole = Trainer::new(&model, spec.clone(), &references()).unwrap();
    finish(&mut whole, &model);
    let mut first = Trainer::new(&model, spec.clone(), &references()).unwrap();
    // Interrupted once during the choice of the start words, and once in the middle of the steps.
    for _ in 0..3 {
        first.advance(&model).unwrap();
    }
    assert_eq!(first.start_words(), None);
    let early = first.checkpoint().unwrap();
    let mut first = Trainer::resume(&model, spec.clone(), &references(), &early).unwrap();
    let mut weighed = 0;
    while first.step() < 4 {
        let advance = first.advance(&model).unwrap();
        weighed += usize::from(matches!(advance, Advance::Weighing { .. }));
    }
    assert_eq!(weighed, references().len(), "a unit of work for each image");
    assert_eq!(first.start_words().unwrap()[..3], ["a", "purple", "and"]);
    let checkpoint = first.checkpoint().unwrap();
    drop(first);
    let mut second = Trainer::resume(&model, spec.clone(), &references(), &checkpoint).unwrap();
    assert_eq!(second.step(), 4);
    finish(&mut second, &model);
    let (a, b) = (whole.concept_file("m").unwrap(), second.concept_file("m").unwrap());
    assert_eq!(a, b);
    assert_eq!(whole.losses(), second.losses());
    assert!(
        whole
            .losses()
            .iter()
            .all(|l| l.prior.is_some() && l.regularisation.is_some())
    );
    let bytes = a.to_bytes().unwrap();
    assert!(
        bytes.len() <= 4 * a.tensors.parameters() + 8 * 1024,
        "{} bytes",
        bytes.len()
    );
    // Another training's checkpoint is rejected, as is a damaged one.
    spec.steps = 10;
    assert!(Trainer::resume(&model, spec.clone(), &references(), &checkpoint).is_err());
    assert!(Trainer::resume(&model, spec, &references(), &checkpoint[..checkpoint.len() / 2]).is_err());
}

#[test]
fn training_lowers_the_loss_and_moves_only_the_concept() {
    let model = model();
    let before = model.transformer.embedding_of(10).unwrap();
    let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
    (spec.steps, spec.image_tokens) = (25, 0);
    let mut trainer = Trainer::new(&model, spec, &references()).unwrap();
    finish(&mut trainer, &model);
    let losses = trainer.losses();
    assert!(
        losses[24].next_token < losses[0].next_token - 0.02,
        "{} {}",
        losses[0].next_token,
        losses[24].next_token
    );
    assert_eq!(model.transformer.embedding_of(10).unwrap(), before);
    let absolute = TrainingSpec::preset(Preset::Paper, ConceptKind::Style, "ink", None, 6);
    let mut absolute = TrainingSpec {
        steps: 3,
        augment: true,
        ..absolute
    };
    absolute.captions = vec!["a cat".into()];
    let mut trainer = Trainer::new(&model, absolute, &references()[..1]).unwrap();
    finish(&mut trainer, &model);
    assert_eq!(trainer.concept_file("m").unwrap().tensors.layers, 3);
}

#[test]
fn recomputing_layers_changes_memory_and_nothing_else() {
    let model = model();
    let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
    // Text and image tokens, the prior term and the regularisation; the concept ends below the last layer.
    (spec.steps, spec.prior_pictures, spec.image_tokens, spec.layers) = (3, 2, 1, 5);
    (spec.prior_weight, spec.regularisation_weight) = (0.5, 0.1);
    spec.start_words.clear();
    let mut kept = Trainer::new(&model, spec.clone(), &references()).unwrap();
    // Progress of the class images ends exactly at their total.
    let mut drawing = vec![];
    // A step consists of many pieces of work, so images need not wait for all of it: six layers forward, the head, and
    // six backward, in the pass of the references and in that of the class images.
    let (mut pieces, mut gradients) = (0, vec![]);
    loop {
        match kept.advance(&model).unwrap() {
            Advance::Piece => pieces += 1,
            Advance::Step(_) => {
                assert!(pieces >= 2 * 13, "{pieces} pieces");
                (pieces, gradients) = (0, kept.gradients().iter().map(|(name, _)| *name).collect());
            }
            Advance::DrawingPrior { done, total } => drawing.push((done, total)),
            Advance::Finished => break,
            _ => {}
        }
    }
    assert!(drawing.is_sorted() && drawing.first() == Some(&(2, 288)) && drawing.last() == Some(&(288, 288)));
    assert_eq!(gradients, ["text", "image"]);
    let expected = kept.concept_file("m").unwrap();
    // Segments that divide the six layers, that do not divide them, and one segment for all.
    for segment in [1, 4, 6] {
        let mut trainer = Trainer::new(&model, spec.clone(), &references()).unwrap();
        trainer.set_graph(Graph::Recomputed { segment });
        finish(&mut trainer, &model);
        assert_eq!(trainer.losses(), kept.losses(), "segments of {segment}");
        assert_eq!(trainer.concept_file("m").unwrap(), expected, "segments of {segment}");
    }
    let estimate = kept.estimate(&model);
    assert!(estimate.bytes(estimate.recomputed()) < estimate.bytes(Graph::Kept));
}
