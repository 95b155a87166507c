//! EfficientNet-Lite0 (`tensorflow/tpu`, 2020; after arXiv 1905.11946) with its published ImageNet weights: inverted
//! residuals of depthwise convolutions, ReLU6, no squeeze and excitation. It was not trained on anything that this
//! project renders, so its results are independent.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::weights;
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::model::preprocessing::{Filter, resize};
use coar_engine::model::weights::pickle::PickleSource;
use coar_engine::model::weights::{Target, TensorSource};

/// Side of the network's input in pixels.
const SIDE: u32 = 224;
/// The normalisation that the network was trained with: `(level - MEAN) / DEVIATION`.
const MEAN: f64 = 127.0;
const DEVIATION: f64 = 128.0;
/// For the batch norms.
const EPSILON: f64 = 1e-3;
/// Number of images per batch: few on a CPU, to keep intermediate results in its caches.
const HOST_BATCH: usize = 4;
const DEVICE_BATCH: usize = 64;
/// The stages whose output statistics are used: 56, 28 and 14 pixels per side.
const STYLE_STAGES: std::ops::Range<usize> = 1..4;

/// Blocks of one width.
#[derive(Debug, Clone, Copy)]
struct Stage {
    blocks: usize,
    kernel: i64,
    /// For the first block.
    stride: i64,
    expansion: i64,
    width: i64,
}

const fn stage(blocks: usize, kernel: i64, stride: i64, expansion: i64, width: i64) -> Stage {
    Stage {
        blocks,
        kernel,
        stride,
        expansion,
        width,
    }
}

#[derive(Debug, Clone)]
struct Shape {
    stem: i64,
    stages: [Stage; 7],
    features: i64,
    classes: i64,
}

const LITE0: Shape = Shape {
    stem: 32,
    stages: [
        stage(1, 3, 1, 1, 16),
        stage(2, 3, 2, 6, 24),
        stage(2, 5, 2, 6, 40),
        stage(3, 3, 2, 6, 80),
        stage(3, 5, 1, 6, 112),
        stage(4, 5, 2, 6, 192),
        stage(1, 3, 1, 6, 320),
    ],
    features: 1280,
    classes: 1000,
};

/// A convolution without bias and the following batch norm, as one convolution.
#[derive(Debug)]
struct Conv {
    weight: Tensor,
    bias: Tensor,
    kernel: i64,
    stride: i64,
    groups: i64,
    /// Followed by ReLU6.
    activate: bool,
}

/// The shape of a convolution.
#[derive(Clone, Copy)]
struct ConvShape {
    input: i64,
    output: i64,
    kernel: i64,
    stride: i64,
    /// Depthwise.
    depthwise: bool,
    activate: bool,
}

impl ConvShape {
    fn pointwise(input: i64, output: i64, activate: bool) -> Self {
        Self {
            input,
            output,
            kernel: 1,
            stride: 1,
            depthwise: false,
            activate,
        }
    }
}

impl Conv {
    fn load(source: &dyn TensorSource, conv: &str, norm: &str, shape: ConvShape) -> Result<Self, ModelError> {
        let ConvShape { output, kernel, .. } = shape;
        let (inner, groups) = match shape.depthwise {
            true => (1, output),
            false => (shape.input, 1),
        };
        let weight = source.tensor(&format!("{conv}.weight"), &[output, inner, kernel, kernel])?;
        let of_norm = |name: &str| -> Result<Tensor, ModelError> {
            let tensor = source.tensor(&format!("{norm}.{name}"), &[output])?;
            Ok(tensor.f_to_kind(Kind::Double)?)
        };
        let deviation = of_norm("running_var")?.f_add_scalar(EPSILON)?.f_sqrt()?;
        let gain = of_norm("weight")?.f_div(&deviation)?;
        let bias = of_norm("bias")?.f_sub(&of_norm("running_mean")?.f_mul(&gain)?)?;
        Ok(Self {
            weight: weight
                .f_to_kind(Kind::Double)?
                .f_mul(&gain.f_view([-1, 1, 1, 1])?)?
                .f_to_kind(Kind::Float)?
                .f_permute([0, 2, 3, 1])?
                .f_contiguous()?
                .f_permute([0, 3, 1, 2])?,
            bias: bias.f_to_kind(Kind::Float)?,
            kernel,
            stride: shape.stride,
            groups,
            activate: shape.activate,
        })
    }

