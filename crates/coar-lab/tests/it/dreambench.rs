//! `coar-lab eval dreambench` on the pocket model: the program as a process, and its run in this process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use coar_core::concept::ConceptFile;
use coar_core::image::{ImageLimits, decode};
use coar_core::training::Preset;
use coar_engine::model::LuminaMgpt;
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::pocket::unpack_shipped;
use coar_lab::eval::dreambench::{Choice, DataFolder, OutFolder, Plan, RunOptions, run, settings};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::support::{PATIENCE, repository};

mod judges;

const PROMPTS: &str = "Classes\n\nsubject_name,class\nrex,cat\nmy_house,house\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n\
    'a photo of {0} {1} on the beach'.format(unique_token, class_token),\n\
    'a photo of {0} {1} in the snow & <Wind>'.format(unique_token, class_token),\n]\n\nLive Subject Prompts\n\n\
    prompt_list = [\n'a photo of {0} {1} on the grass'.format(unique_token, class_token),\n\
    'a photo of {0} {1} at night'.format(unique_token, class_token),\n]\n";

/// A data folder with two subjects from the sample concepts: two images of one and three of the other.
fn data(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    let samples = repository().join("concepts");
    for (subject, sample, count) in [("rex", "rex", 2), ("my_house", "cabin", 3)] {
        std::fs::create_dir_all(data.join(subject)).unwrap();
        for index in 1..=count {
            let file = format!("{index}.png");
            std::fs::copy(samples.join(sample).join(&file), data.join(subject).join(&file)).unwrap();
        }
    }
    std::fs::write(data.join("prompts_and_classes.txt"), PROMPTS).unwrap();
    data
}

