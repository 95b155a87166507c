//! A decode step through libtorch, on the weights' device. The state of rows and images is kept and updated on the
//! device; a single asynchronous upload is needed when images have been added or removed, or a row of codes ends.

use tch::{Kind, Tensor};

use super::batch::BatchOptions;
use super::step::{ImageDraw, Observe, RowFeed, StepPart};
use crate::model::accelerator::{Graph, Pack, Sent, Span, has_own_stream, upload};
use crate::model::attention::{Pairs, Starts, StepTokens};
use crate::model::kv_cache::{KvCache, whole_blocks};
use crate::model::sampling::{DeviceSampler, Draw, PlannedSampler};
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};

#[derive(Debug)]
pub(super) struct DeviceStep {
    /// The vocabulary's id of each code.
    ids: Vec<i64>,
    /// `[buffers, codes]` i64: sampled codes.
    codes: Tensor,
    /// `[buffers, codes]` i64: the key of each code's noise.
    keys: Tensor,
    /// With fixed shapes, the number of rows of every step: all of the cache.
    fixed_rows: Option<i64>,
    /// Images and rows of the next step; `None` after a change.
    members: Option<Members>,
    graph: StepGraph,
    /// Whether a captured step was compared with the same step run eagerly.
    verified: bool,
}

/// The decode step of the current images and rows as a CUDA graph.
#[derive(Debug)]
enum StepGraph {
    /// Steps run eagerly.
    Off,
    /// Number of eager steps of the current images.
    WarmUp(u32),
    Captured(CapturedStep),
}

#[derive(Debug)]
struct CapturedStep {
    graph: Graph,
    /// `[rows, hidden]`: input and output of the step.
    hidden: Tensor,
}

/// Eager steps of the same images before one is captured: a capture takes as long as a few of them.
const WARM_UP_STEPS: u32 = 2;
/// Maximum difference of a captured step from the same step run eagerly, relative to the largest value: the kernels
/// are the same.
const LARGEST_DIFFERENCE: f64 = 0.02;

/// The images and rows of a batch, on the device. With fixed shapes both are padded to the cache's rows: images with
/// copies of the first, rows with unused ones.
#[derive(Debug)]
struct Members {
    images: i64,
    rows: i64,
    /// Rows that are computed.
    computed: i64,
    /// `[images]`: which row predicts an image's next code.
    conditional: Tensor,
    /// If some image is guided: the row of the unconditional branch, or the image's own row if it has none, and the
    /// scale `[images, 1]` f32.
    guidance: Option<(Tensor, Tensor)>,
    sampler: DeviceSampler,
    /// `[images]`: its code buffer, and the number of codes in it.
    buffer: Tensor,
    done: Tensor,
    /// `[rows]`: the image whose code it is fed.
    image: Tensor,
    /// `[rows]`: row of the cache, and position of the next token.
    slot: Tensor,
    position: Tensor,
    /// Of a step with one query per row, and of one with two.
    single: Option<Starts>,
    double: Option<Starts>,
}

/// The upload of [`Members`].
struct Planned {
    conditional: Span,
    guidance: Option<(Span, Span)>,
    sampler: PlannedSampler,
    buffer: Span,
    done: Span,
    image: Span,
    slot: Span,
    position: Span,
    starts: Option<[Span; 3]>,
}

impl DeviceStep {
    pub fn new(model: &Transformer, head: &CodeHead, options: BatchOptions, max_seq: i64) -> Result<Self, ModelError> {
        let (buffers, device) = (options.rows as i64, model.device());
        Ok(Self {
            ids: head.ids()?,
            codes: Tensor::f_zeros([buffers, max_seq], (Kind::Int64, device))?,
            keys: Tensor::f_zeros([buffers, max_seq], (Kind::Int64, device))?,
            fixed_rows: options.fixed_shapes.then_some(buffers),
            members: None,
            graph: match graphs_wanted() && has_own_stream(device) {
                true => StepGraph::WarmUp(0),
                false => StepGraph::Off,
            },
            verified: false,
        })
    }

