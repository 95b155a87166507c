//! The user's input: a folder of images per subject, and a file of classes and prompts.
//!
//! Both in the layout of the DreamBooth dataset. Its file of classes and prompts is part of this program, so images
//! are sufficient; one in the data folder takes precedence.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use coar_core::concept::{concept_names, is_slug, parse_prompt};
use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_core::training::spec::IMAGES_LIMIT;
use coar_engine::model::ModelError;

/// The file's name, in the data folder.
pub const FILE: &str = "prompts_and_classes.txt";

/// The dataset's own file (CC BY 4.0, Ruiz et al.).
const DATASETS_OWN: &str = include_str!("prompts_and_classes.txt");

/// Classes of live subjects if the file does not specify them: those of the dataset's nine pets.
const LIVE_CLASSES: [&str; 2] = ["cat", "dog"];

/// One object or animal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The name of its folder.
    pub name: String,
    /// Its class noun.
    pub class: String,
    /// Whether it uses the prompts for live subjects instead of those for objects.
    pub live: bool,
}

impl Subject {
    /// The concept's name: placeholders only allow hyphens.
    pub fn slug(&self) -> String {
        self.name.replace('_', "-")
    }
}

/// Subjects and prompts. In a prompt `{0}` is the placeholder, `{1}` the class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalogue {
    pub subjects: Vec<Subject>,
    pub object_prompts: Vec<String>,
    pub live_prompts: Vec<String>,
}

/// Parser position in a file of classes and prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Start,
    Classes,
    Prompts { live: bool, open: bool },
}

impl Catalogue {
    /// The DreamBooth dataset's: 30 subjects, 25 prompts for objects and 25 for live subjects.
    ///
    /// # Errors
    /// Never, as a test verifies.
    pub fn of_dataset() -> Result<Self, ModelError> {
        Self::parse(DATASETS_OWN, Path::new(FILE))
    }

    /// Parses the dataset's format: under `Classes` lines of `subject,class` (optionally with `,live` or `,object`),
    /// under `Object Prompts` and `Live Subject Prompts` lists of quoted prompts. `#` starts a comment line.
    ///
    /// # Errors
    /// The first invalid line, with its number, or what is missing in the file.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ModelError> {
        let mut all = Self {
            subjects: vec![],
            object_prompts: vec![],
            live_prompts: vec![],
        };
        let mut section = Section::Start;
        for (number, line) in text.lines().enumerate() {
            section = all
                .line(section, line.trim())
                .map_err(|problem| ModelError::file(file, format!("line {}: {problem}", number + 1)))?;
        }
        let lacking = [
            ("Classes", all.subjects.is_empty()),
            ("Object Prompts", all.object_prompts.is_empty()),
            ("Live Subject Prompts", all.live_prompts.is_empty()),
        ];
        match lacking.iter().find(|(_, lacking)| *lacking) {
            Some((name, _)) => Err(ModelError::file(file, format!("has nothing under `{name}`"))),
            None => Ok(all),
        }
    }

    fn line(&mut self, section: Section, line: &str) -> Result<Section, String> {
        match (section, line) {
            (_, "") => Ok(section),
            (_, comment) if comment.starts_with('#') => Ok(section),
            (_, "Classes") => Ok(Section::Classes),
            (_, "Prompts") => Ok(Section::Start),
            (_, "Object Prompts") => Ok(Section::Prompts {
                live: false,
                open: false,
            }),
            (_, "Live Subject Prompts") => Ok(Section::Prompts {
                live: true,
                open: false,
            }),
            (Section::Classes, "subject_name,class") => Ok(section),
            (Section::Classes, row) => {
                let subject = self.subject(row)?;
                self.subjects.push(subject);
                Ok(section)
            }
            (Section::Prompts { live, open: false }, "prompt_list = [") => Ok(Section::Prompts { live, open: true }),
            (Section::Prompts { live, open: true }, "]") => Ok(Section::Prompts { live, open: false }),
            (Section::Prompts { live, open: true }, quoted) => {
                let prompts = if live {
                    &mut self.live_prompts
                } else {
                    &mut self.object_prompts
                };
                prompts.push(prompt(quoted)?);
                Ok(section)
            }
            (Section::Prompts { open: false, .. }, other) => Err(format!("is `{other}`; expected `prompt_list = [`")),
            (Section::Start, other) => Err(format!(
                "is `{other}`; expected `Classes`, `Object Prompts` or `Live Subject Prompts`"
            )),
        }
    }

    fn subject(&self, row: &str) -> Result<Subject, String> {
        let mut cells = row.split(',').map(str::trim);
        let (name, class) = (cells.next().unwrap_or(""), cells.next().unwrap_or(""));
        let live = match cells.next() {
            None => LIVE_CLASSES.contains(&class),
            Some("live") => true,
            Some("object") => false,
            Some(other) => return Err(format!("says `{other}` of {name}; expected `live` or `object`")),
        };
        if class.is_empty() || cells.next().is_some() {
            return Err(format!("is `{row}`; expected `subject,class`"));
        }
        let subject = Subject {
            name: name.to_owned(),
            class: class.to_owned(),
            live,
        };
        // The name is used for a folder, for files and for a placeholder.
        if !is_slug(&subject.slug()) {
            return Err(format!(
                "names the subject `{name}`; expected 1 to 63 of a-z, 0-9, - and _"
            ));
        }
        if self.subjects.iter().any(|other| other.slug() == subject.slug()) {
            return Err(format!("names the subject `{name}` again"));
        }
        Ok(subject)
    }

    /// The prompts for subjects of its kind.
    pub fn prompts(&self, subject: &Subject) -> &[String] {
        if subject.live {
            &self.live_prompts
        } else {
            &self.object_prompts
        }
    }

    /// SHA-256 of the whole catalogue.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for subject in &self.subjects {
            hash.update(format!("{}\t{}\t{}\n", subject.name, subject.class, subject.live));
        }
        for prompts in [&self.object_prompts, &self.live_prompts] {
            hash.update(format!("{}\n", prompts.len()));
            prompts.iter().for_each(|prompt| hash.update(format!("{prompt}\n")));
        }
        hex::encode(hash.finalize())
    }
}

