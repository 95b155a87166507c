//! The report: how the published network and this project's judge rate the frozen model's images of full captions,
//! compared with the true images and with the tokenizer's reconstructions.

use std::time::Instant;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::judge::{Judge, rendered};
use super::rivals::{Recognised, Rivals};
use super::share::Share;
use crate::eval::judges::{EfficientNet, Outputs};
use crate::pocket::designers::training::measure::as_kept;
use crate::pocket::designers::{IMAGE_SIDE, Spec, World, caption_full, is_held_out};
use crate::pocket::world::contact_sheet;
use coar_core::engine::SamplingParams;
use coar_core::image::RgbImage;
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::plan::{DrawSettings, draw_together};

/// Sampling settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sampling {
    pub guidance: f64,
    pub temperature: f64,
    pub top_k: u32,
}

impl std::fmt::Display for Sampling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            guidance,
            temperature,
            top_k,
        } = self;
        write!(f, "guidance {guidance}, temperature {temperature}, top-k {top_k}")
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct ReportOptions {
    pub images: usize,
    pub seed: u64,
    /// Each setting generates all images with the same random numbers; all share the references.
    pub samplings: Vec<Sampling>,
    /// Images on the sheet.
    pub shown: usize,
    /// Also compare with references that have not been through the tokenizer; costs half as much again.
    pub true_references: bool,
}

/// One kind of images.
#[derive(Debug, Clone, Serialize)]
pub struct ReportRow {
    /// `true images`, `tokenizer`, or `drawn`.
    pub images: &'static str,
    /// For generated images.
    pub sampling: Option<Sampling>,
    /// Time to generate one image, several at once.
    pub seconds_per_image: Option<f64>,
    /// By name, in the table's order.
    pub figures: Vec<(String, Share)>,
}

/// All figures of one run, with its settings.
#[derive(Debug, Clone, Serialize)]
pub struct DesignersReport {
    pub model: String,
    pub seed: u64,
    pub images: usize,
    /// SHA-256 of the published network's weights.
    pub efficientnet: String,
    pub judge_steps: i64,
    pub rows: Vec<ReportRow>,
}

/// Figures of the published network: against references reconstructed by the tokenizer, and, for the object, against
/// true ones.
const OBJECT: &str = "object";
const TOP5: &str = "top-5";
const DESIGNER: &str = "designer";
const TRUE_OBJECT: &str = "object, true";

/// Number of images that differ only in object and place, and so share their references.
const TOGETHER_JUDGED: usize = 5;
/// Maximum number of images per batch: on a CPU up to this many are the same, bit for bit, as alone.
const TOGETHER: usize = 40;
const TOKENIZER: &str = "tokenizer";
const COLUMNS: usize = 16;
/// Differs from the seeds of trainings and other measurements.
const SEED: u64 = 0x7265_706f_7274_0000;

/// One kind of images, during judging.
struct Judged {
    images: &'static str,
    sampling: Option<Sampling>,
    seconds_per_image: Option<f64>,
    pictures: Vec<RgbImage>,
    outputs: Outputs,
    /// Against references reconstructed by the tokenizer.
    kept: Vec<Recognised>,
    /// Against true references.
    own: Vec<Recognised>,
}

fn kept(model: &LuminaMgpt, images: &[RgbImage]) -> Result<Vec<RgbImage>, ModelError> {
    as_kept(&model.vqgan, images, model.transformer.device())
}

