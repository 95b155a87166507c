//! Held-out styles from one image.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value};

use super::measures::palette_similarity;
use super::report::{Report, Row, Values};
use super::run::{Run, SIZE, Trained, accuracy, values, with_overrides};
use crate::pocket::measure::as_drawn;
use crate::pocket::world::{
    Class, HeldOutStyle, Scene, Spec, development_styles, held_out_styles, render, scene_phrase,
};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::training::Reference;

/// A held-out style with images of other things in it.
pub(super) struct StyleCase {
    pub held_out: &'static HeldOutStyle,
    pub trained: Trained,
}

impl Run<'_> {
    /// The content of the style's single reference, and the image itself.
    fn style_reference(&self, style: &HeldOutStyle) -> (String, RgbImage) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed ^ 0x57_1e);
        let mut spec = Spec::sample(&mut rng);
        (spec.class, spec.scene) = (Class::House, Scene::Grass);
        style.apply(&mut spec);
        let caption = format!("a picture of a {} {}", spec.class.name(), scene_phrase(spec.scene));
        (caption, render(&spec, SIZE.0, SIZE.1))
    }

    /// Trains a style on its single image.
    pub(super) fn train_style(
        &self,
        held_out: &HeldOutStyle,
        overrides: &Map<String, Value>,
    ) -> Result<Trained, ModelError> {
        let (caption, reference) = self.style_reference(held_out);
        let mut spec = self.spec(ConceptKind::Style, held_out.name, None)?;
        if self.options.captions {
            spec.captions = vec![caption];
        }
        self.train(with_overrides(&spec, overrides)?, std::slice::from_ref(&reference))
    }

    /// A style's rows: plain prompt, best description, concept.
    pub(super) fn style(&self, held_out: &HeldOutStyle, trained: &Trained) -> Result<Vec<Row>, ModelError> {
        let placeholder = format!("in <{}> style", held_out.name);
        let mut sheet = vec![self.style_reference(held_out).1];
        let mut rows = Vec::new();
        for (condition, phrase, file) in [
            ("plain", String::new(), None),
            ("described", held_out.description.to_owned(), None),
            ("concept", placeholder, Some(&trained.file)),
        ] {
            let (mut values, drawn) = self.measure_style(held_out, &phrase, file)?;
            values.push(("seconds".to_owned(), if file.is_some() { trained.seconds } else { 0.0 }));
            rows.push(Row {
                part: "style".into(),
                of: held_out.name.into(),
                condition: condition.into(),
                values,
            });
            sheet.extend(drawn.iter().step_by(self.options.per_scene).cloned());
        }
        self.sheet(&format!("style-{}", held_out.name), &sheet, 14)?;
        Ok(rows)
    }

    pub(super) fn styles(
        &self,
        report: &mut Report,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<StyleCase>, ModelError> {
        let mut cases = Vec::new();
        let chosen = if self.options.development {
            development_styles()
        } else {
            held_out_styles()
        };
        for held_out in chosen {
            progress(held_out.name);
            let trained = self.train_style(held_out, &Map::new())?;
            report.rows.extend(self.style(held_out, &trained)?);
            cases.push(StyleCase { held_out, trained });
        }
        for condition in ["plain", "described", "concept"] {
            report.add_mean("style", condition);
        }
        Ok(cases)
    }

    fn measure_style(
        &self,
        held_out: &HeldOutStyle,
        phrase: &str,
        file: Option<&ConceptFile>,
    ) -> Result<(Values, Vec<RgbImage>), ModelError> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed ^ 0x57_1f);
        let (mut prompts, mut likes, mut references) = (vec![], vec![], vec![]);
        let (mut classes, mut scenes) = (vec![], vec![]);
        for &scene in Scene::ALL {
            let class = self.some_class(&mut rng);
            let prompt = format!("a picture of a {} {} {phrase}", class.name(), scene_phrase(scene));
            prompts.push(prompt.trim_end().to_owned());
            let mut spec = Spec {
                class,
                scene,
                ..Spec::sample(&mut rng)
            };
            held_out.apply(&mut spec);
            let unseen = render(&spec, SIZE.0, SIZE.1);
            let codes = self.model.encode_image(&unseen)?;
            let head = format!("a picture of a {} {}", class.name(), scene_phrase(scene));
            references.push(match file {
                Some(file) => Reference::new(
                    self.model,
                    (&format!("{head} in "), file.tensors.text_tokens, " style"),
                    codes,
                    SIZE,
                )?,
                None => Reference::new(self.model, (format!("{head} {phrase}").trim_end(), 0, ""), codes, SIZE)?,
            });
            likes.push(unseen);
            for _ in 0..self.options.per_scene {
                classes.push(class.index() as i64);
                scenes.push(scene.index() as i64);
            }
        }
        let concepts: Vec<&ConceptFile> = file.into_iter().collect();
        let drawn = self.draw(&prompts, &concepts, true, 500, self.options.per_scene)?;
        let judgement = self.judge.judge(&drawn)?;
        let kept = as_drawn(&self.model.vqgan, &likes)?;
        let palette: f64 = drawn
            .iter()
            .enumerate()
            .map(|(index, picture)| palette_similarity(picture, &kept[index / self.options.per_scene]))
            .sum();
        let styles = vec![held_out.style.index() as i64; drawn.len()];
        let row = values([
            ("loss", self.code_loss(&references, file)?),
            ("style", accuracy(&judgement, "style", &styles)),
            ("class", accuracy(&judgement, "class", &classes)),
            ("scene", accuracy(&judgement, "scene", &scenes)),
            ("palette", palette / drawn.len() as f64),
        ]);
        Ok((row, drawn))
    }
}
