//! The methods that CoAR is compared with, on the shipped pocket model.

use std::path::Path;
use std::process::{Command, Output};

use coar_core::concept::ConceptFile;
use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_core::training::Preset;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::LuminaMgpt;
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::pocket::unpack_shipped;
use coar_engine::training::{Advance, Reference, token_logits};
use coar_lab::eval::methods::{Evidence, PartRow};
use coar_lab::tuning::{BaseWeights, Tuner, TuningFile, TuningSpec, WeightMethod};
use tch::{Device, Kind, Tensor};

use crate::support::{repository, rex};

struct Pocket {
    _cache: tempfile::TempDir,
    model: LuminaMgpt,
    base: BaseWeights,
}

fn pocket() -> Pocket {
    let cache = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
    let model = LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap();
    let base = BaseWeights::read(&model, &files.dir).unwrap();
    Pocket {
        _cache: cache,
        model,
        base,
    }
}

fn references() -> Vec<RgbImage> {
    let decoded = |png: &Vec<u8>| decode(png, &ImageLimits::default()).unwrap();
    rex(3).iter().map(decoded).collect()
}

/// An image of rex after a prompt with a slot of `tokens`.
fn reference(model: &LuminaMgpt, prompt: (&str, usize, &str)) -> Reference {
    let picture = &references()[0];
    let codes = tch::no_grad(|| model.encode_image(picture)).unwrap();
    Reference::new(model, prompt, codes, (96, 96)).unwrap()
}

fn logits(model: &LuminaMgpt, reference: &Reference, concept: Option<&ConceptFile>) -> Tensor {
    tch::no_grad(|| {
        let uploaded = concept.map(|file| DeviceConcept::upload(&file.tensors, Device::Cpu).unwrap());
        let concept = uploaded.as_ref().map(|concept| (concept, true));
        token_logits(model, &[reference], concept).unwrap().0
    })
}

fn tuner<'b>(pocket: &'b Pocket, method: WeightMethod, steps: u32) -> Tuner<'b> {
    let mut spec = TuningSpec::preset(Preset::Pocket, method, "rex", "cat");
    spec.steps = steps;
    spec.embedding_steps = spec.embedding_steps.min(2);
    spec.prior_pictures = 2;
    Tuner::new(&pocket.model, &pocket.base, Preset::Pocket, spec, &references()).unwrap()
}

fn written(tuner: &Tuner, dir: &Path) -> TuningFile {
    let file = dir.join("rex.safetensors");
    tuner.file().unwrap().write(&file).unwrap();
    TuningFile::read(&file).unwrap()
}

#[test]
fn untrained_tuning_equals_the_frozen_model() {
    let pocket = pocket();
    let dir = tempfile::tempdir().unwrap();
    let reference = reference(&pocket.model, ("a photo of ", 1, " cat"));
    let frozen = logits(&pocket.model, &reference, None);
    for method in [
        WeightMethod::DreamBooth,
        WeightMethod::DreamBoothLora,
        WeightMethod::ProxyTuning,
    ] {
        let tuner = tuner(&pocket, method, 1);
        let (model, concept) = written(&tuner, dir.path()).apply(&pocket.model, &pocket.base).unwrap();
        let tuned = logits(&model, &reference, Some(&concept));
        assert_eq!(tuned, frozen, "{}", method.as_str());
    }
}

#[test]
fn every_method_learns_on_a_copy_and_round_trips() {
    let pocket = pocket();
    let dir = tempfile::tempdir().unwrap();
    let reference = reference(&pocket.model, ("a photo of ", 1, " cat"));
    let frozen = logits(&pocket.model, &reference, None);
    for method in WeightMethod::ALL {
        let mut tuner = tuner(&pocket, method, 6);
        let mut first_stage = 0;
        loop {
            match tuner.advance(&pocket.model).unwrap() {
                Advance::Finished => break,
                Advance::Step(_) if tuner.losses().is_empty() => first_stage += 1,
                _ => {}
            }
        }
        let name = method.as_str();
        assert_eq!(first_stage, if method.has_embedding() { 2 } else { 0 }, "{name}");
        let losses = tuner.losses();
        assert_eq!(losses.len(), 6, "{name}");
        assert!(losses[5].next_token < losses[0].next_token, "{name}: {losses:?}");
        assert_eq!(losses[0].prior.is_some(), method != WeightMethod::ProxyTuning, "{name}");
        assert_eq!(losses[0].regularisation.is_some(), method.has_embedding(), "{name}");
        let file = written(&tuner, dir.path());
        assert_eq!(
            (file.spec.method, file.base_model.as_str()),
            (method, pocket.model.fingerprint())
        );
        let (model, concept) = file.apply(&pocket.model, &pocket.base).unwrap();
        let tuned = logits(&model, &reference, Some(&concept));
        assert_ne!(tuned, frozen, "{name}");
        assert_eq!(
            logits(&pocket.model, &reference, None),
            frozen,
            "{name} changed the frozen model"
        );
    }
}

