//! One decode step of the whole decoder stack in one parallel region: norms, products, rotary embedding, cache and
//! attention without tensor operations in between. The computation is that of `transformer.rs`; between products it
//! is in f32 regardless of the weights' kind.

use std::arch::x86_64::*;

use tch::{Device, Kind, Tensor};

use super::attention::Keys;
use super::numbers::{Stored, WIDE};
use super::pool::{Member, team, threads};
use super::product::{BLOCK, Operands, Sink, Store};
use super::{LayerTensors, StepTokens};
use crate::model::kv_cache::KvCache;
use crate::model::{ModelConfig, ModelError};

#[derive(Debug)]
struct Layer {
    /// Keep alive what the pointers below point into.
    matrices: [Tensor; 4],
    input_norm: Vec<f32>,
    post_attention_norm: Vec<f32>,
    head_weight: Vec<f32>,
    head_bias: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    swin_norm: bool,
}

/// The decoder stack, prepared for steps on the CPU.
#[derive(Debug)]
pub(in crate::model) struct CpuDecoder {
    kind: Kind,
    shape: Shape,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    /// `[positions, head_dim]`, see `Rope`.
    cos: Tensor,
    sin: Tensor,
}

/// Buffers of a step beside weights and cache; they grow to the largest step and are reused.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// `[tokens, hidden]`: the residual stream, and what a swin norm is applied to.
    x: Vec<f32>,
    added: Vec<f32>,
    /// `[tokens, heads * head_dim]` and `[tokens, inner]` in the weights' kind, as bytes.
    attended: Vec<u64>,
    gated: Vec<u64>,
    /// For each thread: `[tokens, hidden]` in the weights' kind, `[tokens, its heads]`, scores.
    normed: Vec<u64>,
    projected: Vec<f32>,
    scores: Vec<f32>,
}

const HEAD_NORM_EPS: f32 = 1e-5;

fn numbers(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    let flat = tensor.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([-1i64])?;
    Ok(Vec::try_from(&flat)?)
}

impl CpuDecoder {
    /// Whether steps of this model can be computed here: the instructions are available, and widths are whole
    /// registers.
    pub fn fits(config: &ModelConfig, kind: Kind, device: Device) -> bool {
        let lanes = match kind {
            Kind::Float if f32::supported() => f32::LANES,
            Kind::BFloat16 if half::bf16::supported() => half::bf16::LANES,
            _ => return false,
        } as i64;
        let head_dim = config.head_dim();
        let widths = [
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * head_dim,
        ];
        device == Device::Cpu
            && widths.iter().all(|width| width % lanes == 0)
            && head_dim % WIDE as i64 == 0
            && head_dim <= 256
    }

