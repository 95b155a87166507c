use std::cell::RefCell;
use std::path::Path;

use serde_json::json;

use super::*;
use crate::eval::dreambench::plan::{Choice, numbers};
use coar_core::image::{OutputFormat, encode};

/// Judges whose embeddings can be verified by hand: of an image its mean red and green, of a text the count of `a`
/// and `b`.
#[derive(Default)]
struct Colours {
    texts: RefCell<Vec<String>>,
}

impl Judges for Colours {
    fn dino(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError> {
        let mean = |picture: &RgbImage, channel| {
            let values = picture.rgb.iter().skip(channel).step_by(3);
            values.map(|&value| f32::from(value)).sum::<f32>() / (picture.rgb.len() / 3) as f32
        };
        Ok(pictures
            .iter()
            .map(|picture| vec![mean(picture, 0), mean(picture, 1)])
            .collect())
    }

    /// Red and green are swapped and green counts three times, so the cosine differs from DINO's.
    fn clip(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError> {
        Ok(self
            .dino(pictures)?
            .iter()
            .map(|both| vec![3.0 * both[1], both[0]])
            .collect())
    }

    fn clip_texts(&self, texts: &[&str]) -> Result<Embeddings, ModelError> {
        self.texts
            .borrow_mut()
            .extend(texts.iter().map(|text| (*text).to_owned()));
        let letters = |text: &str, letter| text.matches(letter).count() as f32;
        Ok(texts
            .iter()
            .map(|text| vec![letters(text, 'a'), letters(text, 'b')])
            .collect())
    }

    fn facts(&self) -> JudgeFacts {
        JudgeFacts {
            dino: "red and green".into(),
            clip: "green and red".into(),
        }
    }
}

const RED: [u8; 3] = [200, 0, 0];
const GREEN: [u8; 3] = [0, 100, 0];
/// With red: 0.6; with green: 0.8.
const BOTH: [u8; 3] = [60, 80, 0];

fn write(file: &Path, colour: [u8; 3]) {
    let picture = RgbImage {
        width: 8,
        height: 8,
        rgb: colour.repeat(64),
    };
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, encode(&picture, OutputFormat::Png, &[]).unwrap()).unwrap();
}

const PROMPTS: &str = "Classes\nmug,bab\nrex,dog\nObject Prompts\nprompt_list = [\n'a {0} {1}'\n'{0} {1} b'\n]\n\
    Live Subject Prompts\nprompt_list = [\n'a {0} {1}'\n'{0} {1} b'\n]\n";

fn settings() -> Settings {
    Settings {
        model: "abc".into(),
        dtype: "f32".into(),
        model_preset: "paper".into(),
        seed: 0,
        pictures: 2,
        width: 8,
        height: 8,
        guidance_scale: 1.0,
        temperature: 1.0,
        top_k: 1,
        training: json!({}),
        catalogue: String::new(),
    }
}

/// A data folder with two subjects and a results folder with the listed images.
fn folders(dir: &Path, drawn: &[(&str, [u8; 3])]) -> (DataFolder, OutFolder) {
    let (data, out) = (dir.join("data"), dir.join("out"));
    for (file, colour) in [("mug/0.png", RED), ("mug/1.png", GREEN), ("rex/0.png", GREEN)] {
        write(&data.join(file), colour);
    }
    std::fs::write(data.join("prompts_and_classes.txt"), PROMPTS).unwrap();
    for (file, colour) in drawn {
        write(&out.join("pictures").join(file), *colour);
    }
    (
        DataFolder::open(&data).unwrap(),
        OutFolder::create(&out, &settings()).unwrap(),
    )
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

#[test]
fn scores_match_a_calculation_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let drawn = [
        ("mug/0-0.png", RED),
        ("mug/0-1.png", BOTH),
        ("mug/1-0.png", BOTH),
        ("mug/1-1.png", GREEN),
        ("rex/0-0.png", GREEN),
        ("rex/0-1.png", RED),
        ("rex/1-0.png", BOTH),
        ("rex/1-1.png", BOTH),
    ];
    let (data, out) = folders(dir.path(), &drawn);
    let plan = Plan::new(&data.catalogue, &Choice::default(), 2).unwrap();
    let judges = Colours::default();
    let mut counted = 0;
    let results = score(&data, (&out, &settings()), &plan, Some(&judges), &mut |n| counted += n).unwrap();
    assert_eq!((results.drawn, results.planned, counted), (8, 8, 8));

    let mug = &results.subjects[0];
    // With red and green: red (1 + 0) / 2, both (0.6 + 0.8) / 2.
    let dino: Vec<f64> = mug
        .pictures
        .iter()
        .map(|picture| picture.scores.unwrap().dino)
        .collect();
    assert!(
        dino.iter().zip([0.5, 0.7, 0.7, 0.5]).all(|(a, b)| close(*a, b)),
        "{dino:?}"
    );
    // `BOTH` is (240, 60) for CLIP: with red (0, 1) 60, with green (1, 0) 240, of a length of sqrt(61200).
    let length = 61_200f64.sqrt();
    assert!(close(mug.pictures[1].scores.unwrap().clip_i, 150.0 / length));
    // "a bab" is (2, 2), "bab b" is (1, 3).
    let clip_t: Vec<f64> = mug
        .pictures
        .iter()
        .map(|picture| picture.scores.unwrap().clip_t)
        .collect();
    let half = 0.5f64.sqrt();
    let wanted = [
        half,
        300.0 * half / length,
        (240.0 + 180.0) / (length * 10f64.sqrt()),
        0.1f64.sqrt(),
    ];
    assert!(
        clip_t.iter().zip(wanted).all(|(a, b)| close(*a, b)),
        "{clip_t:?} {wanted:?}"
    );
    assert!(close(mug.scores.unwrap().dino, 0.6));
    assert!(close(mug.real.unwrap().dino, 0.0) && close(mug.real.unwrap().clip_i, 0.0));

    let rex = &results.subjects[1];
    assert!(close(rex.scores.unwrap().dino, (1.0 + 0.0 + 0.8 + 0.8) / 4.0));
    assert_eq!(rex.real, None, "there is only one real image");
    assert!(close(results.total.unwrap().dino, (0.6 + 0.65) / 2.0));
    assert_eq!(results.real, mug.real);
    assert_eq!(
        *judges.texts.borrow(),
        ["a bab", "bab b", "a dog", "dog b"],
        "the class stands for the placeholder"
    );
}

#[test]
fn missing_images_are_counted_and_existing_ones_scored() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = folders(dir.path(), &[("rex/1-1.png", GREEN)]);
    let plan = Plan::new(&data.catalogue, &Choice::default(), 2).unwrap();
    let results = score(
        &data,
        (&out, &settings()),
        &plan,
        Some(&Colours::default()),
        &mut |_| {},
    )
    .unwrap();
    assert_eq!((results.drawn, results.planned, results.subjects.len()), (1, 8, 1));
    assert!(
        results
            .warnings
            .iter()
            .any(|warning| warning == "Not finished: 1 of 8 images are generated.")
    );
    let some = Choice {
        subjects: Some(vec!["rex".into()]),
        prompts: Some(numbers("1").unwrap()),
    };
    let plan = Plan::new(&data.catalogue, &some, 2).unwrap();
    let results = score(&data, (&out, &settings()), &plan, None, &mut |_| {}).unwrap();
    assert_eq!((results.drawn, results.planned, results.total), (1, 2, None));
    assert!(results.warnings[0].contains("--dino"), "{:?}", results.warnings);
}

