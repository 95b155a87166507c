//! `<name>` in a prompt.

/// A piece of a prompt that is split at its concept placeholders.
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

/// The position of the first `<name>` in a prompt, in characters counted from 1.
pub fn placeholder_at(prompt: &str, name: &str) -> Option<usize> {
    let at = prompt.find(&format!("<{name}>"))?;
    Some(prompt[..at].chars().count() + 1)
}

/// Text that resembles a placeholder: names have neither capitals nor underscores, so `<Rex>` and `<my_cat>` are text.
/// Returns the text between the brackets and the name it resembles, without duplicates, in order of appearance.
pub fn near_placeholders(prompt: &str) -> Vec<(&str, String)> {
    let mut near: Vec<(&str, String)> = Vec::new();
    for (open, _) in prompt.match_indices('<') {
        let Some(length) = prompt[open + 1..].find(['<', '>']) else {
            break;
        };
        let (inner, rest) = prompt[open + 1..].split_at(length);
        let name = inner.to_lowercase().replace('_', "-");
        if rest.starts_with('>') && !is_slug(inner) && is_slug(&name) && near.iter().all(|(known, _)| *known != inner) {
            near.push((inner, name));
        }
    }
    near
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
    fn placeholders_are_found_and_near_ones_recognised() {
        assert_eq!(placeholder_at("è <b>", "b"), Some(3));
        assert_eq!(placeholder_at("è <b>", "a"), None);
        let near = near_placeholders("a <Rex> and <my_cat> and <Rex>, <rex> < Rex> <b <Max> </b> <é> <");
        let expected = [("Rex", "rex"), ("my_cat", "my-cat"), ("Max", "max")];
        assert_eq!(near, expected.map(|(inner, name)| (inner, name.to_owned())));
    }

    #[test]
    fn names_repeat_only_once() {
        let pieces = parse_prompt("<a><b><a>").unwrap();
        assert_eq!(concept_names(&pieces), ["a", "b"]);
    }
}