/// Extracts the prompt from `'a {0} {1} in the snow'.format(unique_token, class_token),`.
fn prompt(line: &str) -> Result<String, String> {
    let quote = line.chars().next().filter(|first| matches!(first, '\'' | '"'));
    let inside = quote.and_then(|quote| line[1..].rsplit_once(quote));
    let Some((prompt, rest)) = inside else {
        return Err(format!("is `{line}`; expected a prompt in quotes"));
    };
    let rest: String = rest.chars().filter(|c| !c.is_whitespace()).collect();
    if !matches!(rest.trim_end_matches(','), "" | ".format(unique_token,class_token)") {
        return Err(format!("continues with `{rest}` after the prompt"));
    }
    let without = prompt.replace("{0}", "").replace("{1}", "");
    let once = |what: &str| prompt.matches(what).count() == 1;
    if !once("{0}") || !once("{1}") || without.contains(['{', '}']) {
        return Err(format!(
            "has the prompt `{prompt}`; expected {{0}} and {{1}} in it, once each"
        ));
    }
    let concepts = parse_prompt(prompt).map(|pieces| concept_names(&pieces).len());
    if concepts != Ok(0) {
        return Err(format!("has the prompt `{prompt}`, which names a concept of its own"));
    }
    Ok(prompt.to_owned())
}

/// A prompt for generation: with the placeholder.
pub fn with_placeholder(prompt: &str, subject: &Subject) -> String {
    prompt
        .replace("{0}", &format!("<{}>", subject.slug()))
        .replace("{1}", &subject.class)
}

/// A prompt for CLIP-T: the class noun replaces placeholder and class.
pub fn with_class(prompt: &str, subject: &Subject) -> String {
    let named = prompt.replace("{0} {1}", "{1}").replace("{0}", "");
    named.replace("{1}", &subject.class)
}

/// A data folder.
#[derive(Debug, Clone)]
pub struct DataFolder {
    dir: PathBuf,
    pub catalogue: Catalogue,
}

