//! Held-out subjects: plain prompt, best description, concept.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, json};

use super::judge::{HEADS, answers};
use super::measures::colour_similarity;
use super::report::{Report, Row, Values};
use super::run::{REFERENCE_SCENES, Run, SIZE, Trained, accuracy, values, with_overrides};
use crate::pocket::measure::as_drawn;
use crate::pocket::world::{
    HeldOutSubject, Scene, Spec, development_subjects, held_out_subjects, render, scene_phrase, subject_phrase,
};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::training::Reference;

/// A held-out subject with its images.
pub(super) struct Subject {
    pub held_out: &'static HeldOutSubject,
    pub references: Vec<RgbImage>,
    /// Two unseen images per scene.
    pub unseen: Vec<(Spec, RgbImage)>,
}

/// A prompt by scene.
pub(super) struct Condition<'a> {
    pub name: &'static str,
    pub concept: Option<&'a ConceptFile>,
    /// Text before the slot, and after it up to the scene; without a concept all text is in the first part.
    pub before: String,
    pub after: String,
}

impl<'a> Condition<'a> {
    pub fn plain(noun: &str) -> Self {
        Self {
            name: "plain",
            concept: None,
            before: format!("a photo of a {noun}"),
            after: String::new(),
        }
    }
    pub fn described(spec: &Spec) -> Self {
        Self {
            name: "described",
            concept: None,
            before: format!("a photo of a {}", subject_phrase(spec)),
            after: String::new(),
        }
    }
    pub fn concept(name: &'static str, noun: &str, file: &'a ConceptFile) -> Self {
        Self {
            name,
            concept: Some(file),
            before: "a photo of ".to_owned(),
            after: format!(" {noun}"),
        }
    }

    fn prompt(&self, scene: Scene) -> String {
        let slot = self
            .concept
            .map_or_else(String::new, |file| format!("<{}>", file.header.name));
        format!("{}{slot}{} {}", self.before, self.after, scene_phrase(scene))
    }
}