    /// The vocabulary's id of each code.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Stores codes that were drawn elsewhere in a buffer.
    pub fn resume(&mut self, buffer: usize, codes: &[i64]) -> Result<(), ModelError> {
        if codes.is_empty() {
            return Ok(());
        }
        let mut place = self.codes.f_get(buffer as i64)?.f_narrow(0, 0, codes.len() as i64)?;
        Ok(place.f_copy_(&upload(codes, self.codes.device())?)?)
    }

    /// Whether steps of one code may run as CUDA graphs.
    pub fn has_graphs(&self) -> bool {
        !matches!(self.graph, StepGraph::Off)
    }

    /// Run steps eagerly from now on.
    pub fn disable_graphs(&mut self) {
        self.graph = StepGraph::Off;
    }

    /// Starts an image in a buffer; its codes are sampled with the noise of `keys`.
    pub fn begin(&mut self, buffer: usize, keys: impl Iterator<Item = u64>) -> Result<(), ModelError> {
        let mut pack = Pack::default();
        let span = pack.ints(keys.map(u64::cast_signed));
        let numbers = pack.send(self.keys.device())?.get(&span)?;
        let mut place = self.keys.f_get(buffer as i64)?.f_narrow(0, 0, numbers.size()[0])?;
        Ok(place.f_copy_(&numbers)?)
    }

    /// Images were added, removed or moved.
    pub fn members_changed(&mut self) {
        if !matches!(self.graph, StepGraph::Off) {
            self.graph = StepGraph::WarmUp(0);
        }
        self.members = None;
    }

