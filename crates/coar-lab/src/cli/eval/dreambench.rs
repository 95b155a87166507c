//! `coar-lab eval dreambench`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::settings;
use crate::eval::dreambench::{
    self, Choice, DataFolder, Judges, Networks, OutFolder, Plan, RunOptions, Settings, numbers, score, write_all,
};
use coar::config::ModelArgs;
use coar_core::training::Preset;

/// Run DreamBench: train a concept for each subject, draw every prompt, score, write a report.
///
/// The scores need DINO and CLIP (docs/judges.md); without them everything is drawn and nothing scored.
///
/// All of it:      coar-lab eval dreambench --data DIR --out DIR --model DIR --dino DIR --clip DIR
/// A part of it:   coar-lab eval dreambench --data DIR --out DIR --subjects dog,can --prompts 0-4
/// Scores later:   coar-lab eval dreambench --data DIR --out DIR --report-only --dino DIR --clip DIR
///
/// DIR of --data has a folder of images for each subject, as the DreamBooth dataset. The same command goes on where an
/// interrupted one was; several at once on the same --out share the work.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(in crate::cli) struct DreambenchArgs {
    /// Folder with a folder of images for each subject; its prompts_and_classes.txt counts instead of the dataset's own.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder for concepts, images, scores and report.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of DINO ViT-S/16 (`facebook/dino-vits16`).
    #[arg(long, value_name = "DIR", requires = "clip")]
    dino: Option<PathBuf>,
    /// Folder of CLIP ViT-B/32 (`openai/clip-vit-base-patch32`).
    #[arg(long, value_name = "DIR", requires = "dino")]
    clip: Option<PathBuf>,
    /// Only these subjects, by name. Default: all.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    subjects: Option<Vec<String>>,
    /// Only these of each subject's prompts, counted from 0, such as 0,3,5-9. Default: all.
    #[arg(long, value_name = "NUMBERS")]
    prompts: Option<String>,
    /// Images for each prompt.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pictures: u32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Default: the model's.
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// Codes to sample from at each step. Default: the model's.
    #[arg(long)]
    top_k: Option<u32>,
    /// Training defaults: `paper` or `pocket`. Default: the model's.
    #[arg(long, value_parser = preset, value_name = "PRESET")]
    preset: Option<Preset>,
    /// Training settings that override the preset's, as JSON: {"steps": 200}
    #[arg(long, value_name = "JSON")]
    settings: Option<String>,
    /// Generate nothing: score existing images and write the report.
    #[arg(long)]
    report_only: bool,
    #[command(flatten)]
    model: ModelArgs,
}

fn preset(text: &str) -> Result<Preset, String> {
    match text {
        "paper" => Ok(Preset::Paper),
        "pocket" => Ok(Preset::Pocket),
        "designers" => Ok(Preset::Designers),
        other => Err(format!("is `{other}`; expected `paper` or `pocket`")),
    }
}

/// How much of a training may be lost if the process is killed.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);

impl DreambenchArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let data = DataFolder::open(&self.data)?;
        let choice = Choice {
            subjects: self.subjects.clone(),
            prompts: match &self.prompts {
                Some(text) => Some(numbers(text).map_err(|problem| anyhow::anyhow!("--prompts {problem}"))?),
                None => None,
            },
        };
        // Before the model is loaded: a wrong name is reported at once.
        let plan = Plan::new(&data.catalogue, &choice, self.pictures)?;
        // Opened before anything is generated: a broken folder is reported at once, not after days.
        let judges = self.judges()?;
        let bar = ProgressBar::new(plan.total());
        bar.set_style(ProgressStyle::with_template(
            "{wide_msg}\n{wide_bar} {pos}/{len}  eta {eta}",
        )?);
        let (folder, settings, plan) = match self.report_only {
            true => {
                let (folder, settings) = OutFolder::open(&self.out, &data.catalogue)?;
                let plan = Plan::new(&data.catalogue, &choice, settings.pictures)?;
                (folder, settings, plan)
            }
            false => {
                let (folder, settings) = self.draw(&data, &plan, &bar)?;
                (folder, settings, plan)
            }
        };
        let reported = self.report(&data, (&folder, &settings), (&plan, judges.as_ref()), &bar);
        bar.finish_and_clear();
        reported
    }

    /// Trains and generates until everything is complete.
    fn draw(&self, data: &DataFolder, plan: &Plan, bar: &ProgressBar) -> anyhow::Result<(OutFolder, Settings)> {
        let (model, info) = self.model.load()?;
        let guidance_scale = self.guidance_scale.unwrap_or(info.default_guidance_scale);
        anyhow::ensure!(
            guidance_scale.is_finite() && (0.0..=100.0).contains(&guidance_scale),
            "--guidance-scale is {guidance_scale}; expected 0 to 100"
        );
        let options = RunOptions {
            seed: self.seed,
            guidance_scale,
            top_k: self.top_k.unwrap_or(info.default_top_k),
            preset: self.preset.unwrap_or(info.preset),
            training: settings(self.settings.as_deref())?,
            checkpoint_every: CHECKPOINT_EVERY,
        };
        let settings = dreambench::settings(&model, info.preset, &data.catalogue, self.pictures, &options)?;
        let folder = OutFolder::create(&self.out, &settings)?;
        // Reported before hours of work.
        for warning in dreambench::warnings(&settings, self.dino.is_some()) {
            bar.suspend(|| eprintln!("! {warning}"));
        }
        dreambench::run(&model, data, (&folder, &settings), (plan, &options), &mut |now| {
            bar.set_position(now.done);
            bar.set_message(now.doing.to_owned());
        })?;
        Ok((folder, settings))
    }

    /// Scores and writes; of several workers that end at once only one does.
    fn report(
        &self,
        data: &DataFolder,
        (folder, settings): (&OutFolder, &Settings),
        (plan, judges): (&Plan, Option<&Networks>),
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let Some(claim) = folder.claim("report")? else {
            bar.suspend(|| println!("another worker is writing the report"));
            return Ok(());
        };
        bar.reset();
        bar.set_message("scoring");
        let results = score(
            data,
            (folder, settings),
            plan,
            judges.map(|judges| judges as &dyn Judges),
            &mut |pictures| bar.inc(pictures),
        )?;
        bar.reset();
        bar.set_message("writing the report");
        let page = write_all(&results, folder, &mut |pictures| bar.inc(pictures))?;
        drop(claim);
        if results.drawn == results.planned {
            folder.tidy();
        }
        bar.suspend(|| println!("{results}\n{}", page.display()));
        Ok(())
    }

    /// DINO and CLIP on the model's device, if their folders are given.
    fn judges(&self) -> anyhow::Result<Option<Networks>> {
        let (Some(dino), Some(clip)) = (&self.dino, &self.clip) else {
            return Ok(None);
        };
        for (flag, dir) in [("--dino", dino), ("--clip", clip)] {
            anyhow::ensure!(dir.is_dir(), "{flag} is {}, which is not a folder", dir.display());
        }
        // With --report-only no model is loaded, which would have set the threads.
        if self.model.threads > 0 {
            tch::set_num_threads(self.model.threads);
        }
        Ok(Some(Networks::open(dino, clip, self.model.source().device()?)?))
    }
}
