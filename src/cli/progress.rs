//! Progress lines for when standard error is not a terminal, so that a log or a pipe is not silent for minutes.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

/// How often a line is written.
const EVERY: Duration = Duration::from_secs(10);

/// Writes the state of a hidden progress bar as a line, every ten seconds.
#[derive(Debug)]
pub(super) struct ProgressLines {
    next: Instant,
}

impl ProgressLines {
    /// The first line is due after ten seconds: shorter work needs none.
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now() + EVERY,
        }
    }

    /// Writes a line if one is due.
    pub(super) fn show(&mut self, bar: &ProgressBar) {
        if bar.is_hidden() && self.next <= Instant::now() {
            eprintln!("{}", line(bar));
            self.next = Instant::now() + EVERY;
        }
    }
}

fn line(bar: &ProgressBar) -> String {
    format!("{}  {}/{}", bar.message(), bar.position(), bar.length().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_the_bar_would() {
        let bar = ProgressBar::hidden();
        bar.set_length(120);
        bar.set_position(30);
        bar.set_message("loss 1.500");
        assert_eq!(line(&bar), "loss 1.500  30/120");
    }
}
