//! The results as a table, JSON and CSV. The page with the images is in `html`.

use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::folder::{OutFolder, Settings, TrainingRecord};
use super::judging::JudgeFacts;
use super::layout::Subject;
use super::metric::{Fidelity, Scores};
use super::plan::Plan;
use coar_engine::model::ModelError;

/// One generated image.
#[derive(Debug, Clone, Serialize)]
pub struct DrawnPicture {
    /// Index in the subject's list of prompts.
    pub prompt_index: usize,
    /// Among the images of this prompt.
    pub index: u32,
    /// Its prompt.
    pub prompt: String,
    /// Its text for CLIP-T.
    pub text: String,
    /// Path inside the results folder.
    pub file: String,
    #[serde(flatten)]
    pub scores: Option<Scores>,
}

/// One subject.
#[derive(Debug, Clone, Serialize)]
pub struct SubjectResults {
    pub name: String,
    pub class: String,
    pub live: bool,
    /// Its real images; their file names in JSON.
    #[serde(serialize_with = "file_names")]
    pub references: Vec<PathBuf>,
    pub training: Option<TrainingRecord>,
    /// Means over its images.
    pub scores: Option<Scores>,
    /// Among its real images.
    pub real: Option<Fidelity>,
    pub pictures: Vec<DrawnPicture>,
}

fn file_names<S: Serializer>(files: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(
        files
            .iter()
            .filter_map(|file| file.file_name())
            .map(|name| name.to_string_lossy()),
    )
}

impl SubjectResults {
    /// A subject without scores.
    pub fn new(subject: &Subject, pictures: Vec<DrawnPicture>) -> Self {
        Self {
            name: subject.name.clone(),
            class: subject.class.clone(),
            live: subject.live,
            references: vec![],
            training: None,
            scores: None,
            real: None,
            pictures,
        }
    }
}

/// All results.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    pub format: &'static str,
    /// Warnings that qualify the figures.
    pub warnings: Vec<String>,
    pub settings: Settings,
    pub judges: Option<JudgeFacts>,
    /// Number of images in the plan, and of those that exist.
    pub planned: u64,
    pub drawn: u64,
    /// Means of the subjects' means.
    pub total: Option<Scores>,
    /// The row of real images: means of the subjects'.
    pub real: Option<Fidelity>,
    pub subjects: Vec<SubjectResults>,
    /// Lengths of DINO's and CLIP's embeddings, if there are any.
    #[serde(skip)]
    pub(super) dimensions: Option<(usize, usize)>,
}

/// A warning for figures from the pocket model.
pub const POCKET: &str = "These figures mean nothing: the base model is the pocket model, which knows the drawings of its \
own small world and has never seen a photograph. This run shows that the benchmark works from end to end.";

const NO_JUDGES: &str = "Nothing is scored: scores need DINO ViT-S/16 and CLIP ViT-B/32 (--dino and --clip); with --report-only \
what is drawn is scored later.";

/// Warnings known before generation: scores will be meaningless or absent.
pub fn warnings(settings: &Settings, judges: bool) -> Vec<String> {
    let pocket = (settings.model_preset == "pocket").then_some(POCKET);
    let none = (!judges).then_some(NO_JUDGES);
    pocket.into_iter().chain(none).map(str::to_owned).collect()
}

impl Results {
    pub(super) fn new(settings: &Settings, plan: &Plan, judges: Option<JudgeFacts>) -> Self {
        Self {
            format: "coar-dreambench-results-1",
            warnings: vec![],
            settings: settings.clone(),
            judges,
            planned: plan.total(),
            drawn: 0,
            total: None,
            real: None,
            subjects: vec![],
            dimensions: None,
        }
    }

    /// Computes means and warnings once all subjects are added. `expected` are the lengths of the real judges'
    /// embeddings.
    pub(super) fn finish(&mut self, expected: (usize, usize)) {
        self.drawn = self.subjects.iter().map(|subject| subject.pictures.len() as u64).sum();
        let scores: Vec<&Scores> = self
            .subjects
            .iter()
            .filter_map(|subject| subject.scores.as_ref())
            .collect();
        let real: Vec<&Fidelity> = self
            .subjects
            .iter()
            .filter_map(|subject| subject.real.as_ref())
            .collect();
        (self.total, self.real) = (Scores::mean_of(scores), Fidelity::mean_of(real));
        self.warnings = warnings(&self.settings, self.judges.is_some());
        if let Some((dino, clip)) = self.dimensions.filter(|found| *found != expected) {
            self.warnings.push(format!(
                "The judges are not DINO ViT-S/16 and CLIP ViT-B/32: their embeddings have {dino} and {clip} numbers instead \
                 of {} and {}. Scores of other judges cannot be compared with published ones.",
                expected.0, expected.1
            ));
        }
        if self.drawn < self.planned {
            let problem = format!("Not finished: {} of {} images are generated.", self.drawn, self.planned);
            self.warnings.push(problem);
        }
    }
}

