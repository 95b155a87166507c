//! `<name>` in a prompt.

/// Splits a prompt at its concept placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptPiece<'a> {
    Text(&'a str),
    /// The name between the angle brackets.
    Concept(&'a str),
}

/// A prompt that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    #[error("is empty")]
    Empty,
}

/// The longest concept name.
pub const NAME_LIMIT: usize = 63;

/// Whether `name` can name a concept: 1 to 63 of `a-z 0-9 -`, the first not a hyphen.
pub fn is_slug(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_LIMIT
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Splits `prompt` at every `<name>` whose name is a slug; other angle brackets are text.
///
/// # Errors
/// When nothing but white space is left.
pub fn parse_prompt(prompt: &str) -> Result<Vec<PromptPiece<'_>>, PromptError> {
    if prompt.trim().is_empty() {
        return Err(PromptError::Empty);
    }
    let mut pieces = Vec::new();
    let (mut text_from, mut search_from) = (0, 0);
    while let Some(open) = prompt[search_from..].find('<').map(|at| at + search_from) {
        match prompt[open + 1..].find(['<', '>']).map(|at| at + open + 1) {
            Some(close) if prompt.as_bytes()[close] == b'>' && is_slug(&prompt[open + 1..close]) => {
                if text_from < open {
                    pieces.push(PromptPiece::Text(&prompt[text_from..open]));
                }
                pieces.push(PromptPiece::Concept(&prompt[open + 1..close]));
                text_from = close + 1;
                search_from = close + 1;
            }
            _ => search_from = open + 1,
        }
    }
    if text_from < prompt.len() {
        pieces.push(PromptPiece::Text(&prompt[text_from..]));
    }
    Ok(pieces)
}

/// The distinct names in a prompt, in the order of their first appearance.
pub fn concept_names<'a>(pieces: &[PromptPiece<'a>]) -> Vec<&'a str> {
    let mut names = Vec::new();
    for piece in pieces {
        if let PromptPiece::Concept(name) = piece
            && !names.contains(name)
        {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_splits_at_placeholders_and_keeps_other_brackets() {
        let pieces = parse_prompt("a <b photo of <rex> cat, 1 < 2, in <ink-2> style <Not>").unwrap();
        assert_eq!(
            pieces,
            [
                PromptPiece::Text("a <b photo of "),
                PromptPiece::Concept("rex"),
                PromptPiece::Text(" cat, 1 < 2, in "),
                PromptPiece::Concept("ink-2"),
                PromptPiece::Text(" style <Not>"),
            ]
        );
        assert_eq!(concept_names(&pieces), ["rex", "ink-2"]);
        assert_eq!(parse_prompt(" \n"), Err(PromptError::Empty));
    }

    #[test]
    fn names_repeat_only_once() {
        let pieces = parse_prompt("<a><b><a>").unwrap();
        assert_eq!(concept_names(&pieces), ["a", "b"]);
    }
}
