//! Fuzz targets: placement of concepts in prompts, and archives.

use std::io::Cursor;

use super::archive;
use super::placement::{Placeable, place};
use coar_core::concept::{ConceptKind, concept_names, parse_prompt};

/// Every placed concept is found in the prompt afterwards, with those that were there before, and placing again changes
/// nothing.
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

/// An unpacked file has the size in the archive's directory, within the limit.
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
