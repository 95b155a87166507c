//! Text tokens, image codes and special ids of a checkpoint's vocabulary, always looked up by name.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokenizers::Tokenizer;

const IMAGE_CODE: &str = "IMGIMG";
const PLACEHOLDER: &str = "<reserved08708>";
const SEPARATOR: &str = "<reserved08706>";
const ROW_END: &str = "<reserved08799>";

/// Why a vocabulary or tokenizer is unusable, or a text cannot be tokenized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing, unreadable or not a tokenizer.
    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: String },
    /// A value is outside its limits.
    #[error("`{field}` {problem}")]
    Invalid { field: &'static str, problem: String },
}

impl TokenizerError {
    fn file(file: &Path, problem: impl ToString) -> Self {
        Self::File {
            file: file.to_owned(),
            problem: problem.to_string(),
        }
    }

    /// A value outside its limits.
    pub fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            problem: problem.into(),
        }
    }
}

/// The largest grid with a name of its own: 64 grids are the longest side of an image of the 1024 px checkpoint.
const MAX_GRIDS: usize = 64;

/// Names in every vocabulary, besides sizes ([`grid_name`]) and image codes ([`code_name`]).
pub const CONTROL_NAMES: [&str; 6] = ["<s>", "<pad>", "<eoss>", "<racm3:break>", SEPARATOR, ROW_END];

/// The name of "n grids of two codes" along a side.
pub fn grid_name(n: usize) -> String {
    format!("<reserved{:05}>", 8800 + n)
}

/// The name of an image code, the inverse of what [`Vocabulary`] parses.
pub fn code_name(code: i64) -> String {
    let letter = |digit: u8| char::from(digit - b'0' + b'A');
    let letters: String = code.to_string().bytes().map(letter).collect();
    format!("{IMAGE_CODE}{letters}Z")
}

/// Ids by their role (`model/chameleon_vae_ori/vocab.py`, `data/item_processor.py`).
#[derive(Debug, Clone)]
pub struct Vocabulary {
    begin: i64,
    pad: i64,
    separator: i64,
    image_start: i64,
    image_end: i64,
    row_end: i64,
    placeholder: i64,
    /// Id of "n grids of two codes", index n - 1.
    grids: Vec<i64>,
    /// Id of every image code.
    codes: Vec<i64>,
    code_of_id: BTreeMap<i64, i64>,
    /// Ids that user text must not contain.
    special: std::collections::BTreeSet<i64>,
}

/// The code in an image token's name: `IMGIMG`, letters A..J for the digits 0..9, and a closing letter.
fn code_of_name(name: &str) -> Option<i64> {
    let digits = name.strip_prefix(IMAGE_CODE)?;
    let digits = &digits[..digits.len().checked_sub(1)?];
    if digits.is_empty() || digits.len() > 9 {
        return None;
    }
    digits.bytes().try_fold(0i64, |code, letter| match letter {
        b'A'..=b'J' => Some(code * 10 + i64::from(letter - b'A')),
        _ => None,
    })
}

impl Vocabulary {
    /// Resolves every role in a name-to-id map, from `text_tokenizer.json` or a `vocabulary_map`.
    ///
    /// # Errors
    /// When a special name is missing, or the image codes are not 0..n, each once.
    pub fn from_names(names: &BTreeMap<String, i64>) -> Result<Self, TokenizerError> {
        let id = |name: &str| {
            names.get(name).copied().ok_or_else(|| {
                TokenizerError::invalid(
                    "vocabulary",
                    format!("lacks `{name}`; expected the special names of a Chameleon vocabulary"),
                )
            })
        };
        let (codes, code_of_id) = image_codes(names)?;
        let grids: Vec<i64> = (1..=MAX_GRIDS)
            .map_while(|n| names.get(&grid_name(n)).copied())
            .collect();
        if grids.is_empty() {
            return Err(TokenizerError::invalid(
                "vocabulary",
                "lacks `<reserved08801>`, the first of the size names",
            ));
        }
        let special = names
            .iter()
            .filter(|(name, _)| is_special_name(name))
            .map(|(_, &id)| id)
            .chain(codes.iter().copied())
            .collect();
        Ok(Self {
            begin: id("<s>")?,
            pad: id("<pad>")?,
            separator: id(SEPARATOR)?,
            image_start: id("<racm3:break>")?,
            image_end: id("<eoss>")?,
            row_end: id(ROW_END)?,
            placeholder: names.get(PLACEHOLDER).copied().map_or_else(|| id("<pad>"), Ok)?,
            grids,
            codes,
            code_of_id,
            special,
        })
    }

