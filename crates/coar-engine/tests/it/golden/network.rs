//! The language model: logits, hidden states, injection with gradients, guided decoding.

use std::path::PathBuf;

use coar_core::tokenizer::{Vocabulary, image_block};
use coar_engine::injection::{DeviceConcept, Placement, SequenceLayout, context_batch};
use coar_engine::model::decoding::{Decoding, DecodingRequest};
use coar_engine::model::sampling::keep_top_k;
use coar_engine::model::transformer::LayerPoint;
use coar_engine::model::weights::Checkpoint;
use coar_engine::model::{ModelConfig, ModelError, Transformer};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::data::{Arrays, F32, differing, largest};
use super::{Outcome, Report, Run};

fn text<T>(result: Result<T, impl std::fmt::Display>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

fn load(run: &Run, change: impl FnOnce(&mut ModelConfig)) -> Result<Transformer, String> {
    let dir = run.path(run.text("model")?);
    let mut config = text(ModelConfig::read(&dir.join("config.json")))?;
    change(&mut config);
    let checkpoint = text(Checkpoint::open_dir(&dir, F32))?;
    text(Transformer::load(&config, &checkpoint))
}

pub fn checkpoint(run: &Run, report: &mut Report) -> Outcome {
    let config_file = run.file("config.json")?;
    let dir: PathBuf = config_file.parent().map(Into::into).ok_or("no folder")?;
    let config = text(ModelConfig::read(&config_file))?;
    let checkpoint = text(Checkpoint::open_dir(&dir, F32))?;
    text(Transformer::load(&config, &checkpoint))?;
    let variant = run.parameter("variant")?;
    let int = |key: &str| variant[key].as_i64().unwrap_or(-1);
    let pairs = [
        (int("hidden"), config.hidden_size),
        (int("heads"), config.num_attention_heads),
        (int("kv"), config.num_key_value_heads),
        (int("mp"), config.model_parallel_size),
        (int("inter"), config.intermediate_size),
        (int("layers"), config.num_hidden_layers as i64),
        (i64::from(variant["swin_norm"] == true), i64::from(config.swin_norm)),
    ];
    report.exact(
        &run.case.id,
        "shape",
        pairs.iter().filter(|(a, b)| a != b).count(),
        pairs.len(),
    );
    Ok(())
}

/// Compares logits `[seq, vocab]` with the stored part of a case.
fn compare_logits(run: &Run, report: &mut Report, arrays: &Arrays, logits: &Tensor) -> Outcome {
    let id = &run.case.id;
    let columns = logits.index_select(1, arrays.get("columns")?);
    report.number(
        id,
        "logits",
        largest(&columns, arrays.get("logits_columns")?),
        run.tolerance("logits_abs")?,
    );
    if arrays.has("logits_last") {
        let last = logits.get(logits.size()[0] - 1);
        report.number(
            id,
            "logits, last row",
            largest(&last, arrays.get("logits_last")?),
            run.tolerance("logits_abs")?,
        );
    }
    let sums = logits.logsumexp([1i64].as_slice(), false);
    report.number(
        id,
        "logsumexp",
        largest(&sums, arrays.get("logsumexp")?),
        run.tolerance("logsumexp_abs")?,
    );
    let clear = arrays.get("argmax_margin")?.gt(1e-3);
    let found = logits.argmax(1, false).masked_select(&clear);
    let expected = arrays.get("argmax")?.masked_select(&clear);
    report.exact(
        id,
        "argmax",
        found.ne_tensor(&expected).sum(Kind::Int64).int64_value(&[]) as usize,
        found.numel(),
    );
    Ok(())
}

/// Runs a sequence and compares every layer's output, first to last.
fn observed(
    run: &Run,
    report: &mut Report,
    arrays: &Arrays,
    forward: impl FnOnce(&mut dyn FnMut(LayerPoint, &Tensor) -> Result<(), ModelError>) -> Result<Tensor, ModelError>,
) -> Result<Tensor, String> {
    let mut layers = Vec::new();
    let out = text(forward(&mut |point, x| {
        match point {
            LayerPoint::Input(0) if arrays.has("embed") => layers.push(("embed".to_owned(), x.get(0).detach())),
            LayerPoint::Output(layer) => layers.push((format!("layer_out_{layer}"), x.get(0).detach())),
            LayerPoint::Input(_) => {}
        }
        Ok(())
    }))?;
    for (name, hidden) in &layers {
        report.number(
            &run.case.id,
            name,
            largest(hidden, arrays.get(name)?),
            run.tolerance("hidden_abs")?,
        );
    }
    if arrays.has("final_norm") {
        report.number(
            &run.case.id,
            "final_norm",
            largest(&out.get(0), arrays.get("final_norm")?),
            run.tolerance("hidden_abs")?,
        );
    }
    Ok(out)
}

pub fn logits(run: &Run, report: &mut Report) -> Outcome {
    let (model, arrays) = (load(run, |_| ())?, Arrays::read(&run.file(".safetensors")?)?);
    let ids = arrays.get("input_ids")?.view([1, -1]);
    let hidden = observed(run, report, &arrays, |observe| {
        model.forward_observed(&ids, None, observe)
    })?;
    compare_logits(run, report, &arrays, &text(model.logits(&hidden.get(0)))?)
}

pub fn mask_image_logits(run: &Run, report: &mut Report) -> Outcome {
    let mask = run.parameter("override")?["mask_image_logits"]
        .as_bool()
        .ok_or("no override")?;
    let model = load(run, |config| config.mask_image_logits = mask)?;
    let arrays = Arrays::read(&run.file(".safetensors")?)?;
    let ids = arrays.get("input_ids")?.view([1, -1]);
    let hidden = text(model.forward(&ids, None))?;
    let found = text(model.logits(&hidden.get(0).get(ids.size()[1] - 1)))?;
    let expected = arrays.get("last")?;
    let lowest = f64::from(f32::MIN);
    let wrong = found
        .eq(lowest)
        .ne_tensor(&expected.eq(lowest))
        .sum(Kind::Int64)
        .int64_value(&[]) as usize;
    report.exact(&run.case.id, "masked", wrong, expected.numel());
    let open = expected.ne(lowest);
    let difference = largest(&found.masked_select(&open), &expected.masked_select(&open));
    report.number(&run.case.id, "logits", difference, run.tolerance("logits_abs")?);
    Ok(())
}

/// The concepts of a case, as leaves that collect gradients.
struct Concepts {
    names: Vec<String>,
    text_positions: Vec<i64>,
    concepts: Vec<DeviceConcept>,
}

impl Concepts {
    fn read(run: &Run, arrays: &Arrays) -> Result<Self, String> {
        let mut all = Self {
            names: vec![],
            text_positions: vec![],
            concepts: vec![],
        };
        let listed = run
            .case
            .parameters
            .get("concepts")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        for concept in listed {
            let name = concept["name"].as_str().ok_or("a concept has no name")?;
            let leaf = |which: &str| -> Result<Tensor, String> {
                let rows = arrays.get(&format!("{name}.{which}"))?;
                Ok(rows.unsqueeze(1).copy().set_requires_grad(true))
            };
            all.concepts.push(DeviceConcept {
                text: leaf("text")?,
                image: leaf("image")?,
            });
            all.text_positions
                .push(concept["text_position"].as_i64().ok_or("no text_position")?);
            all.names.push(name.to_owned());
        }
        Ok(all)
    }

    fn placements<'a>(&'a self, image_at: &[i64]) -> Vec<Placement<'a>> {
        let each = self.concepts.iter().zip(&self.text_positions).zip(image_at);
        each.map(|((concept, &text), &image)| Placement {
            row: 0,
            concept,
            text_at: vec![text],
            image_at: Some(image),
        })
        .collect()
    }
}

