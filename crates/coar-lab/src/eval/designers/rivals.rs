//! Alternatives for an image: references that differ from it only in the object, the designer or the place. The
//! published network has no classes for this world, so an image is classified by its nearest reference.

use tch::{Kind, Tensor};

use crate::eval::judges::Outputs;
use crate::pocket::designers::{Designer, Object, Place, Spec};
use coar_engine::model::ModelError;

/// The published network's features of references for images with the same designer, scene, colour and accessory.
#[derive(Debug)]
pub struct Rivals {
    places: &'static [Place],
    /// `[features]`: the mean over objects and places, which represents what they have in common: scene, colour, the
    /// designer's style.
    mean: Tensor,
    /// `[places, objects, features]`, with the mean subtracted, normalised.
    objects: Tensor,
    /// `[numbers]`: each statistic's deviation over objects and places, to down-weight what varies with them.
    deviation: Tensor,
    /// `[places, objects, designers, numbers]` for the objects of `of_designers`, divided by the deviation.
    designers: Tensor,
    /// Objects for which there are references by every designer.
    of_designers: Vec<Object>,
}

/// The classification of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recognised {
    /// The rank of the correct object among all objects' nearest references: 1 is correct.
    pub rank: usize,
    /// Whether the nearest designer's reference is the correct one.
    pub designer: bool,
}

fn unit(rows: &Tensor) -> Result<Tensor, ModelError> {
    let length = rows
        .f_norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)?
        .f_clamp_min(1e-6)?;
    Ok(rows.f_div(&length)?)
}

fn places(spec: &Spec) -> &'static [Place] {
    match spec.accessory {
        Some(_) => Place::BESIDE,
        None => Place::ALONE,
    }
}

impl Rivals {
    /// The references' specs for images that differ in object and place: at every place, since captions do not
    /// specify it, every object, and then each object of `images` by every trained designer. Everything else is as
    /// in the first image, including colour and accessory.
    pub fn specs(images: &[Spec]) -> Vec<Spec> {
        let Some(first) = images.first() else { return vec![] };
        let mut specs = Vec::new();
        for &place in places(first) {
            specs.extend(Object::all().map(|object| Spec {
                object,
                place,
                ..*first
            }));
            for image in images {
                specs.extend(Designer::TRAINED.iter().map(|&designer| Spec {
                    designer,
                    place,
                    ..*image
                }));
            }
        }
        specs
    }

    /// The references of `images`, from the network's output for the images of [`Self::specs`], in their order.
    ///
    /// # Errors
    /// When their number differs, or libtorch fails.
    pub fn new(images: &[Spec], references: &Outputs) -> Result<Self, ModelError> {
        let Some(first) = images.first() else {
            return Err(ModelError::invalid("images", "are none"));
        };
        let places = places(first);
        let (objects, designers) = (Object::all().len() as i64, Designer::TRAINED.len() as i64);
        let (at, shown) = (places.len() as i64, images.len() as i64);
        let block = objects + designers * shown;
        let all = references.features.f_view([at, block, -1])?;
        let features = all.f_narrow(1, 0, objects)?;
        let style = references.style.f_view([at, block, -1])?;
        let over = [0i64, 1];
        let mean = features.f_mean_dim(over.as_slice(), false, Kind::Float)?;
        let deviation = style
            .f_narrow(1, 0, objects)?
            .f_std_dim(over.as_slice(), false, false)?
            .f_clamp_min(1e-6)?;
        Ok(Self {
            places,
            objects: unit(&features.f_sub(&mean)?)?,
            mean,
            designers: style
                .f_narrow(1, objects, designers * shown)?
                .f_div(&deviation)?
                .f_view([at, shown, designers, -1])?,
            deviation,
            of_designers: images.iter().map(|image| image.object).collect(),
        })
    }

