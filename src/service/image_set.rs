//! Which files of a folder or an archive are reference images, and which are their captions.

use std::cmp::Ordering;

/// Extensions of image files. Unsupported kinds are included: their error message explains what to do.
const IMAGES: [&str; 12] = [
    "png", "jpg", "jpeg", "jfif", "webp", "heic", "heif", "avif", "gif", "tif", "tiff", "bmp",
];
/// Files that operating systems and archivers leave behind, in addition to those that begin with a dot.
const SYSTEM: [&str; 3] = ["thumbs.db", "desktop.ini", "__macosx"];

/// The images of a list of names. Files are indices into the list.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ImageSet {
    /// Images ordered by name, `2.png` before `10.png`, each with its caption: `NAME.txt` is that of `NAME.png`.
    pub images: Vec<(usize, Option<usize>)>,
    /// Everything else: hidden and system files, folders, files of other kinds, and texts without an image.
    pub skipped: Vec<usize>,
}

/// The name without its extension, and the extension in lower case.
fn split(name: &str) -> (&str, String) {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[file..].rfind('.').filter(|dot| *dot > 0) {
        Some(dot) => (&name[..file + dot], name[file + dot + 1..].to_lowercase()),
        None => (name, String::new()),
    }
}

fn is_hidden(name: &str) -> bool {
    let part = |part: &str| part.starts_with('.') || SYSTEM.contains(&part.to_lowercase().as_str());
    name.ends_with('/') || name.split('/').any(part)
}

impl ImageSet {
    /// Sorts file names; `/` separates folders, and ends a folder's own name.
    pub fn of(names: &[String]) -> Self {
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.sort_by(|&one, &other| natural(&names[one], &names[other]));
        let (mut set, mut texts) = (Self::default(), Vec::new());
        for place in order {
            let name = &names[place];
            match split(name).1.as_str() {
                _ if is_hidden(name) => set.skipped.push(place),
                "txt" => texts.push(place),
                kind if IMAGES.contains(&kind) => set.images.push((place, None)),
                _ => set.skipped.push(place),
            }
        }
        for (image, caption) in &mut set.images {
            let stem = split(&names[*image]).0;
            *caption = texts.iter().copied().find(|&text| split(&names[text]).0 == stem);
        }
        let used = |text: &usize| set.images.iter().any(|(_, caption)| *caption == Some(*text));
        let unused: Vec<usize> = texts.into_iter().filter(|text| !used(text)).collect();
        set.skipped.extend(unused);
        set
    }
}

/// A caption file's text, in one line.
pub fn caption_line(text: &str) -> String {
    let words: Vec<&str> = text.trim_start_matches('\u{feff}').split_whitespace().collect();
    words.join(" ")
}

/// Orders numbers by their value: `2.png` comes before `10.png`.
fn natural(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one, other);
    loop {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (here, there) = (digits(one), digits(other));
        if here > 0 && there > 0 {
            let (number, rest) = one.split_at(here);
            let (against, against_rest) = other.split_at(there);
            let [a, b] = [number, against].map(|number| number.trim_start_matches('0'));
            match a.len().cmp(&b.len()).then(a.cmp(b)).then(here.cmp(&there)) {
                Ordering::Equal => (one, other) = (rest, against_rest),
                unequal => return unequal,
            }
            continue;
        }
        let (mut rest, mut against) = (one.chars(), other.chars());
        match (rest.next(), against.next()) {
            (Some(a), Some(b)) if a == b => (one, other) = (rest.as_str(), against.as_str()),
            (None, None) => return Ordering::Equal,
            (a, b) => return a.cmp(&b),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_have_their_captions() {
        let names = [
            "set/",
            "set/10.png",
            "set/2.JPG",
            "set/1.webp",
            "set/1.txt",
            "set/10.txt",
            "other/2.txt",
            "list.csv",
            ".DS_Store",
            "__MACOSX/set/._1.png",
            "set/Thumbs.db",
            ".git/1.png",
            "set/3.heic",
            ".png",
        ]
        .map(str::to_owned);
        let set = ImageSet::of(&names);
        let shown: Vec<_> = set
            .images
            .iter()
            .map(|(image, caption)| (names[*image].as_str(), caption.map(|text| names[text].as_str())))
            .collect();
        assert_eq!(
            shown,
            [
                ("set/1.webp", Some("set/1.txt")),
                ("set/2.JPG", None),
                ("set/3.heic", None),
                ("set/10.png", Some("set/10.txt"))
            ]
        );
        assert_eq!(set.skipped.len(), names.len() - 6);
        assert_eq!(caption_line("\u{feff} on the\r\n beach\n"), "on the beach");
    }

    #[test]
    fn numbers_are_compared_by_value() {
        let mut names = ["img10", "img2", "Img1", "img02", "img", "a", "img2b", "2", "10"];
        names.sort_by(|one, other| natural(one, other));
        assert_eq!(
            names,
            ["2", "10", "Img1", "a", "img", "img2", "img2b", "img02", "img10"]
        );
    }
}
