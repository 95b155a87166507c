//! One pass of an optimizer step, in pieces: the layers in segments, the head and the loss in chunks of tokens. Between
//! two pieces the device is free for other work. Only one chunk of the head's logits, which are larger than everything
//! else, is alive at a time.

use tch::{Kind, Reduction, Tensor};

use super::losses::divergence_each;
use super::passes::{Batch, Graph, Row};
use crate::model::segments::{SegmentedPass, leaf};
use crate::model::{LuminaMgpt, ModelError};

/// The loss of a pass.
#[derive(Debug)]
pub(super) enum Objective {
    /// Next-token cross-entropy: the mean over all tokens, or with `weights` `[tokens]` the weighted mean.
    NextToken { weights: Option<Tensor> },
    /// `0.5 * NTP + 0.5 * KL(frozen || pass)`, means over all tokens. `frozen` `[tokens, hidden]` are the frozen
    /// model's final hidden states: its log-probabilities are computed from them chunk by chunk.
    Prior { frozen: Tensor },
}

/// A pass in progress.
pub(super) struct TrainingPass {
    segments: SegmentedPass,
    batch: Batch,
    objective: Objective,
    /// The loss is multiplied by this before the backward pass.
    weight: f64,
    /// Tokens of a chunk of the head.
    chunk: i64,
    stage: Stage,
}

enum Stage {
    Forward,
    Head(Head),
    Backward,
}

struct Head {
    /// `[tokens, hidden]` with their graph, and the same as a leaf.
    rows: Tensor,
    leaf: Tensor,
    /// Number of tokens done.
    done: i64,
    /// `[]` f32: the loss of these tokens.
    loss: Tensor,
    /// The divisor of the sum over tokens.
    divisor: f64,
}

/// The result of a piece of a pass.
pub(super) enum Progress {
    More,
    /// The unweighted loss; the backward part is pending.
    Loss(f32),
    /// The pass is over: see [`SegmentedPass::into_term`].
    Done(Tensor),
}

/// Bytes of one chunk's logits: 256 tokens of the real vocabulary, or all tokens of a small one.
const CHUNK_BYTES: i64 = 64 << 20;

/// Tokens of one chunk of the head for a vocabulary of `vocab` ids.
pub(super) fn chunk_tokens(vocab: i64) -> i64 {
    (CHUNK_BYTES / (4 * vocab.max(1))).max(1)
}

impl TrainingPass {
    /// Lays out `rows`; nothing is computed yet.
    ///
    /// # Errors
    /// When the sequences are too long, or the device fails.
    pub fn new(
        model: &LuminaMgpt,
        rows: &[Row],
        (objective, weight): (Objective, f64),
        graph: Graph,
    ) -> Result<Self, ModelError> {
        let batch = Batch::new(model, rows)?;
        let segments = match graph {
            Graph::Kept => (1, true),
            Graph::Recomputed { segment } => (segment, false),
        };
        Ok(Self {
            segments: model.transformer.segmented(&batch.ids, &batch.context, segments)?,
            batch,
            objective,
            weight,
            chunk: chunk_tokens(model.transformer.config().vocab_size),
            stage: Stage::Forward,
        })
    }

    /// Computes one more piece. Gradients must be enabled.
    ///
    /// # Errors
    /// When the device fails.
    pub fn advance(mut self, model: &LuminaMgpt) -> Result<(Option<Self>, Progress), ModelError> {
        match &mut self.stage {
            Stage::Forward => {
                if self.segments.forward(&model.transformer)? {
                    self.stage = Stage::Head(self.head(model)?);
                }
            }
            Stage::Head(head) => {
                let tokens = head.leaf.size()[0];
                if head.done < tokens {
                    head.chunk(model, (&self.batch.targets, self.chunk), &self.objective, self.weight)?;
                }
                if head.done == tokens {
                    // The gradient of this sum at the rows is that of the loss.
                    let gradient = head.leaf.f_grad()?;
                    head.rows.f_mul(&gradient)?.f_sum(head.rows.kind())?.f_backward()?;
                    let loss = head.loss.f_double_value(&[])? as f32;
                    self.stage = Stage::Backward;
                    return Ok((Some(self), Progress::Loss(loss)));
                }
            }
            Stage::Backward => {
                if self.segments.backward(&model.transformer)? {
                    let term = self.segments.into_term()?;
                    return Ok((None, Progress::Done(term)));
                }
            }
        }
        Ok((Some(self), Progress::More))
    }

    fn head(&self, model: &LuminaMgpt) -> Result<Head, ModelError> {
        let rows = self.batch.predicting(&self.segments.hidden(&model.transformer)?)?;
        let tokens = rows.size()[0];
        Ok(Head {
            leaf: leaf(&rows)?,
            loss: Tensor::f_zeros(&[] as &[i64], (Kind::Float, rows.device()))?,
            rows,
            done: 0,
            divisor: match &self.objective {
                Objective::NextToken { weights: Some(weights) } => weights.f_sum(Kind::Float)?.f_double_value(&[])?,
                _ => tokens as f64,
            },
        })
    }
}

