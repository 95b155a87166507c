//! AdamW, and Muon for matrices, over named parameters; their state can be saved and restored exactly.

use tch::{Device, Kind, Tensor};

use crate::model::accelerator::AdamW;
use crate::model::{ModelError, accelerator};

/// The update rule of a parameter.
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
    /// On an accelerator, where launching a kernel costs more than its work: parameters that are updated together.
    groups: Option<Groups>,
}

#[derive(Debug)]
struct Groups {
    /// Parameters of AdamW, by weight decay.
    adam: Vec<(f64, Vec<usize>)>,
    /// Parameters of Muon, by shape and weight decay.
    muon: Vec<Stack>,
    /// The number of the last step, a scalar in f32 on the device.
    step: Tensor,
}

/// Matrices of one shape.
#[derive(Debug)]
struct Stack {
    members: Vec<usize>,
    weight_decay: f64,
    /// `[members, rows, columns]`: momentum; each member's is a view of it.
    first: Tensor,
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
        let mut own = Self {
            parameters,
            first,
            second,
            step: 0,
            betas,
            groups: None,
        };
        let device = own.parameters.first().map(|parameter| parameter.tensor.device());
        if device.is_some_and(|device| device != Device::Cpu) {
            own.group()?;
        }
        Ok(own)
    }

    /// Updates parameters together from now on.
    fn group(&mut self) -> Result<(), ModelError> {
        let (mut adam, mut stacks): (Vec<(f64, Vec<usize>)>, Vec<Stack>) = (vec![], vec![]);
        for (index, parameter) in self.parameters.iter().enumerate() {
            match parameter.rule {
                Rule::AdamW { weight_decay } => match adam.iter_mut().find(|(decay, _)| *decay == weight_decay) {
                    Some((_, members)) => members.push(index),
                    None => adam.push((weight_decay, vec![index])),
                },
                Rule::Muon { weight_decay } => {
                    let size = parameter.tensor.size();
                    let alike = |stack: &&mut Stack| {
                        stack.weight_decay == weight_decay && self.parameters[stack.members[0]].tensor.size() == size
                    };
                    match stacks.iter_mut().find(alike) {
                        Some(stack) => stack.members.push(index),
                        None => stacks.push(Stack {
                            members: vec![index],
                            weight_decay,
                            first: self.first[index].shallow_clone(),
                        }),
                    }
                }
            }
        }
        for stack in &mut stacks {
            let own: Vec<_> = stack.members.iter().map(|&index| &self.first[index]).collect();
            stack.first = Tensor::f_stack(&own, 0)?;
            for (place, &index) in (0..).zip(&stack.members) {
                self.first[index] = stack.first.f_get(place)?;
            }
        }
        let device = self.first.first().map_or(Device::Cpu, Tensor::device);
        self.groups = Some(Groups {
            adam,
            muon: stacks,
            step: Tensor::f_zeros([] as [i64; 0], (Kind::Float, device))?,
        });
        Ok(())
    }

    fn step_grouped(&mut self, learning_rate: f64) -> Result<(), ModelError> {
        let Some(groups) = &mut self.groups else {
            return Ok(());
        };
        let _ = groups.step.f_fill_(self.step as f64)?;
        let gradient = |index: usize| Ok::<_, ModelError>(self.parameters[index].tensor.f_grad()?);
        for (weight_decay, members) in &groups.adam {
            let (mut used, mut gradients) = (vec![], vec![]);
            for &index in members {
                let grad = gradient(index)?;
                if grad.defined() {
                    used.push(index);
                    gradients.push(grad);
                }
            }
            let own: Vec<&Tensor> = used.iter().map(|&index| &self.parameters[index].tensor).collect();
            let first: Vec<&Tensor> = used.iter().map(|&index| &self.first[index]).collect();
            let second: Vec<&Tensor> = used.iter().filter_map(|&index| self.second[index].as_ref()).collect();
            let rule = AdamW {
                rate: learning_rate,
                betas: self.betas,
                weight_decay: *weight_decay,
                eps: EPS,
            };
            if !used.is_empty() {
                rule.step((&own, &gradients), (&first, &second), &groups.step)?;
                accelerator::zero(&gradients)?;
            }
        }
        for stack in &mut groups.muon {
            let gradients = stack
                .members
                .iter()
                .map(|&index| gradient(index))
                .collect::<Result<Vec<_>, _>>()?;
            if gradients.iter().any(|grad| !grad.defined()) {
                continue;
            }
            let grad = Tensor::f_stack(&gradients, 0)?;
            let _ = stack.first.f_lerp_(&grad, 1.0 - MUON_MOMENTUM)?;
            let nesterov = grad.f_lerp(&stack.first, MUON_MOMENTUM)?;
            let size = nesterov.size();
            let scale = MUON_RMS * (size[1].max(size[2]) as f64).sqrt();
            let update = orthogonalise(&nesterov)?.f_mul_scalar(-learning_rate * scale)?;
            for (place, &index) in (0..).zip(&stack.members) {
                let mut tensor = self.parameters[index].tensor.shallow_clone();
                if stack.weight_decay > 0.0 {
                    let _ = tensor.f_mul_scalar_(1.0 - learning_rate * stack.weight_decay)?;
                }
                let _ = tensor.f_add_(&update.f_get(place)?)?;
            }
            accelerator::zero(&gradients)?;
        }
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> i64 {
        self.step
    }

    /// The trained tensors.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Scales all gradients down if their joint norm exceeds `limit`; returns the norm.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clip(&self, limit: f64) -> Result<f64, ModelError> {
        let gradients = self.gradients()?;
        let sums = gradients
            .iter()
            .map(|grad| Ok(grad.f_square()?.f_sum(Kind::Float)?))
            .collect::<Result<Vec<_>, ModelError>>()?;
        if sums.is_empty() {
            return Ok(0.0);
        }
        // One read for all: each read synchronises with the device.
        let sums = Vec::<f32>::try_from(&Tensor::f_stack(&sums, 0)?)?;
        let norm = sums.into_iter().map(f64::from).sum::<f64>().sqrt();
        if norm > limit {
            for mut grad in gradients {
                let _ = grad.f_mul_scalar_(limit / norm)?;
            }
        }
        Ok(norm)
    }

    /// As [`Self::clip`], but computes the factor on the device, in f32, without synchronising.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clip_on_device(&self, limit: f64) -> Result<(), ModelError> {
        accelerator::clip(&self.gradients()?, limit)
    }

    /// The existing gradients.
    fn gradients(&self) -> Result<Vec<Tensor>, ModelError> {
        let gradients = self.parameters.iter().map(|parameter| Ok(parameter.tensor.f_grad()?));
        gradients
            .filter(|grad: &Result<Tensor, ModelError>| grad.as_ref().map_or(true, Tensor::defined))
            .collect()
    }

    /// One step along the gradients, which are cleared.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), ModelError> {
        self.step += 1;
        if self.groups.is_some() {
            return tch::no_grad(|| self.step_grouped(learning_rate));
        }
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

    /// Continues to count steps from `steps`, with fresh moments.
    pub fn continue_from(&mut self, steps: i64) {
        self.step = steps;
    }

    /// Restores the result of [`Self::state`].
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

