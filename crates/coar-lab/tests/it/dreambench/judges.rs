//! `coar-lab eval dreambench` with judges: small ones with random weights (`tests/judges/make_fixtures.py`).

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{command, complaint, data, drawn, json_of, output};

use crate::support::repository;

/// Small judges with random weights.
fn judges() -> PathBuf {
    repository().join("tests/judges/tiny")
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn judges_score_new_and_existing_images() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("out"));
    let folders = dir.path().join("judges");
    for name in ["dino_pickle", "clip"] {
        std::fs::create_dir_all(folders.join(name)).unwrap();
        for file in std::fs::read_dir(judges().join(name)).unwrap() {
            let file = file.unwrap().path();
            std::fs::copy(&file, folders.join(name).join(file.file_name().unwrap())).unwrap();
        }
    }
    let flags = [
        "--dino".to_owned(),
        folders.join("dino_pickle").to_str().unwrap().to_owned(),
        "--clip".to_owned(),
        folders.join("clip").to_str().unwrap().to_owned(),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (stdout, _) = drawn(&data, &out, &flags);
    assert!(!stdout.contains("Nothing is scored"), "{stdout}");
    let results = json_of(&out.join("results.json"));
    let warnings = results["warnings"].to_string();
    assert!(
        warnings.contains("not DINO ViT-S/16 and CLIP ViT-B/32") && warnings.contains("24 and 12 numbers"),
        "{warnings}"
    );
    let digest = |name: &str| {
        use sha2::Digest;
        hex::encode(sha2::Sha256::digest(std::fs::read(folders.join(name)).unwrap()))
    };
    let wanted = json!({"dino": digest("dino_pickle/pytorch_model.bin"), "clip": digest("clip/model.safetensors")});
    assert_eq!(results["judges"], wanted);

    // Totals are computed from the rows.
    let subjects = results["subjects"].as_array().unwrap();
    assert_eq!(subjects.len(), 2);
    for score in ["dino", "clip_i", "clip_t"] {
        let of = |value: &Value| value[score].as_f64().unwrap();
        let means: Vec<f64> = subjects
            .iter()
            .map(|subject| {
                let rows: Vec<f64> = subject["pictures"].as_array().unwrap().iter().map(of).collect();
                assert_eq!(rows.len(), 2);
                assert!(
                    rows.iter()
                        .all(|cosine| (-1.0..=1.0).contains(cosine) && *cosine != 0.0),
                    "{rows:?}"
                );
                assert_ne!(rows[0], rows[1], "{score} distinguishes images");
                assert!((mean(&rows) - of(&subject["scores"])).abs() < 1e-9);
                mean(&rows)
            })
            .collect();
        assert!((mean(&means) - of(&results["total"])).abs() < 1e-9, "{score}");
    }
    let csv = std::fs::read_to_string(out.join("results.csv")).unwrap();
    let columns = csv.lines().skip(1).flat_map(|line| line.rsplit(',').take(3));
    assert_eq!(
        columns.filter(|score| score.parse::<f64>().is_ok()).count(),
        12,
        "{csv}"
    );

    // Generated without judges and scored later the result is the same.
    let later = dir.path().join("later");
    drawn(&data, &later, &[]);
    assert_eq!(json_of(&later.join("results.json"))["total"], Value::Null);
    let mut report = command(&data, &later, &[&["--report-only"], &flags[..]].concat());
    output(report.spawn().unwrap());
    let scored = json_of(&later.join("results.json"));
    for of in ["total", "real", "judges"] {
        assert_eq!(scored[of], results[of], "{of}");
    }
}

#[test]
fn broken_judge_is_rejected_before_generation() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("out"));
    let tiny = |name: &str| judges().join(name).to_str().unwrap().to_owned();
    let refused = complaint(&data, &out, &["--dino", &tiny("dino"), "--clip", &tiny("dino")]);
    assert!(
        refused.contains("config.json: `model_type` is \"vit\"; expected `clip`"),
        "{refused}"
    );
    let broken = dir.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    for file in ["config.json", "preprocessor_config.json"] {
        std::fs::copy(judges().join("dino").join(file), broken.join(file)).unwrap();
    }
    let whole = std::fs::read(judges().join("dino/model.safetensors")).unwrap();
    std::fs::write(broken.join("model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    let refused = complaint(
        &data,
        &out,
        &["--dino", broken.to_str().unwrap(), "--clip", &tiny("clip")],
    );
    assert!(
        refused.contains("broken/model.safetensors: not a complete safetensors file"),
        "{refused}"
    );
    assert!(!out.exists(), "nothing was started");
}
