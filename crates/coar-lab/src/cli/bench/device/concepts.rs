//! The cost of concepts in a decode step: a batch in which every image has its own concept, alternating step by step
//! with a batch without concepts.

use super::report::Findings;
use super::setup::Bench;
use super::workload::{begin, concept, request, timed};
use crate::cli::bench::decode::ratio;
use crate::cli::bench::mean;
use coar_engine::model::decoding::DecodingRequest;

/// Maximum relative slowdown of a step with concepts.
const COST: f64 = 0.01;
/// Warm-up steps of each batch.
const WARM_UP: usize = 4;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let model = bench.model(bench.target_size())?;
    let (info, device) = (bench.info(&model), bench.device());
    let (images, steps) = if bench.small { (3, 16) } else { (16, 200) };
    let concepts = (0..images)
        .map(|index| concept(&model, index))
        .collect::<Result<Vec<_>, _>>()?;
    // Two caches of whole images would not fit: the images are only as high as the number of steps requires.
    let requests = |with: bool| -> anyhow::Result<Vec<DecodingRequest>> {
        let one = |index: usize| {
            let concept = concepts.get(index).filter(|_| with);
            let whole = request(&model, &info, concept, (0, index as u64))?;
            let rows = ((WARM_UP + steps) as i64 / whole.columns + 2).min(whole.rows);
            Ok(DecodingRequest { rows, ..whole })
        };
        (0..images).map(one).collect()
    };
    let (plain, plain_ids) = begin(&model, &requests(false)?, false)?;
    let (with, ids) = begin(&model, &requests(true)?, false)?;
    let mut both = [plain, with];
    let mut seconds = [vec![], vec![]];
    for turn in 0..WARM_UP + steps {
        if findings.left().is_zero() {
            break;
        }
        // The order alternates, so neither batch always follows the other.
        for which in [turn % 2, 1 - turn % 2] {
            let spent = timed(device, || {
                both[which].step(&model.transformer)?;
                Ok(())
            })?;
            if turn >= WARM_UP {
                seconds[which].push(spent.device);
            }
        }
    }
    let pairs = seconds[0].len().min(seconds[1].len());
    anyhow::ensure!(pairs >= 2, "{pairs} pairs of steps were taken; expected 2 or more");
    let (ratio, error) = ratio(&seconds[1][..pairs], &seconds[0][..pairs]);
    findings.figure("images", images as u64);
    findings.figure("pairs_of_steps", pairs as u64);
    findings.figure("step_ms_without", 1e3 * mean(&seconds[0]));
    findings.figure("step_ms_with", 1e3 * mean(&seconds[1]));
    findings.figure("with_to_without", ratio);
    findings.figure("standard_error", error);
    findings.headline(format!(
        "a step with {images} concepts to one without: {ratio:.4} +- {error:.4}"
    ));
    if bench.on_cuda() {
        findings.check("cost of concepts, share of a step", ratio - 1.0, COST);
    }
    // Every concept has changed its image relative to the plain prompt and to its neighbours.
    let codes = |which: usize, ids: &[_]| -> anyhow::Result<Vec<Vec<i64>>> {
        let of = |&id| both[which].codes_so_far(id);
        Ok(ids.iter().map(of).collect::<Result<_, _>>()?)
    };
    let (without, with) = (codes(0, &plain_ids)?, codes(1, &ids)?);
    let same = without.iter().zip(&with).filter(|(a, b)| a == b).count();
    findings.check("images that their concept leaves as they are", same as f64, 0.0);
    Ok(())
}