/// Approximates the nearest semi-orthogonal matrices of `[.., rows, columns]` by five quintic Newton-Schulz
/// iterations.
fn orthogonalise(matrices: &Tensor) -> Result<Tensor, ModelError> {
    let (a, b, c) = (3.4445, -4.7750, 2.0315);
    let size = matrices.size();
    let tall = size[size.len() - 2] > size[size.len() - 1];
    let mut x = if tall {
        matrices.f_transpose(-2, -1)?
    } else {
        matrices.shallow_clone()
    };
    let norm = match size.len() {
        2 => x.f_norm()?,
        _ => x.f_norm_scalaropt_dim(2.0, [-2i64, -1].as_slice(), true)?,
    };
    // The iteration only has to bring singular values near one: half the digits are enough and twice as fast.
    x = x.f_div(&norm.f_add_scalar(1e-7)?)?.f_to_kind(Kind::BFloat16)?;
    for _ in 0..5 {
        let square = x.f_matmul(&x.f_transpose(-2, -1)?)?;
        let inner = square
            .f_mul_scalar(b)?
            .f_add(&square.f_matmul(&square)?.f_mul_scalar(c)?)?;
        x = x.f_mul_scalar(a)?.f_add(&inner.f_matmul(&x)?)?;
    }
    let x = x.f_to_kind(matrices.kind())?;
    Ok(if tall { x.f_transpose(-2, -1)? } else { x })
}

/// Warm-up steps of the learning rate.
const WARM_UP: f64 = 10.0;
/// Share of the rate in the last steps.
const LAST_RATE: f64 = 0.05;