pub fn inject(run: &Run, report: &mut Report) -> Outcome {
    let (model, arrays) = (load(run, |_| ())?, Arrays::read(&run.file(".safetensors")?)?);
    let concepts = Concepts::read(run, &arrays)?;
    let ids = arrays.ints("input_ids")?;
    let insert_at = run.int("insert_at")? as usize;
    let extra = concepts.concepts.len();
    let expanded = [&ids[..insert_at], &vec![0; extra], &ids[insert_at..]].concat();
    if expanded.len() as i64 != run.int("expanded_len")? {
        return Err("the expanded sequence has another length".to_owned());
    }
    let image_at: Vec<i64> = (0..extra).map(|index| (insert_at + index) as i64).collect();
    let mask = run
        .parameter("identity_mask")?
        .as_bool()
        .ok_or("identity_mask is no boolean")?;
    let context = text(context_batch(&concepts.placements(&image_at), mask, Device::Cpu))?;
    let expanded = Tensor::from_slice(&expanded).view([1, -1]);
    let hidden = observed(run, report, &arrays, |observe| {
        model.forward_observed(&expanded, Some(&context), observe)
    })?;
    let logits = text(model.logits(&hidden.get(0)))?;
    compare_logits(run, report, &arrays, &logits.detach())?;
    let rows: Vec<i64> =
        serde_json::from_value(run.parameter("loss_logit_rows")?.clone()).map_err(|e| e.to_string())?;
    let loss = logits
        .narrow(0, rows[0], rows[1] - rows[0])
        .cross_entropy_for_logits(arrays.get("targets")?);
    report.number(
        &run.case.id,
        "loss",
        largest(&loss.view([1]), arrays.get("loss")?),
        run.tolerance("loss_abs")?,
    );
    loss.backward();
    for (name, concept) in concepts.names.iter().zip(&concepts.concepts) {
        for (which, leaf) in [("text", &concept.text), ("image", &concept.image)] {
            let expected = arrays.get(&format!("{name}.grad_{which}"))?;
            let found = leaf.grad().squeeze_dim(1);
            let relative = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
            report.number(
                &run.case.id,
                &format!("gradient, {name}.{which}"),
                relative,
                run.tolerance("grad_rel_norm")?,
            );
        }
    }
    Ok(())
}