    /// `[batch, input, h, w]` to `[batch, output, ceil(h / stride), ceil(w / stride)]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let (_, _, height, width) = x.size4()?;
        let (top, bottom) = same_padding(height, self.kernel, self.stride);
        let (left, right) = same_padding(width, self.kernel, self.stride);
        let conv = |x: &Tensor, padding: [i64; 2]| {
            x.f_conv2d(&self.weight, Some(&self.bias), [self.stride], padding, [1], self.groups)
        };
        let y = match top == bottom && left == right {
            true => conv(x, [top, left])?,
            false => conv(&x.f_constant_pad_nd([left, right, top, bottom])?, [0, 0])?,
        };
        Ok(if self.activate { y.f_clamp(0.0, 6.0)? } else { y })
    }
}

/// TensorFlow's `SAME`: zeros before and after for `ceil(size / stride)` outputs, the odd one after.
fn same_padding(size: i64, kernel: i64, stride: i64) -> (i64, i64) {
    let outputs = (size + stride - 1) / stride;
    let total = ((outputs - 1) * stride + kernel - size).max(0);
    (total / 2, total - total / 2)
}

/// An inverted residual.
#[derive(Debug)]
struct Block {
    convs: Vec<Conv>,
    residual: bool,
}

impl Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let mut y = x.shallow_clone();
        for conv in &self.convs {
            y = conv.forward(&y)?;
        }
        Ok(if self.residual { y.f_add(x)? } else { y })
    }
}

/// The network's output for `n` images, all in f32 on the network's device.
#[derive(Debug)]
pub struct Outputs {
    /// `[n, 1000]`: scores of ImageNet's classes.
    pub logits: Tensor,
    /// `[n, 1280]`: content features, independent of position; not normalised.
    pub features: Tensor,
    /// `[n, 288]`: style features: of three early stages (24, 40 and 80 channels) each channel's mean over the
    /// image, then each channel's deviation.
    pub style: Tensor,
}

/// EfficientNet-Lite0, in f32.
#[derive(Debug)]
pub struct EfficientNet {
    stem: Conv,
    stages: Vec<Vec<Block>>,
    head: Conv,
    classes: (Tensor, Tensor),
    device: Device,
    /// SHA-256 of the file in hex; empty if there is none.
    digest: String,
}

impl EfficientNet {
    /// Reads the published `.pth`, a `state_dict` in the format from before PyTorch 1.6; nothing in it is executed.
    ///
    /// # Errors
    /// When the file is missing or damaged, or a tensor is absent or misshapen.
    pub fn open(file: &Path, device: Device) -> Result<Self, ModelError> {
        let target = Target {
            kind: Kind::Float,
            device,
        };
        let source = PickleSource::open(file, target)?;
        let network = tch::no_grad(|| Self::load(&LITE0, &source, device))?;
        Ok(Self {
            digest: weights::digest(file)?,
            ..network
        })
    }