/// Writes `results.json`, `results.csv` (a line per image), `subjects.csv` (a line per subject, and the means) and
/// `report.html` into the folder; returns the page's path.
///
/// # Errors
/// When a file cannot be written, or an image cannot be read.
pub fn write_all(results: &Results, folder: &OutFolder, progress: &mut dyn FnMut(u64)) -> Result<PathBuf, ModelError> {
    let dir = folder.dir();
    folder.write_json(&dir.join("results.json"), results)?;
    folder.write(&dir.join("results.csv"), pictures_csv(results).as_bytes())?;
    folder.write(&dir.join("subjects.csv"), subjects_csv(results).as_bytes())?;
    let page = dir.join("report.html");
    super::html::write(&page, results, folder, progress)?;
    Ok(page)
}

/// A cell of a CSV file (RFC 4180).
fn cell(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

fn line(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|text| cell(text)).collect();
    format!("{}\r\n", cells.join(","))
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn columns(scores: Option<Scores>) -> [String; 3] {
    [
        number(scores.map(|s| s.dino)),
        number(scores.map(|s| s.clip_i)),
        number(scores.map(|s| s.clip_t)),
    ]
}

fn pictures_csv(results: &Results) -> String {
    let mut text = String::from("subject,class,prompt_index,index,prompt,text,file,dino,clip_i,clip_t\r\n");
    for subject in &results.subjects {
        for picture in &subject.pictures {
            let mut cells = vec![
                subject.name.clone(),
                subject.class.clone(),
                picture.prompt_index.to_string(),
                picture.index.to_string(),
                picture.prompt.clone(),
                picture.text.clone(),
                picture.file.clone(),
            ];
            cells.extend(columns(picture.scores));
            text.push_str(&line(&cells));
        }
    }
    text
}

fn subjects_csv(results: &Results) -> String {
    let mut text = String::from("subject,class,references,pictures,dino,clip_i,clip_t,real_dino,real_clip_i\r\n");
    let mut row = |names: [String; 4], scores, real: Option<Fidelity>| {
        let mut cells = names.to_vec();
        cells.extend(columns(scores));
        cells.extend([number(real.map(|r| r.dino)), number(real.map(|r| r.clip_i))]);
        text.push_str(&line(&cells));
    };
    let mut references = 0;
    for subject in &results.subjects {
        references += subject.references.len();
        let counts = [subject.references.len().to_string(), subject.pictures.len().to_string()];
        let [real, drawn] = counts;
        row(
            [subject.name.clone(), subject.class.clone(), real, drawn],
            subject.scores,
            subject.real,
        );
    }
    let names = [
        "mean".to_owned(),
        String::new(),
        references.to_string(),
        results.drawn.to_string(),
    ];
    row(names, results.total, results.real);
    text
}

impl std::fmt::Display for Results {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let settings = &self.settings;
        writeln!(
            f,
            "model {}  seed {}  {} of {} images",
            settings.model, settings.seed, self.drawn, self.planned
        )?;
        let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let names = ["DINO", "CLIP-I", "CLIP-T", "real DINO", "real CLIP-I"];
        write!(f, "\n{:<20} {:>8}", "subject", "pictures")?;
        names.iter().try_for_each(|name| write!(f, " {name:>11}"))?;
        writeln!(f)?;
        let rows = self
            .subjects
            .iter()
            .map(|s| (s.name.as_str(), s.pictures.len() as u64, s.scores, s.real));
        for (name, pictures, scores, real) in rows.chain([("mean", self.drawn, self.total, self.real)]) {
            write!(f, "{name:<20} {pictures:>8}")?;
            for value in [
                scores.map(|s| s.dino),
                scores.map(|s| s.clip_i),
                scores.map(|s| s.clip_t),
                real.map(|r| r.dino),
                real.map(|r| r.clip_i),
            ] {
                write!(f, " {:>11}", show(value))?;
            }
            writeln!(f)?;
        }
        self.warnings
            .iter()
            .try_for_each(|warning| write!(f, "\n! {warning}\n"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::eval::dreambench::Catalogue;
    use crate::eval::dreambench::plan::{Choice, numbers};
    use serde_json::json;

    /// Two subjects, one prompt, one image each, with scores.
    pub fn some(preset: &str, dimensions: (usize, usize)) -> Results {
        let catalogue = Catalogue::of_dataset().unwrap();
        let choice = Choice {
            subjects: Some(vec!["dog".into(), "rc_car".into()]),
            prompts: Some(numbers("20").unwrap()),
        };
        let plan = Plan::new(&catalogue, &choice, 1).unwrap();
        let settings = Settings {
            model: "abc".into(),
            dtype: "f32".into(),
            model_preset: preset.into(),
            seed: 3,
            pictures: 1,
            width: 96,
            height: 96,
            guidance_scale: 2.0,
            temperature: 1.0,
            top_k: 20,
            training: json!({"steps": 60}),
            catalogue: "d1".into(),
        };
        let judges = JudgeFacts {
            dino: "d".into(),
            clip: "c".into(),
        };
        let mut results = Results::new(&settings, &plan, Some(judges));
        results.dimensions = Some(dimensions);
        for ((subject, units), value) in plan.subjects.iter().zip([0.25, 0.75]) {
            let scores = Scores {
                dino: value,
                clip_i: value / 2.0,
                clip_t: 0.5,
            };
            let picture = DrawnPicture {
                prompt_index: units[0].index,
                index: 0,
                prompt: units[0].prompt.clone(),
                text: units[0].text.clone(),
                file: OutFolder::picture_name(&subject.name, &units[0], 0),
                scores: Some(scores),
            };
            let mut row = SubjectResults::new(subject, vec![picture]);
            row.scores = Some(scores);
            row.references = vec![PathBuf::from("/there/00.jpg"), PathBuf::from("/there/01.jpg")];
            row.real = (subject.name == "dog").then_some(Fidelity { dino: 0.8, clip_i: 0.9 });
            results.subjects.push(row);
        }
        results.finish((384, 512));
        results
    }

    #[test]
    fn totals_are_means_of_the_subjects() {
        let results = some("paper", (384, 512));
        assert_eq!(
            results.total,
            Some(Scores {
                dino: 0.5,
                clip_i: 0.25,
                clip_t: 0.5
            })
        );
        assert_eq!(
            results.real,
            Some(Fidelity { dino: 0.8, clip_i: 0.9 }),
            "of those that have more than one image"
        );
        assert_eq!((results.drawn, results.planned, results.warnings.len()), (2, 2, 0));
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["total"]["dino"], 0.5);
        assert_eq!(json["subjects"][1]["pictures"][0]["clip_i"], 0.375);
        assert_eq!(
            json["subjects"][0]["references"],
            json!(["00.jpg", "01.jpg"]),
            "no paths of this machine"
        );
    }

    #[test]
    fn csv_has_a_line_for_each_image_and_subject() {
        let results = some("paper", (384, 512));
        let text = pictures_csv(&results);
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert_eq!(
            lines[1],
            "dog,dog,20,0,a red <dog> dog,a red dog,pictures/dog/20-0.png,0.25,0.125,0.5"
        );
        assert_eq!(lines.len(), 4);
        let text = subjects_csv(&results);
        assert!(
            text.ends_with("rc_car,toy,2,1,0.75,0.375,0.5,,\r\nmean,,4,2,0.5,0.25,0.5,0.8,0.9\r\n"),
            "{text}"
        );
        assert_eq!(cell("a \"b\", c"), "\"a \"\"b\"\", c\"");
    }

    #[test]
    fn meaningless_figures_have_warnings() {
        let pocket = some("pocket", (8, 16));
        assert_eq!(pocket.warnings[0], POCKET);
        assert!(pocket.warnings[1].contains("8 and 16 numbers instead of 384 and 512"));
        let text = pocket.to_string();
        assert!(
            text.contains("! These figures mean nothing") && text.contains("mean                        2"),
            "{text}"
        );
        let mut missing = some("paper", (384, 512));
        (missing.judges, missing.planned) = (None, 3);
        missing.finish((384, 512));
        assert_eq!(missing.warnings[0], NO_JUDGES);
        assert_eq!(missing.warnings[1], "Not finished: 2 of 3 images are generated.");
    }
}
