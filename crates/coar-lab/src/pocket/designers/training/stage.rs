//! The loop of every stage that trains on a [`Feed`]: step, log, measure, save.

use serde_json::Value;
use tch::Tensor;

use super::feed::{Average, Feed};
use super::run::Run;
use coar_engine::model::ModelError;

/// A stage's networks and optimizers.
pub(super) trait Stage {
    /// The training data of one step, on its device.
    type Batch: Send;
    /// The report of one step; detached scalars.
    type Outcome;

    /// Steps between two lines of the curve.
    const LOG_EVERY: i64;
    /// Steps between two measurements.
    const MEASURE_EVERY: i64;

    /// Optimizer steps over all calls.
    fn done(&self) -> i64;

    /// Steps of the whole stage, as far as is known; at first those of the recipe.
    fn steps(&self) -> i64;

    /// Sets the steps of the whole stage, on which the learning rate depends.
    fn set_steps(&mut self, steps: i64);

    /// # Errors
    /// When libtorch fails.
    fn step(&mut self, batch: &Self::Batch) -> Result<Self::Outcome, ModelError>;

    /// The part of a step's report that is averaged.
    fn averaged(outcome: &Self::Outcome) -> &Tensor;

    /// A line of the curve.
    ///
    /// # Errors
    /// When libtorch fails.
    fn line(&self, outcome: &Self::Outcome, average: f64, pace: Pace) -> Result<Value, ModelError>;

    /// Everything that resuming needs.
    fn state(&self) -> Vec<(String, Tensor)>;
}

/// The work of this call so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub steps: i64,
    /// Never 0.
    pub seconds: f64,
}

/// Trains until the stage's last step or until the run's budget is used up; the state is saved from time to time and
/// at the end. Returns the number of steps over all calls.
///
/// # Errors
/// When the world lacks drawings, files cannot be written, or libtorch fails.
pub(super) fn train<'scope, S: Stage>(
    run: &mut Run,
    stage: &mut S,
    mut batches: Feed<'scope, S::Batch>,
    measure: impl Fn(&S) -> Result<Value, ModelError>,
) -> Result<i64, ModelError>
where
    S::Batch: 'scope,
{
    let (first, planned, started) = (stage.done(), stage.steps(), run.seconds());
    let mut average = Average::default();
    let mut done = first >= stage.steps() || run.over();
    while !done {
        let outcome = stage.step(&*batches.next()?)?;
        average.add(S::averaged(&outcome))?;
        let step = stage.done();
        if step % S::LOG_EVERY == 0 {
            stage.set_steps(run.steps(step, planned));
            let pace = Pace {
                steps: step - first,
                seconds: (run.seconds() - started).max(1e-3),
            };
            run.log(step, stage.line(&outcome, average.get()?, pace)?)?;
        }
        done = step >= stage.steps() || run.over();
        if step % S::MEASURE_EVERY == 0 || done {
            run.log(step, measure(stage)?)?;
        }
        if run.due() || done {
            run.save(stage.state())?;
        }
    }
    Ok(stage.done())
}
