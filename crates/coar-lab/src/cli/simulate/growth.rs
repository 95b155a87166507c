//! `coar-lab simulate growth`

use clap::Args;

use super::load::TimesArgs;
use crate::simulator::growth;

/// Growth beside the devices: rows and bytes by concepts and images, transactions and object store requests by
/// images and trainings. Counted from the code, not simulated.
#[derive(Debug, Args)]
pub(in crate::cli) struct GrowthArgs {
    #[command(flatten)]
    times: TimesArgs,
    /// Registered concepts, each trained once.
    #[arg(long, default_value_t = 1e6)]
    concepts: f64,
    /// Images per second, with one concept each.
    #[arg(long, default_value_t = 10.0)]
    pictures_per_second: f64,
    /// Trainings per hour.
    #[arg(long, default_value_t = 100.0)]
    trainings_per_hour: f64,
    /// Workers: those without a training poll for one.
    #[arg(long, default_value_t = 10.0)]
    workers: f64,
    /// Slowdown of a training beside images; 2 at a share of one half.
    #[arg(long, default_value_t = 2.0)]
    slowdown: f64,
    /// Retention of images in hours: `--keep-images` of `coar serve`.
    #[arg(long, default_value_t = 24.0)]
    keep_hours: f64,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

impl GrowthArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let times = self.times.times()?;
        let grown = growth(
            &times,
            self.concepts,
            (self.pictures_per_second, self.trainings_per_hour),
            (self.workers, self.slowdown, self.keep_hours),
        );
        let report = serde_json::to_value(&grown)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        println!("{} ({:?})", times.name, times.origin);
        for (name, value) in report.as_object().into_iter().flatten() {
            match value.as_object() {
                Some(parts) => {
                    for (part, value) in parts {
                        line(&format!("{name} {part}"), value.as_f64());
                    }
                }
                None => line(name, value.as_f64()),
            }
        }
        Ok(())
    }
}

fn line(name: &str, value: Option<f64>) {
    println!("{:<36} {:>12.3}", name.replace('_', " "), value.unwrap_or(f64::NAN));
}
