//! CLIP's byte-pair tokenizer: `tokenizer.json` if the folder has it, otherwise `vocab.json` and `merges.txt`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::fields::read_text;
use coar_core::tokenizer::TextTokenizer;
use coar_engine::model::ModelError;

/// Names of the tokens that begin and end a text.
const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// The pre-tokenizer pattern: the name of a control token, an English ending, letters, one digit, or anything else.
const PIECES: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Maximum file size; the published ones have 2 MB.
const MAX_BYTES: u64 = 64 << 20;
/// Maximum text length in bytes: tens of times the length of 77 tokens, unless it is mostly spaces.
const MAX_TEXT: usize = 64 << 10;

/// Converts texts to ids.
#[derive(Debug)]
pub(super) struct ClipTokenizer {
    tokenizer: TextTokenizer,
    pub begin: i64,
    pub end: i64,
    /// Maximum number of ids of a text, with begin and end.
    positions: usize,
}

impl ClipTokenizer {
    /// Reads a folder's tokenizer for a network of `vocabulary` ids and `positions` positions, whose end token is
    /// `end`.
    ///
    /// # Errors
    /// When the files are missing, cannot be read, lack begin and end tokens, or have ids outside the vocabulary.
    pub fn read(dir: &Path, vocabulary: i64, positions: i64, end: Option<i64>) -> Result<Self, ModelError> {
        let file = dir.join("tokenizer.json");
        let (file, text) = match file.exists() {
            true => {
                let text = read_text(&file, MAX_BYTES)?;
                (file, text)
            }
            false => {
                let (names, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
                if !names.exists() {
                    return Err(ModelError::file(
                        dir,
                        "holds neither tokenizer.json nor vocab.json and merges.txt",
                    ));
                }
                let text = whole_file(
                    (&names, &read_text(&names, MAX_BYTES)?),
                    (&merges, &read_text(&merges, MAX_BYTES)?),
                )?;
                (names, text)
            }
        };
        Self::from_text(&text, vocabulary, positions, end).map_err(|error| match error {
            ModelError::Invalid { field, problem } => ModelError::Config {
                file,
                field: field.to_owned(),
                problem,
            },
            other => other,
        })
    }

    /// As [`Self::read`], from the text of a `tokenizer.json`.
    pub fn from_text(text: &str, vocabulary: i64, positions: i64, end: Option<i64>) -> Result<Self, ModelError> {
        let tokenizer = TextTokenizer::from_bytes(text.as_bytes())?.without_limits()?;
        let names = tokenizer.names();
        let id = |name: &'static str| {
            let missing = || ModelError::invalid("tokenizer", format!("has no `{name}`, which every text gets"));
            names.get(name).copied().ok_or_else(missing)
        };
        let (begin, own_end) = (id(BEGIN)?, id(END)?);
        if let Some((name, id)) = names.iter().find(|(_, id)| **id >= vocabulary) {
            let name: String = name.chars().take(40).collect();
            let problem = format!("gives `{name}` the id {id}; config.json's vocab_size is {vocabulary}");
            return Err(ModelError::invalid("tokenizer", problem));
        }
        // A text's embedding is read at the position of the end token.
        if let Some(end) = end.filter(|end| *end != own_end) {
            let problem = format!("gives `{END}` the id {own_end}; config.json's eos_token_id is {end}");
            return Err(ModelError::invalid("tokenizer", problem));
        }
        Ok(Self {
            tokenizer,
            begin,
            end: own_end,
            positions: positions as usize,
        })
    }

    /// Ids of a text between begin and end; longer texts are truncated before the end token.
    ///
    /// # Errors
    /// When the tokenizer's own patterns fail on the text.
    pub fn ids(&self, text: &str) -> Result<Vec<i64>, ModelError> {
        let cut = (0..=text.len().min(MAX_TEXT))
            .rev()
            .find(|at| text.is_char_boundary(*at));
        let words = self.tokenizer.encode(&text[..cut.unwrap_or(0)])?;
        let room = self.positions.saturating_sub(2);
        let ids = [self.begin].into_iter().chain(words.into_iter().take(room));
        Ok(ids.chain([self.end]).collect())
    }
}

/// Builds a `tokenizer.json` from `vocab.json` and `merges.txt`, as `CLIPTokenizer` does.
pub(super) fn whole_file(
    (vocab_file, vocab): (&Path, &str),
    (merges_file, merges): (&Path, &str),
) -> Result<String, ModelError> {
    let vocab: BTreeMap<String, u32> = serde_json::from_str(vocab)
        .map_err(|error| ModelError::file(vocab_file, format!("is not an object of names and ids: {error}")))?;
    let added = [BEGIN, END].into_iter().filter_map(|name| {
        let id = vocab.get(name)?;
        let flags = json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        Some(flags)
    });
    let added: Vec<Value> = added.collect();
    let mut pairs: Vec<[&str; 2]> = Vec::new();
    for (index, line) in merges.lines().enumerate() {
        if line.starts_with("#version") || line.trim().is_empty() {
            continue;
        }
        let pair = line.split_once(' ').filter(|(_, second)| !second.contains(' '));
        let Some((first, second)) = pair else {
            let line: String = line.chars().take(40).collect();
            let problem = format!(
                "line {}: is `{line}`; expected two pieces and a space between",
                index + 1
            );
            return Err(ModelError::file(merges_file, problem));
        };
        // Checked here, because the library only panics.
        for piece in [first, second, &format!("{first}{second}")] {
            if !vocab.contains_key(piece) {
                let problem = format!("line {}: `{piece}` is not in vocab.json", index + 1);
                return Err(ModelError::file(merges_file, problem));
            }
        }
        pairs.push([first, second]);
    }
    let whole = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": pairs,
        },
    });
    Ok(whole.to_string())
}
