//! `coar --server URL …` against the real server.

use std::process::{Command, Output};

use coar_core::image::{ImageLimits, decode};

use crate::support::{REX, TestApp, images};

/// Runs the program against a server; returns its status and output.
async fn coar(app: &TestApp, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coar"));
    command
        .args(["--server", &app.url])
        .args(args)
        .current_dir(app.dir.path())
        .env_remove("COAR_SERVER")
        .env_remove("COAR_API_KEY");
    tokio::task::spawn_blocking(move || command.output().expect("the program starts"))
        .await
        .unwrap()
}

/// Its standard output; it has to succeed.
async fn printed(app: &TestApp, args: &[&str]) -> String {
    let output = coar(app, args).await;
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(output.status.success(), "{args:?}\n{out}\n{err}");
    out
}

/// Its error output; it has to fail with status 1.
async fn complaint(app: &TestApp, args: &[&str]) -> String {
    let output = coar(app, args).await;
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_concept_is_added_watched_listed_moved_and_deleted() {
    let app = TestApp::start().await;
    let mut files = Vec::new();
    for (index, bytes) in images(&REX, 3).into_iter().enumerate() {
        let file = app.dir.path().join(format!("{index}.png"));
        std::fs::write(&file, bytes).unwrap();
        files.push(file.to_str().unwrap().to_owned());
    }
    let class = &REX.class;
    let mut add = vec!["concept", "add", "rex", "--class", class, "--steps", "4"];
    add.extend(files.iter().map(String::as_str));
    let out = printed(&app, &add).await;
    assert!(out.contains("rex is ready: write <rex> in a prompt"), "{out}");
    let taken = complaint(&app, &add).await;
    assert!(taken.contains("param name") && taken.contains("code "), "{taken}");
    let list = printed(&app, &["concept", "list"]).await;
    let row: Vec<&str> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["rex", "subject", class, "ready"], "{list}");
    let shown = printed(&app, &["training", "show", "rex"]).await;
    assert!(shown.lines().any(|line| line == "step         4/4"), "{shown}");
    let watched = printed(&app, &["training", "watch", "rex"]).await;
    assert!(watched.ends_with("has succeeded\n"), "{watched}");
    let file = app.dir.path().join("kept.safetensors");
    printed(&app, &["concept", "export", "rex", "-o", file.to_str().unwrap()]).await;
    printed(&app, &["concept", "delete", "rex"]).await;
    assert_eq!(app.get("/v1/concepts/rex").await.0, 404);
    let back = printed(&app, &["concept", "import", file.to_str().unwrap(), "--name", "again"]).await;
    assert!(back.contains("again is ready"), "{back}");
    assert!(printed(&app, &["models"]).await.contains("coar"));
}

/// All images of a folder are sent, in order and with their captions.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_registered_with_its_captions() {
    let app = TestApp::start().await;
    let folder = app.dir.path().join("set");
    std::fs::create_dir(&folder).unwrap();
    let all = images(&REX, 3);
    for (name, bytes) in ["10.png", "2.png", "1.png"].into_iter().zip(&all) {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
    std::fs::write(folder.join("2.txt"), "\u{feff}on the\nbeach\n").unwrap();
    std::fs::write(folder.join("._1.png"), "junk").unwrap();
    std::fs::write(folder.join("notes.md"), "junk").unwrap();
    let add = [
        "concept",
        "add",
        "rex",
        "--class",
        "cat",
        "--steps",
        "2",
        "--detach",
        folder.to_str().unwrap(),
    ];
    let output = coar(&app, &add).await;
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    let report = "1.png, 2.png (with a caption), 10.png; skipped: ._1.png, notes.md";
    assert!(told.contains(report), "{told}");
    let (_, concept) = app.get("/v1/concepts/rex").await;
    assert_eq!(concept["images"], 3);
    let id = concept["training"]["id"].as_str().unwrap().to_owned();
    let (_, training) = app.get(&format!("/v1/trainings/{id}")).await;
    assert_eq!(
        training["hyper_parameters"]["captions"],
        serde_json::json!(["", "on the beach", ""]),
        "{training}"
    );
    let first = app
        .request(reqwest::Method::GET, "/v1/concepts/rex/images/0")
        .send()
        .await
        .unwrap();
    let first = decode(&first.bytes().await.unwrap(), &ImageLimits::default()).unwrap();
    assert!(first.rgb == decode(&all[2], &ImageLimits::default()).unwrap().rgb);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_shown_in_the_servers_words() {
    let app = TestApp::start().await;
    let missing = complaint(&app, &["concept", "show", "nobody"]).await;
    assert!(
        missing.starts_with("error: There is no concept `nobody`. (code concept_not_found, request "),
        "{missing}"
    );
    let ended = complaint(&app, &["training", "cancel", "training_unknown"]).await;
    assert!(ended.contains("code training_not_found"), "{ended}");
    let nowhere = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["--server", "http://127.0.0.1:9", "concept", "list"])
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    let said = String::from_utf8(nowhere.stderr).unwrap();
    assert!(said.contains("http://127.0.0.1:9 does not answer"), "{said}");
    let without = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["training", "list"])
        .env_remove("COAR_SERVER")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&without.stderr).contains("--server URL"));
}