    /// Samples a code for each image from `hidden` `[rows, hidden]` and feeds it, as one CUDA graph: [`Self::draw`]
    /// and [`Self::advance`] of a step in which no image leaves and no row of codes ends. Returns `[rows, hidden]`,
    /// which the next step overwrites, or `None` if the step must run eagerly. `highest` is the largest position.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step_by_graph(
        &mut self,
        (model, head): (&Transformer, &CodeHead),
        hidden: &Tensor,
        highest: i64,
        cache: &mut KvCache,
    ) -> Result<Option<Tensor>, ModelError> {
        let by_length = self.members.as_ref().is_some_and(|members| members.single.is_some());
        if !by_length || self.fixed_rows.is_some() || highest >= cache.max_seq() {
            return Ok(None);
        }
        match &mut self.graph {
            StepGraph::Off => Ok(None),
            StepGraph::WarmUp(steps) if *steps < WARM_UP_STEPS => {
                *steps += 1;
                Ok(None)
            }
            StepGraph::WarmUp(_) => match self.capture((model, head), hidden, cache) {
                Ok(captured) if self.verified => {
                    self.graph = StepGraph::Captured(captured);
                    self.replay(hidden).map(Some)
                }
                Ok(captured) => self.verify(captured, (model, head), (hidden, highest), cache).map(Some),
                Err(error) => {
                    tracing::warn!(%error, "cannot capture a decode step as a CUDA graph: steps run eagerly");
                    self.graph = StepGraph::Off;
                    Ok(None)
                }
            },
            StepGraph::Captured(_) => self.replay(hidden).map(Some),
        }
    }

    /// Runs one step by its graph and again eagerly. Graphs are used from then on if both agree.
    fn verify(
        &mut self,
        captured: CapturedStep,
        (model, head): (&Transformer, &CodeHead),
        (hidden, highest): (&Tensor, i64),
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        self.verified = true;
        captured.graph.replay()?;
        let by_graph = captured.hidden.f_detach_copy()?;
        let members = self.members.as_mut().ok_or_else(unprepared)?;
        let _ = members.done.f_sub_scalar_(1)?;
        let _ = members.position.f_sub_scalar_(1)?;
        let place = [&members.buffer, &members.done].map(|at| at.f_narrow(0, 0, members.images));
        let [buffer, done] = place;
        let codes_by_graph = self.codes.f_index(&[Some(buffer?), Some(done?)])?;
        // This overwrites everything that the graph wrote.
        let drawn = self.draw(head, hidden, &mut |_| Ok(()))?;
        let next = self.feed(model, (head, &drawn), highest, cache)?;
        let largest = |of: &Tensor| -> Result<f64, ModelError> {
            Ok(of.f_to_kind(Kind::Double)?.f_abs()?.f_max()?.f_double_value(&[])?)
        };
        let difference = largest(&by_graph.f_sub(&next)?)? / largest(&next)?;
        let other_codes = i64::try_from(&codes_by_graph.f_ne_tensor(&drawn)?.f_sum(Kind::Int64)?)?;
        self.graph = match other_codes == 0 && difference <= LARGEST_DIFFERENCE {
            true => {
                tracing::debug!(difference, "decode steps run as CUDA graphs");
                StepGraph::Captured(captured)
            }
            false => {
                tracing::warn!(
                    difference,
                    other_codes,
                    "a captured decode step differs from the eager one: CUDA graphs are disabled"
                );
                StepGraph::Off
            }
        };
        Ok(next)
    }

    fn replay(&mut self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let StepGraph::Captured(captured) = &mut self.graph else {
            return Err(unprepared());
        };
        if captured.hidden.data_ptr() != hidden.data_ptr() {
            captured.hidden.f_copy_(hidden)?;
        }
        captured.graph.replay()?;
        Ok(captured.hidden.shallow_clone())
    }

    fn capture(
        &mut self,
        (model, head): (&Transformer, &CodeHead),
        hidden: &Tensor,
        cache: &mut KvCache,
    ) -> Result<CapturedStep, ModelError> {
        let mut kept = hidden.f_detach_copy()?;
        let graph = Graph::capture(hidden.device(), || {
            let drawn = self.draw(head, &kept, &mut |_| Ok(()))?;
            let next = self.feed(model, (head, &drawn), 0, cache)?;
            Ok(kept.f_copy_(&next)?)
        })?;
        Ok(CapturedStep { graph, hidden: kept })
    }

    /// The first `count` codes of a buffer. Synchronises with the device.
    pub fn codes(&self, buffer: usize, count: i64) -> Result<Vec<i64>, ModelError> {
        let codes = self.codes.f_get(buffer as i64)?.f_narrow(0, 0, count)?;
        Ok(Vec::try_from(&codes)?)
    }

    /// Uploads images and rows if they have changed. If images have left since `drawn` was sampled, `stayed` has the
    /// indices of the remaining codes, which are returned.
    pub fn refresh(
        &mut self,
        head: &CodeHead,
        (images, rows): (&[ImageDraw], &[RowFeed]),
        free_slots: &[i64],
        cache: &KvCache,
        drawn: Option<(Tensor, &[i64])>,
        by_length: bool,
    ) -> Result<Option<Tensor>, ModelError> {
        if self.members.is_some() {
            return Ok(drawn.map(|(codes, _)| codes));
        }
        let mut pack = Pack::default();
        let planned = self.plan(&mut pack, (images, rows), free_slots, (head.codes(), cache, by_length));
        let stayed = drawn.as_ref().map(|(_, stayed)| pack.ints(stayed.iter().copied()));
        let sent = pack.send(self.codes.device())?;
        let left = match (drawn, stayed) {
            (Some((codes, _)), Some(stayed)) => Some(codes.f_index_select(0, &sent.get(&stayed)?)?),
            _ => None,
        };
        self.members = Some(planned.on(&sent, (images.len() as i64, rows.len() as i64))?);
        Ok(left)
    }

    fn plan(
        &self,
        pack: &mut Pack,
        (images, rows): (&[ImageDraw], &[RowFeed]),
        free_slots: &[i64],
        (codes, cache, by_length): (i64, &KvCache, bool),
    ) -> Planned {
        let computed = self.fixed_rows.map_or(rows.len(), |fixed| fixed as usize);
        let drawn = self.fixed_rows.map_or(images.len(), |fixed| fixed as usize);
        // With fixed shapes: copies of the first image, and unused rows of the cache.
        let images: Vec<&ImageDraw> = images.iter().chain(images.iter().take(1).cycle()).take(drawn).collect();
        let slots: Vec<i64> = rows
            .iter()
            .map(|row| row.slot)
            .chain(free_slots.iter().rev().copied())
            .take(computed)
            .collect();
        let row_of = |pick: fn(&RowFeed) -> i64| rows.iter().map(pick).chain(std::iter::repeat(0)).take(computed);
        let draws: Vec<Draw> = images.iter().map(|image| image.draw).collect();
        Planned {
            conditional: pack.ints(images.iter().map(|image| image.conditional as i64)),
            guidance: images.iter().any(|image| image.unconditional.is_some()).then(|| {
                // An image without guidance is its own unconditional branch: c + 1 * (c - c).
                let other = |image: &&ImageDraw| image.unconditional.unwrap_or(image.conditional) as i64;
                (
                    pack.ints(images.iter().map(other)),
                    pack.floats(images.iter().map(|image| image.guidance_scale)),
                )
            }),
            sampler: DeviceSampler::plan(&draws, codes, pack),
            buffer: pack.ints(images.iter().map(|image| image.buffer as i64)),
            done: pack.ints(images.iter().map(|image| image.done)),
            image: pack.ints(row_of(|row| row.image as i64)),
            position: pack.ints(row_of(|row| row.position)),
            starts: by_length.then(|| {
                let starts = |step: i64| (0..=computed as i64).map(move |row| row * step);
                let keys = slots.iter().map(|&slot| cache.start_of(slot)).chain([0]);
                [pack.ints(starts(1)), pack.ints(starts(2)), pack.ints(keys)]
            }),
            slot: pack.ints(slots.iter().copied()),
        }
    }

    /// Samples a code for each image from `hidden` `[rows, hidden]` and stores it: `[images]`, not synchronised.
    pub fn draw(&mut self, head: &CodeHead, hidden: &Tensor, observe: &mut Observe) -> Result<Tensor, ModelError> {
        let members = self.members.as_mut().ok_or_else(unprepared)?;
        let logits = head.logits(&filled_up(hidden, members.computed)?)?;
        observe(StepPart::Head)?;
        let conditional = logits.f_index_select(0, &members.conditional)?;
        let scores = match &members.guidance {
            None => conditional,
            Some((unconditional, scale)) => {
                let unconditional = logits.f_index_select(0, unconditional)?;
                unconditional.f_add(&conditional.f_sub(&unconditional)?.f_mul(scale)?)?
            }
        };
        let place = [Some(&members.buffer), Some(&members.done)];
        let drawn = members.sampler.draw(&scores, &self.keys.f_index(&place)?)?;
        let of_images = |tensor: &Tensor| tensor.f_narrow(0, 0, members.images);
        let drawn = of_images(&drawn)?;
        let place = [Some(of_images(&members.buffer)?), Some(of_images(&members.done)?)];
        let _ = self.codes.f_index_put_(&place, &drawn, false)?;
        let _ = members.done.f_add_scalar_(1)?;
        observe(StepPart::Sampling)?;
        Ok(drawn)
    }

    /// Feeds the sampled codes, `[images]`; returns `[rows, hidden]`. `rows` are as they were before this step,
    /// `forced` those that get `row_end` after their code.
    pub fn advance(
        &mut self,
        model: &Transformer,
        (head, drawn): (&CodeHead, &Tensor),
        rows: &[RowFeed],
        (forced, row_end): (&[usize], i64),
        cache: &mut KvCache,
        observe: &mut Observe,
    ) -> Result<Tensor, ModelError> {
        let fixed = self.fixed_rows.is_some();
        let highest = rows.iter().map(|row| row.position).max().unwrap_or(0);
        if !fixed && forced.is_empty() {
            let hidden = self.feed(model, (head, drawn), highest, cache)?;
            observe(StepPart::Layers)?;
            return Ok(hidden);
        }
        let members = self.members.as_mut().ok_or_else(unprepared)?;
        let next = head.ids_of(&drawn.f_clamp_min(0)?.f_index_select(0, &members.image)?)?;
        let layout = RowEnd::new(members, rows, forced, fixed)?;
        observe(StepPart::Upload)?;
        let extra = layout.tokens - members.computed;
        let filler = Tensor::f_full([extra], row_end as f64, (Kind::Int64, next.device()))?;
        let tokens = StepTokens {
            sequences: members.computed,
            length: match fixed {
                true => cache.max_seq(),
                false => whole_blocks(highest + 2).min(cache.max_seq()),
            },
            slot: layout.slot,
            position: layout.position,
            seen: layout.seen,
            pairs: Some(layout.pairs),
            starts: members.double.as_ref().map(Starts::share),
        };
        let all = model.decode(&Tensor::f_cat(&[next, filler], 0)?, &tokens, cache, highest + 1)?;
        // In place: a graph adds to it.
        members.position.f_copy_(&layout.following)?;
        let hidden = all.f_index_select(0, &layout.wanted)?;
        observe(StepPart::Layers)?;
        Ok(hidden)
    }

    /// Feeds one token to every row: [`Self::advance`] without row ends. `highest` is the largest position; if rows
    /// are read up to their own length, no shape depends on it.
    fn feed(
        &mut self,
        model: &Transformer,
        (head, drawn): (&CodeHead, &Tensor),
        highest: i64,
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        let members = self.members.as_mut().ok_or_else(unprepared)?;
        let next = head.ids_of(&drawn.f_clamp_min(0)?.f_index_select(0, &members.image)?)?;
        let tokens = StepTokens {
            sequences: members.rows,
            length: whole_blocks(highest + 1).min(cache.max_seq()),
            slot: members.slot.shallow_clone(),
            position: members.position.shallow_clone(),
            seen: members.position.f_view([-1, 1])?,
            pairs: None,
            starts: members.single.as_ref().map(Starts::share),
        };
        let hidden = model.decode(&next, &tokens, cache, highest)?;
        let _ = members.position.f_add_scalar_(1)?;
        Ok(hidden)
    }
}

