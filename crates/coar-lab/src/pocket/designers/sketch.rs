//! A drawing surface for scenes: filled shapes at four times the final resolution.

use tiny_skia::{
    Color, FillRule, GradientStop, Paint, Path, PathBuilder, Pixmap, Point, RadialGradient, Rect, SpreadMode, Stroke,
    Transform,
};

use super::IMAGE_SIDE;
use super::drawing::shrink;

pub(super) type Rgb = [u8; 3];

/// Side of the surface; all coordinates are in its pixels.
pub(super) const SIDE: f32 = (IMAGE_SIDE * 4) as f32;

/// Pixels of a scene under construction.
pub(super) struct Sketch {
    pixels: Pixmap,
}

fn color(rgb: Rgb, alpha: f32) -> Color {
    Color::from_rgba8(rgb[0], rgb[1], rgb[2], (alpha * 255.0) as u8)
}

fn paint(rgb: Rgb) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color(color(rgb, 1.0));
    paint.anti_alias = true;
    paint
}

impl Sketch {
    /// A surface with a vertical gradient through `(height in 0..1, colour)` stops.
    pub(super) fn new(stops: &[(f32, Rgb)]) -> Self {
        let side = SIDE as u32;
        let mut pixels = Pixmap::new(side, side).expect("a scene's side is positive");
        for y in 0..side {
            let rgb = interpolate(stops, y as f32 / (SIDE - 1.0));
            if let Some(row) = Rect::from_xywh(0.0, y as f32, SIDE, 1.0) {
                pixels.fill_rect(row, &paint(rgb), Transform::identity(), None);
            }
        }
        Self { pixels }
    }

    fn fill(&mut self, path: Option<Path>, rgb: Rgb) {
        if let Some(path) = path {
            self.pixels
                .fill_path(&path, &paint(rgb), FillRule::Winding, Transform::identity(), None);
        }
    }

    pub(super) fn polygon(&mut self, points: &[(f32, f32)], rgb: Rgb) {
        let mut builder = PathBuilder::new();
        if let Some((&(x, y), rest)) = points.split_first() {
            builder.move_to(x, y);
            rest.iter().for_each(|&(x, y)| builder.line_to(x, y));
            builder.close();
        }
        self.fill(builder.finish(), rgb);
    }

    pub(super) fn rectangle(&mut self, left: f32, top: f32, right: f32, bottom: f32, rgb: Rgb) {
        self.polygon(&[(left, top), (right, top), (right, bottom), (left, bottom)], rgb);
    }

    /// A rectangle with round corners.
    pub(super) fn pill(&mut self, left: f32, top: f32, right: f32, bottom: f32, radius: f32, rgb: Rgb) {
        let r = radius.min((right - left) / 2.0).min((bottom - top) / 2.0);
        let mut builder = PathBuilder::new();
        builder.move_to(left + r, top);
        builder.line_to(right - r, top);
        builder.quad_to(right, top, right, top + r);
        builder.line_to(right, bottom - r);
        builder.quad_to(right, bottom, right - r, bottom);
        builder.line_to(left + r, bottom);
        builder.quad_to(left, bottom, left, bottom - r);
        builder.line_to(left, top + r);
        builder.quad_to(left, top, left + r, top);
        builder.close();
        self.fill(builder.finish(), rgb);
    }

    pub(super) fn disc(&mut self, x: f32, y: f32, radius: f32, rgb: Rgb) {
        self.fill(PathBuilder::from_circle(x, y, radius), rgb);
    }

    /// The outline of an ellipse, `width` pixels wide.
    pub(super) fn ring(&mut self, x: f32, y: f32, rx: f32, ry: f32, width: f32, rgb: Rgb) {
        let path = Rect::from_ltrb(x - rx, y - ry, x + rx, y + ry).and_then(PathBuilder::from_oval);
        if let Some(path) = path {
            let stroke = Stroke {
                width,
                ..Stroke::default()
            };
            self.pixels
                .stroke_path(&path, &paint(rgb), &stroke, Transform::identity(), None);
        }
    }

    /// The ground below a wavy line around height `y`.
    pub(super) fn hill(&mut self, y: f32, amplitude: f32, period: f32, phase: f32, rgb: Rgb) {
        let mut points = vec![(0.0, SIDE)];
        points.extend((0..=SIDE as u32 / 8).map(|at| {
            let x = at as f32 * 8.0;
            (x, y + amplitude * (x / period + phase).sin())
        }));
        points.push((SIDE, SIDE));
        self.polygon(&points, rgb);
    }

    /// Light that fades out over twice `radius`.
    pub(super) fn glow(&mut self, x: f32, y: f32, radius: f32, rgb: Rgb, strength: f32) {
        let reach = 1.8 * radius;
        let stops = [0.0f32, 0.25, 0.5, 0.75, 1.0]
            .map(|at| GradientStop::new(at, color(rgb, strength * (1.0 - at * at).powi(2))));
        let shader = RadialGradient::new(
            Point::from_xy(x, y),
            0.0,
            Point::from_xy(x, y),
            reach,
            stops.to_vec(),
            SpreadMode::Pad,
            Transform::identity(),
        );
        if let (Some(shader), Some(path)) = (shader, PathBuilder::from_circle(x, y, reach)) {
            let paint = Paint {
                shader,
                ..Paint::default()
            };
            self.pixels
                .fill_path(&path, &paint, FillRule::Winding, Transform::identity(), None);
        }
    }

    pub(super) fn cloud(&mut self, x: f32, y: f32, scale: f32) {
        const WHITE: Rgb = [255; 3];
        for (dx, dy, radius) in [(-28.0, 6.0, 18.0), (0.0, 0.0, 26.0), (28.0, 6.0, 18.0)] {
            self.disc(x + dx * scale, y + dy * scale, radius * scale, WHITE);
        }
        let (left, right) = (x - 46.0 * scale, x + 46.0 * scale);
        self.pill(left, y + 6.0 * scale, right, y + 25.0 * scale, 9.0 * scale, WHITE);
    }

    /// The scene at its final size: RGB, `[side, side, 3]` row by row.
    pub(super) fn finish(self) -> Vec<u8> {
        shrink(self.pixels.data(), SIDE as usize, 4)
            .chunks_exact(4)
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
            .collect()
    }
}

fn interpolate(stops: &[(f32, Rgb)], at: f32) -> Rgb {
    let after = stops.iter().position(|&(p, _)| p >= at).unwrap_or(stops.len() - 1);
    let (p1, c1) = stops[after];
    let (p0, c0) = stops[after.saturating_sub(1)];
    let t = if p1 > p0 { (at - p0) / (p1 - p0) } else { 0.0 };
    std::array::from_fn(|i| (f32::from(c0[i]) + (f32::from(c1[i]) - f32::from(c0[i])) * t).round() as u8)
}
