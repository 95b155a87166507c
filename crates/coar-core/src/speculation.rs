//! The setting of speculative decoding.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The number of tokens per row in a decode step. It does not affect the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// The best window for the current load.
    #[default]
    Auto,
    /// One code per step, with row ends in the same step.
    Off,
    /// Always that many tokens, 2 to [`LARGEST_WINDOW`].
    #[serde(untagged)]
    Tokens(usize),
}

/// The largest window; guesses beyond it are hardly ever correct.
pub const LARGEST_WINDOW: usize = 64;

impl FromStr for Speculation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            ("off", _) | (_, Ok(1)) => Ok(Self::Off),
            (_, Ok(tokens)) if (2..=LARGEST_WINDOW).contains(&tokens) => Ok(Self::Tokens(tokens)),
            _ => Err(format!("expected `auto`, `off` or a number from 1 to {LARGEST_WINDOW}")),
        }
    }
}

impl fmt::Display for Speculation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Tokens(tokens) => write!(f, "{tokens}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read() {
        assert_eq!("auto".parse(), Ok(Speculation::Auto));
        assert_eq!("off".parse(), Ok(Speculation::Off));
        assert_eq!("1".parse(), Ok(Speculation::Off));
        assert_eq!("16".parse(), Ok(Speculation::Tokens(16)));
        for bad in ["0", "65", "-1", "on", ""] {
            assert!(bad.parse::<Speculation>().is_err(), "{bad}");
        }
    }
}
