//! Gradients of concepts through the whole transformer, with every layer kept and with layers recomputed.

use tch::{Device, Kind, Tensor};

use super::super::report::Findings;
use super::Mode;
use super::numbers::relative;
use super::sequences::Sequences;
use coar_engine::model::{ModelError, Transformer};
use coar_engine::training::next_token;

/// How the layers are traversed.
#[derive(Debug, Clone, Copy)]
enum Pass {
    Whole,
    Segments { layers: usize, keeps_graph: bool },
}

/// A loss and its gradients by name, on the CPU.
struct Carried {
    loss: f64,
    gradients: Vec<(String, Tensor)>,
}

/// The next-token loss of both rows with both concepts, backpropagated to the concepts.
fn carry(model: &Transformer, sequences: &Sequences, pass: Pass) -> Result<Carried, ModelError> {
    tch::with_grad(|| {
        let device = model.device();
        let concepts = sequences.upload(device, true)?;
        let context = sequences.context(&concepts, true, device)?;
        let ids = sequences.whole(device)?;
        let at = Tensor::f_from_slice(&sequences.predicted())?.f_to_device(device)?;
        let targets = Tensor::f_from_slice(&sequences.targets())?.f_to_device(device)?;
        let loss_of = |hidden: &Tensor| {
            let width = hidden.size()[2];
            let logits = model.logits(&hidden.f_reshape([-1, width])?.f_index_select(0, &at)?)?;
            next_token(&logits, &targets)
        };
        let loss = match pass {
            Pass::Whole => {
                let loss = loss_of(&model.forward(&ids, Some(&context))?)?;
                loss.f_backward()?;
                loss
            }
            Pass::Segments { layers, keeps_graph } => {
                let mut pass = model.segmented(&ids, &context, (layers, keeps_graph))?;
                while !pass.forward(model)? {}
                let loss = loss_of(&pass.hidden(model)?)?;
                loss.f_backward()?;
                while !pass.backward(model)? {}
                pass.into_term()?.f_backward()?;
                loss
            }
        };
        let mut gradients = vec![];
        for (index, concept) in concepts.iter().enumerate() {
            for (which, leaf) in [("text", &concept.text), ("image", &concept.image)] {
                let gradient = leaf.f_grad()?;
                if !gradient.defined() {
                    return Err(ModelError::invalid(
                        "loss",
                        format!("has no gradient at {which} {index}"),
                    ));
                }
                gradients.push((
                    format!("{which} {index}"),
                    gradient.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?,
                ));
            }
        }
        Ok(Carried {
            loss: loss.f_double_value(&[])?,
            gradients,
        })
    })
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&Transformer, &Transformer),
    sequences: &Sequences,
) -> anyhow::Result<()> {
    let expected = carry(reference, sequences, Pass::Whole)?;
    let segments = |layers, keeps_graph| Pass::Segments { layers, keeps_graph };
    for (what, pass) in [
        ("", Pass::Whole),
        (" in segments", segments(2, true)),
        (", 1 layer recomputed at a time", segments(1, false)),
        (", 3 layers recomputed at a time", segments(3, false)),
    ] {
        let name = format!("{label}: gradients{what}");
        findings.attempt(&name, || {
            let found = carry(device, sequences, pass)?;
            let loss = (found.loss / expected.loss - 1.0).abs();
            findings.check(format!("{name}, loss"), loss, mode.relative);
            for ((which, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
                findings.check(format!("{name}, {which}"), relative(found, expected)?, mode.gradient);
            }
            Ok(())
        })?;
    }
    Ok(())
}