/// The learning rate of a step, counted from 0: it rises over the first steps and, with `decay`, falls linearly over
/// the second half.
pub fn scheduled_rate(rate: f64, step: f64, steps: f64, decay: bool) -> f64 {
    let warm_up = ((step + 1.0) / WARM_UP).min(1.0);
    let falling = match decay && step > 0.5 * steps {
        true => ((steps - step) / (0.5 * steps)).max(LAST_RATE),
        false => 1.0,
    };
    rate * warm_up * falling
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two matrices of one shape and a tall one under Muon, a vector and a matrix under AdamW, one without a gradient.
    fn some() -> Vec<Parameter> {
        let parameter = |name: &str, shape: &[i64], rule| {
            let count: i64 = shape.iter().product();
            let values = Tensor::arange(count, (Kind::Float, Device::Cpu));
            Parameter {
                name: name.to_owned(),
                tensor: (values * 0.7 + name.len() as f64)
                    .sin()
                    .view(shape)
                    .set_requires_grad(true),
                rule,
            }
        };
        let (muon, adam) = (Rule::Muon { weight_decay: 0.05 }, Rule::AdamW { weight_decay: 1e-2 });
        vec![
            parameter("a", &[6, 8], muon),
            parameter("bb", &[6, 8], muon),
            parameter("ccc", &[9, 4], muon),
            parameter("dddd", &[11], adam),
            parameter("eeeee", &[3, 5], Rule::AdamW { weight_decay: 0.0 }),
            parameter("unused", &[4], adam),
        ]
    }

    fn descend(optimizer: &mut Optimizer) {
        for step in 0..4 {
            let mut loss = Tensor::from(0.0f32);
            for parameter in optimizer
                .parameters
                .iter()
                .filter(|parameter| parameter.name != "unused")
            {
                loss += (&parameter.tensor + f64::from(step) * 0.1).square().sum(Kind::Float) * 3.0;
            }
            loss.backward();
            optimizer.clip_on_device(1.0).unwrap();
            optimizer.step(0.05).unwrap();
        }
    }

    #[test]
    fn grouped_updates_equal_single_updates() {
        let mut single = Optimizer::new(some(), (0.9, 0.95)).unwrap();
        let mut grouped = Optimizer::new(some(), (0.9, 0.95)).unwrap();
        grouped.group().unwrap();
        descend(&mut single);
        descend(&mut grouped);
        for ((name, a), (_, b)) in single.state().iter().zip(grouped.state()) {
            let difference = f64::try_from((a - b).abs().max()).unwrap();
            assert!(difference < 1e-5, "{name}: {difference}");
        }
        let before = some();
        for ((a, b), before) in single.parameters.iter().zip(&grouped.parameters).zip(&before) {
            // Muon rounds to half the digits.
            let difference = f64::try_from((&a.tensor - &b.tensor).abs().max()).unwrap();
            assert!(difference < 2e-3, "{}: {difference}", a.name);
            let moved = f64::try_from((&a.tensor - &before.tensor).abs().max()).unwrap();
            assert_eq!(moved > 0.05, a.name != "unused", "{}: {moved}", a.name);
        }
        // The saved state of one is restored in the other.
        let state: std::collections::BTreeMap<_, _> = single
            .state()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.copy()))
            .collect();
        grouped
            .restore(&|name| state.get(name).map(Tensor::shallow_clone))
            .unwrap();
        let stacked = grouped.groups.as_ref().unwrap().muon[0].first.get(1);
        assert_eq!(stacked, state["optimizer.first.bb"]);
    }

    #[test]
    fn clipping_agrees_on_host_and_device() {
        for (limit, clipped) in [(1.0, true), (1e4, false)] {
            let (host, device) = (
                Optimizer::new(some(), (0.9, 0.95)).unwrap(),
                Optimizer::new(some(), (0.9, 0.95)).unwrap(),
            );
            for optimizer in [&host, &device] {
                for parameter in &optimizer.parameters[..5] {
                    parameter.tensor.square().sum(Kind::Float).backward();
                }
            }
            let norm = host.clip(limit).unwrap();
            device.clip_on_device(limit).unwrap();
            assert_eq!(norm > limit, clipped);
            for (a, b) in host.gradients().unwrap().iter().zip(device.gradients().unwrap()) {
                assert!(a.allclose(&b, 1e-5, 1e-7, false));
            }
            assert!(host.clip(f64::INFINITY).unwrap() <= limit * 1.001);
        }
    }
}