impl DataFolder {
    /// Opens a folder with a folder of images per subject.
    ///
    /// # Errors
    /// When it is missing, or its file of classes and prompts is invalid.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        if !dir.is_dir() {
            return Err(ModelError::file(
                dir,
                "is not a folder; --data names the one with a folder for each subject",
            ));
        }
        let file = dir.join(FILE);
        let catalogue = match std::fs::read_to_string(&file) {
            Ok(text) => Catalogue::parse(&text, &file)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Catalogue::of_dataset()?,
            Err(error) => return Err(ModelError::file(file, error)),
        };
        Ok(Self {
            dir: dir.to_owned(),
            catalogue,
        })
    }

    /// A subject's image files, sorted by name.
    ///
    /// # Errors
    /// When the folder is missing or has no image, or more than the training limit.
    pub fn files(&self, subject: &Subject) -> Result<Vec<PathBuf>, ModelError> {
        let dir = self.dir.join(&subject.name);
        let fault = |error: std::io::Error| ModelError::file(&dir, format!("the images of {}: {error}", subject.name));
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(fault)? {
            let path = entry.map_err(fault)?.path();
            let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
            let hidden = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if !hidden && extension.is_some_and(|e| ["jpg", "jpeg", "png", "webp"].contains(&e.as_str())) {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() || files.len() > IMAGES_LIMIT {
            let problem = format!(
                "has {} JPEG, PNG or WebP images; expected 1 to {IMAGES_LIMIT}",
                files.len()
            );
            return Err(ModelError::file(dir, problem));
        }
        Ok(files)
    }

    /// A subject's images, with the bytes of their files.
    ///
    /// # Errors
    /// When one cannot be read or decoded; the message has its path.
    pub fn pictures(&self, subject: &Subject) -> Result<Vec<(PathBuf, Vec<u8>, RgbImage)>, ModelError> {
        let read = |file: PathBuf| {
            let bytes = std::fs::read(&file).map_err(|error| ModelError::file(&file, error))?;
            let picture = decode(&bytes, &ImageLimits::default()).map_err(|error| ModelError::file(&file, error))?;
            Ok((file, bytes, picture))
        };
        self.files(subject)?.into_iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "Classes\n\nsubject_name,class\nmug,cup\nrex_1,dog\nbird,bird,live\n\nPrompts\n\nObject Prompts\n\n\
        prompt_list = [\n'a {0} {1} in the snow'.format(unique_token, class_token),\n]\n\nLive Subject Prompts\n\
        prompt_list = [\n\"a {0} {1}'s hat\",\n'a red {0} {1}'.format(unique_token, class_token)\n]\n";

    fn fault(text: &str) -> String {
        Catalogue::parse(text, Path::new("p.txt")).unwrap_err().to_string()
    }

    #[test]
    fn builtin_catalogue_has_30_subjects_and_25_prompts_each() {
        let all = Catalogue::of_dataset().unwrap();
        assert_eq!(
            (all.subjects.len(), all.object_prompts.len(), all.live_prompts.len()),
            (30, 25, 25)
        );
        let live: Vec<&str> = all
            .subjects
            .iter()
            .filter(|s| s.live)
            .map(|s| s.name.as_str())
            .collect();
        assert_eq!(
            live,
            ["cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"]
        );
        assert_eq!(all.subjects[2].class, "stuffed animal");
        assert_eq!(all.object_prompts[13], "a {0} {1} floating on top of water");
        assert_eq!(all.live_prompts[24], "a cube shaped {0} {1}");
    }

    #[test]
    fn classes_and_prompts_are_read() {
        let all = Catalogue::parse(SMALL, Path::new("p.txt")).unwrap();
        let live: Vec<bool> = all.subjects.iter().map(|subject| subject.live).collect();
        assert_eq!(live, [false, true, true]);
        assert_eq!(all.prompts(&all.subjects[0]), ["a {0} {1} in the snow"]);
        assert_eq!(all.prompts(&all.subjects[1]), ["a {0} {1}'s hat", "a red {0} {1}"]);
    }

    #[test]
    fn prompt_has_a_placeholder_and_a_class_form() {
        let all = Catalogue::parse(SMALL, Path::new("p.txt")).unwrap();
        let (rex, prompt) = (&all.subjects[1], &all.live_prompts[1]);
        assert_eq!(with_placeholder(prompt, rex), "a red <rex-1> dog");
        assert_eq!(with_class(prompt, rex), "a red dog");
    }

    #[test]
    fn faults_name_file_and_line() {
        assert_eq!(
            fault(&SMALL.replace("mug,cup", "mug")),
            "p.txt: line 4: is `mug`; expected `subject,class`"
        );
        assert!(fault(&SMALL.replace("mug", "../mug")).starts_with("p.txt: line 4: names the subject `../mug`"));
        assert!(
            fault(&SMALL.replace("bird,bird,live", "rex-1,dog")).contains("line 6: names the subject `rex-1` again")
        );
        assert!(fault(&SMALL.replace(",live", ",alive")).contains("line 6: says `alive` of bird"));
        assert!(fault(&SMALL.replace("{0} {1} in", "{1} in")).contains("line 13: has the prompt `a {1} in the snow`"));
        assert!(fault(&SMALL.replace("class_token),\n]", "class_token) + x,\n]")).contains("line 13: continues with"));
        assert!(fault(&SMALL.replace("'a red", "a red")).contains("line 19: is `a red"));
        assert!(
            fault(&SMALL.replace("Live Subject Prompts\nprompt_list = [", "Live Subject Prompts\nlist"))
                .contains("line 17")
        );
        assert!(fault(&SMALL.replace("the snow", "<ink> style")).contains("which names a concept of its own"));
        assert!(fault("nothing").contains("line 1: is `nothing`"));
        assert_eq!(fault("Classes\na,b\n"), "p.txt: has nothing under `Object Prompts`");
    }

    #[test]
    fn different_catalogues_have_different_digests() {
        let all = Catalogue::parse(SMALL, Path::new("p.txt")).unwrap();
        let mut other = all.clone();
        other.subjects[0].class = "mug".into();
        assert_ne!(all.digest(), other.digest());
        let moved = Catalogue {
            object_prompts: [all.object_prompts.clone(), vec![all.live_prompts[0].clone()]].concat(),
            live_prompts: vec![all.live_prompts[1].clone()],
            ..all.clone()
        };
        assert_ne!(all.digest(), moved.digest());
    }
}
