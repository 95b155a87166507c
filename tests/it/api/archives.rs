//! Registrations from ZIP archives.

use std::io::Write as _;

use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use zip::write::{SimpleFileOptions, ZipWriter};

use crate::support::{REX, TestApp, image_part, images};

fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in files {
        match name.strip_suffix('/') {
            Some(folder) => archive.add_directory(folder, SimpleFileOptions::default()).unwrap(),
            None => {
                archive.start_file(*name, SimpleFileOptions::default()).unwrap();
                archive.write_all(bytes).unwrap();
            }
        }
    }
    archive.finish().unwrap().into_inner()
}

fn form(name: &'static str, archive: Vec<u8>) -> Form {
    Form::new()
        .text("name", name)
        .text("kind", "subject")
        .text("class", "cat")
        .text("steps", "2")
        .part("images", Part::bytes(archive).file_name("set.zip"))
}

fn refusal(answer: &(u16, Value)) -> (u16, &str, &str) {
    let text = |field: &str| answer.1["error"][field].as_str().unwrap_or("");
    (answer.0, text("code"), text("param"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_its_images_with_their_captions() {
    let app = TestApp::start().await;
    let all = images(&REX, 3);
    let archive = zip(&[
        ("set/", b""),
        ("set/10.png", &all[2]),
        ("set/2.png", &all[1]),
        ("set/2.txt", "\u{feff}on the\r\nbeach\r\n".as_bytes()),
        ("set/1.png", &all[0]),
        ("set/.DS_Store", b"junk"),
        ("__MACOSX/set/._1.png", b"junk"),
        ("notes.md", b"junk"),
    ]);
    let (status, concept) = app.register(form("packed", archive.clone())).await;
    assert_eq!(status, 202, "{concept}");
    assert_eq!(concept["images"], 3);
    let id = concept["training"]["id"].as_str().unwrap();
    let (_, training) = app.get(&format!("/v1/trainings/{id}")).await;
    assert_eq!(
        training["hyper_parameters"]["captions"],
        json!(["", "on the beach", ""])
    );
    let plain = all.iter().fold(
        Form::new()
            .text("name", "plain")
            .text("kind", "subject")
            .text("class", "cat"),
        |form, image| form.part("images", image_part(image.clone())),
    );
    assert_eq!(app.register(plain).await.0, 202);
    for index in 0..3 {
        let image = async |name: &str| {
            let path = format!("/v1/concepts/{name}/images/{index}");
            app.request(Method::GET, &path)
                .send()
                .await
                .unwrap()
                .bytes()
                .await
                .unwrap()
        };
        assert_eq!(image("packed").await, image("plain").await, "{index}");
    }
    // The same archive with additional captions in the form, and with one image too many.
    let twice = form("twice", archive.clone()).text("caption", "x");
    assert_eq!(refusal(&app.register(twice).await), (400, "invalid_value", "captions"));
    let more = (0..8).fold(form("more", archive), |form, _| {
        form.part("images", image_part(all[0].clone()))
    });
    assert_eq!(refusal(&app.register(more).await), (400, "too_many_images", "images"));
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_cannot_be_used() {
    let app = TestApp::start().await;
    let image = images(&REX, 1).remove(0);
    let good = zip(&[("1.png", &image)]);
    let zeros = vec![0; 8 << 20];
    for (archive, said) in [
        (good[..good.len() / 2].to_vec(), "damaged"),
        (zip(&[("notes.txt", b"x")]), "without images"),
        (zip(&[("1.png", &zeros)]), "many times its size"),
    ] {
        let refused = app.register(form("rex", archive)).await;
        assert_eq!(refusal(&refused), (400, "invalid_archive", "images"), "{said}");
        let message = refused.1["error"]["message"].as_str().unwrap();
        assert!(message.contains(said), "{message}");
    }
    let refused = app
        .register(form("rex", zip(&[("1.png", &image), ("2.gif", b"GIF89a")])))
        .await;
    assert_eq!(refusal(&refused), (400, "unknown_image_format", "images[1]"));
    let message = refused.1["error"]["message"].as_str().unwrap();
    assert!(message.contains("(2.gif)"), "{message}");
    let (_, listed) = app.get("/v1/concepts").await;
    assert_eq!(listed["data"], json!([]));
    assert!(app.blobs().is_empty());
}
