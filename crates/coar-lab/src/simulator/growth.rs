//! Growth with concepts, images and trainings outside the devices: rows, bytes, requests. Closed forms over counts
//! taken from the code; each count names its functions.

use serde::Serialize;

use super::times::Times;

/// Database and store operations of one foreground image with one concept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PerPicture {
    /// Transactions that write: `add_generation`, `begin_generation`, `add_image`, `end_generation`.
    pub writes: f64,
    /// Statements that only read: the concept by its name; `remove_unreferenced` when the image expires.
    pub reads: f64,
    /// Objects written: the image.
    pub puts: f64,
    /// Objects read: the concept's file, which `service::generate` reads for every request, resident or not; and the
    /// image, once by its caller.
    pub gets: f64,
    /// Objects removed, when they expire.
    pub deletes: f64,
}

/// Operations of one training, from registration to the end.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PerTraining {
    /// Transactions that write: `add_concept`, `claim_training`, four previews, the last curve, `succeed`; and, while
    /// it runs, progress twice a second, the curve every two seconds, and each checkpoint.
    pub writes: f64,
    /// Statements that only read: name, `trained_alike`, images, losses, five rows; and one for each checkpoint
    /// removed.
    pub reads: f64,
    /// References, previews, the concept, checkpoints.
    pub puts: f64,
    /// References, by the worker.
    pub gets: f64,
    /// Checkpoints.
    pub deletes: f64,
}

impl PerPicture {
    /// The current code.
    pub const COUNTED: Self = Self {
        writes: 4.0,
        reads: 2.0,
        puts: 1.0,
        gets: 2.0,
        deletes: 1.0,
    };
}

/// Reference images of a training.
const REFERENCES: f64 = 5.0;
/// Number of its previews: the default of `--training-previews`.
const PREVIEWS: f64 = 4.0;
/// `jobs::train_concept`: progress updates per second; every fourth includes the curve.
const TICKS_PER_SECOND: f64 = 2.0;
const TICKS_PER_CURVE: f64 = 4.0;
/// Database bytes per concept and its training, indexes included: `benches/registry_size.py`.
const CONCEPT_ROWS: f64 = 5_000.0;
/// The same with a loss curve of 500 points.
const CONCEPT_ROWS_AND_CURVE: f64 = 70_200.0;
/// Database bytes per generation with one image.
const PICTURE_ROWS: f64 = 1_400.0;
/// Polls per second of an idle worker for a training, each in a transaction that writes: `jobs::POLL`.
const CLAIMS_PER_SECOND: f64 = 0.5;

/// Write transactions per second of a running training.
pub fn running_writes_per_second(times: &Times) -> f64 {
    TICKS_PER_SECOND * (1.0 + 1.0 / TICKS_PER_CURVE) + 1.0 / times.training.checkpoint_seconds
}

/// Seconds of a training with exclusive use of the device.
fn training_seconds(times: &Times) -> f64 {
    times.training_steps() * times.training_step()
}

impl PerTraining {
    /// For a training that runs for `seconds`, with the current code.
    fn counted(times: &Times, seconds: f64) -> Self {
        let checkpoints = seconds / times.training.checkpoint_seconds;
        Self {
            writes: 4.0 + PREVIEWS + running_writes_per_second(times) * seconds,
            reads: 9.0 + checkpoints,
            puts: REFERENCES + PREVIEWS + 1.0 + checkpoints,
            gets: REFERENCES,
            deletes: checkpoints,
        }
    }
}

/// Requirements of a service of that size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Growth {
    pub per_picture: PerPicture,
    pub per_training: PerTraining,
    /// Duration of a training in seconds: alone on its device, divided by its share.
    pub training_seconds: f64,
    /// Concurrently running trainings.
    pub trainings_running: f64,
    pub writes_per_second: f64,
    pub reads_per_second: f64,
    pub puts_per_second: f64,
    pub gets_per_second: f64,
    pub deletes_per_second: f64,
    /// GB of the database for the concepts, without their trainings' curves.
    pub concept_rows_gb: f64,
    /// GB of the curves.
    pub curves_gb: f64,
    /// GB of the database for retained images.
    pub picture_rows_gb: f64,
    /// GB of concept files in the store.
    pub concept_files_gb: f64,
    /// GB of reference images and previews in the store.
    pub references_and_previews_gb: f64,
    /// GB of retained images.
    pub pictures_gb: f64,
    /// GB of device memory for all concepts at once.
    pub all_concepts_on_a_device_gb: f64,
    /// Resident concepts per worker.
    pub concepts_on_a_device: usize,
}

/// Requirements for `concepts` concepts, with generation and training at those rates by `workers` workers. A
/// training runs `slowdown` times slower than alone; images are kept for `keep_hours`.
pub fn growth(
    times: &Times,
    concepts: f64,
    (pictures_per_second, trainings_per_hour): (f64, f64),
    (workers, slowdown, keep_hours): (f64, f64, f64),
) -> Growth {
    let trainings = trainings_per_hour / 3600.0;
    let seconds = training_seconds(times) * slowdown;
    let (picture, training) = (PerPicture::COUNTED, PerTraining::counted(times, seconds));
    let idle = (workers - trainings * seconds).max(0.0);
    let rate = |of_picture: f64, of_training: f64| pictures_per_second * of_picture + trainings * of_training;
    let gb = |count: f64, bytes: f64| count * bytes / 1e9;
    let file = times.mean_of(|size| size.file_bytes as f64);
    let kept = pictures_per_second * 3600.0 * keep_hours;
    Growth {
        training_seconds: seconds,
        trainings_running: trainings * seconds,
        writes_per_second: rate(picture.writes, training.writes) + CLAIMS_PER_SECOND * idle,
        reads_per_second: rate(picture.reads, training.reads),
        puts_per_second: rate(picture.puts, training.puts),
        gets_per_second: rate(picture.gets, training.gets),
        deletes_per_second: rate(picture.deletes, training.deletes),
        concept_rows_gb: gb(concepts, CONCEPT_ROWS),
        curves_gb: gb(concepts, CONCEPT_ROWS_AND_CURVE - CONCEPT_ROWS),
        picture_rows_gb: gb(kept, PICTURE_ROWS),
        concept_files_gb: gb(concepts, times.concepts.file_bytes as f64),
        references_and_previews_gb: gb(concepts, (REFERENCES + PREVIEWS) * file),
        pictures_gb: gb(kept, file),
        all_concepts_on_a_device_gb: gb(concepts, times.concepts.device_bytes as f64),
        concepts_on_a_device: times.concept_places(),
        per_picture: picture,
        per_training: training,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_training_writes_as_often_as_the_worker() {
        let times = Times::read("pocket").unwrap();
        // Progress twice a second, the curve every two seconds, a checkpoint every five.
        assert!((running_writes_per_second(&times) - 2.7).abs() < 1e-12);
        let one = growth(&times, 1e6, (0.0, 3600.0), (10.0, 2.0, 24.0));
        // One per second, each for twice 9.45 s: that many run, and that many fewer workers poll.
        assert!((one.trainings_running - one.training_seconds).abs() < 1e-9);
        let expected = 8.0 + 2.7 * one.training_seconds;
        assert!(
            (one.writes_per_second - expected).abs() < 1e-9,
            "{}",
            one.writes_per_second
        );
        let drawn = growth(&times, 1e6, (10.0, 0.0), (4.0, 1.0, 24.0));
        assert!((drawn.writes_per_second - 42.0).abs() < 1e-9);
        assert!((drawn.gets_per_second - 20.0).abs() < 1e-9);
    }
}