/// Generates an image of each caption.
fn drawn(
    model: &LuminaMgpt,
    captions: &[String],
    sampling: Sampling,
    seed: u64,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<RgbImage>, ModelError> {
    let settings: Vec<_> = (0..captions.len() as u64)
        .map(|stream| DrawSettings {
            sampling: SamplingParams {
                width: IMAGE_SIDE as u32,
                height: IMAGE_SIDE as u32,
                seed: seed.wrapping_add(stream),
                guidance_scale: sampling.guidance,
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                identity_mask: false,
            },
            images: 0..1,
        })
        .collect();
    let prompts: Vec<&str> = captions.iter().map(String::as_str).collect();
    let mut all = Vec::with_capacity(captions.len());
    for (prompts, settings) in prompts.chunks(TOGETHER).zip(settings.chunks(TOGETHER)) {
        all.extend(draw_together(model, prompts, &[], settings)?);
        progress(&format!("{sampling}: {} of {} images drawn", all.len(), captions.len()));
    }
    Ok(all)
}

/// Images from the training distribution, the same for every model. Consecutive ones differ only in object and
/// place.
fn specs(count: usize, seed: u64) -> Vec<Spec> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ SEED);
    let mut specs: Vec<Spec> = Vec::with_capacity(count);
    while specs.len() < count {
        let alike = specs.len() / TOGETHER_JUDGED * TOGETHER_JUDGED;
        let sampled = Spec::sample(&mut rng);
        let spec = match specs.get(alike) {
            None => sampled,
            Some(first) => Spec {
                object: sampled.object,
                ..first.moved(first.scene, &mut rng)
            },
        };
        let known = specs[alike..].iter().any(|other| other.object == spec.object);
        if !known && !is_held_out(&spec) {
            specs.push(spec);
        }
    }
    specs
}

/// Generates and judges; returns the figures and the sheet, with generated images below the true ones, one row per
/// sampling setting. Calls `progress` with the current activity.
///
/// # Errors
/// When the model does not support the world's image size, the world lacks drawings, or libtorch fails.
pub fn report(
    model: &LuminaMgpt,
    world: &World,
    efficientnet: &EfficientNet,
    judge: &Judge,
    options: &ReportOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<(DesignersReport, RgbImage), ModelError> {
    let _no_grad = tch::no_grad_guard();
    let side = IMAGE_SIDE as u32;
    if !model.sizes().contains(&(side, side)) || options.images == 0 {
        return Err(ModelError::invalid(
            "model",
            format!("must draw images of {side}x{side} pixels, one at least"),
        ));
    }
    let specs = specs(options.images, options.seed);
    let captions: Vec<_> = specs.iter().map(caption_full).collect();

    let truth = rendered(world, &specs)?;
    let mut groups = vec![
        Judged::new("true images", None, None, truth.clone(), efficientnet)?,
        Judged::new(TOKENIZER, None, None, kept(model, &truth)?, efficientnet)?,
    ];
    for &sampling in &options.samplings {
        let begun = Instant::now();
        let images = drawn(model, &captions, sampling, options.seed, progress)?;
        let seconds = begun.elapsed().as_secs_f64() / images.len() as f64;
        groups.push(Judged::new(
            "drawn",
            Some(sampling),
            Some(seconds),
            images,
            efficientnet,
        )?);
    }
    let mut row = 0;
    for alike in specs.chunks(TOGETHER_JUDGED) {
        let references = rendered(world, &Rivals::specs(alike))?;
        let as_kept = Rivals::new(alike, &efficientnet.judge(&kept(model, &references)?)?)?;
        let own = match options.true_references {
            true => Some(Rivals::new(alike, &efficientnet.judge(&references)?)?),
            false => None,
        };
        for spec in alike {
            for group in &mut groups {
                // Captions do not specify positions: generated objects may be anywhere.
                let left_out = group.sampling.is_none().then_some(spec.place);
                group.kept.push(as_kept.recognise(&group.outputs, row, spec, left_out)?);
                if let Some(own) = &own {
                    group.own.push(own.recognise(&group.outputs, row, spec, left_out)?);
                }
            }
            row += 1;
        }
        progress(&format!("{row} of {} images judged", specs.len()));
    }
    let sheet = sheet(&groups, options.shown);
    let rows = groups
        .into_iter()
        .map(|group| group.row(judge, &specs))
        .collect::<Result<_, _>>()?;
    let report = DesignersReport {
        model: model.fingerprint().to_owned(),
        seed: options.seed,
        images: options.images,
        efficientnet: efficientnet.digest().to_owned(),
        judge_steps: judge.steps,
        rows,
    };
    Ok((report, sheet))
}

impl Judged {
    fn new(
        images: &'static str,
        sampling: Option<Sampling>,
        seconds_per_image: Option<f64>,
        pictures: Vec<RgbImage>,
        efficientnet: &EfficientNet,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            images,
            sampling,
            seconds_per_image,
            outputs: efficientnet.judge(&pictures)?,
            pictures,
            kept: vec![],
            own: vec![],
        })
    }

    fn row(self, judge: &Judge, specs: &[Spec]) -> Result<ReportRow, ModelError> {
        let mut figures = vec![
            (
                OBJECT.to_owned(),
                Share::of(self.kept.iter().map(|found| found.rank == 1)),
            ),
            (
                TOP5.to_owned(),
                Share::of(self.kept.iter().map(|found| found.rank <= 5)),
            ),
            (
                DESIGNER.to_owned(),
                Share::of(self.kept.iter().map(|found| found.designer)),
            ),
        ];
        if !self.own.is_empty() {
            let share = Share::of(self.own.iter().map(|found| found.rank == 1));
            figures.push((TRUE_OBJECT.to_owned(), share));
        }
        let by_judge = judge.accuracy(&self.pictures, specs)?;
        figures.extend(
            by_judge
                .into_iter()
                .map(|(name, share)| (format!("judge: {name}"), share)),
        );
        Ok(ReportRow {
            images: self.images,
            sampling: self.sampling,
            seconds_per_image: self.seconds_per_image,
            figures,
        })
    }
}