/// The vocabulary of the fixture's tokenizer file, by the names in the model's configuration or beside it.
fn vocabulary(run: &Run) -> Result<Vocabulary, String> {
    let tokenizer = run.path("tokenizer/text_tokenizer.json");
    let names = text(coar_core::tokenizer::TextTokenizer::read(&tokenizer))?.names();
    text(Vocabulary::from_names(&names))
}

pub fn decode(run: &Run, report: &mut Report) -> Outcome {
    let _no_grad = tch::no_grad_guard();
    let (model, arrays) = (load(run, |_| ())?, Arrays::read(&run.file(".safetensors")?)?);
    let vocabulary = vocabulary(run)?;
    let concepts = Concepts::read(run, &arrays)?;
    let forced: Vec<i64> = serde_json::from_value(run.parameter("forced")?.clone()).map_err(|e| e.to_string())?;
    let start: [i64; 3] = forced.clone().try_into().map_err(|_| "forced ids are not three")?;
    let (rows, columns) = (2 * run.int("h_grids")?, 2 * run.int("w_grids")?);
    let (scale, image_top_k) = (run.float("cfg_scale")?, run.int("image_top_k")?);
    let prompt = arrays.ints("prompt_ids")?;
    let tokens = vec![1; concepts.concepts.len()];
    let layout = SequenceLayout::new(prompt, vec![], start, &tokens, vocabulary.placeholder());
    let placements = concepts.placements(&layout.image_at);
    let context = || text(context_batch(&placements, true, Device::Cpu));
    let request = DecodingRequest {
        prompt: layout.ids.clone(),
        unconditional: forced.clone(),
        context: Some(context()?),
        rows,
        columns,
        guidance_scale: scale,
        temperature: 0.0,
        top_k: image_top_k,
        streams: vec![(0, 0)],
    };
    let mut decoding = text(Decoding::start(&model, &vocabulary, std::slice::from_ref(&request)))?;
    while !decoding.is_done() {
        text(decoding.step(&model))?;
    }
    let (_, drawn) = text(image_block(
        &vocabulary,
        &decoding.codes()[0],
        rows as usize,
        columns as usize,
    ))?;
    let expected = arrays.ints("expected")?;
    report.exact(&run.case.id, "ids", differing(&drawn, &expected), expected.len());
    let Some(step) = run.case.parameters.get("step").and_then(Value::as_i64) else {
        return Ok(());
    };
    let before = &expected[..step as usize];
    let last = |ids: &[i64], context| -> Result<Tensor, String> {
        let row = Tensor::from_slice(ids).view([1, -1]);
        let hidden = text(model.forward(&row, context))?;
        text(model.logits(&hidden.get(0).get(ids.len() as i64 - 1)))
    };
    let context = context()?;
    let conditional = last(&[&layout.ids[..], before].concat(), Some(&context))?;
    let unconditional = last(&[&forced[..], before].concat(), None)?;
    let guided = &unconditional + (&conditional - &unconditional) * scale;
    let at = arrays.get("columns")?;
    let tolerance = run.tolerance("scores_abs")?;
    let id = &run.case.id;
    report.number(
        id,
        "conditional logits",
        largest(&conditional.index_select(0, at), arrays.get("step_cond")?),
        tolerance,
    );
    report.number(
        id,
        "guided scores",
        largest(&guided.index_select(0, at), arrays.get("step_cfg")?),
        tolerance,
    );
    // This step predicts a code: the grammar allows the image codes.
    let codes = Tensor::from_slice(vocabulary.code_ids());
    let masked = Tensor::full_like(&guided, f64::NEG_INFINITY).index_copy(0, &codes, &guided.index_select(0, &codes));
    let kept = text(keep_top_k(&masked.view([1, -1]), image_top_k))?.view(-1);
    let survivors = arrays.get("step_survivors")?.to_kind(Kind::Int64);
    let threshold = kept.masked_select(&kept.isfinite()).min().double_value(&[]);
    let found = kept.isfinite();
    let wanted = Tensor::zeros_like(&found).index_fill(0, &survivors, 1);
    let near = (&masked - threshold).abs().le(1e-3);
    let wrong = found
        .ne_tensor(&wanted)
        .logical_and(&near.logical_not())
        .sum(Kind::Int64)
        .int64_value(&[]);
    report.exact(id, "survivors", wrong as usize, survivors.numel());
    let scores = masked.index_select(0, &survivors);
    report.number(
        id,
        "survivors' scores",
        largest(&scores, arrays.get("step_survivor_scores")?),
        tolerance,
    );
    let probabilities = (&kept / run.float("step_temperature")?)
        .softmax(0, Kind::Float)
        .index_select(0, &survivors);
    report.number(
        id,
        "survivors' probabilities",
        largest(&probabilities, arrays.get("step_survivor_probs")?),
        run.tolerance("probs_abs")?,
    );
    Ok(())
}