    /// `<s>`: begins every prompt.
    pub fn begin(&self) -> i64 {
        self.begin
    }
    /// `<pad>`
    pub fn pad(&self) -> i64 {
        self.pad
    }
    /// Ends every turn.
    pub fn separator(&self) -> i64 {
        self.separator
    }
    /// `<racm3:break>`: begins an image.
    pub fn image_start(&self) -> i64 {
        self.image_start
    }
    /// `<eoss>`: ends an image.
    pub fn image_end(&self) -> i64 {
        self.image_end
    }
    /// Ends every row of codes, the last one too.
    pub fn row_end(&self) -> i64 {
        self.row_end
    }
    /// The id at context positions; its embedding is always replaced.
    pub fn placeholder(&self) -> i64 {
        self.placeholder
    }
    /// Number of image codes.
    pub fn code_count(&self) -> usize {
        self.codes.len()
    }
    /// The largest number of grids per side that has a name.
    pub fn most_grids(&self) -> usize {
        self.grids.len()
    }

    /// The id for `n` grids (2 codes each) per side.
    ///
    /// # Errors
    /// When the vocabulary has no name for it.
    pub fn grid_id(&self, n: i64) -> Result<i64, TokenizerError> {
        let fault = || {
            TokenizerError::invalid(
                "size",
                format!("is {n} grids along a side; expected 1 to {}", self.grids.len()),
            )
        };
        usize::try_from(n - 1)
            .ok()
            .and_then(|index| self.grids.get(index))
            .copied()
            .ok_or_else(fault)
    }

    /// The number of grids that `id` names.
    pub fn grids_of_id(&self, id: i64) -> Option<i64> {
        self.grids
            .iter()
            .position(|&grid| grid == id)
            .map(|index| index as i64 + 1)
    }

    /// The id of an image code.
    ///
    /// # Errors
    /// When the code is outside the codebook.
    pub fn code_to_id(&self, code: i64) -> Result<i64, TokenizerError> {
        let fault = || TokenizerError::invalid("code", format!("is {code}; expected 0 to {}", self.codes.len() - 1));
        usize::try_from(code)
            .ok()
            .and_then(|index| self.codes.get(index))
            .copied()
            .ok_or_else(fault)
    }

    /// The image code of an id.
    pub fn id_to_code(&self, id: i64) -> Option<i64> {
        self.code_of_id.get(&id).copied()
    }

    /// Whether an id is an image code.
    pub fn is_code(&self, id: i64) -> bool {
        self.code_of_id.contains_key(&id)
    }

    /// Ids of all image codes in the order of the codes.
    pub fn code_ids(&self) -> &[i64] {
        &self.codes
    }

    /// Whether an id is a control or image token, which user text must not contain.
    pub fn is_special(&self, id: i64) -> bool {
        self.special.contains(&id)
    }
}

fn is_special_name(name: &str) -> bool {
    matches!(
        name,
        "<s>" | "</s>" | "<pad>" | "<unk>" | "<eoss>" | "<racm3:break>" | "<image>"
    ) || (name.starts_with("<reserved") || name.starts_with("<sentinel:")) && name.ends_with('>')
}

/// Code to id and back, from names alone.
///
/// # Errors
/// When the codes are not exactly 0..n.
pub fn image_codes(names: &BTreeMap<String, i64>) -> Result<(Vec<i64>, BTreeMap<i64, i64>), TokenizerError> {
    let mut by_code = BTreeMap::new();
    for (name, &id) in names {
        let Some(code) = code_of_name(name) else { continue };
        if by_code.insert(code, id).is_some() {
            return Err(TokenizerError::invalid(
                "vocabulary",
                format!("names the image code {code} twice, last as `{name}`"),
            ));
        }
    }
    let complete = by_code.keys().copied().eq(0..by_code.len() as i64);
    let back: BTreeMap<i64, i64> = by_code.iter().map(|(&code, &id)| (id, code)).collect();
    if by_code.is_empty() || !complete || back.len() != by_code.len() {
        return Err(TokenizerError::invalid(
            "vocabulary",
            "does not name the image codes 0 to n, each once and with an id of its own, as IMGIMG...Z",
        ));
    }
    Ok((by_code.into_values().collect(), back))
}