/// The first images, in whole rows: true ones, and below them those of each sampling setting.
fn sheet(groups: &[Judged], shown: usize) -> RgbImage {
    let count = groups.iter().map(|group| group.pictures.len()).min().unwrap_or(0);
    let columns = COLUMNS.min(count).max(1);
    let mut images = Vec::new();
    for row in 0..shown.min(count) / columns {
        for group in groups.iter().filter(|group| group.images != TOKENIZER) {
            images.extend_from_slice(&group.pictures[row * columns..][..columns]);
        }
    }
    contact_sheet(&images, columns)
}

impl std::fmt::Display for DesignersReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "model {}  {} images, seed {}  judge of {} steps",
            self.model, self.images, self.seed, self.judge_steps
        )?;
        let names = self.rows.first().map_or(&[][..], |row| &row.figures);
        let names: Vec<_> = names.iter().map(|(name, _)| format!("{name:>17}")).collect();
        writeln!(f, "\n{:<48} {}", "", names.join("  "))?;
        for row in &self.rows {
            let images = match row.sampling {
                Some(sampling) => format!("{}, {sampling}", row.images),
                None => row.images.to_owned(),
            };
            let values: Vec<_> = row
                .figures
                .iter()
                .map(|(_, share)| format!("{:>17}", share.to_string()))
                .collect();
            writeln!(f, "{images:<48} {}", values.join("  "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::eval::designers::{JudgeRecipe, train_judge};
    use crate::eval::judges::efficientnet::tests::small;
    use crate::pocket::designers::tests::synthetic_world;
    use crate::pocket::designers::training::Budget;
    use crate::pocket::designers::training::tokenizer::tokenizer_config;
    use crate::pocket::designers::training::transformer::{TransformerRecipe, transformer_config};
    use crate::pocket::designers::words;
    use crate::pocket::parameters::Parameters;
    use crate::pocket::vocabulary::tokenizer_of;
    use coar_core::tokenizer::TextTokenizer;
    use coar_engine::model::lumina::Parts;

    /// A model of the world with random weights.
    fn model() -> LuminaMgpt {
        let recipe = TransformerRecipe {
            hidden: 32,
            layers: 1,
            heads: 2,
            intermediate: 48,
            ..TransformerRecipe::default()
        };
        let mut network = tokenizer_config();
        network.n_embed = 64;
        let vocabulary = tokenizer_of(network.n_embed, &words()).to_string();
        let (weights, vqgan_weights) = (Parameters::default(), Parameters::default());
        LuminaMgpt::assemble(Parts {
            config: transformer_config(&recipe, network.n_embed),
            tokenizer: TextTokenizer::from_bytes(vocabulary.as_bytes()).unwrap(),
            vqgan_config: network,
            weights: &weights,
            vqgan_weights: &vqgan_weights,
            fingerprint: "of the test".to_owned(),
            target_size: Some(IMAGE_SIDE as u32),
        })
        .unwrap()
    }

    #[test]
    fn report_has_every_kind_of_images_and_figures() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = JudgeRecipe {
            steps: 1,
            batch: 2,
            ..JudgeRecipe::default()
        };
        let (world, network) = (synthetic_world(), small());
        let (judge, _) = train_judge(&recipe, world, dir.path(), Budget::default()).unwrap();
        let of = |temperature| Sampling {
            guidance: 1.0,
            temperature,
            top_k: 5,
        };
        let mut options = ReportOptions {
            images: 3,
            seed: 5,
            samplings: vec![of(0.5), of(1.0)],
            shown: 3,
            true_references: true,
        };
        let model = model();
        let (report, sheet) =
            report(&model, world, &network, &judge, &options, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"));
        let kinds: Vec<_> = report.rows.iter().map(|row| row.images).collect();
        assert_eq!(kinds, ["true images", TOKENIZER, "drawn", "drawn"]);
        let figure = |row: usize, name: &str| {
            let found = report.rows[row].figures.iter().find(|(own, _)| own == name);
            found.unwrap_or_else(|| panic!("{name}")).1
        };
        for name in [OBJECT, TOP5, DESIGNER, TRUE_OBJECT] {
            assert!((0..4).all(|row| figure(row, name).of == 3), "{name}");
        }
        assert_eq!(figure(2, "judge: scene").of, 3);
        assert!(report.rows[3].seconds_per_image.is_some());
        assert_eq!((sheet.width, sheet.height), (3 * 128 + 4, 3 * 128 + 4));
        options.images = 0;
        assert!(super::report(&model, world, &network, &judge, &options, &mut |_| ()).is_err());
    }

    #[test]
    fn images_follow_training_and_share_references_in_fives() {
        let specs = specs(33, 7);
        assert_eq!(specs.len(), 33);
        assert_eq!(specs[..12], super::specs(12, 7));
        assert!(specs[..5] != super::specs(5, 8));
        assert!(!specs.iter().any(is_held_out));
        for alike in specs.chunks(5) {
            let common = |spec: &Spec| (spec.designer, spec.scene, spec.colour, spec.accessory);
            assert!(alike.iter().all(|spec| common(spec) == common(&alike[0])));
            let objects: std::collections::BTreeSet<_> = alike.iter().map(|spec| spec.object).collect();
            assert_eq!(objects.len(), alike.len());
        }
    }

    fn figures(shares: &[bool]) -> Vec<(String, Share)> {
        vec![(OBJECT.to_owned(), Share::of(shares.iter().copied()))]
    }

    #[test]
    fn the_table_names_every_row_and_figure() {
        let sampling = Sampling {
            guidance: 1.5,
            temperature: 0.7,
            top_k: 20,
        };
        let row = |images, sampling, shares: &[bool]| ReportRow {
            images,
            sampling,
            seconds_per_image: None,
            figures: figures(shares),
        };
        let report = DesignersReport {
            model: "abc".to_owned(),
            seed: 3,
            images: 2,
            efficientnet: String::new(),
            judge_steps: 7,
            rows: vec![
                row("true images", None, &[true, true]),
                row("drawn", Some(sampling), &[true, false]),
            ],
        };
        let text = report.to_string();
        for part in [
            "model abc",
            "seed 3",
            "object",
            "true images",
            "drawn, guidance 1.5, temperature 0.7, top-k 20",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains("0.500 [0.09-0.91]"), "{text}");
        assert!(serde_json::to_string(&report).unwrap().contains("\"temperature\":0.7"));
    }
}
