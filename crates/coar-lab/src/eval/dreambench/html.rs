//! The page: one self-contained file without scripts. Images are thumbnails (WebP) as data URLs, with the names of
//! the originals beside them.

use std::io::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::folder::OutFolder;
use super::judging::read;
use super::metric::{Fidelity, Scores};
use super::report::{DrawnPicture, Results, SubjectResults};
use coar_core::image::{ImageError, ImageLimits, OutputFormat, RgbImage, decode, encode};
use coar_engine::model::ModelError;
use coar_engine::model::preprocessing::{Filter, resize};

/// The longest side of a thumbnail, in pixels.
const SIDE: u32 = 160;
/// The minimum side of a generated image in the page.
const LEAST: u32 = 128;
/// WebP quality of a thumbnail.
const QUALITY: u8 = 82;

/// Escapes text for HTML, in elements and in quoted attributes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// An image's `img` element.
fn image(picture: &RgbImage, title: &str) -> Result<String, ImageError> {
    let (width, height) = small(picture.width, picture.height);
    let copy = match (width, height) == (picture.width, picture.height) {
        true => picture.clone(),
        false => resize(picture, width, height, Filter::Bicubic),
    };
    let bytes = STANDARD.encode(encode(&copy, OutputFormat::LossyWebP(QUALITY), &[])?);
    let title = escaped(title);
    Ok(format!(
        "<img src=\"data:image/webp;base64,{bytes}\" width=\"{width}\" height=\"{height}\" alt=\"{title}\" title=\"{title}\">"
    ))
}

/// Size of a thumbnail: in proportion, never larger than the image.
fn small(width: u32, height: u32) -> (u32, u32) {
    let longest = width.max(height);
    if longest <= SIDE {
        return (width, height);
    }
    let side = |side: u32| ((u64::from(side) * u64::from(SIDE) + u64::from(longest) / 2) / u64::from(longest)).max(1);
    (side(width) as u32, side(height) as u32)
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"))
}

/// Five cells: three scores, two for the real images.
fn cells(scores: Option<Scores>, real: Option<Fidelity>) -> String {
    [
        scores.map(|s| s.dino),
        scores.map(|s| s.clip_i),
        scores.map(|s| s.clip_t),
        real.map(|r| r.dino),
        real.map(|r| r.clip_i),
    ]
    .map(|value| format!("<td>{}</td>", number(value)))
    .concat()
}

/// Writes the page. `progress` is called with the number of images so far.
pub(super) fn write(
    page: &Path,
    results: &Results,
    folder: &OutFolder,
    progress: &mut dyn FnMut(u64),
) -> Result<(), ModelError> {
    folder.write_with(page, |out| {
        out.write_all(head(results).as_bytes())?;
        for subject in &results.subjects {
            let section = section(subject, results, folder).map_err(std::io::Error::other)?;
            out.write_all(section.as_bytes())?;
            progress(subject.pictures.len() as u64);
        }
        out.write_all(b"</main>\n</body>\n</html>\n")
    })
}

fn head(results: &Results) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>DreamBench</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n<main>\n<h1>DreamBench</h1>\n",
        include_str!("report.css")
    );
    page.push_str(&format!(
        "<p class=\"quiet\">{} subjects, {} of {} images, seed {}, model {}</p>\n",
        results.subjects.len(),
        results.drawn,
        results.planned,
        results.settings.seed,
        escaped(&results.settings.model.chars().take(12).collect::<String>()),
    ));
    for warning in &results.warnings {
        page.push_str(&format!(
            "<p class=\"warning\" role=\"note\">{}</p>\n",
            escaped(warning)
        ));
    }
    page.push_str(&totals(results));
    page.push_str(&table(results));
    page.push_str(&settings(results));
    page
}

/// The three figures of the paper's table; empty without scores.
fn totals(results: &Results) -> String {
    let Some(total) = results.total else {
        return String::new();
    };
    let card = |name: &str, value: f64, beside: String| {
        format!("<div>{name}<b>{value:.3}</b><span class=\"quiet\">{beside}</span></div>\n")
    };
    let real = |value: Option<f64>| format!("real images {}", number(value));
    [
        "<div class=\"totals\">\n".to_owned(),
        card("DINO", total.dino, real(results.real.map(|real| real.dino))),
        card("CLIP-I", total.clip_i, real(results.real.map(|real| real.clip_i))),
        card("CLIP-T", total.clip_t, "prompt against image".to_owned()),
        "</div>\n".to_owned(),
    ]
    .concat()
}

fn table(results: &Results) -> String {
    let mut table = String::from(
        "<div class=\"wide\"><table>\n<thead><tr><th>Subject</th><th>Class</th><th>Pictures</th><th>DINO</th><th>CLIP-I</th>\
         <th>CLIP-T</th><th>real DINO</th><th>real CLIP-I</th></tr></thead>\n<tbody>\n",
    );
    table.push_str(&format!(
        "<tr class=\"mean\"><td>Mean of the subjects</td><td></td><td>{}</td>{}</tr>\n",
        results.drawn,
        cells(results.total, results.real)
    ));
    for subject in &results.subjects {
        let name = escaped(&subject.name);
        table.push_str(&format!(
            "<tr><td><a href=\"#{name}\">{name}</a></td><td>{}</td><td>{}</td>{}</tr>\n",
            escaped(&subject.class),
            subject.pictures.len(),
            cells(subject.scores, subject.real)
        ));
    }
    table.push_str("</tbody></table></div>\n");
    table
}

