//! Fuzz targets for the protocol between processes.

use super::wire::{Decoder, Frame, GenerationRequest, Refusal, TokenizerFile, encode};
use coar_core::engine::TokenCounter;
use coar_core::error::Error;

fn decoded(pieces: &[&[u8]]) -> (Vec<String>, bool) {
    let (mut decoder, mut events) = (Decoder::default(), Vec::new());
    for piece in pieces {
        decoder.add(piece);
        loop {
            match decoder.next() {
                Ok(Some(received)) => {
                    events.push(format!("{received:?}"));
                    if let Frame::Event(event) = received {
                        let mut again = Decoder::default();
                        again.add(&encode(&event));
                        let read = again.next().expect("a valid frame").expect("a complete frame");
                        assert_eq!(Some(&format!("{read:?}")), events.last());
                    }
                }
                Ok(None) => break,
                Err(_) => return (events, true),
            }
        }
    }
    (events, false)
}

/// Decoding does not depend on how frames are split, and decoded events encode to the same bytes.
pub fn frames(bytes: &[u8]) {
    let whole = decoded(&[bytes]);
    let (left, right) = bytes.split_at(bytes.len() / 2);
    assert_eq!(decoded(&[left, right]), whole);
}

/// Generations, tokenizers and refusals.
pub fn messages(bytes: &[u8]) {
    let _ = serde_json::from_slice::<GenerationRequest>(bytes);
    if let Ok(file) = serde_json::from_slice::<TokenizerFile>(bytes) {
        let _ = TokenCounter::try_from(file);
    }
    if let Ok(refusal) = serde_json::from_slice::<Refusal>(bytes) {
        let error = Error::from(refusal);
        let again = Error::from(Refusal::from(&error));
        assert_eq!(
            (again.kind, again.code, again.message),
            (error.kind, error.code, error.message)
        );
    }
}
