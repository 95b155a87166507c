//! The patch discriminator that sharpens the decoder: a small convolutional network that judges overlapping patches of
//! about 30 pixels (as the published VQGAN's training, Esser et al. 2021, at a size that a CPU can train).

use tch::{Device, Kind, Tensor};

use crate::pocket::parameters::Parameters;
use coar_engine::model::ModelError;
use coar_engine::model::weights::TensorSource;
use coar_engine::training::optimizer::{Optimizer, Parameter, Rule};

const GROUPS: i64 = 8;
const NORM_EPS: f64 = 1e-5;
const SLOPE: f64 = 0.2;

/// One convolution: output channels, kernel size, stride, and whether a group norm follows.
struct Layer {
    output: i64,
    size: i64,
    stride: i64,
    norm: bool,
}

const LAYERS: [Layer; 3] = [
    Layer {
        output: 32,
        size: 3,
        stride: 1,
        norm: false,
    },
    Layer {
        output: 64,
        size: 4,
        stride: 2,
        norm: true,
    },
    Layer {
        output: 96,
        size: 3,
        stride: 1,
        norm: true,
    },
];
/// Channels of an image after a space-to-depth of 2.
const INPUT: i64 = 12;

/// The network and its optimizer.
#[derive(Debug)]
pub(super) struct Discriminator {
    parameters: Parameters,
    pub(super) optimizer: Optimizer,
}

impl Discriminator {
    pub(super) fn new(device: Device) -> Result<Self, ModelError> {
        let parameters = Parameters::on(device);
        // The first pass creates the parameters.
        let nothing = Tensor::f_zeros([1, 3, 16, 16], (Kind::Float, device))?;
        let _ = forward(&parameters, &nothing)?;
        let trained = parameters
            .all()
            .into_iter()
            .map(|(name, tensor)| Parameter {
                name,
                tensor,
                rule: Rule::AdamW { weight_decay: 1e-4 },
            })
            .collect();
        Ok(Self {
            parameters,
            optimizer: Optimizer::new(trained, (0.5, 0.95))?,
        })
    }

    /// Scores `[batch, 1, height / 4, width / 4]` of images `[batch, 3, height, width]` in -1..1: high for real patches.
    pub(super) fn score(&self, images: &Tensor) -> Result<Tensor, ModelError> {
        forward(&self.parameters.cast(Kind::BFloat16, true), images)
    }

    /// One step on the hinge loss of real and decoded images; returns the loss, detached.
    pub(super) fn learn(&mut self, real: &Tensor, decoded: &Tensor, learning_rate: f64) -> Result<Tensor, ModelError> {
        let margin = |scores: Tensor, sign: f64| -> Result<Tensor, ModelError> {
            Ok(scores
                .f_mul_scalar(sign)?
                .f_add_scalar(1.0)?
                .f_relu()?
                .f_mean(Kind::Float)?)
        };
        let loss = margin(self.score(real)?, -1.0)? + margin(self.score(&decoded.f_detach()?)?, 1.0)?;
        loss.f_backward()?;
        self.optimizer.clip_on_device(1.0)?;
        self.optimizer.step(learning_rate)?;
        Ok(loss.detach())
    }

    /// Parameters and moments, for the training state; the names do not collide with the decoder's.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = self.parameters.all();
        state.extend(self.optimizer.state());
        state
            .into_iter()
            .map(|(name, tensor)| (format!("adversary.{name}"), tensor))
            .collect()
    }

    /// Restores the result of [`Self::state`].
    pub(super) fn restore(&mut self, saved: &dyn Fn(&str) -> Option<Tensor>) -> Result<(), ModelError> {
        let take = |name: &str| saved(&format!("adversary.{name}"));
        self.parameters.restore(&take)?;
        self.optimizer.restore(&take)
    }
}

fn forward(source: &dyn TensorSource, images: &Tensor) -> Result<Tensor, ModelError> {
    let mut x = images.f_pixel_unshuffle(2)?;
    let mut input = INPUT;
    for (index, layer) in LAYERS.iter().enumerate() {
        x = convolve(source, &format!("layer.{index}.conv"), &x, input, layer)?;
        if layer.norm {
            let weight = source.tensor(&format!("layer.{index}.norm.weight"), &[layer.output])?;
            let bias = source.tensor(&format!("layer.{index}.norm.bias"), &[layer.output])?;
            x = x.f_group_norm(GROUPS, Some(&weight), Some(&bias), NORM_EPS, false)?;
        }
        // A leaky rectifier.
        x = x.f_maximum(&x.f_mul_scalar(SLOPE)?)?;
        input = layer.output;
    }
    let score = Layer {
        output: 1,
        size: 3,
        stride: 1,
        norm: false,
    };
    Ok(convolve(source, "score", &x, input, &score)?.f_to_kind(Kind::Float)?)
}

fn convolve(
    source: &dyn TensorSource,
    name: &str,
    x: &Tensor,
    input: i64,
    layer: &Layer,
) -> Result<Tensor, ModelError> {
    let weight = source.tensor(
        &format!("{name}.weight"),
        &[layer.output, input, layer.size, layer.size],
    )?;
    let bias = source.tensor(&format!("{name}.bias"), &[layer.output])?;
    Ok(x.f_to_kind(weight.kind())?
        .f_conv2d(&weight, Some(&bias), [layer.stride], [1], [1], 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_to_separate_noise_from_flat_images() {
        tch::manual_seed(1);
        let mut discriminator = Discriminator::new(Device::Cpu).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let losses: Vec<f64> = (0..30)
            .map(|_| {
                let (flat, noise) = (
                    Tensor::zeros([2, 3, 32, 32], options),
                    Tensor::randn([2, 3, 32, 32], options),
                );
                let loss = discriminator.learn(&flat, &noise, 2e-3).unwrap();
                f64::try_from(loss).unwrap()
            })
            .collect();
        assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
        assert_eq!(
            discriminator
                .score(&Tensor::zeros([2, 3, 32, 32], options))
                .unwrap()
                .size(),
            [2, 1, 8, 8]
        );
    }
}
