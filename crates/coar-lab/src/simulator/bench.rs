//! Converts the output of `coar-lab bench` to a file of times.

use serde_json::Value;

use super::FleetError;
use super::times::{Origin, Times};

/// Parses `coar-lab bench decode --json`, without concepts: rows and milliseconds.
fn decode(times: &mut Times, report: &Value) -> Result<(), FleetError> {
    let missing = || FleetError::new("decode", "is not what `coar-lab bench decode --json` prints");
    let rows = report["steps"].as_array().ok_or_else(missing)?;
    let plain: Vec<&Value> = rows.iter().filter(|row| row["concept"] == Value::Bool(false)).collect();
    let numbers = |key: &str| -> Option<Vec<f64>> { plain.iter().map(|row| row[key].as_f64()).collect() };
    times.decode.rows = numbers("rows").ok_or_else(missing)?;
    times.decode.step_ms = numbers("step_ms").ok_or_else(missing)?;
    let prefill = numbers("prefill_ms").ok_or_else(missing)?;
    let prefill = prefill.iter().copied().fold(f64::INFINITY, f64::min);
    times.sizes.iter_mut().for_each(|size| size.prefill_ms = prefill);
    times.notes.push(format!(
        "steps by rows and the prompt: coar-lab bench decode, {} on {}",
        report["dtype"], report["device"]
    ));
    Ok(())
}

/// Parses `coar-lab bench serve --json`: the time for pixels, from images one after the other; the cost of a cold
/// concept; the relative speed beside a training.
fn serve(times: &mut Times, report: &Value) -> Result<(), FleetError> {
    let missing = || FleetError::new("serve", "is not what `coar-lab bench serve --json` prints");
    let conditions = report["conditions"].as_array().ok_or_else(missing)?;
    let alone = conditions.iter().find(|row| row["condition"] == "one after the other");
    let each = 60e3
        / alone
            .and_then(|row| row["pictures_per_minute"].as_f64())
            .ok_or_else(missing)?;
    let (rows, threads) = (
        times.engine.rows_per_picture as f64,
        times.engine.picture_threads as f64,
    );
    for size in &mut times.sizes {
        let context = f64::from(size.prompt_tokens) + f64::from(size.codes + size.row_ends) / 2.0;
        let drawing = 1e3 * f64::from(size.codes) * times.decode.step(rows, rows * context);
        size.pixels_ms = (each - drawing - size.prefill_ms).max(0.0);
        size.pixels_device_ms = size.pixels_ms / threads;
    }
    let fetch = report["concept_swap"]["from_the_store_ms"]["median"].as_f64();
    times.concepts.fetch_ms = fetch.ok_or_else(missing)?;
    let kept = |key: &str| report[key].as_f64().ok_or_else(missing);
    let share = kept("training_share")?;
    if share > 0.0 && share < 1.0 {
        let generation = kept("generation_kept_beside_training")? / (1.0 - share);
        let training = kept("training_kept_beside_generation")? / share;
        times.training.beside = f64::midpoint(generation, training);
    }
    times
        .notes
        .push("pixels, a cold concept, drawing beside a training: coar-lab bench serve".to_owned());
    Ok(())
}

/// Parses `coar-lab bench train --json`: a step and the time before the first, of the first mode measured.
fn train(times: &mut Times, report: &Value) -> Result<(), FleetError> {
    let missing = || FleetError::new("train", "is not what `coar-lab bench train --json` prints");
    let first = report.get(0).unwrap_or(report);
    let number = |key: &str| first[key].as_f64().ok_or_else(missing);
    times.training.step_ms = number("step_ms")?;
    times.training.start_seconds = number("seconds_before_the_first_step")?;
    times
        .notes
        .push(format!("a training's step: coar-lab bench train, {}", first["graph"]));
    Ok(())
}

/// `base` with its numbers replaced by those of `coar-lab bench decode`, `serve` and `train` reports.
///
/// # Errors
/// When a report is another command's; when its values are invalid.
pub fn from_bench(
    base: &Times,
    name: &str,
    reports: (Option<&Value>, Option<&Value>, Option<&Value>),
) -> Result<Times, FleetError> {
    let mut times = Times {
        name: name.to_owned(),
        origin: Origin::Measured,
        notes: vec![format!("what no line below names is from `{}`", base.name)],
        ..base.clone()
    };
    // In this order: the time for pixels is what remains of an image after its steps.
    if let Some(report) = reports.0 {
        decode(&mut times, report)?;
    }
    if let Some(report) = reports.1 {
        serve(&mut times, report)?;
    }
    if let Some(report) = reports.2 {
        train(&mut times, report)?;
    }
    Times::parse(name, &times.to_toml()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reports_replace_what_they_measure() {
        let base = Times::read("pocket").unwrap();
        let steps = json!({"dtype": "f32", "device": "Cpu", "steps": [
            {"rows": 2, "concept": false, "step_ms": 1.0, "prefill_ms": 5.0},
            {"rows": 2, "concept": true, "step_ms": 9.0, "prefill_ms": 9.0},
            {"rows": 8, "concept": false, "step_ms": 3.0, "prefill_ms": 6.0}]});
        let trained = json!([{"graph": "Kept", "step_ms": 100.0, "seconds_before_the_first_step": 2.0}, {}]);
        let times = from_bench(&base, "here", (Some(&steps), None, Some(&trained))).unwrap();
        assert_eq!(times.decode.rows, [2.0, 8.0]);
        assert!((times.decode.step(5.0, 5.0 * times.decode.context_tokens) - 0.002).abs() < 1e-12);
        assert_eq!((times.sizes[0].prefill_ms, times.training.step_ms), (5.0, 100.0));
        // An image with 144 ms in steps and 5 ms of prefill, 160 ms in total, leaves 11 ms for pixels.
        let alone = json!([{"condition": "one after the other", "pictures_per_minute": 375.0}]);
        let served = json!({"conditions": alone, "concept_swap": {"from_the_store_ms": {"median": 0.1}},
            "training_share": 0.5, "generation_kept_beside_training": 0.4, "training_kept_beside_generation": 0.4});
        let flat = Times {
            decode: super::super::times::Decode {
                row_token_us: 0.0,
                ..base.decode.clone()
            },
            ..base
        };
        let times = from_bench(&flat, "here", (Some(&steps), Some(&served), None)).unwrap();
        assert!(
            (times.sizes[0].pixels_ms - 11.0).abs() < 1e-9,
            "{}",
            times.sizes[0].pixels_ms
        );
        assert!((times.training.beside - 0.8).abs() < 1e-12);
        assert!(from_bench(&flat, "here", (Some(&json!({})), None, None)).is_err());
    }
}
