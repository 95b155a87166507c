//! The pocket checkpoint's `text_tokenizer.json`: the real file's structure, with few words and compact ids.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::world::words;
use coar_core::tokenizer::{code_name, grid_name};

/// Size names `<reserved08801>` ...: the longest side of the pocket's sizes has 12 grids.
const GRIDS: usize = 16;

/// The symbol of each byte in byte-level BPE: printable bytes represent themselves, the others are shifted up.
fn byte_symbols() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut moved = 256;
    (0..256u32)
        .map(|byte| {
            let point = if printable(byte) {
                byte
            } else {
                moved += 1;
                moved - 1
            };
            char::from_u32(point).expect("code points below 512 are characters")
        })
        .collect()
}

/// Names in the order of their ids, and the merges that make each word of the world, with the space before it, one
/// token.
fn names_and_merges(codes: i64, grids: usize, words: &[&str]) -> (Vec<String>, Vec<(String, String)>, Vec<String>) {
    let mut names: Vec<String> = ["<s>", "<pad>", "</s>", "<unk>"].map(str::to_owned).to_vec();
    names.extend((0..codes).map(code_name));
    let mut special: Vec<String> = names[..4].to_vec();
    let reserved = [8706, 8707, 8708, 8799].map(|n| format!("<reserved{n:05}>"));
    let control: Vec<String> = ["<eoss>", "<racm3:break>"]
        .map(str::to_owned)
        .into_iter()
        .chain(reserved)
        .chain((1..=grids).map(grid_name))
        .collect();
    special.extend(control.iter().cloned());
    names.extend(control);
    names.extend(byte_symbols().into_iter().map(String::from));
    let template = ["an", "image", "of", "according", "to", "the", "following", "prompt"];
    let mut all: Vec<&str> = words.to_vec();
    all.extend(template);
    all.sort_unstable();
    all.dedup();
    let mut merges = Vec::new();
    let mut known: std::collections::BTreeSet<String> = names.iter().cloned().collect();
    // The space's symbol occurs only at a word's start, so chains from the left never meet inside another word.
    let chains = all
        .iter()
        .map(|word| format!("\u{120}{word}"))
        .chain(["Generate".to_owned()]);
    for chain in chains {
        let mut built = String::new();
        for letter in chain.chars() {
            let next = format!("{built}{letter}");
            if !built.is_empty() && known.insert(next.clone()) {
                merges.push((built.clone(), letter.to_string()));
                names.push(next.clone());
            }
            built = next;
        }
    }
    (names, merges, special)
}

/// Every name and its id.
pub fn vocabulary_map() -> BTreeMap<String, i64> {
    vocabulary_map_of(super::IMAGE_CODES, &words())
}

/// Every name and its id in a vocabulary with this many image codes, and these words.
pub fn vocabulary_map_of(codes: i64, words: &[&str]) -> BTreeMap<String, i64> {
    names_and_merges(codes, GRIDS, words).0.into_iter().zip(0..).collect()
}

/// The pocket model's tokenizer file.
pub fn tokenizer_json() -> Value {
    tokenizer_with(super::IMAGE_CODES, GRIDS)
}

/// A tokenizer file in the format of Hugging Face `tokenizers`, with the pre-tokenizer pipeline of the real one:
/// this many image codes (from id 4 on, as in the real one) and size names, and the words of the pocket model's
/// world.
pub fn tokenizer_with(codes: i64, grids: usize) -> Value {
    tokenizer_of_words(codes, grids, &words())
}

/// The tokenizer file with this many image codes, and these words.
pub fn tokenizer_of(codes: i64, words: &[&str]) -> Value {
    tokenizer_of_words(codes, GRIDS, words)
}

fn tokenizer_of_words(codes: i64, grids: usize, words: &[&str]) -> Value {
    let (names, merges, special) = names_and_merges(codes, grids, words);
    let vocabulary: serde_json::Map<String, Value> = names
        .iter()
        .enumerate()
        .map(|(id, name)| (name.clone(), id.into()))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .map(|name| {
            json!({
                "id": vocabulary[name], "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            })
        })
        .collect();
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split("<sentinel:[0-9]+>"),
            split("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
            split("([\\t\\n]|    |  )"),
            {"type": "Digits", "individual_digits": true},
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use coar_core::tokenizer::{PromptPart, TextTokenizer, Vocabulary, encode_prompt};

    fn tokenizer() -> (TextTokenizer, Vocabulary) {
        let tokenizer = TextTokenizer::from_bytes(tokenizer_json().to_string().as_bytes()).unwrap();
        let vocabulary = Vocabulary::from_names(&tokenizer.names()).unwrap();
        (tokenizer, vocabulary)
    }

    #[test]
    fn every_word_of_the_world_is_one_token() {
        let (tokenizer, _) = tokenizer();
        for word in words() {
            assert_eq!(tokenizer.encode(&format!(" {word}")).unwrap().len(), 1, "{word}");
        }
        assert_eq!(tokenizer.names(), vocabulary_map());
    }

    #[test]
    fn codes_are_found_by_name_and_any_text_encodes() {
        let (tokenizer, vocabulary) = tokenizer();
        assert_eq!(vocabulary.code_count(), 1024);
        assert_eq!(
            (vocabulary.code_to_id(0).unwrap(), vocabulary.code_to_id(1023).unwrap()),
            (4, 1027)
        );
        assert!(vocabulary.code_to_id(1024).is_err());
        for text in ["Ünïcode 🦊 と 漢字", "\u{0}\u{ffff}", "a\t\nb    c"] {
            assert!(!tokenizer.encode(text).unwrap().is_empty());
        }
    }

    #[test]
    fn slot_replaces_a_word() {
        let (tokenizer, vocabulary) = tokenizer();
        let parts = [
            PromptPart::Text("a photo of "),
            PromptPart::Slot(2),
            PromptPart::Text(" cat on the beach"),
        ];
        let with = encode_prompt(&tokenizer, &vocabulary, 96, 96, &parts).unwrap();
        let words = encode_prompt(
            &tokenizer,
            &vocabulary,
            96,
            96,
            &[PromptPart::Text("a photo of red blue cat on the beach")],
        )
        .unwrap();
        let at = with.slots[0] as usize;
        assert_eq!(with.ids[..at], words.ids[..at]);
        assert_eq!(with.ids[at..at + 2], [vocabulary.placeholder(); 2]);
        assert_eq!(with.ids[at + 2..], words.ids[at + 2..]);
    }

    #[test]
    fn control_tokens_in_a_prompt_are_refused() {
        let (tokenizer, vocabulary) = tokenizer();
        for text in ["a <eoss> cat", "<racm3:break>", "<reserved08706>"] {
            assert!(
                encode_prompt(&tokenizer, &vocabulary, 96, 96, &[PromptPart::Text(text)]).is_err(),
                "{text}"
            );
        }
    }
}