    fn load(shape: &Shape, source: &dyn TensorSource, device: Device) -> Result<Self, ModelError> {
        let stem = ConvShape {
            input: 3,
            output: shape.stem,
            kernel: 3,
            stride: 2,
            depthwise: false,
            activate: true,
        };
        let (mut width, mut number) = (shape.stem, 0);
        let mut stages = Vec::with_capacity(shape.stages.len());
        for stage in &shape.stages {
            let mut blocks = Vec::with_capacity(stage.blocks);
            for index in 0..stage.blocks {
                let part = |conv: &str, norm: &str, shape| {
                    let name = |own: &str| format!("_blocks.{number}.{own}");
                    Conv::load(source, &name(conv), &name(norm), shape)
                };
                let inner = width * stage.expansion;
                let stride = if index == 0 { stage.stride } else { 1 };
                let mut convs = Vec::with_capacity(3);
                if stage.expansion != 1 {
                    convs.push(part("_expand_conv", "_bn0", ConvShape::pointwise(width, inner, true))?);
                }
                let depthwise = ConvShape {
                    input: inner,
                    output: inner,
                    kernel: stage.kernel,
                    stride,
                    depthwise: true,
                    activate: true,
                };
                convs.push(part("_depthwise_conv", "_bn1", depthwise)?);
                let narrow = ConvShape::pointwise(inner, stage.width, false);
                convs.push(part("_project_conv", "_bn2", narrow)?);
                blocks.push(Block {
                    convs,
                    residual: stride == 1 && width == stage.width,
                });
                width = stage.width;
                number += 1;
            }
            stages.push(blocks);
        }
        Ok(Self {
            stem: Conv::load(source, "_conv_stem", "_bn0", stem)?,
            stages,
            head: Conv::load(
                source,
                "_conv_head",
                "_bn1",
                ConvShape::pointwise(width, shape.features, true),
            )?,
            classes: (
                source.tensor("_fc.weight", &[shape.classes, shape.features])?,
                source.tensor("_fc.bias", &[shape.classes])?,
            ),
            device,
            digest: String::new(),
        })
    }

    /// The network's input for images of any size, `[batch, 3, 224, 224]` on its device: resized to a square with
    /// Pillow's bicubic filter in 8 bits, then normalised.
    ///
    /// # Errors
    /// When an image has no pixels, or libtorch fails.
    pub fn pixels(&self, images: &[RgbImage]) -> Result<Tensor, ModelError> {
        if images.iter().any(|image| image.rgb.is_empty()) {
            return Err(ModelError::invalid("image", "has no pixels"));
        }
        let mut rgb = Vec::with_capacity(images.len() * (3 * SIDE * SIDE) as usize);
        for image in images {
            rgb.extend(resize(image, SIDE, SIDE, Filter::Bicubic).rgb);
        }
        scaled(&rgb, SIDE.into(), self.device)
    }

    /// Judges pixels from [`Self::pixels`], `[batch, 3, h, w]`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forward(&self, pixels: &Tensor) -> Result<Outputs, ModelError> {
        let over_pixels = [2i64, 3];
        let mut x = self.stem.forward(pixels)?;
        let mut style = Vec::with_capacity(2 * STYLE_STAGES.len());
        for (index, stage) in self.stages.iter().enumerate() {
            for block in stage {
                x = block.forward(&x)?;
            }
            if STYLE_STAGES.contains(&index) {
                style.push(x.f_mean_dim(over_pixels.as_slice(), false, Kind::Float)?);
                style.push(x.f_std_dim(over_pixels.as_slice(), false, false)?);
            }
        }
        let features = self
            .head
            .forward(&x)?
            .f_mean_dim(over_pixels.as_slice(), false, Kind::Float)?;
        let (weight, bias) = &self.classes;
        Ok(Outputs {
            logits: features.f_linear(weight, Some(bias))?,
            features,
            style: Tensor::f_cat(&style, 1)?,
        })
    }

    /// Judges images of any size, in batches; the outputs are on the CPU.
    ///
    /// # Errors
    /// When there are none, one has no pixels, or libtorch fails.
    pub fn judge(&self, images: &[RgbImage]) -> Result<Outputs, ModelError> {
        if images.is_empty() {
            return Err(ModelError::invalid("images", "are none"));
        }
        tch::no_grad(|| {
            let (mut logits, mut features, mut style) = (vec![], vec![], vec![]);
            let batch = match self.device {
                Device::Cpu => HOST_BATCH,
                _ => DEVICE_BATCH,
            };
            for chunk in images.chunks(batch) {
                let own = self.forward(&self.pixels(chunk)?)?;
                logits.push(own.logits.f_to_device(Device::Cpu)?);
                features.push(own.features.f_to_device(Device::Cpu)?);
                style.push(own.style.f_to_device(Device::Cpu)?);
            }
            Ok(Outputs {
                logits: Tensor::f_cat(&logits, 0)?,
                features: Tensor::f_cat(&features, 0)?,
                style: Tensor::f_cat(&style, 0)?,
            })
        })
    }

    /// SHA-256 of the weights' file, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// Square images as normalised input `[batch, 3, side, side]`. The memory layout stays channels-last through the