    /// Classifies the image of `spec` in row `row` of `images`. References at the place `left_out` are ignored: a
    /// true image must not be compared with itself.
    ///
    /// # Errors
    /// When there is no such row, the image is not covered by the references, or libtorch fails.
    pub fn recognise(
        &self,
        images: &Outputs,
        row: i64,
        spec: &Spec,
        left_out: Option<Place>,
    ) -> Result<Recognised, ModelError> {
        let kept: Vec<i64> = (0..)
            .zip(self.places)
            .filter(|(_, place)| left_out != Some(**place))
            .map(|(index, _)| index)
            .collect();
        let shown = self.of_designers.iter().position(|object| *object == spec.object);
        let (Some(shown), false) = (shown, kept.is_empty()) else {
            return Err(ModelError::invalid("spec", "has no references"));
        };
        let kept = Tensor::f_from_slice(&kept)?;
        let own = unit(&images.features.f_get(row)?.f_sub(&self.mean)?)?;
        let cosines = self.objects.f_index_select(0, &kept)?.f_matmul(&own)?;
        let nearest = Vec::<f32>::try_from(&cosines.f_amax([0i64].as_slice(), false)?)?;
        let right = nearest[spec.object.index()];
        let style = images.style.f_get(row)?.f_div(&self.deviation)?;
        let distance = self
            .designers
            .f_select(1, shown as i64)?
            .f_index_select(0, &kept)?
            .f_sub(&style)?
            .f_square()?
            .f_sum_dim_intlist([2i64].as_slice(), false, Kind::Float)?
            .f_amin([0i64].as_slice(), false)?;
        Ok(Recognised {
            rank: nearest.iter().filter(|&&cosine| cosine >= right).count(),
            designer: distance.f_argmin(0, false)?.f_int64_value(&[])? == spec.designer.index() as i64,
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use tch::Device;

    use super::*;
    use crate::pocket::designers::Scene;

    #[test]
    fn image_is_classified_by_its_nearest_reference() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut images = vec![Spec::sample(&mut rng); 2];
        images.iter_mut().for_each(|image| image.accessory = None);
        let (object, designer) = (images[0].object.index() as i64, images[0].designer.index() as i64);
        images[0].place = Place::Alone(2);
        images[1].place = Place::Alone(4);
        images[1].object = Object::all().nth((object as usize + 1) % 48).unwrap();
        let specs = Rivals::specs(&images);
        assert_eq!(specs.len(), 4 * (48 + 2 * 5));
        assert_eq!(specs.iter().filter(|other| **other == images[0]).count(), 2);
        let common = |spec: &Spec| (spec.scene, spec.colour, spec.accessory);
        assert!(specs.iter().all(|other| common(other) == common(&images[0])));
        tch::manual_seed(4);
        let random = |columns: i64| Tensor::randn([specs.len() as i64, columns], (Kind::Float, Device::Cpu));
        let references = Outputs {
            logits: random(1),
            // A large common part has no influence.
            features: random(40) + 50.0,
            style: random(12),
        };
        let rivals = Rivals::new(&images, &references).unwrap();
        // Equal to the reference at the third place.
        let shown = |object: i64, designer: i64| Outputs {
            logits: random(1),
            features: references.features.narrow(0, 2 * 58 + object, 1) + 0.1,
            style: references.style.narrow(0, 2 * 58 + 48 + designer, 1) + 0.01,
        };
        let of = |outputs: &Outputs, spec, left_out| rivals.recognise(outputs, 0, spec, left_out).unwrap();
        let right = of(&shown(object, designer), &images[0], None);
        assert_eq!((right.rank, right.designer), (1, true));
        let right = of(
            &shown((object + 1) % 48, 5 + designer),
            &images[1],
            Some(images[1].place),
        );
        assert_eq!((right.rank, right.designer), (1, true));
        let wrong = of(&shown((object + 1) % 48, (designer + 1) % 5), &images[0], None);
        assert!(wrong.rank > 1 && !wrong.designer);
        // Its only reference is ignored.
        let left_out = of(&shown(object, designer), &images[0], Some(Place::Alone(3)));
        assert!(left_out.rank > 1);
        let other = Spec {
            object: Object::all().nth((object as usize + 2) % 48).unwrap(),
            scene: Scene::White,
            ..images[0]
        };
        assert!(rivals.recognise(&shown(0, 0), 0, &other, None).is_err());
        assert!(rivals.recognise(&shown(0, 0), 1, &images[0], None).is_err());
    }
}
