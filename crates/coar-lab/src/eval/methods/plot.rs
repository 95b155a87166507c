//! Scatter and line plots as SVG text.

use std::fmt::Write;

const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
const COLOURS: [&str; 8] = [
    "#1b6ca8", "#c1440e", "#3b7d3b", "#7a4fa3", "#8a6d00", "#444444", "#b0306a", "#008080",
];

/// A named mark with the interval of its y value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mark {
    pub name: String,
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

/// Axis labels, and whether x is logarithmic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axes<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
    pub logarithmic: bool,
}

/// Escapes text for an SVG file.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Ticks of 1, 2 or 5 times a power of ten between two values.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = ((high - low) / 5.0).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|times| times * power)
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|at| at as f64 * step).collect()
}

/// Powers of ten between `10^low` and `10^high`, with 2 and 5 times each if that gives fewer than three.
fn powers(low: f64, high: f64) -> Vec<f64> {
    let powers = low.floor() as i32..=high.ceil() as i32;
    let within = |times: &[f64]| -> Vec<f64> {
        let all = powers
            .clone()
            .flat_map(|power| times.iter().map(move |times| times * 10f64.powi(power)));
        all.filter(|at| (low..=high).contains(&at.log10())).collect()
    };
    let whole = within(&[1.0]);
    if whole.len() < 3 {
        within(&[1.0, 2.0, 5.0])
    } else {
        whole
    }
}

/// Formats a number without the noise of binary fractions.
fn short(number: f64) -> String {
    if number >= 1e6 {
        return format!("{}M", short(number / 1e6));
    }
    if number >= 1e4 {
        return format!("{}k", short(number / 1e3));
    }
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn range(values: impl Iterator<Item = f64> + Clone, margin: f64) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    let room = ((high - low) * margin).max(1e-3);
    (low - room, high + room)
}

/// A scatter plot; marks with an invalid x (zero on a logarithmic axis) are omitted. `line` connects them.
pub(super) fn plot(axes: Axes, marks: &[Mark], line: bool) -> String {
    let place = |x: f64| if axes.logarithmic { x.log10() } else { x };
    let marks: Vec<&Mark> = marks
        .iter()
        .filter(|mark| place(mark.x).is_finite() && mark.y.is_finite())
        .collect();
    let mut out = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="18" font-weight="bold">{}</text>"#,
        escaped(axes.title)
    );
    if marks.is_empty() {
        return out + "</svg>\n";
    }
    let (x0, x1) = range(marks.iter().map(|mark| place(mark.x)), 0.1);
    let ends = marks.iter().flat_map(|mark| [mark.low, mark.high]);
    let (y0, y1) = range(ends.filter(|end| end.is_finite()), 0.08);
    let x = |value: f64| LEFT + (place(value) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let (floor, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let _ = write!(
        out,
        r##"<path d="M{LEFT},{TOP}V{floor}H{right}" fill="none" stroke="#444"/>"##
    );
    let across = match axes.logarithmic {
        true => powers(x0, x1),
        false => ticks(x0, x1),
    };
    for at in across {
        let (px, label) = (x(at), short(at));
        let _ = write!(
            out,
            r##"<path d="M{px:.1},{TOP}V{floor}" stroke="#eee"/><text x="{px:.1}" y="{:.1}" text-anchor="middle">{label}</text>"##,
            floor + 15.0
        );
    }
    for at in ticks(y0, y1) {
        let (py, label) = (y(at), short(at));
        let _ = write!(
            out,
            r##"<path d="M{LEFT},{py:.1}H{right}" stroke="#eee"/><text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"##,
            LEFT - 5.0,
            py + 4.0
        );
    }
    let _ = write!(
        out,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text><text x="14" y="{3:.1}" text-anchor="middle" transform="rotate(-90 14 {3:.1})">{4}</text>"#,
        (LEFT + right) / 2.0,
        HEIGHT - 8.0,
        escaped(axes.x),
        (TOP + floor) / 2.0,
        escaped(axes.y),
    );
    if line {
        let path: Vec<String> = marks
            .iter()
            .map(|mark| format!("{:.1},{:.1}", x(mark.x), y(mark.y)))
            .collect();
        let _ = write!(out, r##"<path d="M{}" fill="none" stroke="#1b6ca8"/>"##, path.join("L"));
    }
    let mut taken: Vec<(f64, f64)> = Vec::new();
    for (mark, colour) in marks.iter().zip(COLOURS.iter().cycle()) {
        let (px, py) = (x(mark.x), y(mark.y));
        let _ = write!(
            out,
            r#"<path d="M{px:.1},{:.1}V{:.1}" stroke="{colour}" stroke-width="1.4"/><circle cx="{px:.1}" cy="{py:.1}" r="4" fill="{colour}"/>"#,
            y(mark.low),
            y(mark.high),
        );
        // A label moves down until it does not overlap others.
        let mut at = py - 5.0;
        while taken
            .iter()
            .any(|&(tx, ty)| (tx - px).abs() < 110.0 && (ty - at).abs() < 12.0)
        {
            at += 12.0;
        }
        taken.push((px, at));
        let (lx, anchor) = if px > right - 110.0 {
            (px - 7.0, "end")
        } else {
            (px + 7.0, "start")
        };
        let _ = write!(
            out,
            r#"<text x="{lx:.1}" y="{at:.1}" fill="{colour}" text-anchor="{anchor}">{}</text>"#,
            escaped(&mark.name)
        );
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_valid_mark_is_plotted_once() {
        let mark = |name: &str, x: f64| Mark {
            name: name.to_owned(),
            x,
            y: 0.5,
            low: 0.4,
            high: 0.6,
        };
        let axes = Axes {
            title: "a < b",
            x: "x",
            y: "y",
            logarithmic: true,
        };
        let svg = plot(axes, &[mark("zero", 0.0), mark("<one>", 1.0), mark("many", 3e6)], false);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("&lt;one&gt;") && svg.contains("a &lt; b") && !svg.contains("zero"));
        assert!(plot(axes, &[], false).ends_with("</svg>\n"));
        assert_eq!(powers(0.5, 4.0), [10.0, 100.0, 1000.0, 10_000.0]);
        assert_eq!(powers(1.1, 2.2), [20.0, 50.0, 100.0]);
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
    }
}
