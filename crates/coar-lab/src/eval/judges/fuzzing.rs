//! Entry points for `crate::fuzzing`.

use std::path::Path;

use super::config::{ClipConfig, DinoConfig, PatchConfig};
use super::encoder::EncoderConfig;
use super::preprocessor::{Family, Steps};
use super::tokenizer::{ClipTokenizer, whole_file};
use coar_core::image::RgbImage;

/// Ids and positions of the tokenizer's network.
const VOCABULARY: i64 = 600;
const POSITIONS: i64 = 77;
/// Image side of the preprocessing target in pixels.
pub(crate) const SIDE: i64 = 24;

fn check(encoder: &EncoderConfig, patches: &PatchConfig) {
    assert_eq!(encoder.hidden % encoder.heads, 0);
    assert!(encoder.layers > 0 && encoder.eps > 0.0);
    assert_eq!(patches.side % patches.patch, 0);
    assert!((1..=4096).contains(&patches.patches()));
}

/// Whether a configuration is accepted; sizes of an accepted one are consistent.
pub(crate) fn config(kind: u8, file: &Path) -> bool {
    match kind {
        0 => DinoConfig::read(file)
            .map(|config| check(&config.encoder, &config.patches))
            .is_ok(),
        1 => ClipConfig::read(file)
            .map(|config| {
                check(&config.vision, &config.patches);
                assert_eq!(config.text.hidden % config.text.heads, 0);
                assert!(config.end.is_none_or(|end| end < config.vocabulary));
            })
            .is_ok(),
        2 => prepare(Family::Vit, file),
        _ => prepare(Family::Clip, file),
    }
}

/// Accepted steps produce the network's input from any image, with finite numbers.
fn prepare(family: Family, file: &Path) -> bool {
    let Ok(steps) = Steps::read(file, family, SIDE) else {
        return false;
    };
    for (width, height) in [(9, 5), (1, 300)] {
        let picture = RgbImage {
            width,
            height,
            rgb: (0..3 * width * height).map(|at| (at * 37) as u8).collect(),
        };
        let pixels = steps.pixels(&[picture]).expect("the picture has its pixels");
        assert_eq!(pixels.size(), [1, 3, SIDE, SIDE]);
        assert!(pixels.isfinite().all().int64_value(&[]) == 1);
    }
    true
}

/// Whether `vocab.json` and `merges.txt` are accepted; texts then have ids within the vocabulary, between begin and
/// end.
pub(crate) fn tokenizer(vocab: &str, merges: &str) -> bool {
    let files = (Path::new("vocab.json"), Path::new("merges.txt"));
    let Ok(whole) = whole_file((files.0, vocab), (files.1, merges)) else {
        return false;
    };
    let Ok(tokenizer) = ClipTokenizer::from_text(&whole, VOCABULARY, POSITIONS, None) else {
        return false;
    };
    for text in ["A photo of  a dog's \u{fc}ber-toy, 3 <|endoftext|>\n", ""] {
        let Ok(ids) = tokenizer.ids(text) else { continue };
        assert!((2..=POSITIONS as usize).contains(&ids.len()));
        assert_eq!(
            (ids.first(), ids.last()),
            (Some(&tokenizer.begin), Some(&tokenizer.end))
        );
        assert!(ids.iter().all(|id| (0..VOCABULARY).contains(id)));
    }
    true
}