#[test]
fn textual_inversion_changes_only_the_input_embedding() {
    let pocket = pocket();
    let model = &pocket.model;
    let id = model.first_token_of("purple").unwrap();
    let embedding = model.transformer.embedding_of(id).unwrap().view([1, 1, -1]);
    let concept = DeviceConcept {
        image: Tensor::zeros([1, 0, embedding.size()[2]], (Kind::Float, Device::Cpu)),
        text: embedding,
    };
    let slot = reference(model, ("a photo of ", 1, " cat"));
    let word = reference(model, ("a photo of purple cat", 0, ""));
    let injected = tch::no_grad(|| token_logits(model, &[&slot], Some((&concept, true))).unwrap().0);
    assert_eq!(injected, logits(model, &word, None));
    assert_ne!(injected, logits(model, &slot, None));
}

#[test]
fn damaged_and_foreign_files_are_rejected_by_name() {
    let pocket = pocket();
    let dir = tempfile::tempdir().unwrap();
    let tuner = tuner(&pocket, WeightMethod::DreamBoothLora, 1);
    let file = dir.path().join("rex.safetensors");
    tuner.file().unwrap().write(&file).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let complaint = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let applied = TuningFile::read(&file).and_then(|file| file.apply(&pocket.model, &pocket.base));
        applied.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(complaint(&bytes), "");
    for end in [0, 7, 100, bytes.len() - 1] {
        assert!(complaint(&bytes[..end]).contains("not a safetensors file"), "{end}");
    }
    let changed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes
            .windows(from.len())
            .position(|part| part == from.as_bytes())
            .unwrap();
        let mut other = bytes.clone();
        other[at..at + to.len()].copy_from_slice(to.as_bytes());
        other
    };
    let fingerprint = pocket.model.fingerprint();
    let other = "0".repeat(fingerprint.len());
    assert!(complaint(&changed(fingerprint, &other)).contains("base_model"));
    assert!(complaint(&changed("coar-tuning", "coar-tunimg")).contains("`format` is `coar-tunimg`"));
    assert!(complaint(&changed("layers.0.self_attn", "layers.9.self_attn")).contains("is not a weight of this model"));
    let mut endless = bytes.clone();
    let last = endless.len() - 4;
    endless[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(complaint(&endless).contains("contains a value that is not finite"));
    let spec = TuningSpec {
        rank: 0,
        ..TuningSpec::preset(Preset::Pocket, WeightMethod::DreamBoothLora, "rex", "cat")
    };
    let refused = Tuner::new(&pocket.model, &pocket.base, Preset::Pocket, spec, &references());
    assert!(refused.err().unwrap().to_string().contains("rank"));
}

fn lab(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coar-lab"))
        .args(args)
        .current_dir(dir)
        .env_remove("COAR_SERVER")
        .env("COAR_DATA", dir.join("data"))
        .output()
        .expect("the program starts")
}

fn printed(dir: &Path, args: &[&str]) -> String {
    let output = lab(dir, args);
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(output.status.success(), "{args:?}\n{out}\n{err}");
    out
}

