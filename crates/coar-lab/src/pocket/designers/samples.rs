//! References that are never used in training: held-out subjects, and drawings of unseen designers.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{
    Designer, Object, Place, Scene, Spec, World, WorldError, development_subjects, reported_subjects, scene_phrase,
};
use coar_core::image::RgbImage;

/// Number of references of a subject.
const REFERENCES: usize = 5;

/// The references of one concept.
#[derive(Debug)]
pub struct Sample {
    /// The concept's name.
    pub name: String,
    /// A subject's noun; `None` for a style.
    pub class_noun: Option<&'static str>,
    /// Images, each with its caption beside the concept ("on the beach", "a cat in the snow").
    pub references: Vec<(RgbImage, String)>,
}

/// Five references of every held-out subject, each in another scene, and one of every unseen designer.
///
/// # Errors
/// When the pack lacks a drawing.
pub fn samples(world: &World, seed: u64) -> Result<Vec<Sample>, WorldError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut samples = Vec::new();
    for subject in reported_subjects().iter().chain(development_subjects()) {
        let mut scenes = Scene::ALL.to_vec();
        scenes.shuffle(&mut rng);
        let references = scenes[..REFERENCES]
            .iter()
            .map(|&scene| {
                let image = world.render(&subject.spec(scene, &mut rng))?;
                Ok((image, scene_phrase(scene).to_owned()))
            })
            .collect::<Result<_, WorldError>>()?;
        samples.push(Sample {
            name: subject.name.to_owned(),
            class_noun: Some(subject.object),
            references,
        });
    }
    for designer in Designer::REPORTED.iter().chain(Designer::DEVELOPMENT) {
        // The first of these in the designer's set.
        let object = ["cat", "elephant", "dog"]
            .into_iter()
            .filter_map(Object::named)
            .find(|&object| world.has(object, *designer));
        let Some(object) = object else { continue };
        let image = world.render(&Spec {
            object,
            designer: *designer,
            colour: None,
            hue: None,
            accessory: None,
            scene: Scene::Grass,
            place: Place::Alone(2),
        })?;
        let words = object.words().unwrap_or("thing");
        samples.push(Sample {
            name: designer.name().to_owned(),
            class_noun: None,
            references: vec![(image, format!("a {words} {}", scene_phrase(Scene::Grass)))],
        });
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;

    #[test]
    fn every_held_out_subject_has_five_different_references() {
        let samples = samples(synthetic_world(), 1).unwrap();
        assert_eq!(samples.len(), reported_subjects().len() + development_subjects().len());
        for sample in &samples {
            assert_eq!(sample.references.len(), REFERENCES, "{}", sample.name);
            for (index, (image, phrase)) in sample.references.iter().enumerate() {
                assert!(phrase.starts_with("on ") || phrase.starts_with("in "), "{phrase}");
                let others = &sample.references[index + 1..];
                assert!(others.iter().all(|(other, words)| other != image && words != phrase));
            }
        }
    }
}
