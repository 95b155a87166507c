//! Decoding of codes to images, on separate threads in parallel with the decode steps. They share the image
//! tokenizer's weights with the device thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc as sync;
use std::thread::JoinHandle;

use tch::Device;
use tokio::sync::mpsc;

use super::guard::guarded;
use crate::model::cpu::without_pool;
use crate::model::lumina::images;
use crate::model::{ModelError, Vqgan, accelerator};
use coar_core::engine::GenerationEvent;
use coar_core::image::RgbImage;
use coar_core::metrics::meters;

/// The destination of a request's images.
#[derive(Debug)]
pub(super) struct Recipient {
    pub events: mpsc::Sender<GenerationEvent>,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Images that are not delivered yet; after the last one the request is done.
    pub left: AtomicU32,
    /// The request's cost, reported with its final event.
    pub text_tokens: u64,
    pub image_tokens: u64,
    /// The request's span.
    pub span: tracing::Span,
}

/// One image to decode.
#[derive(Debug)]
pub(super) struct Order {
    pub recipient: Arc<Recipient>,
    /// The image's index in its request.
    pub index: u32,
    /// Codes in raster order: all of them, or complete rows for a partial image.
    pub codes: Vec<i64>,
    /// The number of a partial image, from 0.
    pub partial: Option<u32>,
}

/// Queue length per thread; the device thread waits if a queue is full.
const QUEUE: usize = 64;

/// Number of threads that decode images: a few on the CPU, where each computes on one core; other devices run one
/// operation at a time anyway.
pub(super) fn threads(device: Device) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match device {
        Device::Cpu => cores.min(2.max(cores / 4)),
        _ => 1,
    }
}

/// A handle of the threads. All work of one request goes to the same thread, which keeps its order.
#[derive(Debug)]
pub(super) struct Orders {
    senders: Vec<sync::SyncSender<Order>>,
    /// Images that are not delivered yet.
    open: Arc<AtomicUsize>,
}

impl Orders {
    fn of(&self, shard: u64, order: &Order) -> &sync::SyncSender<Order> {
        let at = (shard + u64::from(order.index)) % self.senders.len().max(1) as u64;
        &self.senders[at as usize]
    }

    /// Images that are queued or being decoded.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Sends an image; blocks if its thread is far behind. Returns false if the thread has ended. `shard` is the same
    /// for all images of a request.
    pub fn send(&self, shard: u64, order: Order) -> bool {
        self.open.fetch_add(1, Ordering::AcqRel);
        let sent = self.of(shard, &order).send(order).is_ok();
        if !sent {
            self.open.fetch_sub(1, Ordering::AcqRel);
        }
        sent
    }

    /// As [`Self::send`], but drops the image if the thread is behind.
    pub fn offer(&self, shard: u64, order: Order) {
        self.open.fetch_add(1, Ordering::AcqRel);
        if self.of(shard, &order).try_send(order).is_err() {
            self.open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Starts a thread for each tokenizer. The threads end when the handle is dropped, and must be joined before the
/// process ends.
///
/// # Errors
/// When the system cannot create another thread.
pub(super) fn start(tokenizers: Vec<Vqgan>) -> std::io::Result<(Orders, Vec<JoinHandle<()>>)> {
    let (mut senders, mut threads) = (vec![], vec![]);
    let open = Arc::new(AtomicUsize::new(0));
    for vqgan in tokenizers {
        let open = open.clone();
        let (sender, inbox) = sync::sync_channel::<Order>(QUEUE);
        senders.push(sender);
        let thread = std::thread::Builder::new()
            .name("coar-images".to_owned())
            .spawn(move || {
                without_pool();
                // A separate stream, so decode steps do not wait for image decoding.
                if let Err(error) = accelerator::use_own_stream(vqgan.device()) {
                    tracing::warn!(%error, "no separate stream: images are decoded on the decode steps' stream");
                }
                let _no_grad = tch::no_grad_guard();
                for order in inbox {
                    deliver(&vqgan, order);
                    open.fetch_sub(1, Ordering::AcqRel);
                }
            })?;
        threads.push(thread);
    }
    Ok((Orders { senders, open }, threads))
}

fn deliver(vqgan: &Vqgan, order: Order) {
    let Order {
        recipient,
        index,
        codes,
        partial,
    } = order;
    // The reader has been dropped.
    if recipient.events.is_closed() {
        return;
    }
    let decoded = recipient
        .span
        .in_scope(|| guarded(vqgan.device(), || decode(vqgan, &codes, recipient.size)));
    let send = |event| drop(recipient.events.try_send(event));
    match (decoded, partial) {
        (Ok(image), Some(number)) => send(GenerationEvent::Partial { index, number, image }),
        (Err(_), Some(_)) => {}
        (Ok(image), None) => {
            meters().images.inc();
            send(GenerationEvent::Image { index, image });
            if recipient.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                send(GenerationEvent::Done {
                    text_tokens: recipient.text_tokens,
                    image_tokens: recipient.image_tokens,
                });
            }
        }
        // The request has failed; this image stays undelivered, so no second final event is sent.
        (Err(error), None) => send(GenerationEvent::Failed(error)),
    }
}

const GREY: u8 = 128;

/// The image of the complete rows of codes.
fn decode(vqgan: &Vqgan, codes: &[i64], (width, height): (u32, u32)) -> Result<RgbImage, ModelError> {
    let _span = tracing::info_span!("vqgan.decode").entered();
    let _timer = meters().image_decode.start_timer();
    let unit = vqgan.config().pixels_per_code();
    let columns = i64::from(width / unit);
    let rows = codes.len() as i64 / columns.max(1);
    let codes = accelerator::upload(codes, vqgan.device())?.f_view([1, -1])?;
    let mut image = images(&vqgan.decode(&codes, rows, columns)?)?
        .pop()
        .ok_or_else(|| ModelError::invalid("codes", "are empty"))?;
    image.height = height;
    image.rgb.resize(3 * (width * height) as usize, GREY);
    Ok(image)
}