/// Also without a server, in the command's own process.
#[tokio::test(flavor = "multi_thread")]
async fn the_refused_image_is_named() {
    let app = TestApp::start().await;
    let good = app.dir.path().join("good.png");
    std::fs::write(&good, images(&REX, 1).remove(0)).unwrap();
    let bad = app.dir.path().join("holiday.jpg");
    std::fs::write(&bad, b"GIF89a").unwrap();
    let files = [good.to_str().unwrap(), bad.to_str().unwrap()];
    let mut add = vec!["concept", "add", "rex", "--class", &REX.class];
    add.extend(files);
    let refused = complaint(&app, &add).await;
    assert!(
        refused.contains("`images[1]` (holiday.jpg) is a GIF image; save it as PNG")
            && refused.contains("param images[1]"),
        "{refused}"
    );
    let data = app.dir.path().join("local");
    let local = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["train", "rex", "--class", REX.class, "--data", data.to_str().unwrap()])
        .args(files)
        .env_remove("COAR_SERVER")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&local.stderr);
    assert!(
        !local.status.success() && said.contains("(holiday.jpg) is a GIF image"),
        "{said}"
    );
}

/// Uses the native route for generations.
#[tokio::test(flavor = "multi_thread")]
async fn images_are_written_by_seed_and_index() {
    let app = TestApp::start().await;
    let out = app.dir.path().join("drawn");
    let args = [
        "generate",
        "a red car",
        "-n",
        "2",
        "--seed",
        "7",
        "-o",
        out.to_str().unwrap(),
    ];
    if app.get("/v1/generations").await.0 == 404 {
        let refused = complaint(&app, &args).await;
        assert!(refused.contains("code route_not_found"), "{refused}");
        return;
    }
    let said = printed(&app, &args).await;
    assert!(said.ends_with("seed 7\n"), "{said}");
    for index in 0..2 {
        let bytes = std::fs::read(out.join(format!("coar-7-{index}.png"))).unwrap();
        let image = decode(&bytes, &ImageLimits::default()).unwrap();
        assert_eq!((image.width, image.height), (96, 96));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_complete_the_names_of_concepts() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 2).await;
    app.until_ended(&training).await;
    let script = printed(&app, &["completions", "bash"]).await;
    assert!(
        script.contains("COAR_COMPLETE") && script.contains("complete "),
        "{script}"
    );
    let asked = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["--", "coar", "concept", "show", "r"])
        .env("COAR_SERVER", &app.url)
        .env("COAR_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "3")
        .env("_CLAP_COMPLETE_COMP_TYPE", "9")
        .env("_CLAP_COMPLETE_SPACE", "true")
        .env("_CLAP_IFS", "\n")
        .output()
        .unwrap();
    let names = String::from_utf8(asked.stdout).unwrap();
    assert_eq!(names.trim(), REX.name, "{}", String::from_utf8_lossy(&asked.stderr));
}

/// A concept file whose class noun contains terminal codes for red and a line break.
fn with_hostile_noun(file: &[u8]) -> Vec<u8> {
    let (length, rest) = file.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&rest[..length]).unwrap();
    let noun = format!("\"class_noun\":\"{}\"", REX.class);
    let within = noun.replace('"', "\\\"");
    assert!(header.contains(&noun) && header.contains(&within), "{header}");
    let hostile = "\\u001b[31m\\r\\n";
    let header = header
        .replace(&noun, &format!("\"class_noun\":\"{}{hostile}\"", REX.class))
        .replace(
            &within,
            &format!(
                "\\\"class_noun\\\":\\\"{}{}\\\"",
                REX.class,
                hostile.replace('\\', "\\\\")
            ),
        );
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &rest[length..],
    ]
    .concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_text_reaches_the_terminal_escaped() {
    let app = TestApp::start().await;
    let training = app.register_subject(&REX, 1).await;
    assert_eq!(app.until_ended(&training).await["status"], "succeeded");
    let weights = app.request(reqwest::Method::GET, "/v1/concepts/rex/weights");
    let hostile = with_hostile_noun(&weights.send().await.unwrap().bytes().await.unwrap());
    let import = app.request(reqwest::Method::POST, "/v1/concepts/import?name=other");
    let (status, refused) = crate::support::answer(import.body(hostile.clone())).await;
    assert_eq!(
        (status, &refused["error"]["code"]),
        (400, &"invalid_concept_file".into())
    );
    let file = app.dir.path().join("hostile.safetensors");
    std::fs::write(&file, hostile).unwrap();
    let shown = Command::new(env!("CARGO_BIN_EXE_coar"))
        .args(["concept", "show"])
        .arg(&file)
        .env_remove("COAR_SERVER")
        .output()
        .unwrap();
    let said = String::from_utf8([shown.stdout, shown.stderr].concat()).unwrap();
    assert!(said.contains("cat"), "{said}");
    assert!(!said.contains(['\u{1b}', '\r']), "{said:?}");
}
