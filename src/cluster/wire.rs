//! The protocol between API processes and workers: a generation request, and frames of events. Both ends are this
//! program, possibly one version apart: unknown fields are ignored, new fields have defaults.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::registry::{GenerationConcept, GenerationSettings, NewGeneration};
use coar_core::engine::{EngineError, GenerationEvent, TokenCounter};
use coar_core::error::{Error, ErrorKind};
use coar_core::image::RgbImage;
use coar_core::tokenizer::{TextTokenizer, TokenizerError, Vocabulary};

/// A generation as API processes send it to workers. It is self-contained: the worker needs no database lookup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GenerationRequest {
    pub tenant: String,
    pub prompt: String,
    pub settings: GenerationSettings,
    pub concepts: Vec<GenerationConcept>,
}

impl From<&NewGeneration> for GenerationRequest {
    fn from(new: &NewGeneration) -> Self {
        Self {
            tenant: new.tenant.to_string(),
            prompt: new.prompt.clone(),
            settings: new.settings.clone(),
            concepts: new.concepts.clone(),
        }
    }
}

/// What an API process needs to count the tokens of requests for a worker's model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct TokenizerFile {
    /// The checkpoint's `text_tokenizer.json`.
    pub tokenizer: String,
    /// Pixels per side that one image code covers.
    pub pixels_per_code: u32,
    /// Length in tokens of the longest sequence that fits a row of the batch.
    pub longest_row: i64,
}

impl From<&TokenCounter> for TokenizerFile {
    fn from(counter: &TokenCounter) -> Self {
        Self {
            tokenizer: String::from_utf8_lossy(counter.tokenizer.file()).into_owned(),
            pixels_per_code: counter.pixels_per_code,
            longest_row: counter.longest_row,
        }
    }
}

impl TryFrom<TokenizerFile> for TokenCounter {
    type Error = TokenizerError;

    fn try_from(file: TokenizerFile) -> Result<Self, TokenizerError> {
        let tokenizer = TextTokenizer::from_bytes(file.tokenizer.as_bytes())?;
        Ok(Self {
            vocabulary: Vocabulary::from_names(&tokenizer.names())?,
            tokenizer: Arc::new(tokenizer),
            pixels_per_code: file.pixels_per_code.max(1),
            longest_row: file.longest_row,
        })
    }
}

/// A complete refusal. The API process returns it as its own error.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Refusal {
    kind: String,
    code: String,
    message: String,
    field: Option<String>,
    limit: Option<u64>,
    retry_after: Option<u64>,
}

const KINDS: [(&str, ErrorKind); 5] = [
    ("invalid", ErrorKind::Invalid),
    ("not_found", ErrorKind::NotFound),
    ("conflict", ErrorKind::Conflict),
    ("overloaded", ErrorKind::Overloaded),
    ("unavailable", ErrorKind::Unavailable),
];

/// Error codes are static strings; a worker of another version may use codes unknown here.
fn known_code(code: &str) -> &'static str {
    static KNOWN: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    const MAX: usize = 256;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    match known.get(code) {
        Some(code) => code,
        None if known.len() < MAX => {
            let code: &'static str = Box::leak(code.to_owned().into_boxed_str());
            known.insert(code);
            code
        }
        None => "worker_error",
    }
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        let kind = KINDS.iter().find(|(_, kind)| *kind == error.kind);
        Self {
            kind: kind.map_or("internal", |(word, _)| word).to_owned(),
            code: error.code.to_owned(),
            message: error.message.clone(),
            field: error.field.as_ref().map(ToString::to_string),
            limit: error.limit,
            retry_after: error.retry_after,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let kind = KINDS.iter().find(|(word, _)| *word == refusal.kind);
        Self {
            kind: kind.map_or(ErrorKind::Internal, |(_, kind)| *kind),
            code: known_code(&refusal.code),
            message: refusal.message,
            field: refusal.field.map(Into::into),
            limit: refusal.limit,
            retry_after: refusal.retry_after,
        }
    }
}

/// An event without the bytes of its image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Head {
    /// Keep-alive without news.
    Alive,
    Started,
    Progress {
        done: u32,
        total: u32,
    },
    Partial {
        index: u32,
        number: u32,
        width: u32,
        height: u32,
    },
    Image {
        index: u32,
        width: u32,
        height: u32,
    },
    Done {
        text_tokens: u64,
        image_tokens: u64,
    },
    /// The worker is stopping: another one may take the generation.
    Stopped,
    Failed {
        message: String,
    },
}

/// The largest frame accepted: no image is that large.
const FRAME_LIMIT: usize = 64 << 20;
const LENGTHS: usize = 8;

fn frame(head: &Head, body: &[u8]) -> Bytes {
    // A `Head` of numbers and strings always serialises to JSON.
    let head = serde_json::to_vec(head).unwrap_or_default();
    let mut frame = BytesMut::with_capacity(LENGTHS + head.len() + body.len());
    frame.put_u32(head.len() as u32);
    frame.put_u32(body.len() as u32);
    frame.put_slice(&head);
    frame.put_slice(body);
    frame.freeze()
}

/// The keep-alive frame.
pub(super) fn alive() -> Bytes {
    frame(&Head::Alive, &[])
}