/// Whether decode steps may be captured as CUDA graphs: not with `COAR_CUDA_GRAPHS=off`.
fn graphs_wanted() -> bool {
    std::env::var("COAR_CUDA_GRAPHS").map_or(true, |choice| choice != "off")
}

/// `hidden` `[used, hidden]` padded with rows of zeros to `rows`. With fixed shapes the head's product has the rows
/// of the whole cache, too: another number of rows may select another kernel with different rounding.
fn filled_up(hidden: &Tensor, rows: i64) -> Result<Tensor, ModelError> {
    match rows - hidden.size()[0] {
        0 => Ok(hidden.shallow_clone()),
        missing => Ok(hidden.f_constant_pad_nd([0, 0, 0, missing])?),
    }
}

fn unprepared() -> ModelError {
    ModelError::invalid("batch", "has changed since it was prepared for a step")
}

impl Planned {
    fn on(self, sent: &Sent, (images, rows): (i64, i64)) -> Result<Members, ModelError> {
        let get = |span: &Span| sent.get(span);
        let small = |span: &Span| Ok::<_, ModelError>(sent.get(span)?.f_to_kind(Kind::Int)?);
        let starts = |queries: Option<&Span>, keys: Option<&Span>| match (queries, keys) {
            (Some(queries), Some(keys)) => Ok::<_, ModelError>(Some(Starts {
                queries: small(queries)?,
                keys: small(keys)?,
            })),
            _ => Ok(None),
        };
        let [single, double, keys] = match &self.starts {
            Some([single, double, keys]) => [Some(single), Some(double), Some(keys)],
            None => [None; 3],
        };
        let slot = get(&self.slot)?;
        Ok(Members {
            images,
            rows,
            computed: slot.size()[0],
            conditional: get(&self.conditional)?,
            guidance: match &self.guidance {
                None => None,
                Some((other, scale)) => Some((get(other)?, get(scale)?.f_to_kind(Kind::Float)?.f_view([-1, 1])?)),
            },
            sampler: self.sampler.on(sent)?,
            buffer: get(&self.buffer)?,
            done: get(&self.done)?,
            image: get(&self.image)?,
            position: get(&self.position)?,
            single: starts(single, keys)?,
            double: starts(double, keys)?,
            slot,
        })
    }
}