impl Run<'_> {
    pub(super) fn subject(&self, held_out: &'static HeldOutSubject) -> Subject {
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        rng.set_stream(held_out.name.bytes().map(u64::from).sum());
        let mut picture = |scene: Scene| {
            let spec = held_out.spec(scene, &mut rng);
            let picture = render(&spec, SIZE.0, SIZE.1);
            (spec, picture)
        };
        let references = REFERENCE_SCENES.iter().map(|&scene| picture(scene).1).collect();
        let unseen = Scene::ALL
            .iter()
            .flat_map(|&scene| [scene, scene])
            .map(&mut picture)
            .collect();
        Subject {
            held_out,
            references,
            unseen,
        }
    }

    pub(super) fn train_subject(
        &self,
        subject: &Subject,
        overrides: &Map<String, serde_json::Value>,
    ) -> Result<Trained, ModelError> {
        let noun = subject.held_out.class.name();
        let mut spec = self.spec(ConceptKind::Subject, subject.held_out.name, Some(noun))?;
        if self.options.captions {
            spec.captions = REFERENCE_SCENES
                .iter()
                .map(|&scene| scene_phrase(scene).to_owned())
                .collect();
        }
        self.train(with_overrides(&spec, overrides)?, &subject.references)
    }

    /// Generates and judges one condition; returns the row's values and the images.
    pub(super) fn measure_subject(
        &self,
        subject: &Subject,
        condition: &Condition,
    ) -> Result<(Values, Vec<RgbImage>), ModelError> {
        let tokens = condition.concept.map_or(0, |file| file.tensors.text_tokens);
        let references = subject
            .unseen
            .iter()
            .map(|(spec, picture)| {
                let codes = self.model.encode_image(picture)?;
                let after = format!("{} {}", condition.after, scene_phrase(spec.scene));
                Reference::new(self.model, (&condition.before, tokens, &after), codes, SIZE)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let loss = self.code_loss(&references, condition.concept)?;
        let (mut wanted, mut likes) = (Vec::new(), Vec::new());
        let kept = as_drawn(
            &self.model.vqgan,
            &subject.unseen.iter().map(|(_, p)| p.clone()).collect::<Vec<_>>(),
        )?;
        let concepts: Vec<&ConceptFile> = condition.concept.into_iter().collect();
        let prompts: Vec<String> = Scene::ALL.iter().map(|&scene| condition.prompt(scene)).collect();
        let drawn = self.draw(&prompts, &concepts, true, 0, self.options.per_scene)?;
        for index in 0..Scene::ALL.len() {
            let spec = &subject.unseen[2 * index].0;
            for copy in 0..self.options.per_scene {
                wanted.push(answers(spec));
                likes.push(2 * index + copy % 2);
            }
        }
        let judgement = self.judge.judge(&drawn)?;
        let unseen = self.judge.judge(&kept)?;
        let at = |head: &str| HEADS.iter().position(|(name, _)| *name == head).unwrap_or(0);
        let share = |head: &str| {
            accuracy(
                &judgement,
                head,
                &wanted.iter().map(|w| w[at(head)]).collect::<Vec<_>>(),
            )
        };
        let attributes = ["colour1", "colour2", "pattern", "accessory"].map(share);
        let (mut cosine, mut colour) = (0.0, 0.0);
        for (index, &like) in likes.iter().enumerate() {
            let product = judgement
                .features
                .f_get(index as i64)?
                .f_dot(&unseen.features.f_get(like as i64)?)?;
            cosine += product.f_double_value(&[])?;
            colour += colour_similarity(&drawn[index], &kept[like]);
        }
        let n = drawn.len() as f64;
        let row = values([
            ("loss", loss),
            ("class", share("class")),
            ("scene", share("scene")),
            ("attrib", attributes.iter().sum::<f64>() / 4.0),
            ("feature", cosine / n),
            ("colour", colour / n),
        ]);
        Ok((row, drawn))
    }

    pub(super) fn subjects(
        &self,
        report: &mut Report,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<(Subject, Trained)>, ModelError> {
        let chosen = if self.options.development {
            development_subjects()
        } else {
            held_out_subjects()
        };
        let mut all = Vec::new();
        let mut overview = Vec::new();
        for held_out in chosen.iter().take(self.options.subjects) {
            progress(held_out.name);
            let subject = self.subject(held_out);
            let trained = self.train_subject(&subject, &Map::new())?;
            let noun = held_out.class.name();
            let spec = &subject.unseen[0].0;
            let conditions = [
                Condition::plain(noun),
                Condition::described(spec),
                Condition::concept("concept", noun, &trained.file),
            ];
            let mut sheet: Vec<RgbImage> = subject.references.clone();
            sheet.resize(
                9,
                RgbImage {
                    width: SIZE.0,
                    height: SIZE.1,
                    rgb: vec![255; 3 * (SIZE.0 * SIZE.1) as usize],
                },
            );
            for condition in &conditions {
                let (mut row, drawn) = self.measure_subject(&subject, condition)?;
                let seconds = if condition.concept.is_some() {
                    trained.seconds
                } else {
                    0.0
                };
                row.push(("seconds".to_owned(), seconds));
                report.rows.push(Row {
                    part: "subject".into(),
                    of: held_out.name.into(),
                    condition: condition.name.into(),
                    values: row,
                });
                sheet.extend(drawn.iter().step_by(self.options.per_scene).cloned());
            }
            overview.extend(sheet[..3].iter().cloned());
            overview.extend(sheet[sheet.len() - 9..].iter().cloned());
            self.sheet(&format!("subject-{}", held_out.name), &sheet, 9)?;
            all.push((subject, trained));
        }
        if !overview.is_empty() {
            self.sheet("subjects", &overview, 12)?;
        }
        for condition in ["plain", "described", "concept"] {
            report.add_mean("subject", condition);
        }
        Ok(all)
    }

    /// Only context tokens, with each term, with both. The terms act on image context tokens, so these are enabled.
    pub(super) fn ablation(&self, report: &mut Report, progress: &mut dyn FnMut(&str)) -> Result<(), ModelError> {
        let chosen = if self.options.development {
            development_subjects()
        } else {
            held_out_subjects()
        };
        let off = json!(0.0);
        let variants: [(&'static str, Vec<(&str, serde_json::Value)>); 5] = [
            ("text tokens only", vec![("image_tokens", json!(0))]),
            (
                "context tokens",
                vec![("prior_weight", off.clone()), ("regularisation_weight", off.clone())],
            ),
            ("+ DPP", vec![("regularisation_weight", off.clone())]),
            ("+ CASR", vec![("prior_weight", off)]),
            ("+ both", vec![]),
        ];
        for held_out in chosen.iter().take(self.options.subjects.min(3)) {
            let subject = self.subject(held_out);
            for (name, changes) in &variants {
                progress(&format!("ablation, {}: {name}", held_out.name));
                let mut overrides = Map::from_iter([("image_tokens".to_owned(), json!(1))]);
                overrides.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
                let trained = self.train_subject(&subject, &overrides)?;
                let condition = Condition::concept(name, held_out.class.name(), &trained.file);
                let (mut row, _) = self.measure_subject(&subject, &condition)?;
                row.push(("seconds".to_owned(), trained.seconds));
                report.rows.push(Row {
                    part: "ablation".into(),
                    of: held_out.name.into(),
                    condition: (*name).into(),
                    values: row,
                });
            }
        }
        for (name, _) in &variants {
            report.add_mean("ablation", name);
        }
        Ok(())
    }
}
