//! Subject and style in one prompt, without training: identity mask on and off.
//!
//! With N = all layers the context positions are overwritten at every layer's input, so what they attend to cannot
//! matter; the mask is measured with concepts of half the layers.

use serde_json::{Map, Value, json};

use super::judge::{HEADS, answers};
use super::measures::palette_similarity;
use super::report::{Report, Row, Values};
use super::run::{Run, SIZE, Trained, accuracy, values};
use super::styles::StyleCase;
use super::subjects::Subject;
use crate::pocket::measure::as_drawn;
use crate::pocket::world::{HeldOutStyle, Scene, render, scene_phrase};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_engine::model::ModelError;

/// A way of combining a subject and a style in a prompt.
struct Variant<'a> {
    subject: &'a Subject,
    style: &'a HeldOutStyle,
    files: Vec<&'a ConceptFile>,
    mask: bool,
    /// Names the subject only by its noun.
    plain_subject: bool,
    condition: &'a str,
}

/// A subject and a style, each learned at all layers and at few: with few, the mask has an effect.
pub(super) struct Pair<'a> {
    pub subject: &'a Subject,
    pub style: &'a HeldOutStyle,
    pub all: (&'a ConceptFile, &'a ConceptFile),
    pub few: (&'a ConceptFile, &'a ConceptFile),
}

/// Subjects to use.
const SUBJECTS: usize = 4;

impl Run<'_> {
    pub(super) fn compositions(
        &self,
        report: &mut Report,
        subjects: &[(Subject, Trained)],
        styles: &[StyleCase],
        progress: &mut dyn FnMut(&str),
    ) -> Result<(), ModelError> {
        let few = self.few_layers();
        let shallow_styles = styles
            .iter()
            .map(|case| self.train_style(case.held_out, &few))
            .collect::<Result<Vec<_>, _>>()?;
        for (subject, trained) in subjects.iter().take(SUBJECTS) {
            progress(&format!("composition, {}", subject.held_out.name));
            let shallow = self.train_subject(subject, &few)?;
            for (case, shallow_style) in styles.iter().zip(&shallow_styles) {
                let pair = Pair {
                    subject,
                    style: case.held_out,
                    all: (&trained.file, &case.trained.file),
                    few: (&shallow.file, &shallow_style.file),
                };
                report.rows.extend(self.composition(&pair)?);
            }
        }
        let names: Vec<String> = report
            .rows
            .iter()
            .filter(|r| r.part == "composition")
            .map(|r| r.condition.clone())
            .collect();
        let mut seen = Vec::new();
        for name in names {
            if !seen.contains(&name) {
                report.add_mean("composition", &name);
                seen.push(name);
            }
        }
        Ok(())
    }

    /// Settings of concepts for which the identity mask has an effect.
    pub(super) fn few_layers(&self) -> Map<String, Value> {
        let half = (self.model.transformer.config().num_hidden_layers / 2).max(1);
        Map::from_iter([("layers".to_owned(), json!(half))])
    }

    /// The rows of a subject with a style.
    pub(super) fn composition(&self, pair: &Pair) -> Result<Vec<Row>, ModelError> {
        let half = pair.few.0.header.spec.layers;
        let (all, few) = (pair.all, pair.few);
        let variants: [(String, Vec<&ConceptFile>, bool, bool); 5] = [
            ("subject alone".to_owned(), vec![all.0], true, false),
            ("style alone".to_owned(), vec![all.1], true, true),
            ("both, N = all".to_owned(), vec![all.0, all.1], true, false),
            (format!("both, N = {half}, mask"), vec![few.0, few.1], true, false),
            (format!("both, N = {half}, none"), vec![few.0, few.1], false, false),
        ];
        let mut rows = Vec::new();
        for (condition, files, mask, plain_subject) in variants {
            let variant = Variant {
                subject: pair.subject,
                style: pair.style,
                files,
                mask,
                plain_subject,
                condition: &condition,
            };
            let values = self.compose(&variant)?;
            rows.push(Row {
                part: "composition".into(),
                of: format!("{}+{}", pair.subject.held_out.name, pair.style.name),
                condition,
                values,
            });
        }
        Ok(rows)
    }

    fn compose(&self, variant: &Variant) -> Result<Values, ModelError> {
        let Variant {
            subject,
            style,
            files,
            mask,
            plain_subject,
            condition,
        } = variant;
        let noun = subject.held_out.class.name();
        let styled = files.iter().any(|file| file.header.kind == ConceptKind::Style);
        let who = if *plain_subject {
            format!("a {noun}")
        } else {
            format!("<{}> {noun}", subject.held_out.name)
        };
        let how = if styled {
            format!(" in <{}> style", style.name)
        } else {
            String::new()
        };
        let medium = if styled { "picture" } else { "photo" };
        let per_scene = self.options.per_scene.div_ceil(2);
        let (mut prompts, mut wanted, mut likes) = (vec![], vec![], vec![]);
        for (index, &scene) in Scene::ALL.iter().enumerate() {
            prompts.push(format!("a {medium} of {who} {}{how}", scene_phrase(scene)));
            // The subject in this scene as the world renders it in the held-out style.
            let mut spec = subject.unseen[2 * index].0.clone();
            style.apply(&mut spec);
            for _ in 0..per_scene {
                wanted.push(answers(&spec));
            }
            likes.push(render(&spec, SIZE.0, SIZE.1));
        }
        let drawn = self.draw(&prompts, files, *mask, 700, per_scene)?;
        let how_named = condition.replace([' ', ',', '='], "");
        let name = format!("composition-{}-{}-{how_named}", subject.held_out.name, style.name);
        self.sheet(&name, &drawn, 9)?;
        let kept = as_drawn(&self.model.vqgan, &likes)?;
        let (judgement, ideal) = (self.judge.judge(&drawn)?, self.judge.judge(&kept)?);
        let at = |head: &str| HEADS.iter().position(|(name, _)| *name == head).unwrap_or(0);
        let share = |head: &str| {
            accuracy(
                &judgement,
                head,
                &wanted.iter().map(|w| w[at(head)]).collect::<Vec<_>>(),
            )
        };
        let (mut cosine, mut palette) = (0.0, 0.0);
        for (index, picture) in drawn.iter().enumerate() {
            let like = index / per_scene;
            cosine += judgement
                .features
                .f_get(index as i64)?
                .f_dot(&ideal.features.f_get(like as i64)?)?
                .f_double_value(&[])?;
            palette += palette_similarity(picture, &kept[like]);
        }
        let n = drawn.len() as f64;
        Ok(values([
            ("style", share("style")),
            ("class", share("class")),
            ("scene", share("scene")),
            ("pattern", share("pattern")),
            ("accessory", share("accessory")),
            ("feature", cosine / n),
            ("palette", palette / n),
        ]))
    }
}
