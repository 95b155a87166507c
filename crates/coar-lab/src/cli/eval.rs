//! `coar-lab eval`

mod dreambench;
mod methods;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use crate::eval::judge::Judge;
use crate::eval::{EvalOptions, evaluate};
use coar::config::ModelArgs;
use coar_engine::model::ModelError;

#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    /// Train concepts on the held-out subjects and styles of the pocket world, generate images with them, and print
    /// the results.
    Pocket(Box<PocketArgs>),
    Dreambench(Box<dreambench::DreambenchArgs>),
    /// Compare every method on the pocket model: same images, seeds, sampler and judge.
    Methods(Box<methods::MethodsArgs>),
    /// Write docs/evidence.md, its plots and its contact sheets from the JSON of `coar-lab eval methods`.
    Report(methods::ReportArgs),
}

#[derive(Debug, Args)]
pub(super) struct PocketArgs {
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also write every number as JSON to this file; `-` prints it instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Folder for contact sheets.
    #[arg(long, value_name = "DIR")]
    sheets: Option<PathBuf>,
    /// Two subjects, one image per scene, no ablation, no composition.
    #[arg(long)]
    quick: bool,
    /// Measure on the development subjects, which are used to choose settings, instead of the reported ones.
    #[arg(long)]
    development: bool,
    /// Train without captions for the rest of the reference images.
    #[arg(long)]
    no_captions: bool,
    /// Number of held-out subjects.
    #[arg(long)]
    subjects: Option<usize>,
    /// Images for each of the nine scenes.
    #[arg(long)]
    per_scene: Option<usize>,
    /// Parts to skip: base, ablation, styles, compositions.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Default: the model's.
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// Training settings that override the preset's, as JSON: {"steps": 200}
    #[arg(long, value_name = "JSON")]
    subject_settings: Option<String>,
    /// As --subject-settings, for styles.
    #[arg(long, value_name = "JSON")]
    style_settings: Option<String>,
    /// The judge's weights. Default: those shipped with the pocket model.
    #[arg(long, value_name = "FILE")]
    judge: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

impl EvalCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Pocket(args) => args.run(),
            Self::Dreambench(args) => args.run(),
            Self::Methods(args) => args.run(),
            Self::Report(args) => args.run(),
        }
    }
}

fn settings(text: Option<&str>) -> anyhow::Result<serde_json::Map<String, serde_json::Value>> {
    text.map_or_else(
        || Ok(Default::default()),
        |text| {
            serde_json::from_str(text).map_err(|error| anyhow::anyhow!("the settings are not a JSON object: {error}"))
        },
    )
}

/// The judge in `file`, or the one beside the checkpoint.
fn read_judge(file: Option<&Path>, model: &ModelArgs) -> Result<Judge, ModelError> {
    match file {
        Some(file) => Judge::read(file),
        None => Judge::read(&model.files()?.dir.join("judge.safetensors")),
    }
}

impl PocketArgs {
    fn run(self) -> anyhow::Result<()> {
        for part in &self.without {
            anyhow::ensure!(
                ["base", "ablation", "styles", "compositions"].contains(&part.as_str()),
                "--without knows base, ablation, styles and compositions, not `{part}`"
            );
        }
        let (model, info) = self.model.load()?;
        let judge = read_judge(self.judge.as_deref(), &self.model)?;
        let with = |part: &str| !self.quick && !self.without.iter().any(|other| other == part);
        let options = EvalOptions {
            seed: self.seed,
            guidance_scale: self.guidance_scale.unwrap_or(info.default_guidance_scale),
            top_k: info.default_top_k,
            per_scene: self.per_scene.unwrap_or(if self.quick { 1 } else { 4 }).max(1),
            subjects: self.subjects.unwrap_or(if self.quick { 2 } else { 10 }),
            development: self.development,
            captions: !self.no_captions,
            base: with("base") || self.quick,
            ablation: with("ablation"),
            styles: with("styles") || self.quick,
            compositions: with("compositions"),
            subject_settings: settings(self.subject_settings.as_deref())?,
            style_settings: settings(self.style_settings.as_deref())?,
            sheets: self.sheets.clone(),
        };
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let report = evaluate(&model, &judge, &options, &mut |what| bar.set_message(what.to_owned()))?;
        bar.finish_and_clear();
        let json = serde_json::to_string_pretty(&report)?;
        match &self.json {
            Some(file) if file.as_os_str() == "-" => println!("{json}"),
            Some(file) => {
                std::fs::write(file, json)?;
                print!("{report}");
            }
            None => print!("{report}"),
        }
        Ok(())
    }
}
