//! Plots of the command's JSON output, as SVG.

use std::collections::BTreeMap;

use serde_json::Value;

use super::FleetError;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 40.0;
const COLOURS: [&str; 6] = ["#1b6ca8", "#c1440e", "#3b7d3b", "#7a4fa3", "#8a6d00", "#444444"];

/// Points by the name of their line.
type Lines = BTreeMap<String, Vec<(f64, f64)>>;

/// Axis labels.
struct Axes {
    title: String,
    x: &'static str,
    y: &'static str,
}

/// Plots the output of `coar-lab simulate plan --json` (workers by images per second) or `coar-lab simulate run
/// --json` (p95 by images per second and worker).
///
/// # Errors
/// When it is neither, or has no points.
pub fn chart(report: &Value) -> Result<String, FleetError> {
    let (axes, lines) = match report["kind"].as_str() {
        Some("plan") => planned(report),
        Some("run") => ran(report),
        _ => return Err(FleetError::new("kind", "must be `plan` or `run`")),
    };
    if lines.values().all(Vec::is_empty) {
        return Err(FleetError::new("rows", "must have points"));
    }
    Ok(draw(&axes, &lines))
}

fn rows(report: &Value) -> impl Iterator<Item = &Value> {
    report["rows"].as_array().into_iter().flatten()
}

fn title(report: &Value, what: &str) -> String {
    let (name, origin) = (report["times"].as_str(), report["origin"].as_str());
    format!("{what}; {} ({})", name.unwrap_or("?"), origin.unwrap_or("?"))
}

fn planned(report: &Value) -> (Axes, Lines) {
    let mut lines = Lines::new();
    for row in rows(report) {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        if let Some(workers) = row["workers"].as_f64() {
            let name = format!("p95 {} s, {} trainings/h", number("p95"), number("trainings_per_hour"));
            let point = (number("pictures_per_second"), workers);
            lines.entry(name).or_default().push(point);
        }
    }
    let axes = Axes {
        title: title(report, "simulated"),
        x: "pictures per second",
        y: "workers",
    };
    (axes, lines)
}

fn ran(report: &Value) -> (Axes, Lines) {
    let mut lines = Lines::new();
    for row in rows(report) {
        let number = |at: &Value| at.as_f64().unwrap_or(f64::NAN);
        let text = |key: &str| row[key].as_str().unwrap_or("").replace('_', " ");
        let workers = number(&row["report"]["workers"]);
        let name = format!("{workers} workers, {}", text("policy"));
        let load = number(&row["pictures_per_second"]) / workers;
        let point = (load, number(&row["report"]["latency"]["p95"]));
        lines.entry(name).or_default().push(point);
    }
    let axes = Axes {
        title: title(report, "simulated"),
        x: "pictures per second and worker",
        y: "p95 in seconds",
    };
    (axes, lines)
}

/// A step of 1, 2 or 5 times a power of ten, with about five up to `largest`.
fn step(largest: f64) -> f64 {
    let rough = largest.max(1e-9) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * power >= rough);
    times.unwrap_or(10.0) * power
}

fn largest(lines: &Lines, of: fn(&(f64, f64)) -> f64) -> f64 {
    lines.values().flatten().map(of).fold(0.0, f64::max)
}

/// Escapes text for an SVG file.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn draw(axes: &Axes, lines: &Lines) -> String {
    let (right, top) = (largest(lines, |point| point.0), 1.05 * largest(lines, |point| point.1));
    let x = |value: f64| LEFT + value / right.max(1e-9) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / top.max(1e-9) * (HEIGHT - TOP - BOTTOM);
    let mut out = vec![
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>"#
        ),
        format!(
            r#"<text x="{LEFT}" y="16" font-weight="bold">{}</text>"#,
            escaped(&axes.title)
        ),
        format!(
            r##"<path d="M{LEFT},{TOP}V{:.1}H{:.1}" fill="none" stroke="#444"/>"##,
            y(0.0),
            x(right)
        ),
        format!(
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{}</text>"#,
            x(right / 2.0),
            HEIGHT - 8.0,
            axes.x
        ),
        format!(
            r#"<text x="12" y="{0:.1}" text-anchor="middle" transform="rotate(-90 12 {0:.1})">{1}</text>"#,
            y(top / 2.0),
            axes.y
        ),
    ];
    out.extend(ticks(right).map(|at| {
        let label = short(at);
        format!(
            r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
            x(at),
            y(0.0) + 14.0
        )
    }));
    out.extend(ticks(top).map(|at| {
        let label = short(at);
        format!(
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
            LEFT - 5.0,
            y(at) + 3.0
        )
    }));
    for (at, ((name, points), colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let path: Vec<String> = points
            .iter()
            .map(|&(a, b)| format!("{:.1},{:.1}", x(a), y(b)))
            .collect();
        let path = path.join("L");
        out.push(format!(
            r#"<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>"#
        ));
        out.extend(
            points
                .iter()
                .map(|&(a, b)| format!(r#"<circle cx="{:.1}" cy="{:.1}" r="2.4" fill="{colour}"/>"#, x(a), y(b))),
        );
        out.push(format!(
            r#"<text x="{:.1}" y="{:.1}" fill="{colour}">{}</text>"#,
            x(right) + 12.0,
            TOP + 10.0 + 14.0 * at as f64,
            escaped(name)
        ));
    }
    out.push("</svg>\n".to_owned());
    out.join("\n")
}

fn ticks(largest: f64) -> impl Iterator<Item = f64> {
    let step = step(largest);
    (0..=(largest / step) as u32).map(move |at| f64::from(at) * step)
}

/// Without the noise of binary fractions.
fn short(number: f64) -> String {
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_row_is_a_point_and_other_json_is_rejected() {
        let row = |rate: f64, workers: u32| json!({"pictures_per_second": rate, "trainings_per_hour": 0.0, "p95": 20.0, "workers": workers});
        let report =
            json!({"kind": "plan", "times": "a <b>", "origin": "estimate", "rows": [row(1.0, 1), row(2.0, 2)]});
        let svg = chart(&report).unwrap();
        assert_eq!((svg.matches("<circle").count(), svg.matches("<b>").count()), (2, 0));
        assert_eq!(step(47.0), 10.0);
        for other in [json!({}), json!({"kind": "plan", "rows": []})] {
            assert!(chart(&other).is_err());
        }
    }
}
