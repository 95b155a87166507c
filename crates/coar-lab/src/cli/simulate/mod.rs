//! `coar-lab simulate`

mod growth;
mod load;
mod show;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::simulator::{Accelerator, Goal, Shape, Times, chart, estimate, from_bench, plan, simulate};
use load::{FleetArgs, LoadArgs, TimesArgs};

#[derive(Debug, Subcommand)]
pub(super) enum SimulateCommand {
    Run(RunArgs),
    Plan(PlanArgs),
    Growth(growth::GrowthArgs),
    Times(FromBenchArgs),
    /// Print an estimate for a 7B at 512 pixels on one H100, from its data sheet, as a file of times.
    Estimate,
    /// Plot the output of `run --json` or `plan --json` as SVG.
    Chart {
        file: PathBuf,
        /// Output file. Default: stdout.
        #[arg(long, short, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Simulate workers under load, and print latencies, utilisation, rows of the batch and rejections. With several
/// numbers of workers and several rates, all combinations are simulated.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Workers, one device each.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    workers: Vec<usize>,
    /// Images per second, for all workers together.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pictures_per_second: Vec<f64>,
    /// The rates are per worker.
    #[arg(long)]
    each: bool,
    /// Trainings per hour.
    #[arg(long, default_value_t = 0.0)]
    trainings_per_hour: f64,
    /// This many images at the start and none after, instead of a rate.
    #[arg(long, value_name = "N")]
    at_once: Option<u64>,
    /// Trainings that are queued at the start.
    #[arg(long, default_value_t = 0, value_name = "N")]
    trainings_at_start: u32,
    /// Simulated seconds of arrivals; the first fifth is warm-up.
    #[arg(long, default_value_t = 3600.0)]
    seconds: f64,
    #[command(flatten)]
    shared: Shared,
}

/// Find the minimum number of workers for images per second and trainings per hour within a p95. With several of
/// each, all combinations are tried.
#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// Images per second.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pictures_per_second: Vec<f64>,
    /// Trainings per hour.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    trainings_per_hour: Vec<f64>,
    /// Maximum latency of an image in seconds, the 95th percentile.
    #[arg(long, value_delimiter = ',', default_value = "30")]
    p95: Vec<f64>,
    /// Maximum share of rejected images.
    #[arg(long, default_value_t = 0.001)]
    refused: f64,
    /// Maximum seconds until a training starts, the 95th percentile.
    #[arg(long, default_value_t = 600.0)]
    training_wait: f64,
    #[command(flatten)]
    shared: Shared,
}

/// Options of both commands.
#[derive(Debug, Args)]
struct Shared {
    #[command(flatten)]
    times: TimesArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    fleet: FleetArgs,
    /// The same seed and file give the same numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// Print a file of times with the results of `coar-lab bench ... --json` replacing another file's numbers.
#[derive(Debug, Args)]
pub(super) struct FromBenchArgs {
    /// Base for numbers that the reports do not contain.
    #[command(flatten)]
    base: TimesArgs,
    /// Description of the measurement.
    #[arg(long)]
    name: String,
    /// Report of `coar-lab bench decode --json`.
    #[arg(long, value_name = "FILE")]
    decode: Option<PathBuf>,
    /// Report of `coar-lab bench serve --json`.
    #[arg(long, value_name = "FILE")]
    serve: Option<PathBuf>,
    /// Report of `coar-lab bench train --json`.
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
}

fn read_json(file: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))
}

impl RunArgs {
    fn run(self) -> anyhow::Result<()> {
        let Shared {
            times: named,
            load,
            fleet,
            seed,
            json,
        } = &self.shared;
        let times = named.times()?;
        let mut rows = vec![];
        for &workers in &self.workers {
            for &rate in &self.pictures_per_second {
                let rate = if self.each { rate * workers as f64 } else { rate };
                let mut workload = load.workload(rate, self.trainings_per_hour);
                workload.seconds = self.seconds;
                workload.warm_up = 0.2 * self.seconds;
                workload.trainings_at_start = self.trainings_at_start;
                if let Some(pictures) = self.at_once {
                    workload.arrivals = crate::simulator::Arrivals::AtOnce { pictures };
                    workload.warm_up = 0.0;
                }
                let fleet = fleet.fleet(workers);
                let report = simulate(&times, &workload, &fleet, *seed)?;
                rows.push(json!({
                    "pictures_per_second": rate,
                    "policy": fleet.policy,
                    "arrivals": workload.arrivals,
                    "trainings_per_hour": self.trainings_per_hour,
                    "report": report,
                }));
            }
        }
        print(&times, "run", *seed, rows, *json)
    }
}

impl PlanArgs {
    fn run(self) -> anyhow::Result<()> {
        let Shared {
            times: named,
            load,
            fleet,
            seed,
            json,
        } = &self.shared;
        let times = named.times()?;
        let mut rows = vec![];
        for &p95 in &self.p95 {
            for &trainings in &self.trainings_per_hour {
                for &rate in &self.pictures_per_second {
                    let goal = Goal {
                        p95,
                        refused: self.refused,
                        training_wait: self.training_wait,
                    };
                    let workload = load.workload(rate, trainings);
                    let planned = plan(&times, &workload, &fleet.fleet(1), &goal, *seed)?;
                    rows.push(json!({
                        "pictures_per_second": rate,
                        "trainings_per_hour": trainings,
                        "p95": p95,
                        "workers": planned.workers,
                        "at_least": planned.at_least,
                        "report": planned.report,
                    }));
                }
            }
        }
        print(&times, "plan", *seed, rows, *json)
    }
}

fn print(times: &Times, kind: &str, seed: u64, rows: Vec<Value>, as_json: bool) -> anyhow::Result<()> {
    let report = json!({
        "kind": kind,
        "times": times.name,
        "origin": times.origin,
        "seed": seed,
        "most_pictures_per_second_and_worker": crate::simulator::most_pictures_per_second(times),
        "rows": rows,
    });
    match as_json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => show::table(&report),
    }
    Ok(())
}

impl FromBenchArgs {
    fn run(self) -> anyhow::Result<()> {
        let read = |file: &Option<PathBuf>| file.as_deref().map(read_json).transpose();
        let (decode, serve, train) = (read(&self.decode)?, read(&self.serve)?, read(&self.train)?);
        let reports = (decode.as_ref(), serve.as_ref(), train.as_ref());
        let times = from_bench(&self.base.times()?, &self.name, reports)?;
        print!("{}", times.to_toml()?);
        Ok(())
    }
}

impl SimulateCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Run(args) => args.run(),
            Self::Plan(args) => args.run(),
            Self::Growth(args) => args.run(),
            Self::Times(args) => args.run(),
            Self::Estimate => {
                print!("{}", estimate(&Shape::lumina_7b(), &Accelerator::h100()).to_toml()?);
                Ok(())
            }
            Self::Chart { file, out } => {
                let svg = chart(&read_json(&file)?)?;
                match out {
                    Some(out) => {
                        std::fs::write(&out, svg).with_context(|| format!("{} cannot be written", out.display()))
                    }
                    None => {
                        print!("{svg}");
                        Ok(())
                    }
                }
            }
        }
    }
}
