//! Runs the parts one after the other, each on its own thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::report::{Ended, Findings, Found, Late, Outcome, Report, Skip};
use super::setup::Bench;
use super::table::table;
use super::{DeviceArgs, Part};
use coar::jobs::iso_8601;
use coar_engine::model::accelerator;

/// A part that does not return this long after its deadline is abandoned.
const GRACE: Duration = Duration::from_secs(8);
/// A part is skipped if less than this share of its time is left.
const LEAST_SHARE: f64 = 0.2;

/// The commit that the program was built from; set by scripts/gpu-check.sh.
const COMMIT: &str = "GPU_CHECK_COMMIT";

/// The arguments for the report: without the report's own folder, and with the last component of other paths.
fn reported(mut arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut reported = vec![];
    while let Some(argument) = arguments.next() {
        if argument == "--out" {
            arguments.next();
        } else if !argument.starts_with("--out=") {
            let (flag, value) = match argument.split_once('=') {
                Some((flag, value)) => (format!("{flag}="), value),
                None => (String::new(), &*argument),
            };
            let name = value.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            reported.push(format!("{flag}{name}"));
        }
    }
    reported
}

/// Runs every part in `args`, prints the table, and fails if a check has failed.
pub(super) fn all(args: DeviceArgs) -> anyhow::Result<()> {
    let report = Arc::new(Report::create(&args.out)?);
    let parts = match args.parts.is_empty() {
        true => Part::ALL.to_vec(),
        false => args.parts.clone(),
    };
    let total = Duration::from_secs(args.seconds);
    let bench = Bench::new(&args);
    let run = json!({
        "event": "run",
        "coar": env!("CARGO_PKG_VERSION"),
        "time": now(),
        "device": bench.device_name(),
        "card": bench.card(),
        "driver": bench.driver(),
        "libtorch": super::env::LIBTORCH,
        "model": bench.model_name(),
        "target_size": bench.target_size(),
        "small": bench.small,
        "commit": std::env::var(COMMIT).ok().filter(|commit| !commit.is_empty()),
        "arguments": reported(std::env::args().skip(1)),
    });
    report.line(&run);
    let (mut ended, mut abandoned) = (vec![], false);
    for &part in &parts {
        let time = time_for(part, &parts, total, report.at());
        let absent = bench.absent().filter(|_| part != Part::Env);
        let own = bench.clone();
        let (end, hung) = match (time, absent) {
            (None, _) => (skipped(part.name(), &report, "no time was left"), false),
            (_, Some(reason)) => (skipped(part.name(), &report, reason), false),
            (Some(time), None) => one(part.name(), &report, (time, GRACE), move |findings| {
                // As on the engine's thread: CUDA graphs cannot be captured on the default stream.
                let result = own_stream(&own).and_then(|()| part.run(&own, findings));
                accelerator::empty_cache(own.device());
                result
            }),
        };
        report.line(&end.line(report.at()));
        eprintln!("{:<9} {} in {:.1} s", end.part, end.outcome.as_str(), end.seconds);
        ended.push(end);
        abandoned |= hung;
    }
    let count = |outcome| ended.iter().filter(|end| end.outcome == outcome).count();
    let failed = count(Outcome::Failed) > 0;
    let late = count(Outcome::Late);
    report.line(&json!({
        "event": "done",
        "at_s": report.at(),
        "ok": count(Outcome::Ok),
        "failed": count(Outcome::Failed),
        "late": late,
        "skipped": count(Outcome::Skipped),
    }));
    let title = format!(
        "coar {} on {} ({}), {}, {} pixels: {:.1} s",
        env!("CARGO_PKG_VERSION"),
        bench.card(),
        bench.device_name(),
        bench.model_name(),
        bench.target_size(),
        report.at()
    );
    println!("{}", table(&title, &ended));
    if bench.on_cuda() || abandoned {
        leave(i32::from(failed));
    }
    anyhow::ensure!(!failed, "a check of the device has failed");
    Ok(())
}

/// Gives the calling thread its own stream, if there is a device.
fn own_stream(bench: &Bench) -> anyhow::Result<()> {
    match bench.absent() {
        Some(_) => Ok(()),
        None => Ok(accelerator::use_own_stream(bench.device())?),
    }
}

/// Exits without destructors: those of libtorch's CUDA part fail at process exit, and a part that hangs may still
/// compute.
fn leave(status: i32) -> ! {
    use std::io::Write;
    // Both may be a closed pipe or terminal; the report is already complete.
    let _ = (std::io::stdout().flush(), std::io::stderr().flush());
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(status) }
}

/// The time of a part: its nominal time, scaled up in a longer run, and at most what is left. `None` if that is too
/// little to start.
fn time_for(part: Part, parts: &[Part], total: Duration, at: f64) -> Option<Duration> {
    let asked: u64 = parts.iter().map(|part| part.seconds()).sum();
    let generous = (total.as_secs_f64() / asked.max(1) as f64).max(1.0);
    let own = part.seconds() as f64 * generous;
    let left = total.as_secs_f64() - at;
    (left >= LEAST_SHARE * part.seconds() as f64).then(|| Duration::from_secs_f64(own.min(left)))
}

/// A part that did not run.
fn skipped(part: &'static str, report: &Report, reason: &str) -> Ended {
    report.line(&json!({"event": "begin", "part": part, "at_s": report.at(), "deadline_s": 0}));
    Ended {
        part,
        outcome: Outcome::Skipped,
        seconds: 0.0,
        error: Some(reason.to_owned()),
        found: Found::default(),
    }
}