/// Runs `work` and converts a panic to an error: the crate panics on some unusable files, and on some texts with
/// malformed files.
fn tokenized<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer library panicked".to_owned()),
    }
}

/// The checkpoint's own tokenizer file.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// The file it was read from.
    file: Bytes,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("vocabulary", &self.tokenizer.get_vocab_size(true))
            .finish()
    }
}

impl TextTokenizer {
    /// Reads `text_tokenizer.json`.
    ///
    /// # Errors
    /// When the file is unreadable or not a tokenizer.
    pub fn read(file: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(file).map_err(|error| TokenizerError::file(file, error))?;
        Self::from_bytes(&bytes).map_err(|error| TokenizerError::file(file, error))
    }

    /// As [`Self::read`], from memory.
    ///
    /// # Errors
    /// When the bytes are not a tokenizer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let tokenizer = tokenized(|| Tokenizer::from_bytes(bytes))
            .map_err(|error| TokenizerError::invalid("tokenizer", format!("cannot be read: {error}")))?;
        Ok(Self {
            tokenizer,
            file: Bytes::copy_from_slice(bytes),
        })
    }

    /// A copy without the file's own truncation and padding, for callers that handle both themselves.
    ///
    /// # Errors
    /// When the crate rejects it.
    pub fn without_limits(mut self) -> Result<Self, TokenizerError> {
        self.tokenizer
            .with_truncation(None)
            .map_err(|error| TokenizerError::invalid("tokenizer", error.to_string()))?;
        self.tokenizer.with_padding(None);
        Ok(self)
    }

    /// The bytes that it was read from.
    pub fn file(&self) -> &Bytes {
        &self.file
    }

    /// Every name and its id.
    pub fn names(&self) -> BTreeMap<String, i64> {
        self.tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(name, id)| (name, i64::from(id)))
            .collect()
    }

    /// Ids of a text, without added specials; special names inside it become their ids.
    ///
    /// # Errors
    /// When the tokenizer's own patterns fail on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, TokenizerError> {
        let encoding = tokenized(|| self.tokenizer.encode(text, false))
            .map_err(|error| TokenizerError::invalid("prompt", format!("cannot be tokenised: {error}")))?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }
}

/// The generation prompt of the reference.
pub fn generation_prompt(width: u32, height: u32, prompt: &str) -> String {
    format!("Generate an image of {width}x{height} according to the following prompt:\n{prompt}")
}

/// A piece of a prompt with placeholders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptPart<'a> {
    Text(&'a str),
    /// A run of context positions of this length.
    Slot(usize),
}

/// Prompt ids and the first position of each slot, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    pub ids: Vec<i64>,
    pub slots: Vec<i64>,
    /// Tokens of the user's text.
    pub text_tokens: usize,
}

/// `<s>`, the generation prompt with placeholder ids for every slot, and the separator.
///
/// A slot replaces a word: it absorbs the space before it (as a word's own token would), and text after it keeps its
/// leading space.
///
/// # Errors
/// When the text cannot be tokenised, or contains the name of a control token.
pub fn encode_prompt(
    tokenizer: &TextTokenizer,
    vocabulary: &Vocabulary,
    width: u32,
    height: u32,
    parts: &[PromptPart],
) -> Result<EncodedPrompt, TokenizerError> {
    let mut ids = vec![vocabulary.begin()];
    let (mut slots, mut text_tokens) = (Vec::new(), 0);
    let mut lead = generation_prompt(width, height, "");
    for (index, part) in parts.iter().enumerate() {
        match *part {
            PromptPart::Text(text) => {
                let before_slot = matches!(parts.get(index + 1), Some(PromptPart::Slot(_)));
                let text = if before_slot {
                    text.strip_suffix(' ').unwrap_or(text)
                } else {
                    text
                };
                lead.push_str(text);
            }
            PromptPart::Slot(tokens) => {
                text_tokens += push_text(tokenizer, vocabulary, &mut ids, &std::mem::take(&mut lead))?;
                slots.push(ids.len() as i64);
                ids.extend(std::iter::repeat_n(vocabulary.placeholder(), tokens));
            }
        }
    }
    text_tokens += push_text(tokenizer, vocabulary, &mut ids, &lead)?;
    ids.push(vocabulary.separator());
    Ok(EncodedPrompt {
        ids,
        slots,
        text_tokens,
    })
}