    /// Takes shallow copies of the parameters; only norms are copied.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn new(
        config: &ModelConfig,
        embedding: &Tensor,
        layers: &[LayerTensors],
        final_norm: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
    ) -> Result<Self, ModelError> {
        let layers = layers
            .iter()
            .map(|layer| {
                let matrix = |tensor: &Tensor| tensor.f_contiguous();
                Ok(Layer {
                    matrices: [
                        matrix(layer.project)?,
                        matrix(layer.output)?,
                        matrix(layer.gate_up)?,
                        matrix(layer.down)?,
                    ],
                    input_norm: numbers(layer.input_norm)?,
                    post_attention_norm: numbers(layer.post_attention_norm)?,
                    head_weight: numbers(layer.head_norm.0)?,
                    head_bias: numbers(layer.head_norm.1)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            kind: embedding.kind(),
            shape: Shape {
                hidden: config.hidden_size as usize,
                inner: config.intermediate_size as usize,
                heads: config.num_attention_heads as usize,
                kv_heads: config.num_key_value_heads as usize,
                head_dim: config.head_dim() as usize,
                eps: config.rms_norm_eps as f32,
                swin_norm: config.swin_norm,
            },
            embedding: embedding.f_contiguous()?,
            layers,
            final_norm: numbers(final_norm)?,
            cos: cos.f_contiguous()?,
            sin: sin.f_contiguous()?,
        })
    }

    /// Runs the tokens through every layer, writes their keys and values to `cache`, and returns the final normed
    /// hidden states of the requested ones, `[wanted, hidden]` in the weights' kind.
    ///
    /// The caller has checked that ids are in the vocabulary, and rows and positions in the cache.
    ///
    /// # Errors
    /// When memory is short.
    pub fn run(&self, tokens: &StepTokens, cache: &mut KvCache, space: &mut Workspace) -> Result<Tensor, ModelError> {
        match self.kind {
            Kind::BFloat16 => self.run_in::<half::bf16>(tokens, cache, space),
            _ => self.run_in::<f32>(tokens, cache, space),
        }
    }

    fn run_in<W: Stored>(
        &self,
        tokens: &StepTokens,
        cache: &mut KvCache,
        space: &mut Workspace,
    ) -> Result<Tensor, ModelError> {
        let (shape, count, threads) = (self.shape, tokens.ids.len(), threads());
        let blocks = cache.pointers();
        let own = count * shape.projected_width(threads);
        let max_seq = cache.max_seq() as usize;
        space.grow::<W>(&shape, count, threads, (own, max_seq));
        let out = Tensor::f_empty(
            [tokens.wanted.len() as i64, shape.hidden as i64],
            (W::KIND, Device::Cpu),
        )?;
        let step = Step::<W> {
            decoder: self,
            tokens,
            blocks: &blocks,
            kv_heads_max_seq: (shape.kv_heads, max_seq),
            own,
            x: space.x.as_mut_ptr(),
            added: space.added.as_mut_ptr(),
            attended: space.attended.as_mut_ptr().cast(),
            gated: space.gated.as_mut_ptr().cast(),
            normed: space.normed.as_mut_ptr().cast(),
            projected: space.projected.as_mut_ptr(),
            scores: space.scores.as_mut_ptr(),
            out: out.data_ptr() as *mut W,
        };
        // SAFETY: `fits` has checked the instructions; everything pointed to lives to the end of the call.
        team(threads, |member| unsafe { W::step(&step, member) });
        Ok(out)
    }
}

impl Shape {
    /// Numbers per token for the widest thread's heads: queries, keys and values.
    fn projected_width(&self, threads: usize) -> usize {
        let kv = self.kv_heads.div_ceil(threads);
        (kv * (self.heads / self.kv_heads) + 2 * kv) * self.head_dim
    }
}

impl Workspace {
    fn grow<W>(&mut self, shape: &Shape, tokens: usize, threads: usize, (own, max_seq): (usize, usize)) {
        fn at_least<T: Clone + Default>(space: &mut Vec<T>, numbers: usize) {
            if space.len() < numbers {
                space.resize(numbers, T::default());
            }
        }
        let words = |numbers: usize| (numbers * size_of::<W>()).div_ceil(8);
        at_least(&mut self.x, tokens * shape.hidden);
        at_least(&mut self.added, tokens * shape.hidden);
        at_least(&mut self.attended, words(tokens * shape.heads * shape.head_dim));
        at_least(&mut self.gated, words(tokens * shape.inner));
        at_least(&mut self.normed, words(threads * tokens * shape.hidden));
        at_least(&mut self.projected, threads * own);
        at_least(&mut self.scores, threads * max_seq);
    }
}

/// Shared state of the threads of one step.
pub(super) struct Step<'a, W> {
    decoder: &'a CpuDecoder,
    tokens: &'a StepTokens<'a>,
    /// Keys and values of each layer.
    blocks: &'a [(*mut u8, *mut u8)],
    kv_heads_max_seq: (usize, usize),
    /// Numbers of `projected` that belong to one thread.
    own: usize,
    x: *mut f32,
    added: *mut f32,
    attended: *mut W,
    gated: *mut W,
    normed: *mut W,
    projected: *mut f32,
    scores: *mut f32,
    out: *mut W,
}