#[test]
fn undecodable_image_is_named_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = folders(dir.path(), &[("rex/1-1.png", GREEN)]);
    let plan = Plan::new(&data.catalogue, &Choice::default(), 2).unwrap();
    let again = || {
        score(
            &data,
            (&out, &settings()),
            &plan,
            Some(&Colours::default()),
            &mut |_| {},
        )
    };
    let real = dir.path().join("data/rex/0.png");
    let bytes = std::fs::read(&real).unwrap();
    std::fs::write(&real, &bytes[..bytes.len() - 20]).unwrap();
    let error = again().unwrap_err().to_string();
    assert!(error.contains("data/rex/0.png: is truncated"), "{error}");
    std::fs::write(&real, bytes).unwrap();
    std::fs::write(out.dir().join("pictures/rex/1-1.png"), b"no picture").unwrap();
    let error = again().unwrap_err().to_string();
    assert!(
        error.contains("pictures/rex/1-1.png: is not a JPEG, PNG or WebP image"),
        "{error}"
    );
}

#[test]
fn subject_without_images_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = folders(dir.path(), &[]);
    let rex = data.catalogue.subjects[1].clone();
    std::fs::write(dir.path().join("data/rex/.hidden.png"), b"x").unwrap();
    std::fs::write(dir.path().join("data/rex/notes.txt"), b"x").unwrap();
    assert_eq!(data.files(&rex).unwrap().len(), 1);
    std::fs::remove_file(dir.path().join("data/rex/0.png")).unwrap();
    let error = data.files(&rex).unwrap_err().to_string();
    assert!(
        error.ends_with("data/rex: has 0 JPEG, PNG or WebP images; expected 1 to 10"),
        "{error}"
    );
    std::fs::remove_dir_all(dir.path().join("data/rex")).unwrap();
    assert!(
        data.files(&rex)
            .unwrap_err()
            .to_string()
            .contains("data/rex: the images of rex: ")
    );
    let missing = DataFolder::open(&dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(missing.contains("nowhere: is not a folder; --data names"), "{missing}");
    std::fs::remove_file(dir.path().join("data/prompts_and_classes.txt")).unwrap();
    let own = DataFolder::open(&dir.path().join("data")).unwrap();
    assert_eq!(
        own.catalogue.subjects.len(),
        30,
        "the dataset's own counts where there is none"
    );
}
