//! A small drawing surface over tiny-skia: filled and outlined shapes in a subject's own coordinates.

use tiny_skia::{Color, FillRule, LineCap, LineJoin, Mask, Paint, Path, PathBuilder, Pixmap, Rect, Stroke, Transform};

use coar_core::image::RgbImage;

pub(super) type Rgb = [u8; 3];

/// Linear interpolation from `a` to `b` by `t` in 0..1.
pub(super) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    std::array::from_fn(|i| (f32::from(a[i]) * (1.0 - t) + f32::from(b[i]) * t).round() as u8)
}

fn paint(colour: Rgb) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color(Color::from_rgba8(colour[0], colour[1], colour[2], 255));
    paint.anti_alias = true;
    paint
}

/// Pixels, and the map from shape coordinates to them.
pub(super) struct Canvas {
    pixels: Pixmap,
    place: Transform,
}

/// A closed outline under construction.
pub(super) enum Shape<'a> {
    /// Centre and radii.
    Ellipse(f32, f32, f32, f32),
    /// Corners and corner radius.
    Box(f32, f32, f32, f32, f32),
    Polygon(&'a [(f32, f32)]),
}

impl Shape<'_> {
    fn path(&self) -> Option<Path> {
        let mut builder = PathBuilder::new();
        match *self {
            Shape::Ellipse(x, y, rx, ry) => builder.push_oval(Rect::from_ltrb(x - rx, y - ry, x + rx, y + ry)?),
            Shape::Box(x0, y0, x1, y1, radius) => {
                let r = radius.min((x1 - x0) / 2.0).min((y1 - y0) / 2.0);
                builder.move_to(x0 + r, y0);
                builder.line_to(x1 - r, y0);
                builder.quad_to(x1, y0, x1, y0 + r);
                builder.line_to(x1, y1 - r);
                builder.quad_to(x1, y1, x1 - r, y1);
                builder.line_to(x0 + r, y1);
                builder.quad_to(x0, y1, x0, y1 - r);
                builder.line_to(x0, y0 + r);
                builder.quad_to(x0, y0, x0 + r, y0);
                builder.close();
            }
            Shape::Polygon(points) => {
                let (&(x, y), rest) = points.split_first()?;
                builder.move_to(x, y);
                rest.iter().for_each(|&(x, y)| builder.line_to(x, y));
                builder.close();
            }
        }
        builder.finish()
    }
}

impl Canvas {
    /// A canvas of `width` x `height` pixels, at least one each.
    pub(super) fn new(width: u32, height: u32, colour: Rgb) -> Self {
        let mut pixels =
            Pixmap::new(width.max(1), height.max(1)).expect("a side of at least one pixel is a valid size");
        pixels.fill(Color::from_rgba8(colour[0], colour[1], colour[2], 255));
        Self {
            pixels,
            place: Transform::identity(),
        }
    }

    pub(super) fn width(&self) -> f32 {
        self.pixels.width() as f32
    }

    pub(super) fn height(&self) -> f32 {
        self.pixels.height() as f32
    }

    /// Sets the shape coordinates: origin at `(x, y)` pixels, one unit = `scale` pixels, mirrored if `flip`.
    pub(super) fn place(&mut self, x: f32, y: f32, scale: f32, flip: bool) {
        let sx = if flip { -scale } else { scale };
        self.place = Transform::from_row(sx, 0.0, 0.0, scale, x, y);
    }

    pub(super) fn fill(&mut self, shape: &Shape, colour: Rgb) {
        if let Some(path) = shape.path() {
            self.pixels
                .fill_path(&path, &paint(colour), FillRule::Winding, self.place, None);
        }
    }

    /// The shape in `colour` with a line of `line` units around it.
    pub(super) fn outlined(&mut self, shape: &Shape, colour: Rgb, ink: Rgb, line: f32) {
        self.ring(shape, ink, 2.0 * line);
        self.fill(shape, colour);
    }

    /// The shape's border alone, `width` units wide, centred on it.
    pub(super) fn ring(&mut self, shape: &Shape, ink: Rgb, width: f32) {
        if let Some(path) = shape.path() {
            let stroke = Stroke {
                width,
                line_join: LineJoin::Round,
                ..Stroke::default()
            };
            self.pixels.stroke_path(&path, &paint(ink), &stroke, self.place, None);
        }
    }

    pub(super) fn line(&mut self, points: &[(f32, f32)], ink: Rgb, width: f32) {
        let mut builder = PathBuilder::new();
        if let Some((&(x, y), rest)) = points.split_first() {
            builder.move_to(x, y);
            rest.iter().for_each(|&(x, y)| builder.line_to(x, y));
        }
        if let Some(path) = builder.finish() {
            let stroke = Stroke {
                width,
                line_cap: LineCap::Round,
                line_join: LineJoin::Round,
                ..Stroke::default()
            };
            self.pixels.stroke_path(&path, &paint(ink), &stroke, self.place, None);
        }
    }

    /// A mask of the union of the shapes, for [`Self::fill_masked`].
    pub(super) fn mask(&self, shapes: &[Shape]) -> Mask {
        let mut mask =
            Mask::new(self.pixels.width(), self.pixels.height()).expect("the canvas has a valid size, so has its mask");
        for path in shapes.iter().filter_map(Shape::path) {
            mask.fill_path(&path, FillRule::Winding, true, self.place);
        }
        mask
    }

    /// A shape in *pixel* coordinates, clipped by `mask`.
    pub(super) fn fill_masked(&mut self, shape: &Shape, colour: Rgb, mask: &Mask) {
        if let Some(path) = shape.path() {
            self.pixels.fill_path(
                &path,
                &paint(colour),
                FillRule::Winding,
                Transform::identity(),
                Some(mask),
            );
        }
    }

    pub(super) fn finish(self) -> RgbImage {
        let (width, height) = (self.pixels.width(), self.pixels.height());
        let rgb = self
            .pixels
            .pixels()
            .iter()
            .flat_map(|p| [p.red(), p.green(), p.blue()])
            .collect();
        RgbImage { width, height, rgb }
    }
}
