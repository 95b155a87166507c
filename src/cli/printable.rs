//! Makes text from other sources safe for a terminal: names and nouns of imported files, messages of a server.

use std::borrow::Cow;

/// Control characters, which a terminal interprets, and those that change the direction of text.
fn is_obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, kept: &[char]) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_obeyed(c) && !kept.contains(&c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A text on one line, with control characters escaped, as in `\u{1b}`.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    match text.contains(is_obeyed) {
        true => escaped(text, &[]).into(),
        false => text.into(),
    }
}

/// The same for a text of several lines.
pub fn printable_lines(text: &str) -> String {
    escaped(text, &['\n'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_told_nothing_by_foreign_text() {
        assert_eq!(printable("a red cät, 猫"), "a red cät, 猫");
        let hostile = "cat\u{1b}[31m\u{1b}]0;title\u{7}\r\n\u{9b}2J\u{7f}\u{202e}tac";
        let shown = printable(hostile);
        assert_eq!(
            shown,
            "cat\\u{1b}[31m\\u{1b}]0;title\\u{7}\\r\\n\\u{9b}2J\\u{7f}\\u{202e}tac"
        );
        assert!(!shown.contains(is_obeyed));
        assert_eq!(printable_lines("one\ntwo\u{1b}c"), "one\ntwo\\u{1b}c");
    }
}
