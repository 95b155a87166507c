//! Backgrounds: flat, clearly distinct, three layouts each.

use super::canvas::{Canvas, Rgb, Shape, mix};
use super::{Scene, Spec};

/// Coordinates: a square of side 12 cells around the centre of the image, 0..12 in both directions; the background
/// extends beyond it in images that are not square.
struct Stage<'a> {
    canvas: &'a mut Canvas,
    left: f32,
    right: f32,
    top: f32,
    bottom: f32,
}

impl Stage<'_> {
    /// A band over the whole width.
    fn band(&mut self, from: f32, to: f32, colour: Rgb) {
        let (top, bottom) = (
            if from <= 0.0 { self.top } else { from },
            if to >= 12.0 { self.bottom } else { to },
        );
        self.canvas
            .fill(&Shape::Box(self.left, top, self.right, bottom, 0.0), colour);
    }

    fn block(&mut self, x: f32, y: f32, w: f32, h: f32, colour: Rgb) {
        self.canvas.fill(&Shape::Box(x, y, x + w, y + h, 0.0), colour);
    }

    fn disc(&mut self, x: f32, y: f32, r: f32, colour: Rgb) {
        self.canvas.fill(&Shape::Ellipse(x, y, r, r), colour);
    }

    fn oval(&mut self, x: f32, y: f32, rx: f32, ry: f32, colour: Rgb) {
        self.canvas.fill(&Shape::Ellipse(x, y, rx, ry), colour);
    }

    fn polygon(&mut self, points: &[(f32, f32)], colour: Rgb) {
        self.canvas.fill(&Shape::Polygon(points), colour);
    }
}

/// The horizon's height in cells, by variant.
fn horizon(variant: u8) -> f32 {
    [7.0, 8.0, 7.0][usize::from(variant % 3)]
}

/// Left or right, by variant.
fn side(variant: u8) -> f32 {
    if variant.is_multiple_of(2) { 1.5 } else { 10.5 }
}

/// The colour of the ground below the subject, for its shadow; `None` without a shadow.
pub(super) fn ground(scene: Scene) -> Option<Rgb> {
    Some(match scene {
        Scene::Beach => [240, 215, 150],
        Scene::Snow => [246, 249, 255],
        Scene::City => [62, 62, 72],
        Scene::Grass => [85, 172, 68],
        Scene::Desert => [216, 142, 74],
        Scene::Room => [142, 92, 62],
        Scene::Forest => [58, 84, 48],
        Scene::White => [247, 247, 247],
        Scene::Space => return None,
    })
}