/// whole network, which is faster on a CPU.
fn scaled(rgb: &[u8], side: i64, device: Device) -> Result<Tensor, ModelError> {
    Ok(Tensor::f_from_slice(rgb)?
        .f_to_device(device)?
        .f_view([-1, side, side, 3])?
        .f_permute([0, 3, 1, 2])?
        .f_to_kind(Kind::Float)?
        .f_sub_scalar(MEAN)?
        .f_div_scalar(DEVIATION)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;

    use serde::Deserialize;

    use super::*;
    use crate::pocket::designers::{EFFICIENTNET, default_dir};

    /// As in `tests/judges/make_efficientnet.py`.
    const SMALL: Shape = Shape {
        stem: 8,
        stages: [
            stage(1, 3, 1, 1, 4),
            stage(2, 3, 2, 3, 6),
            stage(2, 5, 2, 3, 8),
            stage(2, 3, 2, 2, 10),
            stage(1, 5, 1, 2, 12),
            stage(2, 5, 2, 2, 14),
            stage(1, 3, 1, 2, 16),
        ],
        features: 24,
        classes: 11,
    };

    /// Numbers in -1..1 as a function of name and index.
    fn formula(name: &str, count: usize) -> Vec<f64> {
        let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| {
            (seed ^ u32::from(byte)).wrapping_mul(16_777_619)
        });
        (0..count as u32)
            .map(|at| {
                let mut u = at.wrapping_mul(2_654_435_761).wrapping_add(seed);
                u = (u ^ (u >> 16)).wrapping_mul(2_246_822_519);
                u = (u ^ (u >> 13)).wrapping_mul(3_266_489_917);
                f64::from(u) / f64::from(1u32 << 31) - 1.0
            })
            .collect()
    }

    struct Formula;

    impl TensorSource for Formula {
        fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
            let count: i64 = shape.iter().product();
            let fan_in: i64 = shape[1..].iter().product();
            let number = |value: f64| match name.rsplit('.').next() {
                Some("running_var") => 1.25 + value,
                Some("running_mean") => 0.3 * value,
                Some("bias") => 0.5 * value,
                _ if shape.len() == 1 => 1.0 + 0.5 * value,
                _ => value * 2.5 / (fan_in as f64).sqrt(),
            };
            let numbers: Vec<f32> = formula(name, count as usize)
                .into_iter()
                .map(|value| number(value) as f32)
                .collect();
            Ok(Tensor::from_slice(&numbers).view(shape))
        }

        fn shape_of(&self, _: &str) -> Option<Vec<i64>> {
            None
        }
    }

    fn image(index: usize, height: usize, width: usize) -> RgbImage {
        let noise = formula(&format!("image {index}"), height * width * 3);
        let rgb = noise.iter().enumerate().map(|(at, noise)| {
            let (x, y, c) = (at / 3 % width, at / 3 / width, at % 3);
            let waves = (((x * (index + 1) * 3 + y * 5 + c * 80) % 256) as f64 - 128.0) * 0.75;
            (128.0 + waves + 24.0 * noise).floor().clamp(0.0, 255.0) as u8
        });
        RgbImage {
            width: width as u32,
            height: height as u32,
            rgb: rgb.collect(),
        }
    }

    #[derive(Deserialize)]
    struct Expected {
        height: usize,
        width: usize,
        logits: Vec<Vec<f32>>,
        features: Vec<Vec<f32>>,
        style: Vec<Vec<f32>>,
    }

    impl Expected {
        fn read(name: &str) -> Self {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/judges/efficientnet");
            serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
        }

        fn images(&self) -> Vec<RgbImage> {
            (0..self.logits.len())
                .map(|index| image(index, self.height, self.width))
                .collect()
        }

        fn compare(&self, found: &Outputs) {
            let parts = [
                ("logits", &self.logits, &found.logits),
                ("features", &self.features, &found.features),
                ("style", &self.style, &found.style),
            ];
            for (name, expected, found) in parts {
                let rows = expected.len() as i64;
                let expected = Tensor::from_slice(&expected.concat()).view([rows, -1]);
                assert_eq!(expected.size(), found.size(), "{name}");
                let difference = (found - &expected).abs().max().double_value(&[]);
                let largest = expected.abs().max().double_value(&[]);
                println!("{name}: {difference:.2e}, of numbers up to {largest:.2}");
                assert!(difference <= 1e-4, "{name}: {difference}");
            }
        }
    }

    /// A network with formula weights.
    pub(crate) fn small() -> EfficientNet {
        EfficientNet::load(&SMALL, &Formula, Device::Cpu).unwrap()
    }

    #[test]
    fn small_network_matches_the_independent_script() {
        let network = small();
        for name in ["small_odd.json", "small_even.json"] {
            let expected = Expected::read(name);
            let (height, width) = (expected.height as i64, expected.width as i64);
            let images = expected.images();
            let rows = images.iter().map(|image| {
                let rgb = Tensor::from_slice(&image.rgb).view([height, width, 3]);
                (rgb.permute([2, 0, 1]).to_kind(Kind::Float) - MEAN) / DEVIATION
            });
            let pixels = Tensor::stack(&rows.collect::<Vec<_>>(), 0);
            expected.compare(&network.forward(&pixels).unwrap());
        }
    }

    /// Compares the published network if its file is in the user's cache; otherwise prints SKIPPED to the real standard error,
    /// which the test harness does not capture.
    pub(crate) fn published() -> Option<EfficientNet> {
        let file = default_dir().ok()?.join(EFFICIENTNET);
        if !file.exists() {
            let problem = "SKIPPED, not compared with the published weights";
            // `eprintln!` is captured in a passing test.
            let _ = writeln!(
                std::io::stderr(),
                "{problem}: {} is absent; run scripts/fetch-judge.sh",
                file.display()
            );
            return None;
        }
        Some(EfficientNet::open(&file, Device::Cpu).unwrap())
    }

    #[test]
    fn published_network_matches_the_independent_script() {
        let Some(network) = published() else { return };
        let expected = Expected::read("lite0.json");
        expected.compare(&network.judge(&expected.images()).unwrap());
        assert_eq!(
            network.digest(),
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        );
    }

    #[test]
    fn padding_is_tensorflows() {
        assert_eq!(same_padding(224, 3, 2), (0, 1));
        assert_eq!(same_padding(33, 3, 2), (1, 1));
        assert_eq!(same_padding(56, 5, 2), (1, 2));
        assert_eq!(same_padding(7, 5, 1), (2, 2));
        assert_eq!(same_padding(5, 1, 1), (0, 0));
    }

    #[test]
    fn invalid_images_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("weights.pth");
        let open = || EfficientNet::open(&file, Device::Cpu).unwrap_err().to_string();
        assert!(open().contains("weights.pth"));
        let legacy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pickle/legacy.ckpt");
        std::fs::copy(legacy, &file).unwrap();
        let problem = open();
        assert!(
            problem.contains("_conv_stem.weight") || problem.contains("_blocks.0"),
            "{problem}"
        );
        let network = small();
        let empty = RgbImage {
            width: 0,
            height: 0,
            rgb: vec![],
        };
        assert!(network.judge(&[empty]).is_err() && network.judge(&[]).is_err());
    }
}