/// A step in which rows have two tokens: the forced ones, or with fixed shapes all of them.
struct RowEnd {
    tokens: i64,
    slot: Tensor,
    position: Tensor,
    seen: Tensor,
    pairs: Pairs,
    /// `[rows]`: the token that each row's following code is predicted from.
    wanted: Tensor,
    /// `[computed]`: positions of the step after this one.
    following: Tensor,
}

impl RowEnd {
    fn new(members: &Members, rows: &[RowFeed], forced: &[usize], fixed: bool) -> Result<Self, ModelError> {
        let computed = members.computed as usize;
        let position = |row: usize| rows.get(row).map_or(0, |row| row.position);
        let second: Vec<usize> = match fixed {
            true => (0..computed).collect(),
            false => forced.to_vec(),
        };
        let mut wanted: Vec<i64> = (0..rows.len() as i64).collect();
        let mut following: Vec<i64> = (0..computed).map(|row| position(row) + 1).collect();
        for &row in forced {
            following[row] += 1;
        }
        // Both queries of a row with one token are that token's, and the last one is its output: if rows are read up
        // to their own length, the one before the last sees one key less.
        let mut query: Vec<i64> = (0..computed as i64).flat_map(|token| [token, token]).collect();
        let mut seen: Vec<i64> = (0..computed).flat_map(|row| [position(row); 2]).collect();
        let mut answer: Vec<i64> = (0..computed as i64).map(|row| 2 * row + 1).collect();
        for (&row, token) in second.iter().zip(computed as i64..) {
            answer[row] = 2 * row as i64;
            answer.push(2 * row as i64 + 1);
            query[2 * row + 1] = token;
            seen[2 * row + 1] += 1;
            if forced.contains(&row) {
                wanted[row] = token;
            }
        }
        let mut pack = Pack::default();
        let query = pack.ints(query);
        let seen = pack.ints(seen);
        let answer = pack.ints(answer);
        let wanted = pack.ints(wanted);
        let following = pack.ints(following);
        let more_positions = pack.ints(second.iter().map(|&row| position(row) + 1));
        let second_row = pack.ints(second.iter().map(|&row| row as i64));
        let sent = pack.send(members.slot.device())?;
        let more_slots = members.slot.f_index_select(0, &sent.get(&second_row)?)?;
        Ok(Self {
            tokens: (computed + second.len()) as i64,
            slot: Tensor::f_cat(&[&members.slot, &more_slots], 0)?,
            position: Tensor::f_cat(&[&members.position, &sent.get(&more_positions)?], 0)?,
            seen: sent.get(&seen)?.f_view([-1, 2])?,
            pairs: Pairs {
                query: sent.get(&query)?,
                answer: sent.get(&answer)?,
            },
            wanted: sent.get(&wanted)?,
            following: sent.get(&following)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::super::Speculation;
    use super::*;
    use crate::model::ModelConfig;
    use crate::model::weights::{Checkpoint, Target};
    use coar_core::tokenizer::{TextTokenizer, Vocabulary};

    const ROWS: usize = 6;

    fn parts(fixed_shapes: bool) -> (Transformer, CodeHead, KvCache, DeviceStep) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let (kind, device) = (Kind::Float, Device::Cpu);
        let dir = root.join("model/mha");
        let config = ModelConfig::read(&dir.join("config.json")).unwrap();
        let mut model =
            Transformer::load(&config, &Checkpoint::open_dir(&dir, Target { kind, device }).unwrap()).unwrap();
        model.through_libtorch();
        let names = TextTokenizer::read(&root.join("tokenizer/text_tokenizer.json"))
            .unwrap()
            .names();
        let head = model.code_head(&Vocabulary::from_names(&names).unwrap()).unwrap();
        let cache = KvCache::new(&config, ROWS as i64, 32, kind, device).unwrap();
        let options = BatchOptions {
            rows: ROWS,
            max_seq: 32,
            fixed_shapes,
            speculation: Speculation::Off,
        };
        let step = DeviceStep::new(&model, &head, options, cache.max_seq()).unwrap();
        (model, head, cache, step)
    }

    fn image(conditional: usize, buffer: usize) -> ImageDraw {
        ImageDraw {
            conditional,
            unconditional: None,
            guidance_scale: 1.0,
            draw: Draw {
                top_k: 0,
                temperature: 1.0,
                key: 5,
            },
            buffer,
            done: 0,
        }
    }

    fn row(image: usize, slot: i64, position: i64) -> RowFeed {
        RowFeed { image, slot, position }
    }

    /// Regression: the head's product had as many rows as there were images, so its rounding could depend on the
    /// batch.
    #[test]
    fn fixed_shapes_cover_the_whole_cache() {
        let _no_grad = tch::no_grad_guard();
        let (_, head, cache, mut step) = parts(true);
        let batch = (&[image(0, 3)][..], &[row(0, 4, 7)][..]);
        step.refresh(&head, batch, &[5, 3, 2, 1, 0], &cache, None, true)
            .unwrap();
        let members = step.members.as_ref().unwrap();
        let rows = ROWS as i64;
        assert_eq!((members.images, members.rows, members.computed), (1, 1, rows));
        assert_eq!(members.conditional.size(), [rows]);
        assert_eq!(
            filled_up(&Tensor::zeros([1, 8], (Kind::Float, Device::Cpu)), members.computed)
                .unwrap()
                .size(),
            [rows, 8]
        );
        // No two rows write to the same row of the cache.
        let mut slots = Vec::<i64>::try_from(&members.slot).unwrap();
        assert_eq!(slots[0], 4);
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3, 4, 5]);
        let hidden = Tensor::randn([1, head.width()], (Kind::Float, Device::Cpu));
        let drawn = step.draw(&head, &hidden, &mut |_| Ok(())).unwrap();
        assert_eq!(drawn.size(), [1]);
        // Only the image's own buffer is written.
        assert_eq!(
            step.codes.ne(0).sum(Kind::Int64).int64_value(&[]),
            step.codes.get(3).ne(0).sum(Kind::Int64).int64_value(&[])
        );
    }