fn settings(results: &Results) -> String {
    let mut list = String::from("<details><summary>Settings</summary><dl>\n");
    let mut entry = |name: &str, value: &str| {
        list.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", escaped(name), escaped(value)));
    };
    let value = serde_json::to_value(&results.settings).unwrap_or_default();
    for (name, value) in value.as_object().into_iter().flatten() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        entry(name, &text);
    }
    if let Some(judges) = &results.judges {
        entry("DINO's weights", &judges.dino);
        entry("CLIP's weights", &judges.clip);
    }
    list.push_str("</dl></details>\n");
    list
}

/// A subject: its real images, then every prompt with its images.
fn section(subject: &SubjectResults, results: &Results, folder: &OutFolder) -> Result<String, ModelError> {
    let name = escaped(&subject.name);
    let trained = subject.training.as_ref().and_then(|record| record.parameters);
    let trained = trained.map_or_else(String::new, |parameters| format!(", {parameters} trained numbers"));
    let mut section = format!(
        "<section id=\"{name}\">\n<div class=\"head\"><h2>{name}</h2><span class=\"quiet\">{}{trained}</span>{}</div>\n\
         <h3>Real images</h3>\n<div class=\"row\">\n",
        escaped(&subject.class),
        figures(subject),
    );
    for file in &subject.references {
        let bytes = std::fs::read(file).map_err(|error| ModelError::file(file, error))?;
        let element = decode(&bytes, &ImageLimits::default())
            .and_then(|picture| image(&picture, &file.file_name().unwrap_or_default().to_string_lossy()))
            .map_err(|error| ModelError::file(file, error))?;
        section.push_str(&element);
        section.push('\n');
    }
    // At least two side by side, for a prompt's text; slightly reduced, so that two prompts of four images fit
    // beside each other.
    let across = results.settings.pictures.clamp(2, 4);
    let card = across * results.settings.width.max(results.settings.height).min(LEAST);
    section.push_str(&format!(
        "</div>\n<h3>Drawn pictures</h3>\n<div class=\"prompts\" style=\"--card: {card}px; --across: {across}\">\n"
    ));
    for pictures in subject.pictures.chunk_by(|a, b| a.prompt_index == b.prompt_index) {
        section.push_str(&prompt(pictures, folder)?);
    }
    section.push_str("</div>\n</section>\n");
    Ok(section)
}

/// A subject's scores in a line.
fn figures(subject: &SubjectResults) -> String {
    let Some(scores) = subject.scores else {
        return String::new();
    };
    let real = |value: Option<f64>| value.map_or_else(String::new, |value| format!(" (real {value:.3})"));
    format!(
        "<span class=\"quiet\">DINO {:.3}{}, CLIP-I {:.3}{}, CLIP-T {:.3}</span>",
        scores.dino,
        real(subject.real.map(|real| real.dino)),
        scores.clip_i,
        real(subject.real.map(|real| real.clip_i)),
        scores.clip_t,
    )
}

/// A prompt with its images and their mean scores.
fn prompt(pictures: &[DrawnPicture], folder: &OutFolder) -> Result<String, ModelError> {
    let Some(first) = pictures.first() else {
        return Ok(String::new());
    };
    let mean = Scores::mean_of(
        pictures
            .iter()
            .filter_map(|picture| picture.scores.as_ref())
            .collect::<Vec<_>>(),
    );
    let mean = mean.map_or_else(String::new, |mean| {
        format!(
            "<span>DINO {:.3}, CLIP-I {:.3}, CLIP-T {:.3}</span>",
            mean.dino, mean.clip_i, mean.clip_t
        )
    });
    let mut figure = format!(
        "<figure><figcaption>{}{mean}</figcaption><div class=\"row\">\n",
        escaped(&first.text)
    );
    for drawn in pictures {
        let file = folder.dir().join(&drawn.file);
        let element = image(&read(&file)?, &drawn.file).map_err(|error| ModelError::file(&file, error))?;
        figure.push_str(&element);
        figure.push('\n');
    }
    figure.push_str("</div></figure>\n");
    Ok(figure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::dreambench::report::tests::some;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escaped("<a b='c'>\"&amp;"), "&lt;a b=&#39;c&#39;&gt;&quot;&amp;amp;");
        let mut results = some("pocket", (8, 16));
        results.subjects[0].class = "<script>alert(1)</script>".into();
        results.settings.model = "\"><img onerror=x>".into();
        results.warnings.push("<b>".into());
        let page = head(&results);
        for markup in ["<script", "<img", "<b>&lt;"] {
            assert!(!page.replace("<b>0.", "").contains(markup), "{markup}");
        }
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    }

    #[test]
    fn thumbnails_keep_proportions_and_are_never_larger() {
        assert_eq!(small(96, 96), (96, 96));
        assert_eq!(small(1600, 800), (160, 80));
        assert_eq!(small(333, 1000), (53, 160));
        assert_eq!(small(10_000, 1), (160, 1));
    }

    #[test]
    fn the_page_has_totals_and_warnings_first() {
        let page = head(&some("pocket", (8, 16)));
        let at = |what: &str| page.find(what).unwrap_or_else(|| panic!("{what} is not in the page"));
        assert!(at("These figures mean nothing") < at("<b>0.500</b>"));
        assert!(at("<b>0.500</b>") < at("<a href=\"#rc_car\">rc_car</a>"));
        assert!(page.contains("<td>0.750</td><td>0.375</td><td>0.500</td><td>–</td><td>–</td>"));
    }
}
