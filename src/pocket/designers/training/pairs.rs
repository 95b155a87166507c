//! Training images in pairs: one drawing at one place in two scenes, drawn anew at every step.

use std::sync::mpsc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::model::ModelError;
use crate::model::lumina::pixels;
use crate::pocket::designers::{CELLS, Spec, World, WorldError};
use crate::picture::RgbPicture;

/// `2 * pairs` images; image `pairs + i` shows what image `i` shows, in another scene.
#[derive(Debug)]
pub struct PairBatch {
    images: Vec<RgbPicture>,
    /// `pairs * CELLS * CELLS`: which cells of the grid show nothing of the scene.
    covered: Vec<f32>,
}

impl From<WorldError> for ModelError {
    fn from(error: WorldError) -> Self {
        Self::invalid("world", error.to_string())
    }
}

impl PairBatch {
    /// The given images and the same things in other scenes.
    ///
    /// # Errors
    /// When the world lacks a drawing.
    pub fn of(world: &World, specs: &[Spec], rng: &mut ChaCha8Rng) -> Result<Self, WorldError> {
        let others: Vec<_> = specs.iter().map(|spec| spec.in_another_scene(rng)).collect();
        let images = specs
            .iter()
            .chain(&others)
            .map(|spec| world.render(spec))
            .collect::<Result<_, _>>()?;
        let mut covered = Vec::with_capacity(specs.len() * CELLS * CELLS);
        for spec in specs {
            covered.extend(world.covered(spec)?.iter().map(|&cell| f32::from(u8::from(cell))));
        }
        Ok(Self { images, covered })
    }

    /// The batch of a training step: the same in every run with this seed.
    ///
    /// # Errors
    /// When the world lacks a drawing.
    pub fn draw(world: &World, seed: u64, step: i64, pairs: usize) -> Result<Self, WorldError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step as u64 + 1);
        let specs: Vec<_> = (0..pairs).map(|_| Spec::sample_for_tokenizer(&mut rng)).collect();
        Self::of(world, &specs, &mut rng)
    }

    /// Images `[2 * pairs, 3, height, width]` in -1..1, and the covered cells `[pairs, 1, CELLS, CELLS]` as 0 and 1.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn tensors(&self, device: Device) -> Result<(Tensor, Tensor), ModelError> {
        let side = CELLS as i64;
        let covered = Tensor::f_from_slice(&self.covered)?
            .f_view([-1, 1, side, side])?
            .f_to_kind(Kind::Float)?;
        Ok((pixels(&self.images)?.f_to_device(device)?, covered.f_to_device(device)?))
    }
}

/// Draws the batches of steps `from..` on a thread of the scope, a few ahead.
pub fn prefetch<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    world: &'scope World,
    seed: u64,
    from: i64,
    pairs: usize,
) -> mpsc::Receiver<Result<PairBatch, WorldError>> {
    let (send, receive) = mpsc::sync_channel(4);
    scope.spawn(move || {
        for step in from.. {
            if send.send(PairBatch::draw(world, seed, step, pairs)).is_err() {
                return;
            }
        }
    });
    receive
}
