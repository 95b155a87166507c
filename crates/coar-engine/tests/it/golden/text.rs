//! Vocabulary, tokenizer, grammar, top-k, whole items.

use std::collections::BTreeMap;

use coar_core::tokenizer::{TextTokenizer, Vocabulary, image_block, image_codes};
use coar_engine::model::image_grammar::{Next, image_is_open, next};
use coar_engine::model::item::{Role, conversation};
use coar_engine::model::lumina::pixels;
use coar_engine::model::sampling::keep_top_k;
use serde_json::Value;

use super::data::{Arrays, differing};
use super::images::{read_image, vqgan};
use super::{Outcome, Report, Run};

fn ints(value: &Value) -> Result<Vec<i64>, String> {
    serde_json::from_value(value.clone()).map_err(|error| error.to_string())
}

fn code_name(code: i64) -> String {
    let letters: String = code
        .to_string()
        .bytes()
        .map(|digit| char::from(digit - b'0' + b'A'))
        .collect();
    format!("IMGIMG{letters}Z")
}

/// A vocabulary of the ids in a case.
fn made_up(
    start: i64,
    end: i64,
    row_end: i64,
    first: i64,
    last: i64,
    grid0: i64,
    all: i64,
) -> Result<Vocabulary, String> {
    let mut names: BTreeMap<String, i64> = [
        ("<s>", 0),
        ("<pad>", 1),
        ("<reserved08706>", grid0 - 94),
        ("<racm3:break>", start),
        ("<eoss>", end),
        ("<reserved08799>", row_end),
    ]
    .map(|(name, id)| (name.to_owned(), id))
    .into();
    names.extend((first..=last).map(|id| (code_name(id - first), id)));
    names.extend(
        (1..=64)
            .take_while(|n| grid0 + n < all)
            .map(|n| (format!("<reserved{:05}>", 8800 + n), grid0 + n)),
    );
    Vocabulary::from_names(&names).map_err(|error| error.to_string())
}

pub fn grammar(run: &Run, report: &mut Report) -> Outcome {
    let (first, last, all) = (run.int("first_code")?, run.int("last_code")?, run.int("vocab")?);
    let (start, end, row_end) = (run.int("image_start")?, run.int("image_end")?, run.int("newline")?);
    let vocabulary = made_up(start, end, row_end, first, last, run.int("grid0")?, all)?;
    let case = run.json(".json")?;
    let mut context = ints(&case["start"])?;
    let steps = case["steps"].as_array().ok_or("no steps")?;
    let mut wrong = 0;
    for step in steps {
        let allowed = match next(&vocabulary, &context) {
            Next::Any => (all, 0, all - 1),
            Next::Code => (last - first + 1, first, last),
            Next::Forced(id) => (1, id, id),
        };
        let field = |name: &str| step[name].as_i64().ok_or_else(|| format!("a step has no `{name}`"));
        wrong += usize::from(allowed != (field("n_allowed")?, field("min")?, field("max")?));
        context.push(field("next")?);
    }
    report.exact(&run.case.id, "allowed sets", wrong, steps.len());
    Ok(())
}

pub fn topk(run: &Run, report: &mut Report) -> Outcome {
    let arrays = Arrays::read(&run.file(".safetensors")?)?;
    let (start, end) = (run.int("image_start")?, run.int("image_end")?);
    let vocabulary = made_up(start, end, end + 607, 4, 5, end + 608, end + 700)?;
    let cases = run.parameter("cases")?.as_array().ok_or("`cases` is no list")?;
    for case in cases {
        let name = case.as_str().ok_or("a case has no name")?;
        let context = arrays.ints(&format!("{name}.context"))?;
        let k = if image_is_open(&vocabulary, &context) {
            run.int("image_top_k")?
        } else {
            run.int("text_top_k")?
        };
        let scores = arrays.get(&format!("{name}.scores"))?.view([1, -1]);
        let kept = keep_top_k(&scores, k)
            .map_err(|error| error.to_string())?
            .isfinite()
            .view(-1);
        let survivors = Vec::<i64>::try_from(&kept.nonzero().view(-1)).map_err(|error| error.to_string())?;
        let expected = arrays.ints(&format!("{name}.survivors"))?;
        report.exact(
            &run.case.id,
            &format!("survivors, {name}"),
            differing(&survivors, &expected),
            expected.len(),
        );
    }
    Ok(())
}

fn tokenizer(run: &Run) -> Result<TextTokenizer, String> {
    TextTokenizer::read(&run.file("text_tokenizer.json")?).map_err(|error| error.to_string())
}

