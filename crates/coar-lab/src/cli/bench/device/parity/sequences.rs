//! Whole sequences, with two concepts and without.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::super::report::Findings;
use super::Mode;
use super::numbers::largest;
use crate::pocket::world::{Scene, held_out_subjects, render};
use coar_core::concept::ConceptTensors;
use coar_engine::injection::{DeviceConcept, Placement, context_batch};
use coar_engine::model::context::ContextBatch;
use coar_engine::model::{LuminaMgpt, ModelConfig, ModelError, Transformer};

/// Two rows of different lengths with space for two concepts.
#[derive(Debug)]
pub(super) struct Sequences {
    /// Actual ids of each row.
    pub ids: [Vec<i64>; 2],
    /// Tokens of each row that are prefilled; the others are fed by decode steps.
    pub prompt: [usize; 2],
    /// Whether the model was trained on such sequences.
    pub trained: bool,
    concepts: [ConceptTensors; 2],
}

/// Tokens by which the second row is shorter.
const SHORTER: usize = 7;

fn concepts(config: &ModelConfig) -> [ConceptTensors; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    // With concepts at all layers the identity mask would have no effect: what their positions attend to is
    // overwritten.
    let (layers, hidden) = (config.num_hidden_layers / 2, config.hidden_size as usize);
    [0, 1].map(|_| {
        let mut numbers = || (0..layers * hidden).map(|_| rng.random_range(-1.0..1.0)).collect();
        ConceptTensors {
            layers,
            hidden,
            text_tokens: 1,
            image_tokens: 1,
            text: numbers(),
            image: numbers(),
        }
    })
}

impl Sequences {
    /// A prompt and the codes of an image of the pocket model's world.
    pub fn of_image(model: &LuminaMgpt) -> anyhow::Result<Self> {
        let (width, height) = model.sizes()[0];
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut row = |subject: usize, scene: Scene| -> anyhow::Result<(Vec<i64>, Vec<i64>)> {
            let image = render(&held_out_subjects()[subject].spec(scene, &mut rng), width, height);
            let codes = model.encode_image(&image)?;
            let (mut prompt, _) = model.prompt_with_slot("a photo of a red cat on the beach", 0, "", width, height)?;
            let (start, image) = model.image_ids(&codes, width, height)?;
            prompt.extend(start);
            prompt.extend([model.vocabulary.placeholder(); 2]);
            Ok((prompt, image))
        };
        let (first, mut second) = (row(0, Scene::Beach)?, row(1, Scene::Grass)?);
        second.0.drain(1..=SHORTER);
        Ok(Self {
            prompt: [first.0.len(), second.0.len()],
            ids: [[first.0, first.1].concat(), [second.0, second.1].concat()],
            trained: true,
            concepts: concepts(model.transformer.config()),
        })
    }