fn complaint(dir: &Path, args: &[&str]) -> String {
    let output = lab(dir, args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn cli_trains_and_generates_with_each_kind_of_method() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut train = vec!["tune", "train", "rex", "--class", "cat"];
    let files: Vec<String> = (0..3).map(|index| format!("{index}.png")).collect();
    for (file, bytes) in files.iter().zip(rex(3)) {
        std::fs::write(dir.join(file), bytes).unwrap();
    }
    train.extend(files.iter().map(String::as_str));
    let with = |more: &[&'static str]| [train.as_slice(), more].concat();
    let out = printed(
        dir,
        &with(&["--method", "dreambooth-lora", "--steps", "2", "--rank", "4"]),
    );
    assert!(
        out.contains("coar-lab tune generate rex.dreambooth-lora.safetensors"),
        "{out}"
    );
    let tuned = [
        "tune",
        "generate",
        "rex.dreambooth-lora.safetensors",
        "a photo of <rex> cat on the beach",
        "--seed",
        "3",
    ];
    assert!(printed(dir, &tuned).contains("coar-3-0.png"));
    let picture = decode(
        &std::fs::read(dir.join("coar-3-0.png")).unwrap(),
        &ImageLimits::default(),
    )
    .unwrap();
    assert_eq!((picture.width, picture.height), (96, 96));
    let unknown = complaint(
        dir,
        &[
            "tune",
            "generate",
            "rex.dreambooth-lora.safetensors",
            "a photo of <max> cat",
        ],
    );
    assert!(unknown.contains("<max>"), "{unknown}");
    for (more, part) in [
        (&["--method", "sorcery"][..], "sorcery"),
        (&["--method", "textual-inversion"][..], "textual-inversion"),
        (&["--method", "dreambooth", "--layers", "2"][..], "--layers"),
        (&["--rank", "4"][..], "--method"),
    ] {
        let error = complaint(dir, &with(more));
        assert!(error.contains(part), "{more:?}: {error}");
    }
}

#[test]
fn comparison_is_resumed_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "eval",
        "methods",
        "--subjects",
        "rex,minty",
        "--seeds",
        "1",
        "--per-scene",
        "1",
        "--methods",
        "real,plain,coar-text,dreambooth-lora",
        "--settings",
        r#"{"coar-text": {"steps": 1}, "dreambooth-lora": {"steps": 1, "prior_pictures": 1}}"#,
        "--between",
        "--dir",
        "cells",
        "--json",
    ];
    // Two processes with a part each, then one that collects without training.
    printed(dir, &[&args[..], &["0.json", "--finished"]].concat());
    printed(dir, &[&args[..], &["1.json", "--part", "1/2"]].concat());
    printed(dir, &[&args[..], &["2.json", "--part", "2/2"]].concat());
    let cells = || std::fs::read_dir(dir.join("cells")).unwrap().count();
    let kept = cells();
    printed(dir, &[&args[..], &["all.json"]].concat());
    assert_eq!((kept, cells()), (32, 32), "16 rows with their sheets");
    let read =
        |name: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap() };
    assert_eq!(read("0.json")["rows"], serde_json::json!([]));
    let mut all = read("all.json");
    let rows = all["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    let between = all["between"].as_array().unwrap();
    assert_eq!(between.len(), 8);
    assert!(
        between
            .iter()
            .all(|row| row["subject"] == "rex-between" || row["subject"] == "minty-between")
    );
    for row in rows.iter().chain(between) {
        for column in ["similarity", "colour", "scene", "class"] {
            assert!((0.0..=1.0).contains(&row[column].as_f64().unwrap()), "{row}");
        }
        let trained = row["parameters"].as_u64().unwrap() > 0;
        for column in ["bytes", "seconds", "swap_ms"] {
            assert_eq!(row[column].as_f64().unwrap() > 0.0, trained, "{row}");
        }
        assert_eq!(row["mixed_batch"], row["method"] != "dreambooth-lora");
    }
    printed(dir, &["eval", "report", "all.json", "--out", "report.md"]);
    let report = std::fs::read_to_string(dir.join("report.md")).unwrap();
    assert!(
        report.contains("2 held-out subjects x 1 seeds") && report.contains("| coar-text |"),
        "{report}"
    );
    assert!(report.contains("## Shades that no word means"), "{report}");
    assert!(dir.join("report/scene.svg").exists());
    assert!(!report.contains("Contact sheets"));
    all["rows"][0]["similarity"] = 0.123.into();
    all["rows"][4]["similarity"] = 0.123.into();
    std::fs::write(dir.join("all.json"), all.to_string()).unwrap();
    // Rows of an earlier file are reused; with other settings they are not.
    let from = [&args[..args.len() - 3], &["--from", "all.json", "--json"]].concat();
    printed(dir, &[&from[..], &["again.json"]].concat());
    assert_eq!(read("again.json")["rows"], all["rows"]);
    assert_eq!(read("again.json")["between"], all["between"]);
    let mut other: Vec<&str> = [&from[..], &["other.json"]].concat();
    let per_scene = other.iter().position(|arg| *arg == "--per-scene").unwrap();
    other[per_scene + 1] = "2";
    let methods = other.iter().position(|arg| *arg == "--methods").unwrap();
    other[methods + 1] = "real";
    printed(dir, &other);
    assert_ne!(read("other.json")["rows"][0]["similarity"], 0.123);
    printed(dir, &[&args[..], &["same.json", "--sheets", "report"]].concat());
    for subject in ["rex", "minty"] {
        let sheet = std::fs::read(dir.join(format!("report/sheet-{subject}.webp"))).unwrap();
        let sheet = decode(&sheet, &ImageLimits::default()).unwrap();
        assert_eq!(
            (sheet.width, sheet.height),
            (9 * 98 - 2, 4 * 98 - 2),
            "{subject}: 4 methods, 9 scenes"
        );
    }
    printed(dir, &["eval", "report", "all.json", "--out", "report.md"]);
    let changed = std::fs::read_to_string(dir.join("report.md")).unwrap();
    assert!(
        changed.contains("![sheet-minty.webp](report/sheet-minty.webp)"),
        "{changed}"
    );
    assert!(changed.contains("| real | 2 x 1 | 0.123 [0.123, 0.123] |"), "{changed}");
    for (more, part) in [
        (&["--methods", "magic"][..], "magic"),
        (&["--subjects", "unknown"][..], "unknown"),
        (&["--part", "3/2", "--dir", "cells"][..], "3/2"),
    ] {
        let error = complaint(dir, &[&["eval", "methods"][..], more].concat());
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn styles_and_compositions_are_cells() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let args = [
        "eval",
        "methods",
        "--subjects",
        "rex",
        "--seeds",
        "1",
        "--per-scene",
        "1",
        "--methods",
        "real",
        "--styles",
        "--settings",
        r#"{"subject": {"steps": 1, "start_words": []}, "style": {"steps": 1, "start_words": []}}"#,
        "--dir",
        "cells",
        "--json",
    ];
    printed(dir, &[&args[..], &["one.json"]].concat());
    let read = |name: &str| -> Evidence { serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap() };
    let one = read("one.json");
    // Two styles with three conditions each, and rex with either in five.
    let count = |part: &str| one.parts.iter().filter(|row| row.part == part).count();
    assert_eq!((count("style"), count("composition")), (6, 10));
    for row in &one.parts {
        for column in ["style", "class", "scene", "palette"] {
            assert!((0.0..=1.0).contains(&row.values[column]), "{row:?}");
        }
    }
    let of = |condition: &str| -> Vec<&PartRow> { one.parts.iter().filter(|row| row.condition == condition).collect() };
    // At half of the layers the mask changes images.
    let (mask, none) = (of("both, N = 3, mask"), of("both, N = 3, none"));
    assert!(
        mask.iter()
            .zip(none)
            .any(|(with, without)| with.values != without.values)
    );
    // Nothing is trained again: the numbers are identical, including seconds of training.
    printed(dir, &[&args[..], &["two.json"]].concat());
    assert_eq!(read("two.json"), one);
    printed(dir, &["eval", "report", "one.json", "--out", "report.md"]);
    let report = std::fs::read_to_string(dir.join("report.md")).unwrap();
    assert!(
        report.contains("| blueprint, described |") && report.contains("| both, N = 3, mask |"),
        "{report}"
    );
}

/// The committed report must match the committed rows.
#[test]
fn committed_report_matches_the_committed_rows() {
    let docs = repository().join("docs");
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("evidence");
    std::fs::create_dir(&made).unwrap();
    let mut plots = Vec::new();
    for entry in std::fs::read_dir(docs.join("evidence")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        match name.rsplit_once('.').unwrap().1 {
            "svg" => plots.push(name),
            _ => drop(std::fs::copy(docs.join("evidence").join(&name), made.join(&name)).unwrap()),
        }
    }
    printed(
        dir.path(),
        &["eval", "report", "evidence/results.json", "--out", "evidence.md"],
    );
    let same = |name: &str| {
        let read = |file: std::path::PathBuf| std::fs::read_to_string(file).unwrap_or_default();
        assert_eq!(
            read(dir.path().join(name)),
            read(docs.join(name)),
            "{name}: run `coar-lab eval report`"
        );
    };
    same("evidence.md");
    assert!(plots.len() >= 3, "{plots:?}");
    plots.iter().for_each(|plot| same(&format!("evidence/{plot}")));
}