// SAFETY: between two barriers every thread writes only its own part, and reads what was written before the last
// one.
unsafe impl<W> Sync for Step<'_, W> {}

/// Adds sums to the residual stream.
struct Add {
    x: *mut f32,
    n: usize,
}

impl Sink for Add {
    #[inline(always)]
    unsafe fn put<const N: usize>(&self, token: usize, row: usize, sums: &[f32; N]) {
        // SAFETY: the caller promises that token and row, and N numbers from there on, are inside of `x`.
        unsafe {
            let at = self.x.add(token * self.n + row);
            let mut i = 0;
            while i < N {
                *at.add(i) += sums[i];
                i += 1;
            }
        }
    }
}

impl<W: Stored> Step<'_, W> {
    fn count(&self) -> usize {
        self.tokens.ids.len()
    }

    /// One thread's share of the step.
    ///
    /// # Safety
    /// As [`Stored::step`].
    #[inline(always)]
    pub unsafe fn share(&self, member: Member) {
        // SAFETY: pointers are as `run_in` made them; parts of different threads are disjoint.
        unsafe {
            let shape = self.decoder.shape;
            self.embed(member);
            member.wait();
            let mut index = 0;
            while index < self.decoder.layers.len() {
                let layer = &self.decoder.layers[index];
                let norms = (layer.input_norm.as_ptr(), layer.post_attention_norm.as_ptr());
                let before = |weight| if shape.swin_norm { std::ptr::null() } else { weight };
                self.norm(member, before(norms.0));
                self.project(member, layer, self.blocks[index]);
                member.wait();
                let attended = self.operands(&layer.matrices[1], self.attended, shape.heads * shape.head_dim);
                self.add(member, &attended, norms.0);
                self.norm(member, before(norms.1));
                self.gate(member, layer);
                member.wait();
                let gated = self.operands(&layer.matrices[3], self.gated, shape.inner);
                self.add(member, &gated, norms.1);
                index += 1;
            }
            self.finish(member);
        }
    }

    fn operands(&self, weight: &tch::Tensor, x: *const W, k: usize) -> Operands<W> {
        Operands {
            x,
            weight: weight.data_ptr() as *const W,
            tokens: self.count(),
            k,
        }
    }

    #[inline(always)]
    unsafe fn embed(&self, member: Member) {
        // SAFETY: ids are in the vocabulary.
        unsafe {
            let hidden = self.decoder.shape.hidden;
            let table = self.decoder.embedding.data_ptr() as *const W;
            let mut token = member.thread;
            while token < self.count() {
                let from = table.add(self.tokens.ids[token] as usize * hidden);
                let mut at = 0;
                while at < hidden {
                    _mm512_storeu_ps(self.x.add(token * hidden + at), W::widen(from.add(at)));
                    at += WIDE;
                }
                token += member.threads;
            }
        }
    }

    /// `1 / sqrt(mean(x^2) + eps)` of one token's numbers.
    #[inline(always)]
    unsafe fn scale_of(&self, x: *const f32) -> f32 {
        // SAFETY: `x` points to `hidden` numbers.
        unsafe {
            let (hidden, mut at) = (self.decoder.shape.hidden, 0);
            let mut squares = _mm512_setzero_ps();
            while at < hidden {
                let numbers = _mm512_loadu_ps(x.add(at));
                squares = _mm512_fmadd_ps(numbers, numbers, squares);
                at += WIDE;
            }
            1.0 / (_mm512_reduce_add_ps(squares) / hidden as f32 + self.decoder.shape.eps).sqrt()
        }
    }

    /// Computes the residual stream of every token, RMS-normed if `weight` is given, rounded into this thread's own
    /// `normed`: every thread does all of it, which costs less than a barrier.
    #[inline(always)]
    unsafe fn norm(&self, member: Member, weight: *const f32) {
        // SAFETY: sizes are those of `grow`.
        unsafe {
            let hidden = self.decoder.shape.hidden;
            let own = self.normed.add(member.thread * self.count() * hidden);
            let mut token = 0;
            while token < self.count() {
                let x = self.x.add(token * hidden);
                let scale = if weight.is_null() { 1.0 } else { self.scale_of(x) };
                let (scale, mut at) = (_mm512_set1_ps(scale), 0);
                while at < hidden {
                    let mut numbers = _mm512_mul_ps(_mm512_loadu_ps(x.add(at)), scale);
                    if !weight.is_null() {
                        numbers = _mm512_mul_ps(numbers, _mm512_loadu_ps(weight.add(at)));
                    }
                    W::narrow(own.add(token * hidden + at), numbers);
                    at += WIDE;
                }
                token += 1;
            }
        }
    }

    /// Queries, keys and values of this thread's heads, and their attention, without a barrier.
    #[inline(always)]
    unsafe fn project(&self, member: Member, layer: &Layer, block: (*mut u8, *mut u8)) {
        // SAFETY: as `share`.
        unsafe {
            let shape = self.decoder.shape;
            let group = shape.heads / shape.kv_heads;
            let (from, to) = member.part(shape.kv_heads, 1);
            if from == to {
                return;
            }
            let dim = shape.head_dim;
            let (queries, kv) = ((to - from) * group, to - from);
            let width = (queries + 2 * kv) * dim;
            let own = self.projected.add(member.thread * self.own);
            let normed = self.normed.add(member.thread * self.count() * shape.hidden);
            let mut operands = self.operands(&layer.matrices[0], normed, shape.hidden);
            let whole = operands.weight;
            // First row of each of the three parts in the weight, the number of rows here, and their offset in `own`.
            let parts = [
                (from * group * dim, queries * dim, 0),
                ((shape.heads + from) * dim, kv * dim, queries * dim),
                (
                    (shape.heads + shape.kv_heads + from) * dim,
                    kv * dim,
                    (queries + kv) * dim,
                ),
            ];
            let mut part = 0;
            while part < 3 {
                let (row, rows, at) = parts[part];
                operands.weight = whole.add(row * shape.hidden);
                operands.run(
                    0,
                    rows,
                    &Store {
                        out: own.add(at),
                        n: width,
                    },
                );
                part += 1;
            }
            let (_, max_seq) = self.kv_heads_max_seq;
            let place =
                |token: usize, head: usize| (self.tokens.rows[token] as usize * shape.kv_heads + from + head) * max_seq;
            let (keys, values) = (block.0.cast::<W>(), block.1.cast::<W>());
            let mut token = 0;
            while token < self.count() {
                let position = self.tokens.positions[token] as usize;
                let mine = own.add(token * width);
                let mut head = 0;
                while head < queries {
                    let norm = (from * group + head) * dim;
                    self.norm_and_rotate(layer, norm, position, mine.add(head * dim));
                    head += 1;
                }
                let mut head = 0;
                while head < kv {
                    let norm = (shape.heads + from + head) * dim;
                    let key = mine.add((queries + head) * dim);
                    self.norm_and_rotate(layer, norm, position, key);
                    let at = (place(token, head) + position) * dim;
                    narrow_all::<W>(key, keys.add(at), dim);
                    narrow_all::<W>(mine.add((queries + kv + head) * dim), values.add(at), dim);
                    head += 1;
                }
                token += 1;
            }
            let scores = self.scores.add(member.thread * max_seq);
            let mut answer = [0.0f32; 256];
            let scale = _mm512_set1_ps(1.0 / (dim as f32).sqrt());
            let mut token = 0;
            while token < self.count() {
                let mut head = 0;
                while head < queries {
                    let query = own.add(token * width + head * dim);
                    let mut at = 0;
                    while at < dim {
                        _mm512_storeu_ps(query.add(at), _mm512_mul_ps(_mm512_loadu_ps(query.add(at)), scale));
                        at += WIDE;
                    }
                    let cached = place(token, head / group) * dim;
                    let seen = Keys {
                        keys: keys.add(cached).cast_const(),
                        values: values.add(cached).cast_const(),
                        count: self.tokens.positions[token] as usize + 1,
                        head_dim: dim,
                    };
                    seen.attend(query, scores, answer.as_mut_ptr());
                    let at = (token * shape.heads + from * group + head) * dim;
                    narrow_all::<W>(answer.as_ptr(), self.attended.add(at), dim);
                    head += 1;
                }
                token += 1;
            }
        }
    }

    /// LayerNorm of one head with its own weight and bias at `norm`, then the rotary embedding of its position, in
    /// place.
    #[inline(always)]
    unsafe fn norm_and_rotate(&self, layer: &Layer, norm: usize, position: usize, head: *mut f32) {
        // SAFETY: `head` points to `head_dim` numbers, a multiple of sixteen up to 256.
        unsafe {
            let dim = self.decoder.shape.head_dim;
            let (weight, bias) = (layer.head_weight.as_ptr().add(norm), layer.head_bias.as_ptr().add(norm));
            let mut sum = _mm512_setzero_ps();
            let mut at = 0;
            while at < dim {
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(head.add(at)));
                at += WIDE;
            }
            let mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / dim as f32);
            let mut squares = _mm512_setzero_ps();
            let mut at = 0;
            while at < dim {
                let off = _mm512_sub_ps(_mm512_loadu_ps(head.add(at)), mean);
                squares = _mm512_fmadd_ps(off, off, squares);
                at += WIDE;
            }
            let variance = _mm512_reduce_add_ps(squares) / dim as f32;
            let scale = _mm512_set1_ps(1.0 / (variance + HEAD_NORM_EPS).sqrt());
            // Stored twice, so the rotated halves can be read as one contiguous vector.
            let mut doubled = [0.0f32; 512];
            let mut at = 0;
            while at < dim {
                let normed = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(head.add(at)), mean), scale);
                let normed = _mm512_fmadd_ps(normed, _mm512_loadu_ps(weight.add(at)), _mm512_loadu_ps(bias.add(at)));
                _mm512_storeu_ps(doubled.as_mut_ptr().add(at), normed);
                _mm512_storeu_ps(doubled.as_mut_ptr().add(dim + at), normed);
                at += WIDE;
            }
            let cos = (self.decoder.cos.data_ptr() as *const f32).add(position * dim);
            let sin = (self.decoder.sin.data_ptr() as *const f32).add(position * dim);
            let mut at = 0;
            while at < dim {
                let direct = _mm512_mul_ps(_mm512_loadu_ps(doubled.as_ptr().add(at)), _mm512_loadu_ps(cos.add(at)));
                let rotated = _mm512_loadu_ps(doubled.as_ptr().add(at + dim / 2));
                _mm512_storeu_ps(
                    head.add(at),
                    _mm512_fmadd_ps(rotated, _mm512_loadu_ps(sin.add(at)), direct),
                );
                at += WIDE;
            }
        }
    }

    /// Adds a product to the residual stream, RMS-normed by `weight` first if the model requires it, then waits at
    /// the barrier.
    #[inline(always)]
    unsafe fn add(&self, member: Member, operands: &Operands<W>, weight: *const f32) {
        // SAFETY: every thread writes its own columns.
        unsafe {
            let hidden = self.decoder.shape.hidden;
            let (from, to) = member.part(hidden, WIDE);
            if !self.decoder.shape.swin_norm {
                operands.run(from, to, &Add { x: self.x, n: hidden });
            } else {
                operands.run(
                    from,
                    to,
                    &Store {
                        out: self.added,
                        n: hidden,
                    },
                );
                member.wait();
                let mut token = 0;
                while token < self.count() {
                    let (x, added) = (self.x.add(token * hidden), self.added.add(token * hidden));
                    let (scale, mut at) = (_mm512_set1_ps(self.scale_of(added)), from);
                    while at < to {
                        let normed = _mm512_mul_ps(_mm512_loadu_ps(added.add(at)), scale);
                        let own = _mm512_loadu_ps(x.add(at));
                        _mm512_storeu_ps(x.add(at), _mm512_fmadd_ps(normed, _mm512_loadu_ps(weight.add(at)), own));
                        at += WIDE;
                    }
                    token += 1;
                }
            }
            member.wait();
        }
    }

    /// `silu(gate) * up` of this thread's part of the inner width.
    #[inline(always)]
    unsafe fn gate(&self, member: Member, layer: &Layer) {
        // SAFETY: every thread writes its own columns.
        unsafe {
            let (hidden, inner) = (self.decoder.shape.hidden, self.decoder.shape.inner);
            let normed = self.normed.add(member.thread * self.count() * hidden);
            let gate = self.operands(&layer.matrices[2], normed, hidden);
            let up = Operands {
                weight: gate.weight.add(inner * hidden),
                ..gate
            };
            let (mut from, end) = member.part(inner, WIDE);
            let own = self.projected.add(member.thread * self.own);
            // As many columns at a time as fit into this thread's buffer.
            let most = (self.own / (2 * self.count()) / BLOCK * BLOCK).max(WIDE) / WIDE * WIDE;
            while from < end {
                let to = (from + most).min(end);
                let n = to - from;
                let other = own.add(self.count() * n);
                let part = |all: &Operands<W>| Operands {
                    weight: all.weight.add(from * hidden),
                    ..*all
                };
                part(&gate).run(0, n, &Store { out: own, n });
                part(&up).run(0, n, &Store { out: other, n });
                let mut token = 0;
                while token < self.count() {
                    let mut at = 0;
                    while at < n {
                        let g = _mm512_loadu_ps(own.add(token * n + at));
                        let u = _mm512_loadu_ps(other.add(token * n + at));
                        let one = _mm512_set1_ps(1.0);
                        let minus = super::numbers::exp(_mm512_sub_ps(_mm512_setzero_ps(), g));
                        let silu = _mm512_div_ps(g, _mm512_add_ps(one, minus));
                        W::narrow(self.gated.add(token * inner + from + at), _mm512_mul_ps(silu, u));
                        at += WIDE;
                    }
                    token += 1;
                }
                from = to;
            }
        }
    }

    /// The final norm of the requested tokens.
    #[inline(always)]
    unsafe fn finish(&self, member: Member) {
        // SAFETY: requested tokens are tokens of this step.
        unsafe {
            let hidden = self.decoder.shape.hidden;
            let weight = self.decoder.final_norm.as_ptr();
            let mut row = member.thread;
            while row < self.tokens.wanted.len() {
                let x = self.x.add(self.tokens.wanted[row] as usize * hidden);
                let (scale, mut at) = (_mm512_set1_ps(self.scale_of(x)), 0);
                while at < hidden {
                    let normed = _mm512_mul_ps(_mm512_loadu_ps(x.add(at)), scale);
                    let normed = _mm512_mul_ps(normed, _mm512_loadu_ps(weight.add(at)));
                    W::narrow(self.out.add(row * hidden + at), normed);
                    at += WIDE;
                }
                row += member.threads;
            }
        }
    }
}

/// Rounds `count` numbers, a multiple of sixteen.
#[inline(always)]
unsafe fn narrow_all<W: Stored>(from: *const f32, to: *mut W, count: usize) {
    // SAFETY: as documented.
    unsafe {
        let mut at = 0;
        while at < count {
            W::narrow(to.add(at), _mm512_loadu_ps(from.add(at)));
            at += WIDE;
        }
    }
}