/// Encodes an event as a frame.
pub(super) fn encode(event: &GenerationEvent) -> Bytes {
    let side = |image: &RgbImage| (image.width, image.height);
    match event {
        GenerationEvent::Started => frame(&Head::Started, &[]),
        GenerationEvent::Progress { done, total } => frame(
            &Head::Progress {
                done: *done,
                total: *total,
            },
            &[],
        ),
        GenerationEvent::Partial { index, number, image } => {
            let (width, height) = side(image);
            let head = Head::Partial {
                index: *index,
                number: *number,
                width,
                height,
            };
            frame(&head, &image.rgb)
        }
        GenerationEvent::Image { index, image } => {
            let (width, height) = side(image);
            let head = Head::Image {
                index: *index,
                width,
                height,
            };
            frame(&head, &image.rgb)
        }
        GenerationEvent::Done {
            text_tokens,
            image_tokens,
        } => frame(
            &Head::Done {
                text_tokens: *text_tokens,
                image_tokens: *image_tokens,
            },
            &[],
        ),
        GenerationEvent::Failed(EngineError::Stopped) => frame(&Head::Stopped, &[]),
        GenerationEvent::Failed(EngineError::Device(message)) => frame(
            &Head::Failed {
                message: message.clone(),
            },
            &[],
        ),
        GenerationEvent::Failed(other) => frame(
            &Head::Failed {
                message: other.to_string(),
            },
            &[],
        ),
    }
}

/// Decodes events from bytes as they arrive.
#[derive(Debug, Default)]
pub(super) struct Decoder(BytesMut);

/// The content of a frame.
#[derive(Debug)]
pub(super) enum Frame {
    Alive,
    Event(GenerationEvent),
}

impl Decoder {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next complete frame, if there is one.
    ///
    /// # Errors
    /// When the bytes are not valid frames.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, String> {
        let Some(mut lengths) = self.0.get(..LENGTHS) else {
            return Ok(None);
        };
        let (head, body) = (lengths.get_u32() as usize, lengths.get_u32() as usize);
        let whole = head.saturating_add(body);
        if whole > FRAME_LIMIT {
            return Err(format!("a frame of {whole} bytes"));
        }
        if self.0.len() < LENGTHS + whole {
            return Ok(None);
        }
        self.0.advance(LENGTHS);
        let (head, body) = (self.0.split_to(head), self.0.split_to(body));
        let head: Head = serde_json::from_slice(&head).map_err(|error| error.to_string())?;
        event(head, &body).map(Some)
    }
}

fn image(width: u32, height: u32, pixels: &[u8]) -> Result<RgbImage, String> {
    if u64::from(width) * u64::from(height) * 3 != pixels.len() as u64 {
        return Err(format!("an image of {width}x{height} in {} bytes", pixels.len()));
    }
    Ok(RgbImage {
        width,
        height,
        rgb: pixels.to_vec(),
    })
}

fn event(head: Head, body: &[u8]) -> Result<Frame, String> {
    Ok(Frame::Event(match head {
        Head::Alive => return Ok(Frame::Alive),
        Head::Started => GenerationEvent::Started,
        Head::Progress { done, total } => GenerationEvent::Progress { done, total },
        Head::Partial {
            index,
            number,
            width,
            height,
        } => GenerationEvent::Partial {
            index,
            number,
            image: image(width, height, body)?,
        },
        Head::Image { index, width, height } => GenerationEvent::Image {
            index,
            image: image(width, height, body)?,
        },
        Head::Done {
            text_tokens,
            image_tokens,
        } => GenerationEvent::Done {
            text_tokens,
            image_tokens,
        },
        Head::Stopped => GenerationEvent::Failed(EngineError::Stopped),
        Head::Failed { message } => GenerationEvent::Failed(EngineError::Device(message)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_is_independent_of_chunking() {
        let image = RgbImage {
            width: 2,
            height: 1,
            rgb: vec![1, 2, 3, 4, 5, 6],
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&encode(&GenerationEvent::Started));
        bytes.extend_from_slice(&alive());
        bytes.extend_from_slice(&encode(&GenerationEvent::Image {
            index: 1,
            image: image.clone(),
        }));
        bytes.extend_from_slice(&encode(&GenerationEvent::Failed(EngineError::Stopped)));
        for size in [1, 7, bytes.len()] {
            let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(size) {
                decoder.add(piece);
                while let Some(one) = decoder.next().unwrap() {
                    frames.push(one);
                }
            }
            assert!(matches!(frames[0], Frame::Event(GenerationEvent::Started)));
            assert!(matches!(frames[1], Frame::Alive));
            assert!(
                matches!(&frames[2], Frame::Event(GenerationEvent::Image { index: 1, image: seen }) if *seen == image)
            );
            assert!(matches!(
                frames[3],
                Frame::Event(GenerationEvent::Failed(EngineError::Stopped))
            ));
            assert_eq!(frames.len(), 4);
        }
    }

    #[test]
    fn decode_rejects_invalid_frames() {
        let mut decoder = Decoder::default();
        decoder.add(&[255; 16]);
        assert!(decoder.next().is_err());
        let mut decoder = Decoder::default();
        decoder.add(&frame(
            &Head::Image {
                index: 0,
                width: 9,
                height: 9,
            },
            &[0; 3],
        ));
        assert!(decoder.next().is_err());
    }

    #[test]
    fn a_refusal_arrives_whole() {
        let error = Error::field("prompt_too_long", "prompt", "is long").limit(7);
        let sent = serde_json::to_string(&Refusal::from(&error)).unwrap();
        let seen = Error::from(serde_json::from_str::<Refusal>(&sent).unwrap());
        assert_eq!(
            (seen.kind, seen.code, seen.limit),
            (ErrorKind::Invalid, "prompt_too_long", Some(7))
        );
        assert_eq!(seen.message, error.message);
    }
}
