//! One line per check: case, check, largest difference, tolerance.

use std::fmt;

#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    case: String,
    check: String,
    difference: String,
    tolerance: String,
    passed: bool,
}

impl Report {
    /// A numeric check; NaN fails.
    pub fn number(&mut self, case: &str, check: &str, difference: f64, tolerance: f64) {
        let passed = difference <= tolerance;
        self.push(
            case,
            check,
            format!("{difference:.3e}"),
            format!("{tolerance:.1e}"),
            passed,
        );
    }

    /// An exact check: the number of differing values out of how many.
    pub fn exact(&mut self, case: &str, check: &str, differing: usize, of: usize) {
        self.push(
            case,
            check,
            format!("{differing} of {of} differ"),
            "exact".to_owned(),
            differing == 0 && of > 0,
        );
    }

    pub fn failed(&mut self, case: &str, problem: &str) {
        self.push(case, problem, "-".to_owned(), "-".to_owned(), false);
    }

    fn push(&mut self, case: &str, check: &str, difference: String, tolerance: String, passed: bool) {
        self.lines.push(Line {
            case: case.to_owned(),
            check: check.to_owned(),
            difference,
            tolerance,
            passed,
        });
    }

    pub fn passed(&self) -> bool {
        !self.lines.is_empty() && self.lines.iter().all(|line| line.passed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            let verdict = if line.passed { "ok  " } else { "FAIL" };
            writeln!(
                f,
                "{verdict} {:<28} {:<34} {:>20}  {}",
                line.case, line.check, line.difference, line.tolerance
            )?;
        }
        let failed = self.lines.iter().filter(|line| !line.passed).count();
        writeln!(f, "golden: {} checks, {failed} failed", self.lines.len())
    }
}
