//! Whole conversations as token sequences with labels (`data/item_processor.py`, `data/convertsation.py`).

use super::ModelError;
use coar_core::tokenizer::{TextTokenizer, Vocabulary};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Human,
    Model,
}

/// The symbol of an image in a text; it never reaches the model.
pub const IMAGE_SYMBOL: &str = "<|image|>";
/// Marks ids that a loss ignores.
pub const IGNORED: i64 = -100;

/// Ids and labels of a conversation. Every turn ends with the separator; images (whole blocks of ids) replace
/// `<|image|>` in the text. If no text contains it, the images precede the first turn's text. A turn without text
/// adds nothing. Labels are [`IGNORED`] for the beginning and human turns.
///
/// # Errors
/// When the symbols and images do not match, or a text cannot be tokenised.
pub fn conversation(
    tokenizer: &TextTokenizer,
    vocabulary: &Vocabulary,
    turns: &[(Role, Option<&str>)],
    images: &[Vec<i64>],
) -> Result<(Vec<i64>, Vec<i64>), ModelError> {
    let (mut ids, mut labels) = (vec![vocabulary.begin()], vec![IGNORED]);
    let implicit = !turns
        .iter()
        .any(|(_, text)| text.is_some_and(|text| text.contains(IMAGE_SYMBOL)));
    let mut images_left = images.iter();
    for (index, (role, text)) in turns.iter().enumerate() {
        let Some(text) = text else { continue };
        let text = match index == 0 && implicit {
            true => format!("{IMAGE_SYMBOL} ").repeat(images.len()) + text,
            false => (*text).to_owned(),
        };
        let from = ids.len();
        for (part, piece) in text.split(IMAGE_SYMBOL).enumerate() {
            if part > 0 {
                let image = images_left.next().ok_or_else(|| {
                    ModelError::invalid("images", format!("are {}, the conversation needs more", images.len()))
                })?;
                ids.extend(image);
            }
            if !piece.is_empty() {
                ids.extend(tokenizer.encode(piece)?);
            }
        }
        ids.push(vocabulary.separator());
        match role {
            Role::Human => labels.resize(ids.len(), IGNORED),
            Role::Model => labels.extend_from_slice(&ids[from..]),
        }
    }
    match images_left.next() {
        None => Ok((ids, labels)),
        Some(_) => Err(ModelError::invalid(
            "images",
            format!("are {}, the conversation has fewer placeholders", images.len()),
        )),
    }
}
