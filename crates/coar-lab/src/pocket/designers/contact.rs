//! Contact sheets: an overview of the world.

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::{
    Accessory, Colour, Designer, Object, Place, Scene, Spec, World, WorldError, development_subjects, reported_subjects,
};
use crate::pocket::world::contact_sheet;
use coar_core::image::RgbImage;

/// One sheet and the name of its file, without extension.
#[derive(Debug)]
pub struct Sheet {
    pub name: &'static str,
    pub image: RgbImage,
}

fn sheet(world: &World, name: &'static str, specs: &[Spec], columns: usize) -> Result<Sheet, WorldError> {
    let images = specs
        .iter()
        .map(|spec| world.render(spec))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Sheet {
        name,
        image: contact_sheet(&images, columns),
    })
}

fn plain(object: Object, designer: Designer, scene: Scene) -> Spec {
    Spec {
        object,
        designer,
        colour: None,
        hue: None,
        accessory: None,
        scene,
        place: Place::Alone(2),
    }
}

/// Random images of training; every object by every designer; colours; accessories; held-out subjects in every scene.
///
/// # Errors
/// When the pack lacks a drawing.
pub fn sheets(world: &World, seed: u64) -> Result<Vec<Sheet>, WorldError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let random: Vec<_> = (0..96).map(|_| Spec::sample(&mut rng)).collect();
    let scene = |rng: &mut ChaCha8Rng| *Scene::ALL.choose(rng).unwrap_or(&Scene::White);

    let mut objects = Vec::new();
    let designers: Vec<_> = Designer::ALL
        .iter()
        .filter(|&&designer| Object::all().any(|object| world.has(object, designer)))
        .collect();
    for half in Object::all().collect::<Vec<_>>().chunks(16) {
        for &&designer in &designers {
            for &object in half {
                // If a designer does not have the object, the first designer's is used, on white.
                let at = match world.has(object, designer) {
                    true => plain(object, designer, Scene::ALL[object.index() % 8]),
                    false => plain(object, Designer::Noto, Scene::White),
                };
                objects.push(at);
            }
        }
    }
    let colours: Vec<_> = ["cat", "dog", "car", "elephant", "penguin", "house", "whale", "burger"]
        .iter()
        .filter_map(|words| Object::named(words))
        .zip(Designer::TRAINED.iter().cycle())
        .flat_map(|(object, &designer)| {
            std::iter::once(None)
                .chain(Colour::ALL.iter().copied().map(Some))
                .map(move |colour| Spec {
                    colour,
                    ..plain(object, designer, Scene::White)
                })
        })
        .collect();
    let accessories: Vec<_> = Designer::TRAINED
        .iter()
        .flat_map(|&designer| Accessory::ALL.iter().map(move |&accessory| (designer, accessory)))
        .enumerate()
        .filter_map(|(index, (designer, accessory))| {
            Some(Spec {
                accessory: Some(accessory),
                place: Place::BESIDE[index % 2],
                ..plain(Object::all().nth(index * 2)?, designer, scene(&mut rng))
            })
        })
        .collect();
    let held_out: Vec<_> = reported_subjects()
        .iter()
        .chain(development_subjects())
        .flat_map(|subject| Scene::ALL.iter().map(move |&scene| (subject, scene)))
        .map(|(subject, scene)| subject.spec(scene, &mut rng))
        .collect();
    Ok(vec![
        sheet(world, "world", &random, 12)?,
        sheet(world, "objects", &objects, 16)?,
        sheet(world, "colours", &colours, 8)?,
        sheet(world, "accessories", &accessories, 10)?,
        sheet(world, "held-out", &held_out, Scene::ALL.len())?,
    ])
}
