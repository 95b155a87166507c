//! AdamW, and Muon for matrices, over named parameters; their state can be saved and restored exactly.

use tch::{Kind, Tensor};

use crate::model::ModelError;

/// Which rule moves a parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW { weight_decay: f64 },
    /// Momentum, orthogonalised by Newton-Schulz iterations (Jordan 2024), scaled to AdamW's typical step
    /// (Moonlight, arXiv 2502.16982); for weight matrices of hidden layers.
    Muon { weight_decay: f64 },
}

/// A trainable tensor, its rule, and its share of the learning rate.
#[derive(Debug)]
pub struct Parameter {
    pub name: String,
    /// A leaf that requires gradients.
    pub tensor: Tensor,
    pub rule: Rule,
}

/// Moments of every parameter and the number of steps taken.
#[derive(Debug)]
pub struct Optimizer {
    parameters: Vec<Parameter>,
    first: Vec<Tensor>,
    second: Vec<Option<Tensor>>,
    step: i64,
    betas: (f64, f64),
}

const EPS: f64 = 1e-8;
const MUON_MOMENTUM: f64 = 0.95;
const MUON_RMS: f64 = 0.2;

impl Optimizer {
    /// Fresh moments for `parameters`.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn new(parameters: Vec<Parameter>, betas: (f64, f64)) -> Result<Self, ModelError> {
        let first = parameters
            .iter()
            .map(|p| p.tensor.detach().f_zeros_like())
            .collect::<Result<_, _>>()?;
        let second = parameters
            .iter()
            .map(|p| match p.rule {
                Rule::AdamW { .. } => p.tensor.detach().f_zeros_like().map(Some),
                Rule::Muon { .. } => Ok(None),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            parameters,
            first,
            second,
            step: 0,
            betas,
        })
    }

    /// Steps taken.
    pub fn steps(&self) -> i64 {
        self.step
    }

    /// The trained tensors.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Scales all gradients down where their joint norm exceeds `limit`; returns the norm.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clip(&self, limit: f64) -> Result<f64, ModelError> {
        let mut total = 0.0;
        for parameter in &self.parameters {
            let grad = parameter.tensor.f_grad()?;
            if grad.defined() {
                total += grad.f_square()?.f_sum(Kind::Float)?.f_double_value(&[])?;
            }
        }
        let norm = total.sqrt();
        if norm > limit {
            for parameter in &self.parameters {
                let mut grad = parameter.tensor.f_grad()?;
                if grad.defined() {
                    let _ = grad.f_mul_scalar_(limit / norm)?;
                }
            }
        }
        Ok(norm)
    }

    /// One step along the gradients, which are cleared.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), ModelError> {
        self.step += 1;
        tch::no_grad(|| {
            for index in 0..self.parameters.len() {
                let parameter = &self.parameters[index];
                let mut tensor = parameter.tensor.shallow_clone();
                let mut grad = tensor.f_grad()?;
                if !grad.defined() {
                    continue;
                }
                let weight_decay = match parameter.rule {
                    Rule::AdamW { weight_decay } | Rule::Muon { weight_decay } => weight_decay,
                };
                if weight_decay > 0.0 {
                    let _ = tensor.f_mul_scalar_(1.0 - learning_rate * weight_decay)?;
                }
                match &mut self.second[index] {
                    Some(second) => {
                        let (b1, b2) = self.betas;
                        let _ = self.first[index].f_lerp_(&grad, 1.0 - b1)?;
                        let _ = second.f_mul_scalar_(b2)?.f_addcmul_(&(&grad * (1.0 - b2)), &grad)?;
                        let c1 = 1.0 - b1.powi(self.step as i32);
                        let c2 = 1.0 - b2.powi(self.step as i32);
                        let scale = second.f_sqrt()?.f_div_scalar(c2.sqrt())?.f_add_scalar(EPS)?;
                        let _ = tensor.f_add_(&self.first[index].f_div(&scale)?.f_mul_scalar(-learning_rate / c1)?)?;
                    }
                    None => {
                        let _ = self.first[index].f_lerp_(&grad, 1.0 - MUON_MOMENTUM)?;
                        let nesterov = grad.f_lerp(&self.first[index], MUON_MOMENTUM)?;
                        let size = nesterov.size();
                        let scale = MUON_RMS * (size[0].max(size[1]) as f64).sqrt();
                        let update = orthogonalise(&nesterov)?.f_mul_scalar(-learning_rate * scale)?;
                        let _ = tensor.f_add_(&update)?;
                    }
                }
                let _ = grad.f_zero_()?;
            }
            Ok(())
        })
    }

    /// Moments by name, to be saved beside the parameters.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("optimizer.step".to_owned(), Tensor::from_slice(&[self.step]))];
        for (index, parameter) in self.parameters.iter().enumerate() {
            state.push((
                format!("optimizer.first.{}", parameter.name),
                self.first[index].shallow_clone(),
            ));
            if let Some(second) = &self.second[index] {
                state.push((format!("optimizer.second.{}", parameter.name), second.shallow_clone()));
            }
        }
        state
    }

    /// Takes over what [`Self::state`] gave.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn restore(&mut self, saved: &dyn Fn(&str) -> Option<Tensor>) -> Result<(), ModelError> {
        let take = |name: &str| saved(name).ok_or_else(|| ModelError::invalid("checkpoint", format!("lacks `{name}`")));
        self.step = take("optimizer.step")?.f_int64_value(&[0])?;
        for (index, parameter) in self.parameters.iter().enumerate() {
            self.first[index].f_copy_(&take(&format!("optimizer.first.{}", parameter.name))?)?;
            if let Some(second) = &mut self.second[index] {
                second.f_copy_(&take(&format!("optimizer.second.{}", parameter.name))?)?;
            }
        }
        Ok(())
    }
}

/// The nearest semi-orthogonal matrix, about, by five quintic Newton-Schulz iterations.
fn orthogonalise(matrix: &Tensor) -> Result<Tensor, ModelError> {
    let (a, b, c) = (3.4445, -4.7750, 2.0315);
    let tall = matrix.size()[0] > matrix.size()[1];
    let mut x = if tall {
        matrix.f_transpose(0, 1)?
    } else {
        matrix.shallow_clone()
    };
    // The iteration only has to bring singular values near one: half the digits are enough and twice as fast.
    x = x.f_div(&x.f_norm()?.f_add_scalar(1e-7)?)?.f_to_kind(Kind::BFloat16)?;
    for _ in 0..5 {
        let square = x.f_matmul(&x.f_transpose(0, 1)?)?;
        let inner = square
            .f_mul_scalar(b)?
            .f_add(&square.f_matmul(&square)?.f_mul_scalar(c)?)?;
        x = x.f_mul_scalar(a)?.f_add(&inner.f_matmul(&x)?)?;
    }
    let x = x.f_to_kind(matrix.kind())?;
    Ok(if tall { x.f_transpose(0, 1)? } else { x })
}
/// Steps over which a learning rate rises from nothing.
const WARM_UP: f64 = 10.0;
/// Share of the rate that the last steps have.
const LAST_RATE: f64 = 0.05;

/// The learning rate of a step, counted from 0: it rises over the first steps and, with `decay`, falls linearly over the
/// second half.
pub(super) fn scheduled_rate(rate: f64, step: f64, steps: f64, decay: bool) -> f64 {
    let warm_up = ((step + 1.0) / WARM_UP).min(1.0);
    let falling = match decay && step > 0.5 * steps {
        true => ((steps - step) / (0.5 * steps)).max(LAST_RATE),
        false => 1.0,
    };
    rate * warm_up * falling
}
