//! `coar-lab eval methods` and `coar-lab eval report`

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{read_judge, settings};
use crate::eval::methods::evidence::{table, write_report};
use crate::eval::methods::{Evidence, MethodsOptions, evaluate_methods};
use coar::config::ModelArgs;

#[derive(Debug, Args)]
pub(in crate::cli) struct MethodsArgs {
    /// The first seed. A seed determines the reference images, the training and the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of seeds. Default: 3, with --quick 1.
    #[arg(long)]
    seeds: Option<u64>,
    /// Two subjects, one seed, two images per scene, no ablations.
    #[arg(long)]
    quick: bool,
    /// Also write every row as JSON to this file; `-` prints it instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rows of an earlier --json are reused if their inputs are unchanged; only the others are measured.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Folder for finished cells: an interrupted run resumes from there.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Only the I-th of N parts of the cells (from 1), for several processes on one --dir; a final command without
    /// --part collects them.
    #[arg(long, value_name = "I/N", requires = "dir")]
    part: Option<String>,
    /// Measure nothing: only collect what is finished, in --dir and --from.
    #[arg(long, conflicts_with = "part")]
    finished: bool,
    /// Only these methods.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    methods: Vec<String>,
    /// Held-out subjects: a number, or names.
    #[arg(long, value_delimiter = ',', value_name = "N|NAMES")]
    subjects: Vec<String>,
    /// The development subjects, which are used to choose settings, instead of the reported ones.
    #[arg(long)]
    development: bool,
    /// Also vary CoAR's settings one at a time.
    #[arg(long)]
    ablations: bool,
    /// Also styles from one image, and every subject with every style.
    #[arg(long)]
    styles: bool,
    /// Also the same subjects in shades without a caption word.
    #[arg(long)]
    between: bool,
    /// Write a contact sheet of each subject, from the finished cells, to this folder: the one beside the report,
    /// which includes them.
    #[arg(long, value_name = "DIR", requires = "dir")]
    sheets: Option<PathBuf>,
    /// Images for each of the nine scenes. Default: 4, with --quick 2.
    #[arg(long)]
    per_scene: Option<usize>,
    /// Default: the model's.
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// Settings of single methods that override the preset's, as JSON: {"dreambooth": {"steps": 30}}
    #[arg(long, value_name = "JSON")]
    settings: Option<String>,
    /// The judge's weights. Default: those shipped with the pocket model.
    #[arg(long, value_name = "FILE")]
    judge: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ReportArgs {
    /// The output of `coar-lab eval methods --json`.
    json: PathBuf,
    /// The report to write; plots go into a folder beside it.
    #[arg(long, default_value = "docs/evidence.md", value_name = "FILE")]
    out: PathBuf,
}

/// `I/N` as an index from 0 and a count.
fn part(text: &str) -> anyhow::Result<(usize, usize)> {
    let parsed = text
        .split_once('/')
        .and_then(|(i, n)| Some((i.parse::<usize>().ok()?, n.parse::<usize>().ok()?)));
    match parsed {
        Some((i, n)) if (1..=n).contains(&i) => Ok((i - 1, n)),
        _ => anyhow::bail!("--part is `{text}`; expected I/N with I from 1 to N"),
    }
}

/// Reads the output of `--json`.
fn evidence(file: &Path) -> anyhow::Result<Evidence> {
    let text = std::fs::read_to_string(file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    serde_json::from_str(&text).map_err(|error| anyhow::anyhow!("{} is no evidence: {error}", file.display()))
}

impl MethodsArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let part = match (&self.part, self.finished) {
            (_, true) => None,
            (Some(text), _) => Some(part(text)?),
            (None, false) => Some((0, 1)),
        };
        let from = self.from.as_deref().map(evidence).transpose()?;
        let settings = settings(self.settings.as_deref())?;
        let (model, info) = self.model.load()?;
        let files = self.model.files()?;
        let judge = read_judge(self.judge.as_deref(), &self.model)?;
        let seeds = self.seeds.unwrap_or(if self.quick { 1 } else { 3 });
        let count = match self.subjects.as_slice() {
            [only] => only.parse().ok(),
            _ => None,
        };
        let options = MethodsOptions {
            seeds: (self.seed..self.seed + seeds).collect(),
            subjects: count.unwrap_or(if self.quick { 2 } else { 10 }),
            named: if count.is_some() { vec![] } else { self.subjects.clone() },
            development: self.development,
            per_scene: self.per_scene.unwrap_or(if self.quick { 2 } else { 4 }).max(1),
            guidance_scale: self.guidance_scale.unwrap_or(info.default_guidance_scale),
            top_k: info.default_top_k,
            methods: self.methods.clone(),
            ablations: self.ablations && !self.quick,
            styles: self.styles,
            between: self.between,
            from,
            sheets: self.sheets.clone(),
            dir: self.dir.clone(),
            part,
            settings,
        };
        let style = ProgressStyle::with_template("{msg:40} {wide_bar} {pos}/{len}  eta {eta}")?;
        let bar = ProgressBar::new(0).with_style(style);
        bar.enable_steady_tick(std::time::Duration::from_millis(500));
        let evidence = evaluate_methods(&model, &files.dir, &judge, &options, &mut |done, total, what| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message(what.to_owned());
        })?;
        bar.finish_and_clear();
        let json = serde_json::to_string_pretty(&evidence)?;
        match &self.json {
            Some(file) if file.as_os_str() == "-" => println!("{json}"),
            Some(file) => {
                std::fs::write(file, json)?;
                print!("{}", table(&evidence.rows));
            }
            None => print!("{}", table(&evidence.rows)),
        }
        if self.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
            for rows in [&evidence.between, &evidence.ablations] {
                if !rows.is_empty() {
                    print!("\n{}", table(rows));
                }
            }
        }
        Ok(())
    }
}

impl ReportArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let evidence = evidence(&self.json)?;
        for file in write_report(&evidence, &self.out)? {
            println!("{}", file.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_from_one() {
        assert_eq!(part("1/2").unwrap(), (0, 2));
        assert_eq!(part("2/2").unwrap(), (1, 2));
        for wrong in ["0/2", "3/2", "2", "a/b", "1/0"] {
            assert!(part(wrong).is_err(), "{wrong}");
        }
    }
}