    /// Random ids of the vocabulary.
    pub fn random(config: &ModelConfig) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut row = |length: usize| (0..length).map(|_| rng.random_range(0..config.vocab_size)).collect();
        Self {
            ids: [row(70), row(70 - SHORTER)],
            prompt: [24, 24 - SHORTER],
            trained: false,
            concepts: concepts(config),
        }
    }

    /// `[2, longest]`, the first `most` tokens of each row, right-padded.
    fn tensor(&self, lengths: [usize; 2], device: Device) -> Result<Tensor, ModelError> {
        let longest = lengths[0].max(lengths[1]);
        let mut all = Vec::with_capacity(2 * longest);
        for (row, length) in self.ids.iter().zip(lengths) {
            all.extend_from_slice(&row[..length]);
            all.resize(all.len() + longest - length, row[0]);
        }
        Ok(Tensor::f_from_slice(&all)?.f_view([2, -1])?.f_to_device(device)?)
    }

    /// Both rows at full length.
    pub fn whole(&self, device: Device) -> Result<Tensor, ModelError> {
        self.tensor(self.ids.each_ref().map(Vec::len), device)
    }

    /// The index of each real token of both rows in `[2 * longest]`, from the first predicted one after the prompt.
    pub fn predicted(&self) -> Vec<i64> {
        let longest = self.ids[0].len().max(self.ids[1].len());
        let of_row = |row: usize| self.prompt[row] - 1..self.ids[row].len() - 1;
        (0..2)
            .flat_map(|row| of_row(row).map(move |at| (row * longest + at) as i64))
            .collect()
    }

    /// The tokens at [`Self::predicted`], shifted by one.
    pub fn targets(&self) -> Vec<i64> {
        (0..2)
            .flat_map(|row| self.ids[row][self.prompt[row]..].iter().copied())
            .collect()
    }

    /// The two concepts, on `device`; they accumulate gradients if `leaves` is set.
    pub fn upload(&self, device: Device, leaves: bool) -> Result<[DeviceConcept; 2], ModelError> {
        let upload = |host: &ConceptTensors| -> Result<DeviceConcept, ModelError> {
            let concept = DeviceConcept::upload(host, device)?;
            Ok(DeviceConcept {
                text: concept.text.f_set_requires_grad(leaves)?,
                image: concept.image.f_set_requires_grad(leaves)?,
            })
        };
        Ok([upload(&self.concepts[0])?, upload(&self.concepts[1])?])
    }

    fn placement<'a>(&self, row: usize, concepts: &'a [DeviceConcept; 2], which: usize, text: i64) -> Placement<'a> {
        Placement {
            row: row as i64,
            concept: &concepts[which],
            text_at: vec![text],
            image_at: Some((self.prompt[row] - 2 + which) as i64),
        }
    }

    /// Both concepts in the first row, one of them in the second.
    pub fn context(
        &self,
        concepts: &[DeviceConcept; 2],
        mask: bool,
        device: Device,
    ) -> Result<ContextBatch, ModelError> {
        let at = |row, which, text| self.placement(row, concepts, which, text);
        context_batch(&[at(0, 0, 3), at(0, 1, 6), at(1, 1, 4)], mask, device)
    }

    /// Both concepts in a batch of the first row alone.
    pub fn context_of_first(&self, concepts: &[DeviceConcept; 2], device: Device) -> Result<ContextBatch, ModelError> {
        let at = |which, text| self.placement(0, concepts, which, text);
        context_batch(&[at(0, 3), at(1, 6)], true, device)
    }
}

/// Logits `[tokens, vocabulary]` at [`Sequences::predicted`], in one pass over whole sequences.
pub(super) fn read(
    model: &Transformer,
    sequences: &Sequences,
    context: Option<&ContextBatch>,
) -> Result<Tensor, ModelError> {
    let device = model.device();
    let hidden = model.forward(&sequences.whole(device)?, context)?;
    let at = Tensor::f_from_slice(&sequences.predicted())?.f_to_device(device)?;
    let width = hidden.size()[2];
    model.logits(&hidden.f_reshape([-1, width])?.f_index_select(0, &at)?)
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&Transformer, &Transformer),
    sequences: &Sequences,
) -> anyhow::Result<()> {
    let plain = read(reference, sequences, None)?;
    let name = format!("{label}: logits");
    findings.attempt(&name, || {
        mode.compare(
            findings,
            &name,
            &read(device, sequences, None)?,
            &plain,
            sequences.trained,
        )
    })?;
    let here = sequences.upload(Device::Cpu, false)?;
    let context = |mask| sequences.context(&here, mask, Device::Cpu);
    let masked = read(reference, sequences, Some(&context(true)?))?;
    let open = read(reference, sequences, Some(&context(false)?))?;
    // With a mask that has no effect the two comparisons below would not test it.
    let effect = largest(&masked, &open)?;
    findings.check(
        format!("{label}: tolerance over what the identity mask changes"),
        1e-3 / effect,
        0.1,
    );
    let there = sequences.upload(device.device(), false)?;
    for (mask, expected) in [(true, &masked), (false, &open)] {
        let with = if mask {
            "two concepts and the identity mask"
        } else {
            "two concepts"
        };
        let name = format!("{label}: logits with {with}");
        let context = sequences.context(&there, mask, device.device())?;
        findings.attempt(&name, || {
            mode.compare(
                findings,
                &name,
                &read(device, sequences, Some(&context))?,
                expected,
                false,
            )
        })?;
    }
    Ok(())
}
