//! The times of one worker's work: the simulator's input.

use serde::{Deserialize, Serialize};

use super::FleetError;

/// The origin of the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Measured.
    Measured,
    /// Computed from data sheets and assumptions.
    Estimate,
}

/// One worker: a device with one model on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    pub name: String,
    pub origin: Origin,
    /// The origin of each number, one line each.
    pub notes: Vec<String>,
    pub engine: Engine,
    pub decode: Decode,
    pub sizes: Vec<Size>,
    pub concepts: Concepts,
    pub training: Training,
}

/// Engine settings, named as in `coar serve`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Maximum number of rows of the batch, by memory and settings.
    pub rows: usize,
    /// 2 with guidance, 1 without.
    pub rows_per_picture: usize,
    /// Limit of queued requests; more are rejected with 429.
    pub queue: usize,
    /// Share of device time for trainings while images wait, 0 to 1.
    pub training_share: f64,
    /// Threads or streams that decode codes to pixels.
    pub picture_threads: usize,
    /// Seconds from a worker's death until it can work again.
    pub restart_seconds: f64,
}

/// A decode step by rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decode {
    /// Rows of the measured points, in ascending order.
    pub rows: Vec<f64>,
    /// Milliseconds of a step at each; interpolated between them, extrapolated with the last slope.
    pub step_ms: Vec<f64>,
    /// Tokens in each row's cache for which the points are valid.
    pub context_tokens: f64,
    /// Microseconds per additional token in a row's cache.
    pub row_token_us: f64,
}

/// A size of image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub name: String,
    /// Its share of all images, in any unit.
    pub weight: f64,
    /// Codes: the number of steps. Row ends add no steps.
    pub codes: u32,
    /// Cache tokens in addition to the codes: row ends.
    pub row_ends: u32,
    /// Tokens before the first code.
    pub prompt_tokens: u32,
    /// Device milliseconds of the prefill.
    pub prefill_ms: f64,
    /// Milliseconds from the last code to the image, without waiting.
    pub pixels_ms: f64,
    /// Device milliseconds that this takes from decode steps.
    pub pixels_device_ms: f64,
    /// Bytes of the encoded file.
    pub file_bytes: u64,
}

/// The cost of a concept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concepts {
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Bytes on the device.
    pub device_bytes: u64,
    /// MiB of the device for resident concepts that are not in use: `--concept-memory`.
    pub memory_mib: f64,
    /// Milliseconds to fetch a cold one from the store; the device continues meanwhile.
    pub fetch_ms: f64,
    /// Device milliseconds of a cold one at admission.
    pub upload_ms: f64,
}

/// The cost of a training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub steps: u32,
    /// Milliseconds of a step with exclusive use of the device.
    pub step_ms: f64,
    /// Device seconds before the first step: references, class images.
    pub start_seconds: f64,
    /// Concurrent trainings per worker.
    pub slots: usize,
    /// Seconds between checkpoints: the maximum loss at a worker's death.
    pub checkpoint_seconds: f64,
    /// Bytes of a checkpoint.
    pub checkpoint_bytes: u64,
    /// Speed of each while both are running, relative to their shares of one device: 1 without interference.
    pub beside: f64,
}

/// Files that are part of the program, by name.
const SHIPPED: &[(&str, &str)] = &[
    ("pocket", include_str!("times/pocket-2-cores.toml")),
    ("30m", include_str!("times/30m-2-cores.toml")),
    ("7b-h100", include_str!("times/7b-h100-estimate.toml")),
];

impl Times {
    /// A shipped file by its name, such as `pocket`; otherwise a TOML or JSON file by its path.
    ///
    /// # Errors
    /// When it cannot be read, or its values are invalid.
    pub fn read(name: &str) -> Result<Self, FleetError> {
        let shipped = SHIPPED.iter().find(|(known, _)| *known == name);
        let text = match shipped {
            Some((_, text)) => (*text).to_owned(),
            None => std::fs::read_to_string(name).map_err(|error| FleetError::new(name, format!("{error}")))?,
        };
        Self::parse(name, &text)
    }