    #[test]
    fn no_upload_while_the_images_are_unchanged() {
        let _no_grad = tch::no_grad_guard();
        let (model, head, mut cache, mut step) = parts(false);
        let (images, rows) = ([image(0, 0)], [row(0, 2, 5)]);
        step.begin(0, [1, 2, 3].into_iter()).unwrap();
        step.refresh(&head, (&images, &rows), &[], &cache, None, true).unwrap();
        let mut parts = vec![];
        let mut observe = |part: StepPart| {
            parts.push(part);
            Ok(())
        };
        let hidden = Tensor::randn([1, head.width()], (Kind::Float, Device::Cpu));
        let drawn = step.draw(&head, &hidden, &mut observe).unwrap();
        let hidden = step
            .advance(&model, (&head, &drawn), &rows, (&[], 0), &mut cache, &mut observe)
            .unwrap();
        assert_eq!(hidden.size(), [1, head.width()]);
        assert_eq!(parts, [StepPart::Head, StepPart::Sampling, StepPart::Layers]);
        let members = step.members.as_ref().unwrap();
        assert_eq!(
            (members.done.int64_value(&[0]), members.position.int64_value(&[0])),
            (1, 6)
        );
        // The end of a row of codes: two tokens, one copy.
        let rows = [row(0, 2, 6)];
        parts.clear();
        let mut observe = |part: StepPart| {
            parts.push(part);
            Ok(())
        };
        let _ = step
            .advance(&model, (&head, &drawn), &rows, (&[0], 9), &mut cache, &mut observe)
            .unwrap();
        assert_eq!(parts, [StepPart::Upload, StepPart::Layers]);
        assert_eq!(step.members.as_ref().unwrap().position.int64_value(&[0]), 8);
    }
}
