//! What an image could show instead: references that differ from it in the object or in the designer alone. The published
//! network has no words for this world; it says which reference an image is nearest to.

use tch::{Kind, Tensor};

use crate::eval::judges::Outputs;
use crate::model::ModelError;
use crate::pocket::designers::{Designer, Object, Spec};

/// The references of one image, as the published network sees them.
#[derive(Debug)]
pub struct Rivals {
    /// `[features]`: the mean over the objects. It is what they have in common: scene, place, colour, the designer's hand.
    mean: Tensor,
    /// `[objects, features]`, less the mean, of unit length.
    objects: Tensor,
    /// `[numbers]`: each statistic's deviation over the objects, so that what varies with the object weighs little.
    deviation: Tensor,
    /// `[designers, numbers]`, over the deviation.
    designers: Tensor,
    object: usize,
    designer: usize,
}

/// What one image was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recognised {
    /// How many objects' references are at least as near as that of the right object, with itself: 1 is right.
    pub rank: usize,
    /// Whether the nearest designer's reference is the right one.
    pub designer: bool,
}

fn unit(rows: &Tensor) -> Result<Tensor, ModelError> {
    let length = rows
        .f_norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)?
        .f_clamp_min(1e-6)?;
    Ok(rows.f_div(&length)?)
}

impl Rivals {
    /// What the references of an image show: every object, and then every trained designer; all else is as in `spec`, colour
    /// and accessory too.
    pub fn specs(spec: &Spec) -> Vec<Spec> {
        let objects = Object::all().map(|object| Spec { object, ..*spec });
        let designers = Designer::TRAINED.iter().map(|&designer| Spec { designer, ..*spec });
        objects.chain(designers).collect()
    }

    /// The references of an image of `spec`, from what the network says of the images of [`Self::specs`], in their order.
    ///
    /// # Errors
    /// When there are fewer, or libtorch fails.
    pub fn new(spec: &Spec, references: &Outputs) -> Result<Self, ModelError> {
        let (objects, designers) = (Object::all().len() as i64, Designer::TRAINED.len() as i64);
        let features = references.features.f_narrow(0, 0, objects)?;
        let mean = features.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
        let deviation = references
            .style
            .f_narrow(0, 0, objects)?
            .f_std_dim([0i64].as_slice(), false, false)?
            .f_clamp_min(1e-6)?;
        Ok(Self {
            objects: unit(&features.f_sub(&mean)?)?,
            mean,
            designers: references.style.f_narrow(0, objects, designers)?.f_div(&deviation)?,
            deviation,
            object: spec.object.index(),
            designer: spec.designer.index(),
        })
    }

    /// What the image in row `row` of `images` is taken for.
    ///
    /// # Errors
    /// When there is no such row, or libtorch fails.
    pub fn recognise(&self, images: &Outputs, row: i64) -> Result<Recognised, ModelError> {
        let own = unit(&images.features.f_get(row)?.f_sub(&self.mean)?)?;
        let cosines = Vec::<f32>::try_from(&self.objects.f_mv(&own)?)?;
        let right = cosines[self.object];
        let style = images.style.f_get(row)?.f_div(&self.deviation)?;
        let distance =
            self.designers
                .f_sub(&style)?
                .f_square()?
                .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
        Ok(Recognised {
            rank: cosines.iter().filter(|&&cosine| cosine >= right).count(),
            designer: distance.f_argmin(0, false)?.f_int64_value(&[])? == self.designer as i64,
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use tch::Device;

    use super::*;

    #[test]
    fn an_image_is_what_its_nearest_reference_shows() {
        let spec = Spec::sample(&mut ChaCha8Rng::seed_from_u64(3));
        let specs = Rivals::specs(&spec);
        assert_eq!(specs.len(), 53);
        assert_eq!(specs.iter().filter(|other| **other == spec).count(), 2);
        assert!(specs.iter().all(|other| {
            (other.scene, other.place, other.colour, other.accessory)
                == (spec.scene, spec.place, spec.colour, spec.accessory)
        }));
        tch::manual_seed(4);
        let random = |columns: i64| Tensor::randn([53, columns], (Kind::Float, Device::Cpu));
        let references = Outputs {
            logits: random(1),
            // A large part that all have in common decides nothing.
            features: random(40) + 50.0,
            style: random(12),
        };
        let rivals = Rivals::new(&spec, &references).unwrap();
        let shown = |object: i64, designer: i64| Outputs {
            logits: random(1),
            features: references.features.narrow(0, object, 1) + 0.1,
            style: references.style.narrow(0, 48 + designer, 1) + 0.01,
        };
        let (object, designer) = (spec.object.index() as i64, spec.designer.index() as i64);
        let right = rivals.recognise(&shown(object, designer), 0).unwrap();
        assert_eq!((right.rank, right.designer), (1, true));
        let wrong = rivals
            .recognise(&shown((object + 1) % 48, (designer + 1) % 5), 0)
            .unwrap();
        assert!(wrong.rank > 1 && !wrong.designer);
        assert!(rivals.recognise(&shown(object, designer), 1).is_err());
    }
}