/// Runs one part, with `time` until its deadline and `grace` to return after it; also returns whether its thread is
/// still running.
fn one(
    part: &'static str,
    report: &Arc<Report>,
    (time, grace): (Duration, Duration),
    work: impl FnOnce(&Findings) -> anyhow::Result<()> + Send + 'static,
) -> (Ended, bool) {
    let begun = Instant::now();
    let ended = |outcome, error: Option<String>, findings: &Findings| Ended {
        part,
        outcome,
        seconds: begun.elapsed().as_secs_f64(),
        error,
        found: findings.close(),
    };
    let findings = Findings::new(part, report.clone(), time);
    report.line(&json!({
        "event": "begin", "part": part, "at_s": report.at(), "deadline_s": time.as_secs_f64(),
    }));
    let (done, finished) = channel();
    let its = findings.clone();
    let thread = std::thread::Builder::new()
        .name(format!("coar-bench-{part}"))
        .spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| {
                let _no_grad = tch::no_grad_guard();
                work(&its)
            }));
            // The run may have continued without this part.
            let _ = done.send(result);
        });
    let thread = match thread {
        Ok(thread) => thread,
        Err(error) => return (ended(Outcome::Failed, Some(error.to_string()), &findings), false),
    };
    let (outcome, error) = match finished.recv_timeout(time + grace) {
        Ok(Ok(Ok(()))) => (Outcome::Ok, None),
        Ok(Ok(Err(error))) if error.is::<Late>() => (Outcome::Late, Some(error.to_string())),
        Ok(Ok(Err(error))) if error.is::<Skip>() => (Outcome::Skipped, Some(error.to_string())),
        Ok(Ok(Err(error))) => (Outcome::Failed, Some(format!("{error:#}"))),
        Ok(Err(panic)) => (Outcome::Failed, Some(format!("panicked: {}", panic_text(&*panic)))),
        Err(RecvTimeoutError::Timeout) => {
            let error = "did not return after its deadline; its thread was abandoned";
            return (
                with_checks(ended(Outcome::Late, Some(error.to_owned()), &findings)),
                true,
            );
        }
        Err(RecvTimeoutError::Disconnected) => (Outcome::Failed, Some("its thread ended without a result".to_owned())),
    };
    // It has sent its result, so its thread is about to end.
    let _ = thread.join();
    (with_checks(ended(outcome, error, &findings)), false)
}

/// A failed check takes precedence over everything else.
fn with_checks(mut end: Ended) -> Ended {
    if end.found.failed().next().is_some() {
        end.outcome = Outcome::Failed;
    }
    end
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("without a message").to_owned()
}

/// The current time in RFC 3339.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    iso_8601(since.map_or(0, |since| since.as_secs() as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With the default of `--seconds` every part gets its nominal time.
    const WHOLE: u64 = 500;

    #[test]
    fn parts_get_their_time_until_none_is_left() {
        let time =
            |part, total, at| time_for(part, &Part::ALL, Duration::from_secs(total), at).map(|time| time.as_secs_f64());
        assert_eq!(Part::ALL.iter().map(|part| part.seconds()).sum::<u64>(), WHOLE);
        assert_eq!(time(Part::Parity, WHOLE, 10.0), Some(45.0));
        assert_eq!(time(Part::Parity, 2 * WHOLE, 10.0), Some(90.0));
        assert_eq!(time(Part::Parity, WHOLE, 480.0), Some(20.0));
        assert_eq!(time(Part::Parity, WHOLE, 495.0), None);
        assert_eq!(time(Part::Env, WHOLE, 600.0), None);
    }

    #[test]
    fn arguments_are_reported_without_folders() {
        let reported = |line: &str| reported(line.split(' ').map(str::to_owned)).join(" ");
        assert_eq!(
            reported("bench device --parts env,load --out /x/y --model models/7b/ --golden=/a/golden --out=z --tf32"),
            "bench device --parts env,load --model 7b --golden=golden --tf32"
        );
    }

    const TENTH: Duration = Duration::from_millis(100);

    /// Runs `work` as a part with a deadline of a tenth of a second, and `grace` to return after it.
    fn run(grace: Duration, work: impl FnOnce(&Findings) -> anyhow::Result<()> + Send + 'static) -> (Ended, bool) {
        let dir = tempfile::tempdir().unwrap();
        let report = Arc::new(Report::create(dir.path()).unwrap());
        one("parity", &report, (TENTH, grace), work)
    }

    #[test]
    fn panicking_failing_and_hanging_parts_end() {
        let (end, hung) = run(GRACE, |_| panic!("out of range"));
        assert_eq!((end.outcome, hung), (Outcome::Failed, false));
        assert_eq!(end.error.as_deref(), Some("panicked: out of range"));
        let (end, _) = run(GRACE, |findings| {
            findings.check("sum", 2.0, 1.0);
            Err(Skip("no device".to_owned()).into())
        });
        assert_eq!(
            (end.outcome, end.error.as_deref()),
            (Outcome::Failed, Some("no device"))
        );
        let (end, _) = run(GRACE, |_| Err(Skip("no device".to_owned()).into()));
        assert_eq!(end.outcome, Outcome::Skipped);
        let (end, hung) = run(GRACE, |findings| {
            findings.check("sum", 1.0, 1.0);
            loop {
                findings.in_time()?;
                std::thread::yield_now();
            }
        });
        assert_eq!((end.outcome, hung, end.found.checks.len()), (Outcome::Late, false, 1));
        let (release, held) = channel::<()>();
        let (end, hung) = run(TENTH, move |_| {
            // Until the test is over.
            let _ = held.recv();
            Ok(())
        });
        assert_eq!((end.outcome, hung), (Outcome::Late, true));
        drop(release);
    }
}
