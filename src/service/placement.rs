//! Placement of concepts in a prompt that does not name them.
//!
//! A subject is placed before the first occurrence of its class noun as a whole word, in any case, without a
//! placeholder before it: "a cat on a beach" becomes "a <rex> cat on a beach". In scripts without spaces between words
//! every occurrence counts. A plural is another word, since the language of the prompt is not known. Without an
//! occurrence, the concept is placed at the beginning: "a photo of <rex> cat, on a beach". A style is placed at the
//! end: "a cat in <ink> style". A concept that the prompt already names is not placed. Subjects come first, each kind
//! in the order in which it was given.

use coar_core::concept::{ConceptKind, PromptPiece, parse_prompt};

/// A concept to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placeable<'a> {
    pub name: &'a str,
    pub kind: ConceptKind,
    /// The class noun of a subject.
    pub class: Option<&'a str>,
}

/// The prompt with all concepts placed in it.
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

/// Where `word` occurs in `text` as a whole word.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.char_indices().map(|(at, _)| at).filter(move |&at| {
        let Some(length) = same_beginning(&text[at..], word) else {
            return false;
        };
        let (before, after) = text.split_at(at);
        let (found, after) = after.split_at(length);
        let ends_word = |inner: Option<char>, outer: Option<char>| match (inner, outer) {
            (Some(inner), Some(outer)) => !continues(outer) || is_unspaced(inner) || is_unspaced(outer),
            _ => true,
        };
        // Korean is written with spaces, but its particles follow a noun without one.
        let particle = |inner: Option<char>| inner.is_some_and(|inner| ('가'..='힣').contains(&inner));
        ends_word(found.chars().next(), before.chars().next_back())
            && (particle(found.chars().next_back()) || ends_word(found.chars().next_back(), after.chars().next()))
    })
}

/// The length of the beginning of `text` that equals `word` in any case.
fn same_beginning(text: &str, word: &str) -> Option<usize> {
    if word.is_empty() {
        return None;
    }
    let mut wanted = word.chars().flat_map(char::to_lowercase).peekable();
    for (at, character) in text.char_indices() {
        if wanted.peek().is_none() {
            return Some(at);
        }
        for folded in character.to_lowercase() {
            if wanted.next() != Some(folded) {
                return None;
            }
        }
    }
    wanted.peek().is_none().then_some(text.len())
}

/// Whether a character next to a word makes it another word: letters, digits, and combining accents.
fn continues(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '\u{300}'..='\u{36f}')
}

/// Scripts that are written without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
fn is_unspaced(character: char) -> bool {
    matches!(
        character,
        '\u{e00}'..='\u{eff}'
            | '\u{1000}'..='\u{109f}'
            | '\u{1780}'..='\u{17ff}'
            | '\u{3040}'..='\u{30ff}'
            | '\u{3400}'..='\u{4dbf}'
            | '\u{4e00}'..='\u{9fff}'
            | '\u{f900}'..='\u{faff}'
            | '\u{20000}'..='\u{3ffff}'
    )
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
    fn nouns_of_other_scripts_are_found() {
        let placed = |class: &str, prompt: &str| {
            let class = Some(class);
            place(prompt, &[Placeable { class, ..REX }])
        };
        assert_eq!(placed("猫", "一只猫在海滩上"), "一只<rex> 猫在海滩上");
        assert_eq!(placed("ネコ", "浜辺のネコ"), "浜辺の<rex> ネコ");
        assert_eq!(placed("แมว", "รูปแมวบนชายหาด"), "รูป<rex> แมวบนชายหาด");
        assert_eq!(placed("cat", "一只cat在海滩上"), "一只<rex> cat在海滩上");
        assert_eq!(placed("고양이", "해변의 고양이가 잔다"), "해변의 <rex> 고양이가 잔다");
        assert_eq!(placed("고양이", "들고양이"), "a photo of <rex> 고양이, 들고양이");
        assert_eq!(placed("café", "a CAFÉ at night"), "a <rex> CAFÉ at night");
        assert_eq!(placed("ÉCLAIR", "un éclair"), "un <rex> éclair");
        assert_eq!(placed("кот", "Кот на пляже"), "<rex> Кот на пляже");
        assert_eq!(placed("кот", "котик"), "a photo of <rex> кот, котик");
        // A combining accent belongs to the letter before it.
        assert_eq!(placed("cafe", "a cafe\u{301}"), "a photo of <rex> cafe, a cafe\u{301}");
        assert_eq!(placed("cat", "two cats"), "a photo of <rex> cat, two cats");
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
