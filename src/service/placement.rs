//! Where in the prompt concepts go that a caller names outside of it.
//!
//! A subject goes before the first occurrence of its class noun as a whole word, whatever its case, that has no
//! placeholder before it: "a cat on a beach" becomes "a <rex> cat on a beach". Where there is none, the prompt gets a
//! beginning: "a photo of <rex> cat, on a beach". A style goes to the end: "a cat in <ink> style". A concept that the
//! prompt names already stays where it is. Subjects come first, each kind in the order in which it was named.

use coar_core::concept::{ConceptKind, PromptPiece, parse_prompt};

/// A concept to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placeable<'a> {
    pub name: &'a str,
    pub kind: ConceptKind,
    /// A subject's class noun.
    pub class: Option<&'a str>,
}

/// The prompt with every concept in it.
pub(super) fn place(prompt: &str, concepts: &[Placeable<'_>]) -> String {
    let mut prompt = prompt.to_owned();
    let mut before = Vec::new();
    let mut missing: Vec<_> = Vec::new();
    for concept in concepts {
        if !names(&prompt, concept.name) && !missing.contains(&concept) {
            missing.push(concept);
        }
    }
    for subject in missing.iter().filter(|concept| concept.kind == ConceptKind::Subject) {
        let class = subject.class.unwrap_or_default();
        match noun(&prompt, class) {
            Some(at) => prompt.insert_str(at, &format!("<{}> ", subject.name)),
            None => before.push(format!("<{}> {class}", subject.name).trim_end().to_owned()),
        }
    }
    if !before.is_empty() {
        prompt = format!("a photo of {}, {}", before.join(" and "), prompt.trim_start());
    }
    for style in missing.iter().filter(|concept| concept.kind == ConceptKind::Style) {
        let end = prompt.trim_end().trim_end_matches(['.', ',']).len();
        prompt.truncate(end);
        prompt.push_str(&format!(" in <{}> style", style.name));
    }
    prompt
}

fn names(prompt: &str, name: &str) -> bool {
    prompt.contains(&format!("<{name}>"))
}

/// Where `class` occurs in the prompt's text as a whole word without a placeholder before it.
fn noun(prompt: &str, class: &str) -> Option<usize> {
    let pieces = parse_prompt(prompt).ok()?;
    let (mut begin, mut after_placeholder) = (0, false);
    for piece in pieces {
        match piece {
            PromptPiece::Concept(name) => {
                begin += name.len() + 2;
                after_placeholder = true;
            }
            PromptPiece::Text(text) => {
                let taken = |at: usize| after_placeholder && text[..at].trim().is_empty();
                if let Some(at) = words(text, class).find(|&at| !taken(at)) {
                    return Some(begin + at);
                }
                begin += text.len();
                after_placeholder = false;
            }
        }
    }
    None
}

/// Where `word` occurs in `text` with no letter or digit on either side.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let inside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text.char_indices().map(|(at, _)| at).filter(move |&at| {
        let end = at + word.len();
        let same = text.get(at..end).is_some_and(|found| found.eq_ignore_ascii_case(word));
        same && !word.is_empty() && !inside(text[..at].chars().next_back()) && !inside(text[end..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REX: Placeable = Placeable {
        name: "rex",
        kind: ConceptKind::Subject,
        class: Some("cat"),
    };
    const MAX: Placeable = Placeable { name: "max", ..REX };
    const BEAR: Placeable = Placeable {
        name: "bruno",
        kind: ConceptKind::Subject,
        class: Some("teddy bear"),
    };
    const INK: Placeable = Placeable {
        name: "ink",
        kind: ConceptKind::Style,
        class: None,
    };

    #[test]
    fn a_subject_goes_to_its_noun() {
        let placed = |prompt| place(prompt, &[REX]);
        assert_eq!(placed("a cat on the beach"), "a <rex> cat on the beach");
        assert_eq!(placed("A Cat, and a cat"), "A <rex> Cat, and a cat");
        assert_eq!(placed("cat"), "<rex> cat");
        assert_eq!(placed("a café's cat"), "a café's <rex> cat");
        assert_eq!(place("my Teddy Bear at sea", &[BEAR]), "my <bruno> Teddy Bear at sea");
    }

    #[test]
    fn other_words_are_not_its_noun() {
        let placed = |prompt| place(prompt, &[REX]);
        assert_eq!(
            placed("a catalogue of cats"),
            "a photo of <rex> cat, a catalogue of cats"
        );
        assert_eq!(
            placed("in the <cat> garden"),
            "a photo of <rex> cat, in the <cat> garden"
        );
        assert_eq!(placed("on the moon"), "a photo of <rex> cat, on the moon");
        assert_eq!(
            placed("a <max> cat and a dog"),
            "a photo of <rex> cat, a <max> cat and a dog"
        );
        assert_eq!(placed("a <max> cat and a cat"), "a <max> cat and a <rex> cat");
    }

    #[test]
    fn several_find_their_places_and_styles_come_last() {
        assert_eq!(
            place("a cat in the snow. ", &[INK, REX]),
            "a <rex> cat in the snow in <ink> style"
        );
        assert_eq!(place("a cat and a cat", &[REX, MAX]), "a <rex> cat and a <max> cat");
        assert_eq!(
            place("on the beach", &[REX, BEAR, INK]),
            "a photo of <rex> cat and <bruno> teddy bear, on the beach in <ink> style"
        );
    }

    #[test]
    fn what_the_prompt_names_already_stays() {
        assert_eq!(place("a cat beside <rex>", &[REX, REX]), "a cat beside <rex>");
        assert_eq!(
            place("a cat in <ink> style", &[INK, REX, REX]),
            "a <rex> cat in <ink> style"
        );
    }
}
