//! Codes to pictures, on a thread of its own, so that drawing goes on meanwhile. It shares the image tokenizer's weights
//! with the device thread.

use std::sync::mpsc as sync;
use std::thread::JoinHandle;

use tch::Tensor;
use tokio::sync::mpsc;

use super::command::GenerationEvent;
use super::thread::guarded;
use crate::model::lumina::pictures;
use crate::model::{ModelError, Vqgan};
use crate::picture::RgbPicture;
use crate::telemetry::meters;

/// One thing to do for a request.
#[derive(Debug)]
pub(super) enum Work {
    Picture {
        index: u32,
        codes: Vec<i64>,
    },
    /// The rows drawn so far, whole rows of codes only.
    Partial {
        index: u32,
        number: u32,
        codes: Vec<i64>,
    },
    /// All pictures have been handed over.
    Done {
        text_tokens: u64,
        image_tokens: u64,
    },
}

/// Work with what it needs.
#[derive(Debug)]
pub(super) struct Order {
    pub work: Work,
    /// Width and height in pixels.
    pub size: (u32, u32),
    pub events: mpsc::Sender<GenerationEvent>,
    /// The request that it belongs to.
    pub span: tracing::Span,
}

/// Orders that may wait; a device thread that is faster than this thread waits for it.
const QUEUE: usize = 64;

/// Starts the thread; it ends when the sender is dropped, and must be joined before the process ends.
///
/// # Errors
/// When the system has no thread left.
pub(super) fn start(vqgan: Vqgan) -> std::io::Result<(sync::SyncSender<Order>, JoinHandle<()>)> {
    let (sender, inbox) = sync::sync_channel::<Order>(QUEUE);
    let thread = std::thread::Builder::new()
        .name("coar-pictures".to_owned())
        .spawn(move || {
            super::without_pool();
            let _no_grad = tch::no_grad_guard();
            for Order {
                work,
                size,
                events,
                span,
            } in inbox
            {
                let _request = span.entered();
                let event = match work {
                    Work::Done {
                        text_tokens,
                        image_tokens,
                    } => GenerationEvent::Done {
                        text_tokens,
                        image_tokens,
                    },
                    _ if events.is_closed() => continue,
                    Work::Picture { index, codes } => match guarded(|| decode(&vqgan, &codes, size)) {
                        Ok(picture) => {
                            meters().pictures.inc();
                            GenerationEvent::Picture { index, picture }
                        }
                        Err(error) => GenerationEvent::Failed(error),
                    },
                    Work::Partial { index, number, codes } => match guarded(|| decode(&vqgan, &codes, size)) {
                        Ok(picture) => GenerationEvent::Partial { index, number, picture },
                        Err(_) => continue,
                    },
                };
                // A reader that is gone wants nothing.
                let _ = events.try_send(event);
            }
        })?;
    Ok((sender, thread))
}

const GREY: u8 = 128;

/// The picture of as many whole rows of codes as there are.
fn decode(vqgan: &Vqgan, codes: &[i64], (width, height): (u32, u32)) -> Result<RgbPicture, ModelError> {
    let _span = tracing::info_span!("vqgan.decode").entered();
    let _timer = meters().picture_decode.start_timer();
    let unit = vqgan.config().pixels_per_code();
    let columns = i64::from(width / unit);
    let rows = codes.len() as i64 / columns.max(1);
    let codes = Tensor::f_from_slice(codes)?
        .f_view([1, -1])?
        .f_to_device(vqgan.device())?;
    let mut picture = pictures(&vqgan.decode(&codes, rows, columns)?)?
        .pop()
        .ok_or_else(|| ModelError::invalid("codes", "are empty"))?;
    picture.height = height;
    picture.rgb.resize(3 * (width * height) as usize, GREY);
    Ok(picture)
}
