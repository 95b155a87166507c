//! Errors of a registration's images, with the index and the file's name.

use coar_core::error::{Error, ErrorKind};
use coar_core::image::ImageError;

/// The error of the image at `index`, from 0; `file_name` is empty if it is not known.
pub(super) fn image_error(error: &ImageError, index: usize, file_name: &str) -> Error {
    let (code, kind, limit) = match error {
        ImageError::Unsupported(kind) if kind.is_jpeg() => ("unsupported_image", ErrorKind::Invalid, None),
        ImageError::UnknownFormat | ImageError::Unsupported(_) => ("unknown_image_format", ErrorKind::Invalid, None),
        ImageError::TooManyBytes { limit, .. } => ("image_too_large", ErrorKind::TooLarge, Some(*limit as u64)),
        ImageError::TooManyPixels { pixels, .. } => ("image_too_many_pixels", ErrorKind::Invalid, Some(*pixels)),
        ImageError::EmptyFile | ImageError::NoPixels { .. } | ImageError::Truncated { .. } | ImageError::Damaged(_) => {
            ("damaged_image", ErrorKind::Invalid, None)
        }
    };
    let fault = image_fault(code, index, file_name, error.to_string()).of_kind(kind);
    match limit {
        Some(limit) => fault.limit(limit),
        None => fault,
    }
}

/// An error of the image at `index`, from 0; the message contains its file's name.
pub fn image_fault(code: &'static str, index: usize, file_name: &str, problem: impl AsRef<str>) -> Error {
    let problem = problem.as_ref();
    let problem = match short_name(file_name) {
        name if name.is_empty() => problem.to_owned(),
        name => format!("({name}) {problem}"),
    };
    Error::field(code, format!("images[{index}]"), problem)
}

/// A file's name without its folders, with unprintable characters escaped, and of bounded length: its beginning, and
/// its end with the extension.
fn short_name(file_name: &str) -> String {
    const HEAD: usize = 40;
    const TAIL: usize = 20;
    let name = file_name.rsplit(['/', '\\']).next().unwrap_or_default();
    let characters: Vec<char> = match name.char_indices().nth(HEAD + TAIL) {
        None => name.chars().collect(),
        Some(_) => {
            let mut tail: Vec<char> = name.chars().rev().take(TAIL).collect();
            tail.reverse();
            name.chars().take(HEAD).chain(['…']).chain(tail).collect()
        }
    };
    characters
        .into_iter()
        .map(|character| match character {
            // Combining accents, as macOS writes names.
            '"' | '\'' | '\u{300}'..='\u{36f}' | '\u{3099}' | '\u{309a}' => character.to_string(),
            // Control characters, and those that change the direction of text.
            other => other.escape_debug().to_string(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use coar_core::image::Unsupported;

    use super::*;

    #[test]
    fn the_place_and_the_name_are_in_the_message() {
        let gif = ImageError::Unsupported(Unsupported::Gif);
        let error = image_error(&gif, 6, "C:\\Users\\ann\\holiday.jpg");
        assert_eq!(error.field.as_deref(), Some("images[6]"));
        assert_eq!(error.code, "unknown_image_format");
        assert_eq!(
            error.message,
            "`images[6]` (holiday.jpg) is a GIF image; save it as PNG"
        );
        let error = image_error(&ImageError::EmptyFile, 0, "");
        assert_eq!(
            (error.message.as_str(), error.code),
            ("`images[0]` is an empty file", "damaged_image")
        );
        let cmyk = image_error(&ImageError::Unsupported(Unsupported::CmykJpeg), 1, "a.jpg");
        assert_eq!(cmyk.code, "unsupported_image");
    }

    #[test]
    fn names_are_printable_and_short() {
        for (name, shown) in [
            ("folder/cat.png", "cat.png"),
            ("猫.png", "猫.png"),
            ("cafe\u{301}.png", "cafe\u{301}.png"),
            ("it's.png", "it's.png"),
            ("a\nb\u{1b}[31m.png", "a\\nb\\u{1b}[31m.png"),
            ("\u{202e}gnp.exe", "\\u{202e}gnp.exe"),
            ("folder/", ""),
        ] {
            assert_eq!(short_name(name), shown);
        }
        let long = format!("{}.png", "x".repeat(300));
        assert_eq!(short_name(&long), format!("{}…{}.png", "x".repeat(40), "x".repeat(16)));
        assert!(short_name(&"\u{1b}".repeat(300)).len() < 500);
    }
}
