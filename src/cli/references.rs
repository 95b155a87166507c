//! Reference images and their captions, from files and folders.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;

use crate::service::{ImageSet, caption_line};
use coar_core::training::spec::IMAGES_LIMIT;

/// What a concept is trained from.
#[derive(Debug, Default)]
pub(super) struct References {
    /// File names and bytes.
    pub images: Vec<(String, Bytes)>,
    /// The images' captions in their order, empty for an image without one; there may be fewer.
    pub captions: Vec<String>,
}

/// The content of a folder.
#[derive(Debug, Default, PartialEq, Eq)]
struct Folder {
    images: Vec<PathBuf>,
    /// Of each image, in their order.
    captions: Vec<Option<PathBuf>>,
    /// Names of files that are skipped.
    skipped: Vec<String>,
}

impl References {
    /// Reads files, and the images of folders, with `NAME.txt` as the caption of `NAME.png`. Reports what is read from
    /// each folder.
    ///
    /// # Errors
    /// When a file cannot be read, a folder has no images, or captions are `given` in addition to those of a folder.
    pub(super) fn read(paths: &[PathBuf], given: &[String]) -> anyhow::Result<Self> {
        let (mut files, mut captions) = (Vec::new(), Vec::new());
        for path in paths {
            if !path.is_dir() {
                files.push(path.clone());
                captions.push(None);
                continue;
            }
            let folder = Folder::read(path)?;
            anyhow::ensure!(!folder.images.is_empty(), "{}: has no images", path.display());
            eprintln!("{}: {}", path.display(), folder.report());
            files.extend(folder.images);
            captions.extend(folder.captions);
        }
        anyhow::ensure!(
            files.len() <= IMAGES_LIMIT,
            "{} images, but a concept has at most {IMAGES_LIMIT}: name those to train from",
            files.len()
        );
        let captioned = captions.iter().any(Option::is_some);
        anyhow::ensure!(
            !captioned || given.is_empty(),
            "the folder has captions in text files: give no --caption, or name the image files"
        );
        let images = files.iter().map(|file| {
            let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
            let name = file.file_name().unwrap_or(file.as_os_str());
            Ok((name.to_string_lossy().into_owned(), bytes.into()))
        });
        let texts = captions
            .iter()
            .map(|file| file.as_deref().map_or(Ok(String::new()), caption));
        Ok(Self {
            images: images.collect::<anyhow::Result<_>>()?,
            captions: match captioned {
                true => texts.collect::<anyhow::Result<_>>()?,
                false => given.to_vec(),
            },
        })
    }
}

fn caption(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Ok(caption_line(&text))
}

impl Folder {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let context = || path.display().to_string();
        let (mut names, mut paths) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(path).with_context(context)? {
            let entry = entry.with_context(context)?;
            let folder = if entry.path().is_dir() { "/" } else { "" };
            names.push(format!("{}{folder}", entry.file_name().to_string_lossy()));
            paths.push(entry.path());
        }
        let set = ImageSet::of(&names);
        let captions = set.images.iter().map(|(_, text)| text.map(|text| paths[text].clone()));
        Ok(Self {
            images: set.images.iter().map(|(image, _)| paths[*image].clone()).collect(),
            captions: captions.collect(),
            skipped: set.skipped.into_iter().map(|place| names[place].clone()).collect(),
        })
    }

    fn report(&self) -> String {
        let names: Vec<_> = self
            .images
            .iter()
            .zip(&self.captions)
            .map(|(image, caption)| {
                let name = image.file_name().unwrap_or_default().to_string_lossy();
                let captioned = if caption.is_some() { " (with a caption)" } else { "" };
                format!("{}{captioned}", name.escape_debug())
            })
            .collect();
        match self.skipped.is_empty() {
            true => names.join(", "),
            false => format!(
                "{}; skipped: {}",
                names.join(", "),
                self.skipped.join(", ").escape_debug()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(dir.path().join(name), format!(" {name}\n of it \n")).unwrap();
        }
        dir
    }

    #[test]
    fn a_folder_is_images_with_captions() {
        let dir = folder(&[
            "10.png",
            "2.JPG",
            "1.webp",
            "1.txt",
            "10.txt",
            "notes.txt",
            "list.csv",
            ".DS_Store",
            "._1.png",
            "Thumbs.db",
            "3.heic",
        ]);
        std::fs::create_dir(dir.path().join("more.png")).unwrap();
        let found = Folder::read(dir.path()).unwrap();
        assert_eq!(
            found.report(),
            "1.webp (with a caption), 2.JPG, 3.heic, 10.png (with a caption); skipped: .DS_Store, ._1.png, Thumbs.db, \
             list.csv, more.png/, notes.txt"
        );
        let read = References::read(&[dir.path().to_owned()], &[]).unwrap();
        let names: Vec<_> = read.images.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["1.webp", "2.JPG", "3.heic", "10.png"]);
        assert_eq!(read.captions, ["1.txt of it", "", "", "10.txt of it"]);
        let both = References::read(&[dir.path().to_owned()], &["x".to_owned()]).unwrap_err();
        assert!(both.to_string().contains("--caption"), "{both}");
    }

    #[test]
    fn files_keep_their_order_and_the_captions_given() {
        let dir = folder(&["b.png", "a.png", "a.txt"]);
        let files = ["b.png", "a.png"].map(|name| dir.path().join(name));
        let read = References::read(&files, &["one".to_owned()]).unwrap();
        assert_eq!(
            (read.images[0].0.as_str(), read.captions),
            ("b.png", vec!["one".to_owned()])
        );
        let empty = folder(&[".DS_Store"]);
        assert!(References::read(&[empty.path().to_owned()], &[]).is_err());
        let many: Vec<_> = (0..11).map(|_| dir.path().join("a.png")).collect();
        assert!(
            References::read(&many, &[])
                .unwrap_err()
                .to_string()
                .starts_with("11 images")
        );
    }
}
