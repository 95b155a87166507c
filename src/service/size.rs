//! Chooses the size of images.

use crate::config::SizePolicy;
use coar_core::error::Error;

/// Number of sizes in an error message.
const NAMED: usize = 6;

/// The distance of a size from the requested one: first in aspect ratio, then in area.
fn distance(asked: (u32, u32), size: (u32, u32)) -> (f64, f64) {
    let ratio = |(width, height): (u32, u32)| (f64::from(width) / f64::from(height)).ln();
    let area = |(width, height): (u32, u32)| (f64::from(width) * f64::from(height)).ln();
    ((ratio(asked) - ratio(size)).abs(), (area(asked) - area(size)).abs())
}

/// The size to draw; the first of `sizes` is the default.
///
/// # Errors
/// `invalid_size`, with the nearest sizes first.
pub(super) fn choose(asked: Option<(u32, u32)>, sizes: &[(u32, u32)], policy: SizePolicy) -> Result<(u32, u32), Error> {
    let Some((width, height)) = asked else {
        return Ok(sizes[0]);
    };
    if sizes.contains(&(width, height)) {
        return Ok((width, height));
    }
    let invalid = |problem: String| Err(Error::field("invalid_size", "size", problem));
    if width == 0 || height == 0 {
        return invalid(format!("is {width}x{height}; expected two sides of at least one pixel"));
    }
    let mut nearest: Vec<_> = sizes
        .iter()
        .map(|&size| (distance((width, height), size), size))
        .collect();
    nearest.sort_by(|(one, _), (other, _)| one.0.total_cmp(&other.0).then(one.1.total_cmp(&other.1)));
    match policy {
        SizePolicy::Nearest => Ok(nearest[0].1),
        SizePolicy::Exact => {
            let named: Vec<String> = nearest.iter().map(|(_, (w, h))| format!("{w}x{h}")).collect();
            let more = match named.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(", and {more} more (`GET /v1/models`)"),
            };
            let named = named[..named.len().min(NAMED)].join(", ");
            invalid(format!(
                "is {width}x{height}; this model draws, the nearest first, {named}{more}, or `auto`"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [(u32, u32); 8] = [
        (96, 96),
        (128, 64),
        (64, 128),
        (104, 80),
        (80, 104),
        (112, 72),
        (72, 112),
        (120, 72),
    ];

    #[test]
    fn the_nearest_has_the_nearest_aspect_ratio() {
        let nearest = |asked| choose(Some(asked), &SIZES, SizePolicy::Nearest).unwrap();
        assert_eq!(nearest((1024, 1024)), (96, 96));
        assert_eq!(nearest((1792, 1024)), (120, 72));
        assert_eq!(nearest((1024, 1536)), (72, 112));
        assert_eq!(nearest((u32::MAX, 1)), (128, 64));
        assert_eq!(nearest((64, 128)), (64, 128));
        // Among equal ratios the one with the nearest area.
        let sizes = [(96, 96), (48, 48), (192, 192)];
        assert_eq!(
            choose(Some((180, 180)), &sizes, SizePolicy::Nearest).unwrap(),
            (192, 192)
        );
        assert_eq!(choose(None, &SIZES, SizePolicy::Exact).unwrap(), (96, 96));
    }

    #[test]
    fn a_refusal_names_the_nearest_first() {
        let error = choose(Some((1792, 1024)), &SIZES, SizePolicy::Exact).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), ("invalid_size", Some("size")));
        assert!(
            error.message.contains("the nearest first, 120x72, "),
            "{}",
            error.message
        );
        assert!(error.message.contains("and 2 more"), "{}", error.message);
        for policy in [SizePolicy::Exact, SizePolicy::Nearest] {
            assert_eq!(choose(Some((0, 64)), &SIZES, policy).unwrap_err().code, "invalid_size");
        }
    }
}