fn command(data: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coar-lab"));
    command
        .args([
            "eval",
            "dreambench",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--dtype",
            "f32",
        ])
        .arg("--data")
        .arg(data)
        .arg("--out")
        .arg(out)
        .args(more)
        .env("COAR_LOG", "info")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Few steps, few candidate words, no guidance: seconds instead of a minute.
const SMALL: [&str; 8] = [
    "--settings",
    "{\"steps\": 3, \"batch_size\": 1, \"start_words\": []}",
    "--pictures",
    "1",
    "--guidance-scale",
    "1",
    "--seed",
    "7",
];

fn output(child: Child) -> (String, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let (out, err) = (
        String::from_utf8(stdout).unwrap(),
        String::from_utf8_lossy(&stderr).into_owned(),
    );
    assert!(status.success(), "{out}\n{err}");
    (out, err)
}

fn drawn(data: &Path, out: &Path, more: &[&str]) -> (String, String) {
    output(command(data, out, &[&SMALL, more].concat()).spawn().unwrap())
}

fn complaint(data: &Path, out: &Path, more: &[&str]) -> String {
    let Output { status, stderr, .. } = command(data, out, more).output().unwrap();
    assert_eq!(status.code(), Some(1), "{more:?}");
    String::from_utf8(stderr).unwrap()
}

/// Every generated image by its path in the folder.
fn pictures(out: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for subject in std::fs::read_dir(out.join("pictures")).into_iter().flatten() {
        for file in std::fs::read_dir(subject.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(out).unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

fn json_of(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn interrupted_and_concurrent_runs_give_the_same_images() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let whole = dir.path().join("whole");
    let (stdout, _) = drawn(&data, &whole, &[]);
    let wanted = pictures(&whole);
    let names: Vec<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let expected = ["my_house/0-0", "my_house/1-0", "rex/0-0", "rex/1-0"].map(|name| format!("pictures/{name}.png"));
    assert_eq!(names, expected);
    reports_everything(&data, &whole, &stdout);

    // Killed as soon as an image exists, then restarted.
    let killed = dir.path().join("killed");
    let mut child = command(&data, &killed, &SMALL).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while pictures(&killed).is_empty() {
        assert!(Instant::now() < deadline, "nothing was drawn");
        assert!(child.try_wait().unwrap().is_none(), "it exited early");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = pictures(&killed);
    assert!(before.len() < wanted.len() && !killed.join("results.json").exists());
    let (_, log) = drawn(&data, &killed, &[]);
    assert_eq!(pictures(&killed), wanted);
    assert_eq!(
        log.matches("concept trained").count(),
        1,
        "one was trained before: {log}"
    );
    assert!(before.iter().all(|picture| wanted.contains(picture)));

    // Two concurrent processes.
    let shared = dir.path().join("shared");
    let workers: Vec<Child> = (0..2)
        .map(|_| command(&data, &shared, &SMALL).spawn().unwrap())
        .collect();
    let (stdout, logs): (String, String) = workers.into_iter().map(output).unzip();
    assert_eq!(pictures(&shared), wanted);
    assert_eq!(
        logs.matches("concept trained").count(),
        2,
        "each is trained once: {logs}"
    );
    assert!(stdout.contains("report.html"), "{stdout}");

    // Another setting conflicts with these images.
    let refused = complaint(&data, &whole, &[&SMALL[..7], &["8"]].concat());
    assert!(
        refused.contains("manifest.json: `seed` was 7 when this folder was created and is 8 now"),
        "{refused}"
    );
    let steps = ["--settings", "{\"steps\": 4, \"batch_size\": 1, \"start_words\": []}"];
    let refused = complaint(&data, &whole, &[&steps, &SMALL[2..]].concat());
    assert!(refused.contains("`training.steps` was 3"), "{refused}");
    // So do other prompts, or other reference images.
    let prompts = data.join("prompts_and_classes.txt");
    std::fs::write(&prompts, PROMPTS.replace("at night", "in a city")).unwrap();
    let refused = complaint(&data, &whole, &["--report-only"]);
    assert!(
        refused.contains("manifest.json: is of a run with other classes and prompts"),
        "{refused}"
    );
    let refused = complaint(&data, &whole, &SMALL);
    assert!(refused.contains("manifest.json: `catalogue` was"), "{refused}");
    std::fs::write(&prompts, PROMPTS).unwrap();
    std::fs::copy(data.join("rex/2.png"), data.join("rex/1.png")).unwrap();
    let refused = complaint(&data, &whole, &SMALL);
    assert!(
        refused.contains("rex.safetensors: was started with other images of this subject"),
        "{refused}"
    );
}

/// The output of a run without judges.
fn reports_everything(data: &Path, out: &Path, stdout: &str) {
    let nothing = "These figures mean nothing";
    assert!(
        stdout.contains(nothing) && stdout.contains("Nothing is scored"),
        "{stdout}"
    );
    let results = json_of(&out.join("results.json"));
    assert!(
        results["warnings"][0].as_str().unwrap().starts_with(nothing),
        "{results}"
    );
    assert_eq!((&results["drawn"], &results["planned"]), (&json!(4), &json!(4)));
    assert_eq!((&results["total"], &results["judges"]), (&Value::Null, &Value::Null));
    assert_eq!(results["subjects"][0]["references"], json!(["1.png", "2.png"]));
    let pictures = results["subjects"][1]["pictures"].as_array().unwrap();
    assert_eq!(pictures[0]["prompt"], "a photo of <my-house> house on the beach");
    assert_eq!(pictures[1]["text"], "a photo of house in the snow & <Wind>");
    for file in ["results.csv", "subjects.csv"] {
        assert!(out.join(file).exists(), "{file}");
    }
    let csv = std::fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 5);
    assert!(!out.join("tmp").exists(), "partial files remain");
    holds_every_picture(data, out, &results);
}

/// The page has a thumbnail of each real and each generated image, and loads nothing.
fn holds_every_picture(data: &Path, out: &Path, results: &Value) {
    use base64::Engine;
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("These figures mean nothing"));
    assert!(page.contains("in the snow &amp; &lt;Wind&gt;") && !page.contains("<Wind>"));
    for outside in ["http://", "https://", "src=\"/", "<script", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let mut wanted: Vec<PathBuf> = Vec::new();
    for subject in results["subjects"].as_array().unwrap() {
        let folder = data.join(subject["name"].as_str().unwrap());
        let names = |list: &Value, key: Option<&str>| -> Vec<String> {
            let text = |value: &Value| key.map_or(value, |key| &value[key]).as_str().unwrap().to_owned();
            list.as_array().unwrap().iter().map(text).collect()
        };
        wanted.extend(names(&subject["references"], None).iter().map(|name| folder.join(name)));
        wanted.extend(
            names(&subject["pictures"], Some("file"))
                .iter()
                .map(|name| out.join(name)),
        );
    }
    let copies: Vec<&str> = page.split("<img src=\"data:image/webp;base64,").skip(1).collect();
    assert_eq!(copies.len(), wanted.len());
    for (copy, file) in copies.iter().zip(&wanted) {
        let name = file.file_name().unwrap().to_string_lossy();
        let (bytes, rest) = copy.split_once('"').unwrap();
        assert!(rest.split('>').next().unwrap().contains(&*name), "{name}");
        let bytes = base64::engine::general_purpose::STANDARD.decode(bytes).unwrap();
        let small = decode(&bytes, &ImageLimits::default()).unwrap();
        let original = decode(&std::fs::read(file).unwrap(), &ImageLimits::default()).unwrap();
        assert_eq!(
            (small.width, small.height),
            (original.width, original.height),
            "not larger than a small copy"
        );
        // Lossy, but of this image: the mean difference of a sample is a few levels.
        let difference: u64 = small
            .rgb
            .iter()
            .zip(&original.rgb)
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        assert!(difference / (small.rgb.len() as u64) < 12, "{name}: {difference}");
    }
}

#[test]
fn invalid_input_is_rejected_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("out"));
    let refused = complaint(&dir.path().join("nowhere"), &out, &[]);
    assert!(refused.contains("nowhere: is not a folder"), "{refused}");
    let refused = complaint(&data, &out, &["--subjects", "rex,dog"]);
    assert!(
        refused.contains("`subjects` names `dog`; the subjects are rex, my_house"),
        "{refused}"
    );
    let refused = complaint(&data, &out, &["--prompts", "0-2"]);
    assert!(
        refused.contains("`prompts` names 2; those of rex are 0 to 1"),
        "{refused}"
    );
    let refused = complaint(&data, &out, &["--prompts", "one"]);
    assert!(refused.contains("--prompts has `one`"), "{refused}");
    let refused = complaint(&data, &out, &["--pictures", "17"]);
    assert!(refused.contains("`pictures` is 17; expected 1 to 16"), "{refused}");
    let refused = complaint(&data, &out, &["--report-only"]);
    assert!(refused.contains("manifest.json: is missing"), "{refused}");
    let there = data.to_str().unwrap();
    let refused = complaint(&data, &out, &["--dino", there, "--clip", "/nowhere"]);
    assert!(
        refused.contains("--clip is /nowhere, which is not a folder"),
        "{refused}"
    );
    assert!(!out.exists(), "nothing was started");
    for (given, problem) in [
        (
            "{\"name\": \"x\"}",
            "`settings` names `name`, which is each subject's own",
        ),
        ("{\"steps\": 0}", "`steps` is 0"),
        ("{\"stepps\": 9}", "unknown field `stepps`"),
        ("[]", "the settings are not a JSON object"),
    ] {
        let refused = complaint(&data, &out, &["--settings", given]);
        assert!(refused.contains(problem), "{given}: {refused}");
    }
    let file = data.join("my_house/2.png");
    std::fs::write(&file, b"GIF89a").unwrap();
    let refused = complaint(&data, &out, &SMALL);
    assert!(
        refused.contains("my_house/2.png: is a GIF image; save it as PNG"),
        "{refused}"
    );
    assert!(
        pictures(&out).is_empty(),
        "all of the data is looked at before anything is drawn"
    );
    std::fs::write(
        data.join("prompts_and_classes.txt"),
        PROMPTS.replace("{0} {1} at night", "{1} at night"),
    )
    .unwrap();
    let refused = complaint(&data, &out, &SMALL);
    assert!(
        refused.contains("prompts_and_classes.txt: line 20: has the prompt"),
        "{refused}"
    );
}

fn model() -> LuminaMgpt {
    let cache = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
    LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap()
}

#[test]
fn interrupted_training_resumes_from_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (model(), DataFolder::open(&data(dir.path())).unwrap());
    let choice = Choice {
        subjects: Some(vec!["my_house".into()]),
        prompts: Some(vec![0]),
    };
    let plan = Plan::new(&data.catalogue, &choice, 1).unwrap();
    let training = json!({"steps": 6, "batch_size": 1, "start_words": []});
    let options = RunOptions {
        seed: 1,
        guidance_scale: 1.0,
        top_k: 20,
        preset: Preset::Pocket,
        training: training.as_object().unwrap().clone(),
        checkpoint_every: Duration::ZERO,
    };
    let settings = settings(&model, Preset::Pocket, &data.catalogue, 1, &options).unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let (whole, resumed) = (
        OutFolder::create(&first, &settings).unwrap(),
        OutFolder::create(&second, &settings).unwrap(),
    );
    // The state after a kill after the fourth step.
    let mut steps = Vec::new();
    run(&model, &data, (&whole, &settings), (&plan, &options), &mut |now| {
        if now.doing.ends_with("step 4/6") {
            for file in ["my_house.json", "my_house.checkpoint"] {
                let _ = std::fs::copy(first.join("concepts").join(file), second.join("concepts").join(file));
            }
        }
    })
    .unwrap();
    run(&model, &data, (&resumed, &settings), (&plan, &options), &mut |now| {
        steps.extend(now.doing.split_once(": step ").map(|(_, step)| step.to_owned()));
    })
    .unwrap();
    assert_eq!(
        steps,
        ["4/6", "5/6", "6/6"],
        "the checkpoint is the one before the reported step"
    );
    let concept = |dir: &Path| {
        let bytes = std::fs::read(dir.join("concepts/my_house.safetensors")).unwrap();
        ConceptFile::from_bytes(&bytes).unwrap()
    };
    assert_eq!(concept(&first), concept(&second));
    assert_eq!(concept(&first).header.name, "my-house");
    assert_eq!(pictures(&first), pictures(&second));
    assert!(!second.join("concepts/my_house.checkpoint").exists());
}
