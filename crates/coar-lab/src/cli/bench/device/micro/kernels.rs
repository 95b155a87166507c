//! Attention of one query at the model's real shapes: libtorch's kernels by name, and by row lengths.

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::super::workload::timed;
use super::Micro;

/// Number of caches that are read in rotation, to defeat the device's own cache.
const SETS: usize = 4;
/// Maximum relative difference of a kernel from the explicit form.
const APART: f64 = 2e-2;

/// Query `[rows, heads, 1, head_dim]`, caches `[rows, heads, length, head_dim]`, additive mask `[rows, heads, 1, length]`.
struct Inputs {
    query: Tensor,
    sets: Vec<(Tensor, Tensor)>,
    mask: Tensor,
    scale: f64,
}

type Kernel = fn(&Inputs, &(Tensor, Tensor)) -> anyhow::Result<Tensor>;

const EXPLICIT: &str = "explicit";
const KERNELS: [(&str, Kernel); 3] = [
    (EXPLICIT, explicit),
    ("efficient", efficient),
    ("as libtorch chooses", chosen),
];

fn explicit(inputs: &Inputs, (key, value): &(Tensor, Tensor)) -> anyhow::Result<Tensor> {
    let scores = inputs
        .query
        .f_mul_scalar(inputs.scale)?
        .f_matmul(&key.f_transpose(2, 3)?)?;
    let weights = scores.f_add(&inputs.mask)?.f_softmax(-1, Kind::Float)?;
    Ok(weights.f_to_kind(value.kind())?.f_matmul(value)?)
}

fn efficient(inputs: &Inputs, (key, value): &(Tensor, Tensor)) -> anyhow::Result<Tensor> {
    let (mixed, ..) = Tensor::f_internal_scaled_dot_product_efficient_attention(
        &inputs.query,
        key,
        value,
        Some(&inputs.mask),
        false,
        0.0,
        false,
        inputs.scale,
    )?;
    Ok(mixed)
}

fn chosen(inputs: &Inputs, (key, value): &(Tensor, Tensor)) -> anyhow::Result<Tensor> {
    Ok(Tensor::f_scaled_dot_product_attention(
        &inputs.query,
        key,
        value,
        Some(&inputs.mask),
        0.0,
        false,
        inputs.scale,
        false,
    )?)
}

impl Micro<'_> {
    fn inputs(&self, rows: i64, length: i64, sets: usize) -> anyhow::Result<Inputs> {
        let (heads, width) = (self.config.num_attention_heads, self.config.head_dim());
        let shape = [rows, heads, length, width];
        Ok(Inputs {
            query: self.random(&[rows, heads, 1, width])?,
            sets: (0..sets)
                .map(|_| Ok((self.random(&shape)?, self.random(&shape)?)))
                .collect::<anyhow::Result<_>>()?,
            mask: Tensor::f_zeros([rows, 1, 1, length], (self.kind, self.device))?
                .f_expand([rows, heads, 1, length], false)?,
            scale: 1.0 / (width as f64).sqrt(),
        })
    }

    /// Milliseconds of a layer's attention by kernel, with the first call separate, and whether the result equals
    /// the explicit form's.
    pub(super) fn attention(&self) -> anyhow::Result<()> {
        let shapes: &[(i64, i64)] = match self.small {
            true => &[(2, 48), (8, 160)],
            false => &[(2, 1104), (2, 2400), (32, 1104), (32, 2400)],
        };
        for &(rows, length) in shapes {
            let inputs = self.inputs(rows, length, SETS)?;
            let bytes = (2 * inputs.sets[0].0.numel() * self.kind.elt_size_in_bytes()) as f64;
            let expected = explicit(&inputs, &inputs.sets[0])?;
            for (name, kernel) in KERNELS {
                if name == "efficient" && self.device == Device::Cpu {
                    continue;
                }
                let mut turn = 0;
                let measured = (|| -> anyhow::Result<serde_json::Value> {
                    let first = timed(self.device, || kernel(&inputs, &inputs.sets[1]))?;
                    let ms = self.ms(|| {
                        turn += 1;
                        kernel(&inputs, &inputs.sets[turn % SETS])
                    })?;
                    if name != EXPLICIT {
                        let apart = apart(&kernel(&inputs, &inputs.sets[0])?, &expected)?;
                        let check = format!("attention {name}, {rows} rows of {length}, relative to the explicit form");
                        self.findings.check(check, apart, APART);
                    }
                    Ok(json!({"first_ms": 1e3 * first.wall, "ms": ms, "gb_per_second": bytes / ms / 1e6}))
                })();
                self.row(
                    "attention",
                    json!({"kernel": name, "rows": rows, "length": length}),
                    measured,
                )?;
            }
        }
        // The cost of a new length: visible with a kernel that is planned for each shape.
        for length in [1200, 1216, 1232, 1248].map(|length| if self.small { length / 16 } else { length }) {
            let inputs = self.inputs(2, length, 1)?;
            for (name, kernel) in KERNELS {
                if name == "efficient" && self.device == Device::Cpu {
                    continue;
                }
                let measured = timed(self.device, || kernel(&inputs, &inputs.sets[0]));
                let measured = measured.map(|spent| json!({"ms": 1e3 * spent.wall}));
                self.row("new_length", json!({"kernel": name, "length": length}), measured)?;
            }
        }
        Ok(())
    }
}

/// Norm of the difference, relative to the norm.
fn apart(found: &Tensor, expected: &Tensor) -> anyhow::Result<f64> {
    let wide = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
    let norm = |tensor: &Tensor| tensor.f_norm()?.f_double_value(&[]);
    let expected = wide(expected)?;
    Ok(norm(&wide(found)?.f_sub(&expected)?)? / norm(&expected)?)
}
