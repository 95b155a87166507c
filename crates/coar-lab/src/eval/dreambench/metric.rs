//! Scores from embeddings, as a pure function: every figure of the table is one of these means.
//!
//! Embeddings are rows of any non-zero length; they need not be normalised. All sums are in f64.

use serde::Serialize;

/// Similarity to a subject's real images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fidelity {
    pub dino: f64,
    pub clip_i: f64,
}

/// The three figures of the paper's table, for an image or as means over many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    pub dino: f64,
    pub clip_i: f64,
    pub clip_t: f64,
}

/// Cosine of two embeddings; 0 if one of them is all zeros.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// The mean of numbers; `None` if there are none.
pub fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values
        .into_iter()
        .fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// For each generated image the mean cosine with every real image of its subject. The mean of these over a subject's
/// images is the paper's average over pairs of a generated and a real image.
pub fn against_references(drawn: &[Vec<f32>], references: &[Vec<f32>]) -> Vec<f64> {
    let of = |picture: &Vec<f32>| mean(references.iter().map(|real| cosine(picture, real))).unwrap_or(0.0);
    drawn.iter().map(of).collect()
}

/// The mean cosine between different real images of one subject: the table's first row. `None` for a single image.
pub fn among_references(references: &[Vec<f32>]) -> Option<f64> {
    let pairs = references
        .iter()
        .enumerate()
        .flat_map(|(index, a)| references[index + 1..].iter().map(move |b| cosine(a, b)));
    mean(pairs)
}

/// For each generated image its cosine with the embedding of its prompt.
pub fn to_text(drawn: &[Vec<f32>], prompts: &[Vec<f32>]) -> Vec<f64> {
    drawn
        .iter()
        .zip(prompts)
        .map(|(picture, text)| cosine(picture, text))
        .collect()
}

impl Scores {
    /// Means over images, or over subjects; `None` for none.
    pub fn mean_of<'a>(all: impl IntoIterator<Item = &'a Scores> + Clone) -> Option<Scores> {
        let of = |value: fn(&Scores) -> f64| mean(all.clone().into_iter().map(value));
        Some(Scores {
            dino: of(|scores| scores.dino)?,
            clip_i: of(|scores| scores.clip_i)?,
            clip_t: of(|scores| scores.clip_t)?,
        })
    }
}

impl Fidelity {
    /// Means over subjects; `None` for none.
    pub fn mean_of<'a>(all: impl IntoIterator<Item = &'a Fidelity> + Clone) -> Option<Fidelity> {
        let of = |value: fn(&Fidelity) -> f64| mean(all.clone().into_iter().map(value));
        Some(Fidelity {
            dino: of(|scores| scores.dino)?,
            clip_i: of(|scores| scores.clip_i)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    #[test]
    fn cosine_matches_known_values() {
        assert!(close(cosine(&[3.0, 4.0], &[3.0, 4.0]), 1.0));
        assert!(close(cosine(&[1.0, 0.0], &[0.0, 2.0]), 0.0));
        assert!(close(cosine(&[1.0, 0.0], &[-5.0, 0.0]), -1.0));
        assert!(close(cosine(&[1.0, 0.0], &[3.0, 4.0]), 0.6));
        assert_eq!(cosine(&[0.0, 0.0], &[3.0, 4.0]), 0.0);
    }

    #[test]
    fn generated_image_is_compared_with_every_real_one() {
        // With (1, 0): 1 and 0.6; with (0, 1): 0 and 0.8.
        let real = [vec![1.0, 0.0], vec![3.0, 4.0]];
        let scores = against_references(&[vec![2.0, 0.0], vec![0.0, 1.0]], &real);
        assert!(close(scores[0], 0.8) && close(scores[1], 0.4), "{scores:?}");
        // The mean over images is the mean over the four pairs.
        assert!(close(mean(scores).unwrap(), (1.0 + 0.6 + 0.0 + 0.8) / 4.0));
    }

    #[test]
    fn real_images_are_not_compared_with_themselves() {
        // Pairs: 0.6, 0, 0.8.
        let real = [vec![1.0, 0.0], vec![3.0, 4.0], vec![0.0, 1.0]];
        assert!(close(among_references(&real).unwrap(), 1.4 / 3.0));
        assert!(close(among_references(&real[..2]).unwrap(), 0.6));
        assert_eq!(among_references(&real[..1]), None);
    }

    #[test]
    fn each_image_uses_its_own_prompt() {
        let scores = to_text(&[vec![1.0, 0.0], vec![0.0, 1.0]], &[vec![3.0, 4.0], vec![3.0, 4.0]]);
        assert!(close(scores[0], 0.6) && close(scores[1], 0.8));
    }

    #[test]
    fn means_of_scores_are_by_column() {
        let scores = |dino, clip_i, clip_t| Scores { dino, clip_i, clip_t };
        let all = [scores(0.0, 0.5, 1.0), scores(1.0, 0.25, 0.5)];
        assert_eq!(Scores::mean_of(&all), Some(scores(0.5, 0.375, 0.75)));
        assert_eq!(Scores::mean_of(&[]), None);
        assert_eq!(Fidelity::mean_of(&[]), None);
    }
}