fn push_text(
    tokenizer: &TextTokenizer,
    vocabulary: &Vocabulary,
    ids: &mut Vec<i64>,
    text: &str,
) -> Result<usize, TokenizerError> {
    if text.is_empty() {
        return Ok(0);
    }
    let encoded = tokenizer.encode(text)?;
    if encoded.iter().any(|&id| vocabulary.is_special(id)) {
        return Err(TokenizerError::invalid(
            "prompt",
            "contains the name of a control token of the model, such as `<eoss>`; write it differently",
        ));
    }
    let count = encoded.len();
    ids.extend(encoded);
    Ok(count)
}

/// An image as ids: `[start, height, width]`, then the rest: rows of codes each with a row end, and the image end.
/// Sides are in codes and must be even, since sizes are named in grids of two codes.
///
/// # Errors
/// When the sides have no name or the codes do not form the image.
pub fn image_block(
    vocabulary: &Vocabulary,
    codes: &[i64],
    rows: usize,
    columns: usize,
) -> Result<([i64; 3], Vec<i64>), TokenizerError> {
    if codes.len() != rows * columns || !rows.is_multiple_of(2) || !columns.is_multiple_of(2) || columns == 0 {
        return Err(TokenizerError::invalid(
            "codes",
            format!("are {}; expected {rows} rows of {columns}, both even", codes.len()),
        ));
    }
    let start = [
        vocabulary.image_start(),
        vocabulary.grid_id(rows as i64 / 2)?,
        vocabulary.grid_id(columns as i64 / 2)?,
    ];
    let mut ids = Vec::with_capacity(codes.len() + rows + 1);
    for row in codes.chunks_exact(columns) {
        for &code in row {
            ids.push(vocabulary.code_to_id(code)?);
        }
        ids.push(vocabulary.row_end());
    }
    ids.push(vocabulary.image_end());
    Ok((start, ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(codes: &[(&str, i64)], without: &str) -> BTreeMap<String, i64> {
        let fixed = CONTROL_NAMES.into_iter().chain(["<reserved08801>"]);
        let specials = fixed.zip(100..).filter(|(name, _)| *name != without);
        codes
            .iter()
            .copied()
            .chain(specials)
            .map(|(name, id)| (name.to_owned(), id))
            .collect()
    }

    #[test]
    fn a_file_that_makes_the_reader_panic_is_an_error() {
        let file = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": 7, "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;
        let error = TextTokenizer::from_bytes(file.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn codes_are_found_by_name_in_any_order() {
        let vocabulary =
            Vocabulary::from_names(&names(&[("IMGIMGBZ", 4), ("IMGIMGAZ", 9), ("IMGIMGCZ", 2)], "")).unwrap();
        assert_eq!(vocabulary.code_ids(), [9, 4, 2]);
        assert_eq!((vocabulary.id_to_code(2), vocabulary.id_to_code(3)), (Some(2), None));
        assert!(vocabulary.code_to_id(3).is_err() && vocabulary.code_to_id(-1).is_err());
    }

    #[test]
    fn a_codes_name_spells_it() {
        assert_eq!(code_name(8191), "IMGIMGIBJBZ");
        assert_eq!(code_of_name(&code_name(70)), Some(70));
    }

    #[test]
    fn ambiguous_and_incomplete_codes_are_rejected() {
        for codes in [
            &[("IMGIMGAZ", 4), ("IMGIMGAAZ", 5)][..],
            &[("IMGIMGAZ", 4), ("IMGIMGCZ", 5)],
            &[("IMGIMGAZ", 4), ("IMGIMGBZ", 4)],
            &[],
        ] {
            assert!(Vocabulary::from_names(&names(codes, "")).is_err(), "{codes:?}");
        }
    }

    #[test]
    fn a_missing_special_name_is_named() {
        assert_eq!(grid_name(1), "<reserved08801>");
        for name in CONTROL_NAMES.into_iter().chain(["<reserved08801>"]) {
            let error = Vocabulary::from_names(&names(&[("IMGIMGAZ", 4)], name))
                .unwrap_err()
                .to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
