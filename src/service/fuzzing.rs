//! Prompts and what is put into them; archives.

use std::io::Cursor;

use super::archive;
use super::placement::{Placeable, place};
use coar_core::concept::{ConceptKind, concept_names, parse_prompt};

/// Every concept that is placed is found in the prompt afterwards, with those that were there, and placing again
/// changes nothing.
pub fn placement(prompt: &str, class: &str) {
    let before = parse_prompt(prompt)
        .map(|pieces| concept_names(&pieces).join(" "))
        .unwrap_or_default();
    let concept = |name, kind, class| Placeable { name, kind, class };
    let concepts = [
        concept("rex", ConceptKind::Subject, Some(class)),
        concept("ink", ConceptKind::Style, None),
        concept("max", ConceptKind::Subject, Some(class)),
    ];
    let placed = place(prompt, &concepts);
    let pieces = parse_prompt(&placed).expect("a prompt with concepts is not empty");
    let names = concept_names(&pieces);
    for concept in &concepts {
        assert!(names.contains(&concept.name), "{} is not in {placed:?}", concept.name);
    }
    for name in before.split_whitespace() {
        assert!(names.contains(&name), "{name} is lost in {placed:?}");
    }
    assert_eq!(place(&placed, &concepts), placed);
}

/// What an archive's directory says of a file holds for what is unpacked of it, within the limit.
pub fn archive(bytes: &[u8]) {
    const LIMIT: u64 = 1 << 16;
    let mut archive = Cursor::new(bytes);
    let Ok(entries) = archive::entries(&mut archive) else {
        return;
    };
    for entry in &entries {
        let mut length = 0;
        let unpacked = archive::unpack(&mut archive, entry, LIMIT, |piece| {
            length += piece.len() as u64;
            Ok(())
        });
        assert!(length <= entry.size.min(LIMIT), "{length} bytes of {entry:?}");
        assert!(unpacked.is_err() || length == entry.size, "{length} bytes of {entry:?}");
    }
}
