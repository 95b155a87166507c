//! Writes the trained stages as a checkpoint folder in the layout of the real ones, which every other command reads.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::run::{State, saved_recipe, saved_state};
use super::tokenizer::TrainedTokenizer;
use super::transformer::{TransformerRecipe, transformer_config};
use crate::pocket::designers::words;
use crate::pocket::parameters::{Parameters, save};
use crate::pocket::vocabulary::tokenizer_of;
use coar_engine::model::{ModelError, Transformer, Vqgan};

/// Writes `config.json`, `model.safetensors`, `text_tokenizer.json`, `vqgan.yaml` and `vqgan.safetensors` to `out`: the
/// transformer saved in `transformer`, and the tokenizer saved in `tokenizer`. Weights are rounded to f16.
///
/// # Errors
/// When a stage has no saved state, the transformer was trained on other codes, or a file cannot be written.
pub fn export(transformer: &Path, tokenizer: &Path, out: &Path) -> Result<(), ModelError> {
    let recipe: TransformerRecipe = saved_recipe(transformer)?;
    let tokenizer = TrainedTokenizer::open(tokenizer)?;
    let network = &tokenizer.network;
    let config = transformer_config(&recipe, network.n_embed);
    if tokenizer.steps != recipe.tokenizer_steps {
        return Err(ModelError::invalid(
            "tokenizer",
            format!(
                "has the codes of step {}; the transformer was trained on those of step {}",
                tokenizer.steps, recipe.tokenizer_steps
            ),
        ));
    }
    std::fs::create_dir_all(out).map_err(|error| ModelError::file(out, error))?;
    let text = |name: &str, text: String| {
        let file = out.join(name);
        std::fs::write(&file, text).map_err(|error| ModelError::file(file, error))
    };
    let config_json =
        serde_json::to_value(&config).map_err(|error| ModelError::invalid("config", error.to_string()))?;
    text("config.json", format!("{config_json}\n"))?;
    let vocabulary = tokenizer_of(network.n_embed, &words());
    text("text_tokenizer.json", format!("{vocabulary}\n"))?;
    text("vqgan.yaml", network.to_yaml()?)?;

    let parameters = Parameters::default();
    Transformer::load(&config, &parameters)?;
    write(&parameters, &saved_state(transformer)?, &out.join("model.safetensors"))?;
    let parameters = Parameters::default();
    Vqgan::load(network, &parameters)?;
    write(&parameters, &tokenizer.state, &out.join("vqgan.safetensors"))
}

fn write(parameters: &Parameters, state: &State, file: &Path) -> Result<(), ModelError> {
    parameters.restore(&|name| state.get(name).map(Tensor::shallow_clone))?;
    let halved: Vec<_> = parameters
        .all()
        .into_iter()
        .map(|(name, tensor)| {
            Ok((
                name,
                tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?,
            ))
        })
        .collect::<Result<_, ModelError>>()?;
    save(file, &halved)
}

#[cfg(test)]
mod tests {
    use super::super::run::{Budget, Run};
    use super::super::tokenizer::tokenizer_config;
    use super::*;

    /// A stage's folder with random weights.
    fn stage(dir: &Path, recipe: &impl serde::Serialize, parameters: &Parameters, step: i64) {
        let (mut run, _) = Run::open(dir, recipe, Budget::default()).unwrap();
        let mut state = parameters.all();
        state.push(("optimizer.step".to_owned(), Tensor::from_slice(&[step])));
        run.save(state).unwrap();
    }

    #[test]
    fn exported_checkpoint_is_complete_and_has_the_same_codes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let recipe = TransformerRecipe {
            hidden: 32,
            layers: 1,
            heads: 2,
            intermediate: 48,
            tokenizer_steps: 7,
            ..TransformerRecipe::default()
        };
        let parameters = Parameters::default();
        Transformer::load(&transformer_config(&recipe, 2048), &parameters).unwrap();
        stage(&at("transformer"), &recipe, &parameters, 3);
        let parameters = Parameters::default();
        Vqgan::load(&tokenizer_config(), &parameters).unwrap();
        let of_stage = serde_json::json!({"steps": 10, "network": tokenizer_config()});
        stage(&at("tokenizer"), &of_stage, &parameters, 7);
        stage(&at("other"), &of_stage, &parameters, 8);
        export(&at("transformer"), &at("tokenizer"), &at("out")).unwrap();
        for name in [
            "config.json",
            "model.safetensors",
            "text_tokenizer.json",
            "vqgan.yaml",
            "vqgan.safetensors",
        ] {
            assert!(at("out").join(name).metadata().unwrap().len() > 100, "{name}");
        }
        let error = export(&at("transformer"), &at("other"), &at("out2"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("step 8") && error.contains("step 7"), "{error}");
    }
}