    /// Parses JSON if the text starts with a brace, otherwise TOML.
    ///
    /// # Errors
    /// As [`Times::read`].
    pub fn parse(name: &str, text: &str) -> Result<Self, FleetError> {
        let fault = |error: String| FleetError::new(name, error);
        let times: Self = match text.trim_start().starts_with('{') {
            true => serde_json::from_str(text).map_err(|error| fault(error.to_string()))?,
            false => toml::from_str(text).map_err(|error| fault(error.to_string()))?,
        };
        times.check()?;
        Ok(times)
    }

    /// As a TOML file.
    ///
    /// # Errors
    /// When a number cannot be written.
    pub fn to_toml(&self) -> Result<String, FleetError> {
        toml::to_string(self).map_err(|error| FleetError::new("times", error.to_string()))
    }

    /// Checks the assumptions of the simulation.
    fn check(&self) -> Result<(), FleetError> {
        let need = |good: bool, field: &str, problem: &str| match good {
            true => Ok(()),
            false => Err(FleetError::new(field, problem)),
        };
        let Decode { rows, step_ms, .. } = &self.decode;
        let rising = rows.windows(2).all(|pair| pair[0] < pair[1]);
        need(!rows.is_empty() && rising, "decode.rows", "must rise and not be empty")?;
        let steps = rows.len() == step_ms.len() && step_ms.iter().all(|ms| *ms > 0.0);
        need(
            steps,
            "decode.step_ms",
            "must be above 0, one for each of `decode.rows`",
        )?;
        let engine = &self.engine;
        let fits = engine.rows_per_picture >= 1 && engine.rows >= engine.rows_per_picture;
        need(fits, "engine.rows", "must hold one picture at least")?;
        need(
            engine.picture_threads >= 1,
            "engine.picture_threads",
            "must be 1 or more",
        )?;
        let share = (0.0..=1.0).contains(&engine.training_share);
        need(share, "engine.training_share", "must be a number from 0 to 1")?;
        need(!self.sizes.is_empty(), "sizes", "must not be empty")?;
        let sizes = self.sizes.iter().all(|size| size.codes > 0 && size.weight >= 0.0);
        need(sizes, "sizes", "must have codes, and weights of 0 or more")?;
        let weight: f64 = self.sizes.iter().map(|size| size.weight).sum();
        need(weight > 0.0, "sizes", "must have one with a weight above 0")?;
        let training = &self.training;
        let good = training.steps > 0 && training.step_ms > 0.0 && training.beside > 0.0;
        need(good, "training", "must have steps, step_ms and beside above 0")
    }

    /// Images that fit into the batch at once.
    pub(super) fn places(&self) -> usize {
        self.engine.rows / self.engine.rows_per_picture
    }

    /// Resident concepts per device.
    pub(super) fn concept_places(&self) -> usize {
        (self.concepts.memory_mib * f64::from(1 << 20) / self.concepts.device_bytes.max(1) as f64) as usize
    }

    /// A training's work in steps, its start included.
    pub(super) fn training_steps(&self) -> f64 {
        f64::from(self.training.steps) + self.training.start_seconds / self.training_step()
    }

    /// Seconds of a training step alone.
    pub(super) fn training_step(&self) -> f64 {
        self.training.step_ms / 1e3
    }

    /// Mean of a value over the sizes, by weight.
    pub(super) fn mean_of(&self, of: impl Fn(&Size) -> f64) -> f64 {
        let weight: f64 = self.sizes.iter().map(|size| size.weight).sum();
        self.sizes.iter().map(|size| size.weight * of(size)).sum::<f64>() / weight
    }
}

impl Decode {
    /// Seconds of a step of `rows` rows with `tokens` in all their caches together.
    pub(super) fn step(&self, rows: f64, tokens: f64) -> f64 {
        let more = tokens - rows * self.context_tokens;
        // Far below the measured context the line could reach 0; a step never takes less than half its point.
        let point = self.point(rows);
        (point + more * self.row_token_us / 1e3).max(0.5 * point) / 1e3
    }

    /// Milliseconds by rows: interpolated between points, constant before the first, extrapolated with the last
    /// slope.
    fn point(&self, rows: f64) -> f64 {
        let (xs, ys) = (&self.rows, &self.step_ms);
        if xs.len() == 1 || rows <= xs[0] {
            return ys[0];
        }
        let above = xs.partition_point(|x| *x < rows).clamp(1, xs.len() - 1);
        let slope = (ys[above] - ys[above - 1]) / (xs[above] - xs[above - 1]);
        ys[above - 1] + slope * (rows - xs[above - 1])
    }
}
