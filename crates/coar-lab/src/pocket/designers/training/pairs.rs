//! Training images in pairs: one drawing in two scenes and, without accessory, at two positions, rendered anew for
//! every step.

use std::thread::Scope;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::feed::Feed;
use crate::pocket::designers::{CELLS, IMAGE_SIDE, Spec, World, WorldError};
use coar_engine::model::ModelError;
use coar_engine::model::lumina::pixels_on;

/// `2 * pairs` images; image `pairs + i` shows the object of image `i`, in another scene or at another position.
#[derive(Debug)]
pub struct PairBatch {
    /// 8-bit RGB, image after image.
    rgb: Vec<u8>,
    /// `pairs * CELLS * CELLS`: which cells of the first image's grid show nothing of the scene.
    covered: Vec<f32>,
    /// For each pair: the shift of the second image to the right, in cells.
    shifts: Vec<i64>,
}

/// A batch of pairs on a device.
#[derive(Debug)]
pub struct PairTensors {
    /// `[2 * pairs, 3, height, width]` in -1..1.
    pub images: Tensor,
    pub alignment: Alignment,
}

/// The correspondence of covered cells in the two images of each pair.
#[derive(Debug)]
pub struct Alignment {
    /// `[pairs, 1, CELLS, CELLS]` of 0 and 1, in the first image's cells.
    pub covered: Tensor,
    /// `[pairs, 1, 1, CELLS]`: the column of the second image that corresponds to this column of the first.
    columns: Tensor,
    /// The inverse of `columns`.
    back: Tensor,
}

impl Alignment {
    /// For cells `covered` `[pairs, 1, h, w]`, if the second image is shifted by `shifts` columns to the right.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn new(covered: Tensor, shifts: &[i64]) -> Result<Self, ModelError> {
        let width = covered.size()[3];
        let columns = |sign: i64| -> Result<Tensor, ModelError> {
            let columns: Vec<i64> = shifts
                .iter()
                .flat_map(|shift| (0..width).map(move |column| (column + sign * shift).rem_euclid(width)))
                .collect();
            Ok(Tensor::f_from_slice(&columns)?
                .f_view([-1, 1, 1, width])?
                .f_to_device(covered.device())?)
        };
        Ok(Self {
            columns: columns(1)?,
            back: columns(-1)?,
            covered,
        })
    }

    /// Values `[pairs, channels, h, w]` of the second images, shifted to the positions of the first images.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn to_first(&self, values: &Tensor) -> Result<Tensor, ModelError> {
        Ok(values.f_gather(3, &self.columns.f_expand_as(values)?, false)?)
    }

    /// The inverse of [`Self::to_first`].
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn to_second(&self, values: &Tensor) -> Result<Tensor, ModelError> {
        Ok(values.f_gather(3, &self.back.f_expand_as(values)?, false)?)
    }
}

impl From<WorldError> for ModelError {
    fn from(error: WorldError) -> Self {
        Self::invalid("world", error.to_string())
    }
}

impl PairBatch {
    /// Images of `first`, and of `second`, which show the same objects elsewhere.
    ///
    /// # Errors
    /// When the world lacks a drawing.
    pub fn of(world: &World, first: &[Spec], second: &[Spec]) -> Result<Self, WorldError> {
        let mut rgb = Vec::with_capacity((first.len() + second.len()) * IMAGE_SIDE * IMAGE_SIDE * 3);
        for spec in first.iter().chain(second) {
            rgb.extend(world.render(spec)?.rgb);
        }
        let mut covered = Vec::with_capacity(first.len() * CELLS * CELLS);
        for spec in first {
            covered.extend(world.covered(spec)?.iter().map(|&cell| f32::from(u8::from(cell))));
        }
        let shifts = first
            .iter()
            .zip(second)
            .map(|(a, b)| a.place.cells_to(b.place))
            .collect();
        Ok(Self { rgb, covered, shifts })
    }

    /// The batch of a training step: deterministic for a seed.
    ///
    /// # Errors
    /// When the world lacks a drawing.
    pub fn draw(world: &World, seed: u64, step: i64, pairs: usize) -> Result<Self, WorldError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step as u64 + 1);
        let specs: Vec<_> = (0..pairs).map(|_| Spec::sample_for_tokenizer(&mut rng)).collect();
        let others: Vec<_> = specs.iter().map(|spec| spec.elsewhere(&mut rng)).collect();
        Self::of(world, &specs, &others)
    }

    /// The batches of training steps `from..`, on `device`.
    pub(super) fn feed<'scope>(
        scope: &'scope Scope<'scope, '_>,
        device: Device,
        world: &'scope World,
        from: i64,
        seed: u64,
        pairs: usize,
    ) -> Feed<'scope, PairTensors> {
        let draw = move |step| Self::draw(world, seed, step, pairs);
        Feed::new(scope, device, from, draw, move |batch: Self| batch.tensors(device))
    }

    /// The batch on `device`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn tensors(&self, device: Device) -> Result<PairTensors, ModelError> {
        let side = CELLS as i64;
        let covered = Tensor::f_from_slice(&self.covered)?
            .f_view([-1, 1, side, side])?
            .f_to_kind(Kind::Float)?;
        Ok(PairTensors {
            images: pixels_on(&self.rgb, (IMAGE_SIDE, IMAGE_SIDE), device)?,
            alignment: Alignment::new(covered.f_to_device(device)?, &self.shifts)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;

    #[test]
    fn covered_cells_show_the_same_in_both_images() {
        let batch = PairBatch::draw(synthetic_world(), 7, 0, 24).unwrap();
        assert!(batch.shifts.iter().any(|&shift| shift != 0), "{:?}", batch.shifts);
        let tensors = batch.tensors(Device::Cpu).unwrap();
        // Mean colour of each cell.
        let cells = tensors
            .images
            .avg_pool2d([8, 8], [8, 8], [0, 0], false, true, None::<i64>);
        let (first, second) = (cells.narrow(0, 0, 24), cells.narrow(0, 24, 24));
        let aligned = tensors.alignment.to_first(&second).unwrap();
        let apart = |other: &Tensor| {
            let worst = ((&first - other).abs() * &tensors.alignment.covered).max();
            f64::try_from(worst).unwrap()
        };
        assert!(apart(&aligned) < 0.02, "{}", apart(&aligned));
        assert!(apart(&second) > 0.1);
        assert_eq!(tensors.alignment.to_second(&aligned).unwrap(), second);
    }
}