impl Head {
    /// The loss of the next tokens and its gradient at their hidden states.
    fn chunk(
        &mut self,
        model: &LuminaMgpt,
        (targets, chunk): (&Tensor, i64),
        objective: &Objective,
        weight: f64,
    ) -> Result<(), ModelError> {
        let count = chunk.min(self.leaf.size()[0] - self.done);
        let part = |of: &Tensor| of.f_narrow(0, self.done, count);
        let logits = model.transformer.logits(&part(&self.leaf)?)?;
        let each = logits.f_cross_entropy_loss(&part(targets)?, None::<&Tensor>, Reduction::None, -100, 0.0)?;
        let each = match objective {
            Objective::NextToken { weights: None } => each,
            Objective::NextToken { weights: Some(weights) } => each.f_mul(&part(weights)?)?,
            Objective::Prior { frozen } => {
                let frozen = tch::no_grad(|| -> Result<Tensor, ModelError> {
                    let logits = model.transformer.logits(&part(frozen)?)?;
                    Ok(logits.f_log_softmax(-1, Kind::Float)?)
                })?;
                let divergence = divergence_each(&frozen, &logits.f_log_softmax(-1, Kind::Float)?)?;
                each.f_add(&divergence)?.f_mul_scalar(0.5)?
            }
        };
        let loss = each.f_sum(Kind::Float)?.f_div_scalar(self.divisor)?;
        loss.f_mul_scalar(weight)?.f_backward()?;
        self.loss = self.loss.f_add(&loss.f_detach()?)?;
        self.done += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::injection::DeviceConcept;
    use crate::model::lumina::CheckpointFiles;
    use crate::pocket::unpack_shipped;
    use crate::training::References;
    use crate::training::losses::{divergence_from_frozen, next_token, weighted_next_token};
    use crate::training::passes::{predicting_states, row_logits, rows};
    use crate::training::tests::rex;
    use coar_core::concept::ConceptKind;
    use coar_core::training::{Preset, TrainingSpec};

    fn model() -> LuminaMgpt {
        let cache = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
        LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap()
    }

    fn references(model: &LuminaMgpt) -> References {
        let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
        spec.captions = vec![];
        let images = [rex(1), rex(2)];
        References::encode(model, &spec, &images).unwrap()
    }

    fn concept(model: &LuminaMgpt) -> DeviceConcept {
        tch::manual_seed(5);
        let leaf = |tokens: i64| {
            let shape = [4, tokens, model.transformer.config().hidden_size];
            Tensor::randn(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true)
        };
        DeviceConcept {
            text: leaf(2),
            image: leaf(1),
        }
    }

    /// Loss, gradients, and the number of pieces.
    fn run(model: &LuminaMgpt, concept: &DeviceConcept, mut pass: TrainingPass) -> (f64, Vec<Tensor>, usize) {
        let (mut loss, mut pieces) = (f64::NAN, 0);
        loop {
            pieces += 1;
            let (left, progress) = pass.advance(model).unwrap();
            match progress {
                Progress::More => {}
                Progress::Loss(value) => loss = f64::from(value),
                Progress::Done(term) => {
                    term.backward();
                    return (loss, gradients(concept), pieces);
                }
            }
            pass = left.unwrap();
        }
    }

    fn gradients(concept: &DeviceConcept) -> Vec<Tensor> {
        let take = |tensor: &Tensor| {
            let mut gradient = tensor.grad();
            let copy = gradient.copy();
            let _ = gradient.zero_();
            copy
        };
        vec![take(&concept.text), take(&concept.image)]
    }

    #[test]
    fn pieces_add_up_to_the_whole_pass() {
        let model = model();
        let (references, concept) = (references(&model), concept(&model));
        let both = [references.view(0), references.view(1)];
        let with = rows(&both, Some((&concept, true)));
        let tokens: i64 = both.iter().map(|reference| reference.image.len() as i64).sum();
        let frozen = tch::no_grad(|| predicting_states(&model, &rows(&both, None)).unwrap());
        let weights = Tensor::rand([tokens], (Kind::Float, Device::Cpu));
        let objective = |which: usize| match which {
            0 => Objective::NextToken { weights: None },
            1 => Objective::NextToken {
                weights: Some(weights.shallow_clone()),
            },
            _ => Objective::Prior {
                frozen: frozen.shallow_clone(),
            },
        };
        for which in 0..3 {
            // The same in one graph.
            let (logits, targets) = row_logits(&model, &with).unwrap();
            let whole = match which {
                0 => next_token(&logits, &targets).unwrap(),
                1 => weighted_next_token(&logits, &targets, &weights).unwrap(),
                _ => {
                    let frozen = model.transformer.logits(&frozen).unwrap().log_softmax(-1, Kind::Float);
                    (next_token(&logits, &targets).unwrap() + divergence_from_frozen(&frozen, &logits).unwrap()) * 0.5
                }
            };
            (&whole * 0.7).backward();
            let (expected, expected_loss) = (gradients(&concept), whole.double_value(&[]));
            for (graph, chunk) in [
                (Graph::Kept, 1 << 20),
                (Graph::Kept, 17),
                (Graph::Recomputed { segment: 4 }, 100),
            ] {
                let mut pass = TrainingPass::new(&model, &with, (objective(which), 0.7), graph).unwrap();
                pass.chunk = chunk;
                let (loss, found, pieces) = run(&model, &concept, pass);
                assert!(
                    (loss - expected_loss).abs() < 1e-5,
                    "{which} {graph:?}: {loss}, {expected_loss}"
                );
                for (found, expected) in found.iter().zip(&expected) {
                    let off = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
                    assert!(off < 1e-5, "{which} {graph:?} {chunk}: {off}");
                }
                let segments = if graph == Graph::Kept { 6 } else { 2 };
                let chunks = (tokens + chunk - 1) / chunk;
                assert_eq!(pieces as i64, 2 * segments + chunks.max(1), "{which} {graph:?} {chunk}");
            }
        }
    }
}
