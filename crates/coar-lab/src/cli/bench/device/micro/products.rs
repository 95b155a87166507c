//! Products with the layers' weights by rows, weights in narrower kinds, and convolutions of the image tokenizer.

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::Micro;
use coar_engine::model::accelerator;

/// Number of layers whose weights are read in rotation, to defeat caches.
const LAYERS: usize = 4;

impl Micro<'_> {
    /// The four products of a layer for a number of rows, compared with the bytes of their weights.
    pub(super) fn products(&self) -> anyhow::Result<()> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let shapes = [
            [3 * hidden, hidden],
            [hidden, hidden],
            [2 * inner, hidden],
            [hidden, inner],
        ];
        let layers = (0..LAYERS)
            .map(|_| {
                shapes
                    .iter()
                    .map(|shape| self.random(shape))
                    .collect::<anyhow::Result<Vec<_>>>()
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let numbers: usize = layers.iter().flatten().map(Tensor::numel).sum();
        let bytes = (numbers * self.kind.elt_size_in_bytes()) as f64;
        for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
            let (x, y) = (self.random(&[rows, hidden])?, self.random(&[rows, inner])?);
            let measured = self.ms(|| {
                for layer in &layers {
                    for (weight, input) in layer.iter().zip([&x, &x, &x, &y]) {
                        let _ = input.f_linear(weight, None::<&Tensor>)?;
                    }
                }
                Ok(())
            });
            let measured = measured.map(|ms| {
                json!({
                    "ms": ms,
                    "ms_of_all_layers": ms * self.config.num_hidden_layers as f64 / LAYERS as f64,
                    "gb_per_second": bytes / ms / 1e6,
                })
            });
            self.row("products", json!({"rows": rows, "layers": LAYERS}), measured)?;
        }
        Ok(())
    }

    /// The widest product of a layer with weights in each kind that libtorch has kernels for.
    pub(super) fn narrow_weights(&self) -> anyhow::Result<()> {
        if self.device == Device::Cpu {
            self.findings.skip(
                "weights in int4, int8, fp8",
                "the kernels in question are those of CUDA",
            );
            return Ok(());
        }
        let (inputs, outputs) = (self.config.hidden_size, 2 * self.config.intermediate_size);
        let options = |kind| (kind, self.device);
        let wide = self.random(&[outputs, inputs])?;
        for rows in [2, 32] {
            let x = self.random(&[rows, inputs])?;
            let row = |kind: &str| json!({"weights": kind, "rows": rows});
            let ms = |ms: f64| json!({"ms": ms});
            let measured = self.ms(|| Ok(x.f_linear(&wide, None::<&Tensor>)?));
            self.row("narrow_weights", row("bf16"), measured.map(ms))?;
            let int4 = || -> anyhow::Result<f64> {
                let packed = Tensor::f_randint_low(0, 255, [outputs, inputs / 2], options(Kind::Uint8))?;
                let weight = packed.f_internal_convert_weight_to_int4pack(8)?;
                let scales = Tensor::f_rand([inputs / 128, outputs, 2], options(Kind::BFloat16))?;
                self.ms(|| Ok(x.f_internal_weight_int4pack_mm(&weight, 128, &scales)?))
            };
            self.row("narrow_weights", row("int4"), int4().map(ms))?;
            let int8 = || -> anyhow::Result<f64> {
                let weight = Tensor::f_randint_low(-127, 127, [outputs, inputs], options(Kind::Int8))?;
                let scales = Tensor::f_rand([outputs], options(Kind::Float))?;
                let x = x.f_to_kind(Kind::Float)?;
                self.ms(|| Ok(x.f_internal_weight_int8pack_mm(&weight, &scales)?))
            };
            self.row("narrow_weights", row("int8"), int8().map(ms))?;
            let fp8 = || -> anyhow::Result<f64> {
                let (a, b) = (
                    x.f_to_kind(Kind::Float8e4m3fn)?,
                    wide.f_to_kind(Kind::Float8e4m3fn)?.f_transpose(0, 1)?,
                );
                let one = Tensor::f_ones(&[] as &[i64], options(Kind::Float))?;
                self.ms(|| {
                    let none = None::<&Tensor>;
                    Ok(a.f_internal_scaled_mm(&b, &one, &one, none, none, Kind::BFloat16, false)?)
                })
            };
            self.row("narrow_weights", row("fp8"), fp8().map(ms))?;
        }
        Ok(())
    }

    /// The image tokenizer's widest convolution, by size of the image and kind.
    pub(super) fn convolutions(&self) -> anyhow::Result<()> {
        let sizes = if self.small { [64, 96, 128] } else { [512, 768, 1024] };
        let channels = if self.small { 16 } else { 128 };
        let cuda = self.device != Device::Cpu;
        let kinds: &[(&str, Kind, bool)] = match cuda {
            true => &[
                ("f32", Kind::Float, false),
                ("tf32", Kind::Float, true),
                ("bf16", Kind::BFloat16, false),
            ],
            false => &[("f32", Kind::Float, false)],
        };
        for side in sizes {
            for &(name, kind, tf32) in kinds {
                accelerator::set_tf32(tf32)?;
                let measured = (|| -> anyhow::Result<f64> {
                    let image = Tensor::f_randn([1, channels, side, side], (kind, self.device))?;
                    let filter = Tensor::f_randn([channels, channels, 3, 3], (kind, self.device))?;
                    let convolve = || {
                        let none = None::<&Tensor>;
                        Ok(image.f_conv2d(&filter, none, [1, 1], [1, 1], [1, 1], 1)?)
                    };
                    self.ms(convolve)
                })();
                accelerator::set_tf32(self.tf32)?;
                let flops = (2 * channels * channels * 9 * side * side) as f64;
                let measured = measured.map(|ms| json!({"ms": ms, "tflops": flops / ms / 1e9}));
                self.row("convolutions", json!({"side": side, "kind": name}), measured)?;
            }
        }
        Ok(())
    }
}