pub(super) fn draw(canvas: &mut Canvas, spec: &Spec) {
    let (width, height) = (canvas.width(), canvas.height());
    let cell = width.min(height) / 12.0;
    let (x, y) = ((width - 12.0 * cell) / 2.0, (height - 12.0 * cell) / 2.0);
    canvas.place(x, y, cell, false);
    let mut stage = Stage {
        canvas,
        left: -x / cell,
        right: 12.0 + x / cell,
        top: -y / cell,
        bottom: 12.0 + y / cell,
    };
    let variant = spec.layout.variant;
    let (line, at) = (horizon(variant), side(variant));
    let floor = ground(spec.scene).unwrap_or([14, 10, 36]);
    match spec.scene {
        Scene::Beach => {
            stage.band(0.0, 12.0, [140, 208, 246]);
            stage.band(line - 2.0, line, [36, 132, 196]);
            stage.band(line, 12.0, floor);
            stage.disc(at, 1.5, 1.2, [255, 236, 96]);
        }
        Scene::Snow => {
            stage.band(0.0, line, [176, 198, 226]);
            stage.band(line, 12.0, floor);
            for x in [1.0, 11.0] {
                stage.polygon(&[(x - 1.8, line), (x + 1.8, line), (x, line - 4.6)], [66, 122, 110]);
                stage.polygon(
                    &[(x - 0.7, line - 2.8), (x + 0.7, line - 2.8), (x, line - 4.6)],
                    [250, 252, 255],
                );
            }
            for (x, y) in [(3.0, 1.0), (5.0, 2.0), (8.0, 1.0), (9.5, 2.5), (at, 2.0)] {
                stage.disc(x, y, 0.26, [255; 3]);
            }
        }
        Scene::City => {
            stage.band(0.0, 12.0, [24, 26, 64]);
            let heights = [
                [4.0, 6.0, 3.0, 5.0, 4.0, 6.0],
                [6.0, 3.0, 5.0, 4.0, 6.0, 4.0],
                [5.0, 4.0, 6.0, 3.0, 5.0, 3.0],
            ];
            let heights = heights[usize::from(variant % 3)];
            let from = (stage.left / 2.0).floor() as i32;
            let to = (stage.right / 2.0).ceil() as i32;
            for tower in from..to {
                let (x, roof) = (2.0 * tower as f32, heights[tower.rem_euclid(6) as usize]);
                stage.block(x, roof, 1.85, 12.0, [58, 60, 100]);
                let mut y = roof + 0.5;
                while y < 8.5 {
                    for window in [x + 0.3, x + 1.05] {
                        stage.block(window, y, 0.5, 0.6, [255, 222, 112]);
                    }
                    y += 1.0;
                }
            }
            stage.band(9.0, 12.0, floor);
            stage.disc(at, 1.5, 0.8, [246, 241, 204]);
        }
        Scene::Grass => {
            stage.band(0.0, 12.0, [126, 200, 250]);
            let hill = if variant == 1 { 9.0 } else { 3.0 };
            stage.oval(hill, line + 1.0, 6.0, 3.0, [110, 192, 92]);
            stage.band(line, 12.0, floor);
            stage.oval(at, 1.5, 1.4, 0.7, [255; 3]);
            stage.oval(at + 0.8, 1.1, 0.9, 0.6, [255; 3]);
        }
        Scene::Desert => {
            stage.band(0.0, 12.0, [252, 196, 126]);
            stage.oval(
                if variant == 1 { 9.0 } else { 3.0 },
                line + 1.2,
                6.5,
                2.6,
                [228, 158, 88],
            );
            stage.band(line + 1.0, 12.0, floor);
            let (cactus, x) = ([58, 132, 72], if at < 6.0 { 1.0 } else { 11.0 });
            stage.canvas.line(&[(x, line + 1.4), (x, line - 3.0)], cactus, 0.8);
            stage.canvas.line(
                &[
                    (x - 0.9, line - 2.0),
                    (x - 0.9, line - 0.6),
                    (x + 0.9, line - 0.6),
                    (x + 0.9, line - 1.6),
                ],
                cactus,
                0.55,
            );
        }
        Scene::Room => {
            stage.band(0.0, 12.0, [218, 194, 174]);
            stage.band(line + 1.0, 12.0, floor);
            stage.band(line + 0.6, line + 1.0, [246, 240, 236]);
            let x = if at < 6.0 { 0.0 } else { 8.5 };
            stage.block(x, 1.0, 3.5, 3.6, [250; 3]);
            stage.block(x + 0.35, 1.35, 1.25, 2.9, [150, 210, 246]);
            stage.block(x + 1.9, 1.35, 1.25, 2.9, [150, 210, 246]);
        }
        Scene::Forest => {
            stage.band(0.0, 12.0, [74, 122, 88]);
            let shift = f32::from(variant % 3) - 1.0;
            let mut x = (stage.left / 3.0).floor() * 3.0 + 0.5 + shift;
            while x < stage.right + 1.0 {
                stage.block(x, 2.0, 0.8, 7.0, [88, 60, 40]);
                stage.oval(x + 0.4, 1.4, 1.45, 1.9, [34, 88, 48]);
                x += 3.0;
            }
            stage.band(9.0, 12.0, floor);
        }
        Scene::Space => {
            stage.band(0.0, 12.0, floor);
            let stars = [
                (1.0, 5.0),
                (3.0, 1.0),
                (5.0, 11.0),
                (8.0, 0.5),
                (10.5, 6.0),
                (11.0, 10.5),
                (1.5, 9.0),
                (6.5, 2.0),
            ];
            for (x, y) in stars {
                let x = (x + 2.0 * f32::from(variant)) % 12.0;
                stage.disc(x, y, 0.2, [255; 3]);
            }
            stage.disc(at, 1.8, 1.2, [206, 126, 96]);
            stage
                .canvas
                .line(&[(at - 1.5, 2.2), (at + 1.5, 1.4)], [238, 206, 166], 0.4);
        }
        Scene::White => stage.band(0.0, 12.0, floor),
    }
    if spec.scene != Scene::Space {
        shadow(stage.canvas, spec, floor);
    }
}

fn shadow(canvas: &mut Canvas, spec: &Spec, floor: Rgb) {
    let foot = super::subjects::place(canvas, spec);
    canvas.fill(&Shape::Ellipse(0.0, foot, 0.42, 0.055), mix(floor, [0; 3], 0.3));
}