pub fn vocab(run: &Run, report: &mut Report) -> Outcome {
    let names = tokenizer(run)?.names();
    let vocabulary = Vocabulary::from_names(&names).map_err(|error| error.to_string())?;
    let file = run
        .case
        .files
        .iter()
        .find(|name| !name.ends_with("text_tokenizer.json"))
        .ok_or("no case file")?;
    let text = std::fs::read_to_string(run.path(file)).map_err(|error| error.to_string())?;
    let case: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let mut pairs: Vec<(i64, Option<i64>)> = Vec::new();
    for (code, id) in case["code_to_id"].as_object().ok_or("no code_to_id")? {
        let code: i64 = code.parse().map_err(|_| "a code is no integer")?;
        let id = id.as_i64().ok_or("an id is no integer")?;
        pairs.push((id, vocabulary.code_to_id(code).ok()));
        pairs.push((code, vocabulary.id_to_code(id)));
    }
    for (id, name) in case["names"].as_object().ok_or("no names")? {
        let id = id.parse().map_err(|_| "an id is no integer")?;
        pairs.push((id, name.as_str().and_then(|name| names.get(name)).copied()));
    }
    for (key, id) in [
        ("bos", vocabulary.begin()),
        ("pad", vocabulary.pad()),
        ("boi", vocabulary.image_start()),
        ("eoi", vocabulary.image_end()),
        ("sep", vocabulary.separator()),
        ("newline", vocabulary.row_end()),
    ] {
        pairs.push((id, case[key].as_i64()));
    }
    for (grids, id) in case["grid"].as_object().ok_or("no grid")? {
        let grids = grids.parse().map_err(|_| "a grid is no integer")?;
        pairs.push((id.as_i64().unwrap_or(-1), vocabulary.grid_id(grids).ok()));
    }
    let [low, high] = ints(run.parameter("image_ids")?)?[..] else {
        return Err("image_ids is no pair".into());
    };
    let ids = vocabulary.code_ids();
    pairs.push((low, ids.iter().min().copied()));
    pairs.push((high, ids.iter().max().copied()));
    let wrong = pairs
        .iter()
        .filter(|(expected, found)| Some(*expected) != *found)
        .count();
    report.exact(&run.case.id, "ids by name", wrong, pairs.len());
    Ok(())
}

pub fn vocab_map(run: &Run, report: &mut Report) -> Outcome {
    let case = run.json(".json")?;
    let names: BTreeMap<String, i64> = serde_json::from_value(case["vocab"].clone()).map_err(|e| e.to_string())?;
    let (codes, _) = image_codes(&names).map_err(|error| error.to_string())?;
    let expected = ints(&case["code_to_id"])?;
    report.exact(
        &run.case.id,
        "ids of codes",
        differing(&codes, &expected),
        expected.len(),
    );
    Ok(())
}

pub fn tokenize(run: &Run, report: &mut Report) -> Outcome {
    let tokenizer = tokenizer(run)?;
    let file = run
        .case
        .files
        .iter()
        .find(|name| !name.ends_with("text_tokenizer.json"))
        .ok_or("no case file")?;
    let text = std::fs::read_to_string(run.path(file)).map_err(|error| error.to_string())?;
    let cases: Vec<Value> = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let mut wrong = 0;
    for case in &cases {
        let found = tokenizer
            .encode(case["text"].as_str().ok_or("no text")?)
            .map_err(|error| error.to_string())?;
        wrong += usize::from(found != ints(&case["ids"])?);
    }
    report.exact(&run.case.id, "texts", wrong, cases.len());
    Ok(())
}

pub fn item(run: &Run, report: &mut Report) -> Outcome {
    let tokenizer = tokenizer(run)?;
    let vocabulary = Vocabulary::from_names(&tokenizer.names()).map_err(|error| error.to_string())?;
    let vqgan = vqgan(run)?;
    let unit = vqgan.config().pixels_per_code();
    let images: Vec<&String> = run.case.files.iter().filter(|name| name.ends_with(".png")).collect();
    let mut blocks = Vec::new();
    for name in images {
        let image = read_image(&run.path(name))?;
        let codes = pixels(std::slice::from_ref(&image))
            .and_then(|p| vqgan.encode(&p))
            .map_err(|e| e.to_string())?;
        let codes = Vec::<i64>::try_from(&codes.view(-1)).map_err(|error| error.to_string())?;
        let (rows, columns) = ((image.height / unit) as usize, (image.width / unit) as usize);
        let (start, rest) = image_block(&vocabulary, &codes, rows, columns).map_err(|error| error.to_string())?;
        blocks.push([start.to_vec(), rest].concat());
    }
    let file = run
        .case
        .files
        .iter()
        .find(|name| name.ends_with("item.json"))
        .ok_or("no item.json")?;
    let text = std::fs::read_to_string(run.path(file)).map_err(|error| error.to_string())?;
    let case: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    for item in case["items"].as_array().ok_or("no items")? {
        let name = item["name"].as_str().unwrap_or("?");
        let turns = item["conversations"].as_array().ok_or("no conversations")?;
        let turns: Vec<(Role, Option<&str>)> = turns
            .iter()
            .map(|turn| {
                (
                    if turn[0] == "human" { Role::Human } else { Role::Model },
                    turn[1].as_str(),
                )
            })
            .collect();
        let images: Vec<Vec<i64>> = ints(&item["images"])?
            .iter()
            .map(|&index| blocks[index as usize].clone())
            .collect();
        let (ids, labels) =
            conversation(&tokenizer, &vocabulary, &turns, &images).map_err(|error| error.to_string())?;
        let expected = ints(&item["tokens"])?;
        report.exact(
            &run.case.id,
            &format!("tokens, {name}"),
            differing(&ids, &expected),
            expected.len(),
        );
        if item["training"] == true {
            let expected = ints(&item["labels"])?;
            report.exact(
                &run.case.id,
                &format!("labels, {name}"),
                differing(&labels, &expected),
                expected.len(),
            );
        }
    }
    Ok(())
}
