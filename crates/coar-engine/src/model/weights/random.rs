//! Random weights: for measurements, where only shapes matter.

use std::hash::{DefaultHasher, Hash, Hasher};

use tch::Tensor;

use super::{Target, TensorSource};
use crate::model::ModelError;

/// Standard deviation of a matrix's numbers times the square root of its inputs.
const GAIN: f64 = 1.7;

/// Seeded random weights, generated on the target device in the target's kind, without a file and without the host.
///
/// Matrices and filters are normal numbers times `1.7 / sqrt(n)`, n the inputs of one output; weights of norms are 1
/// and biases 0. A tensor depends on the seed, its name, its shape and the device's generator.
///
/// It reseeds libtorch's generators for every tensor, so nothing else in the process may rely on their state.
#[derive(Debug, Clone, Copy)]
pub struct RandomWeights {
    pub seed: u64,
    pub target: Target,
}

impl TensorSource for RandomWeights {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let options = (self.target.kind, self.target.device);
        if name.ends_with(".bias") {
            return Ok(Tensor::f_zeros(shape, options)?);
        }
        if name.contains("norm") {
            return Ok(Tensor::f_ones(shape, options)?);
        }
        let mut hash = DefaultHasher::new();
        (self.seed, name).hash(&mut hash);
        tch::manual_seed(hash.finish() as i64);
        let inputs = shape.iter().skip(1).product::<i64>().max(1);
        let mut numbers = Tensor::f_randn(shape, options)?;
        let _ = numbers.f_mul_scalar_(GAIN / (inputs as f64).sqrt())?;
        Ok(numbers)
    }

    fn shape_of(&self, _name: &str) -> Option<Vec<i64>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn weights_depend_on_seed_and_name_and_have_the_right_spread() {
        let source = |seed| RandomWeights {
            seed,
            target: Target {
                kind: Kind::Float,
                device: Device::Cpu,
            },
        };
        let numbers = |seed, name| source(seed).tensor(name, &[64, 256]).unwrap();
        let one = numbers(1, "a.weight");
        assert_eq!(one, numbers(1, "a.weight"));
        assert_ne!(one, numbers(2, "a.weight"));
        assert_ne!(one, numbers(1, "b.weight"));
        let spread = one.std(false).double_value(&[]);
        assert!((spread - 1.7 / 16.0).abs() < 0.005, "{spread}");
        assert_eq!(
            numbers(1, "a.norm.weight"),
            Tensor::ones([64, 256], (Kind::Float, Device::Cpu))
        );
        assert_eq!(
            numbers(1, "a.bias"),
            Tensor::zeros([64, 256], (Kind::Float, Device::Cpu))
        );
    }
}
