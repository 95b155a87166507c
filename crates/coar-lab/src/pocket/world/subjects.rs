//! The ten classes, in a unit box around their centre (x to the right, y down), and their accessories.

use tiny_skia::Mask;

use super::canvas::{Canvas, Rgb, Shape, mix};
use super::{Accessory, Class, Pattern, Spec};
use Shape::{Box, Ellipse, Polygon};

const INK: Rgb = [34, 30, 38];
const LINE: f32 = 0.03;
const WHITE: Rgb = [255; 3];
/// The feet's height below the centre.
const FOOT: f32 = 0.5;

/// Moves the canvas to the subject's box; returns the feet's height there.
pub(super) fn place(canvas: &mut Canvas, spec: &Spec) -> f32 {
    let (width, height) = (canvas.width(), canvas.height());
    let side = width.min(height);
    let cell = side / 12.0;
    let scale = f32::from(spec.layout.size) * side / 96.0;
    // The feet are on a grid line, eleven cells down.
    let foot = (height - side) / 2.0 + 11.0 * cell;
    let x = width / 2.0 + f32::from(spec.layout.offset) * cell;
    canvas.place(x, foot - FOOT * scale, scale, spec.layout.flip);
    FOOT
}

struct Pen<'a> {
    canvas: &'a mut Canvas,
    spec: &'a Spec,
    /// The body's first colour, darkened for parts without a pattern.
    shade: Rgb,
}

impl Pen<'_> {
    fn part(&mut self, shape: Shape, colour: Rgb) {
        self.canvas.outlined(&shape, colour, INK, LINE);
    }

    fn flat(&mut self, shape: Shape, colour: Rgb) {
        self.canvas.fill(&shape, colour);
    }

    fn limb(&mut self, points: &[(f32, f32)], colour: Rgb, width: f32) {
        self.canvas.line(points, INK, width + 2.0 * LINE);
        self.canvas.line(points, colour, width);
    }

    /// The surface that carries colours and pattern.
    fn body(&mut self, shapes: &[Shape]) {
        for shape in shapes {
            self.canvas.ring(shape, INK, 2.0 * LINE);
        }
        let mask = self.canvas.mask(shapes);
        surface(self.canvas, self.spec, &mask);
    }

    fn eye(&mut self, x: f32, y: f32, r: f32) {
        self.canvas.fill(&Ellipse(x, y, r, r * 1.1), WHITE);
        self.canvas
            .fill(&Ellipse(x + 0.1 * r, y + 0.1 * r, 0.62 * r, 0.72 * r), INK);
        self.canvas
            .fill(&Ellipse(x + 0.3 * r, y - 0.25 * r, 0.24 * r, 0.24 * r), WHITE);
    }
}

/// Fills the mask with the subject's colours. Patterns repeat every two cells and are aligned to the subject's
/// centre, a whole number of cells from the image's grid, so the same part of a subject falls on the same cell.
fn surface(canvas: &mut Canvas, spec: &Spec, mask: &Mask) {
    let (width, height) = (canvas.width(), canvas.height());
    let side = width.min(height);
    let cell = side / 12.0;
    let [one, two] = spec.shades;
    canvas.fill_masked(&Box(0.0, 0.0, width, height, 0.0), one, mask);
    let (x0, y0) = (
        width / 2.0 + f32::from(spec.layout.offset) * cell,
        (height - side) / 2.0,
    );
    let reach = 14;
    match spec.pattern {
        Pattern::Plain => {}
        Pattern::Striped => {
            for row in (0..12).step_by(2) {
                let y = y0 + row as f32 * cell;
                canvas.fill_masked(&Box(0.0, y, width, y + cell, 0.0), two, mask);
            }
        }
        Pattern::Dotted => {
            for row in 0..6 {
                for column in -reach..reach {
                    let stagger = if row % 2 == 0 { 0.0 } else { cell };
                    let (x, y) = (
                        x0 + column as f32 * 2.0 * cell + stagger,
                        y0 + (2.0 * row as f32 + 1.0) * cell,
                    );
                    canvas.fill_masked(&Ellipse(x, y, 0.56 * cell, 0.56 * cell), two, mask);
                }
            }
        }
        Pattern::Checkered => {
            for row in 0..12 {
                for column in (-reach..reach).filter(|column| (row + column) % 2 == 0) {
                    let (x, y) = (x0 + column as f32 * cell, y0 + row as f32 * cell);
                    canvas.fill_masked(&Box(x, y, x + cell, y + cell, 0.0), two, mask);
                }
            }
        }
    }
}

pub(super) fn draw(canvas: &mut Canvas, spec: &Spec) {
    place(canvas, spec);
    let shade = mix(spec.shades[0], [0; 3], 0.3);
    let mut pen = Pen { canvas, spec, shade };
    let (x, y) = match spec.class {
        Class::Cat => cat(&mut pen),
        Class::Dog => dog(&mut pen),
        Class::Robot => robot(&mut pen),
        Class::Mug => mug(&mut pen),
        Class::Car => car(&mut pen),
        Class::House => house(&mut pen),
        Class::Fish => fish(&mut pen),
        Class::Bird => bird(&mut pen),
        Class::Backpack => backpack(&mut pen),
        Class::Teapot => teapot(&mut pen),
    };
    accessory(&mut pen, x, y);
}

// Each class returns the position of an accessory: the centre of its lower edge.

fn cat(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    pen.limb(&[(0.22, 0.38), (0.44, 0.3), (0.46, 0.04)], shade, 0.09);
    pen.body(&[
        Polygon(&[(-0.27, -0.02), (-0.27, -0.36), (-0.06, -0.18)]),
        Polygon(&[(0.27, -0.02), (0.27, -0.36), (0.06, -0.18)]),
        Ellipse(0.0, 0.26, 0.28, 0.24),
        Ellipse(0.0, -0.04, 0.3, 0.22),
    ]);
    pen.eye(-0.12, -0.05, 0.075);
    pen.eye(0.12, -0.05, 0.075);
    pen.flat(Polygon(&[(-0.045, 0.05), (0.045, 0.05), (0.0, 0.1)]), [236, 110, 130]);
    (0.0, -0.2)
}

fn dog(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    pen.limb(&[(-0.36, 0.12), (-0.48, -0.1)], shade, 0.09);
    pen.body(&[
        Box(-0.4, 0.2, -0.25, 0.5, 0.03),
        Box(-0.02, 0.2, 0.13, 0.5, 0.03),
        Box(-0.42, 0.02, 0.2, 0.36, 0.12),
        Ellipse(0.2, -0.06, 0.21, 0.2),
        Box(0.24, -0.08, 0.5, 0.1, 0.08),
    ]);
    pen.part(Ellipse(0.05, -0.02, 0.075, 0.17), shade);
    pen.eye(0.23, -0.1, 0.07);
    pen.flat(Ellipse(0.47, -0.05, 0.055, 0.045), INK);
    (0.2, -0.22)
}

fn robot(pen: &mut Pen) -> (f32, f32) {
    for x in [-0.14, 0.14] {
        pen.part(Box(x - 0.08, 0.3, x + 0.08, 0.5, 0.03), [120, 125, 140]);
    }
    for x in [-0.37, 0.37] {
        pen.part(Box(x - 0.07, 0.06, x + 0.07, 0.32, 0.06), [160, 165, 178]);
    }
    pen.body(&[Box(-0.29, 0.02, 0.29, 0.38, 0.05), Box(-0.25, -0.26, 0.25, 0.02, 0.05)]);
    pen.flat(Box(-0.19, -0.2, 0.19, -0.04, 0.04), [38, 44, 60]);
    for x in [-0.09, 0.09] {
        pen.flat(Ellipse(x, -0.12, 0.055, 0.055), [120, 240, 255]);
    }
    (0.0, -0.26)
}

fn mug(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    let handle = Ellipse(0.3, 0.12, 0.17, 0.2);
    pen.canvas.ring(&handle, INK, 0.15);
    pen.canvas.ring(&handle, shade, 0.09);
    pen.body(&[Box(-0.36, -0.2, 0.28, 0.5, 0.08)]);
    let rim = mix(pen.spec.shades[0], WHITE, 0.45);
    pen.part(Ellipse(-0.04, -0.18, 0.32, 0.075), rim);
    pen.flat(Ellipse(-0.04, -0.17, 0.25, 0.045), [74, 44, 28]);
    (-0.04, -0.22)
}

fn car(pen: &mut Pen) -> (f32, f32) {
    pen.body(&[
        Polygon(&[(-0.36, 0.12), (-0.24, -0.16), (0.2, -0.16), (0.36, 0.12)]),
        Box(-0.5, 0.06, 0.5, 0.4, 0.1),
    ]);
    let glass = [190, 232, 252];
    pen.flat(
        Polygon(&[(-0.27, 0.08), (-0.19, -0.1), (-0.03, -0.1), (-0.03, 0.08)]),
        glass,
    );
    pen.flat(
        Polygon(&[(0.03, 0.08), (0.03, -0.1), (0.16, -0.1), (0.26, 0.08)]),
        glass,
    );
    for x in [-0.28, 0.28] {
        pen.flat(Ellipse(x, 0.38, 0.14, 0.14), INK);
        pen.flat(Ellipse(x, 0.38, 0.065, 0.065), [205, 205, 210]);
    }
    pen.flat(Ellipse(0.46, 0.18, 0.04, 0.05), [255, 240, 150]);
    (-0.02, -0.16)
}

fn house(pen: &mut Pen) -> (f32, f32) {
    pen.body(&[Box(-0.38, 0.06, 0.38, 0.5, 0.01)]);
    let roof = mix(pen.spec.shades[0], [90, 30, 30], 0.6);
    pen.part(Polygon(&[(-0.47, 0.08), (0.0, -0.24), (0.47, 0.08)]), roof);
    pen.part(Box(-0.1, 0.24, 0.1, 0.5, 0.02), [96, 62, 42]);
    pen.part(Box(-0.32, 0.18, -0.17, 0.33, 0.02), [190, 232, 252]);
    pen.part(Box(0.17, 0.18, 0.32, 0.33, 0.02), [190, 232, 252]);
    (0.0, -0.18)
}

fn fish(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    pen.part(Polygon(&[(-0.06, 0.3), (0.12, 0.48), (0.18, 0.3)]), shade);
    pen.body(&[
        Polygon(&[(-0.22, 0.14), (-0.5, -0.1), (-0.5, 0.4)]),
        Ellipse(0.08, 0.14, 0.41, 0.28),
    ]);
    pen.part(Polygon(&[(-0.08, 0.1), (0.1, 0.18), (-0.06, 0.28)]), shade);
    pen.eye(0.3, 0.07, 0.075);
    pen.canvas.line(&[(0.45, 0.22), (0.35, 0.24)], INK, 0.03);
    (0.1, -0.12)
}

fn bird(pen: &mut Pen) -> (f32, f32) {
    let beak = [246, 165, 36];
    for x in [-0.08, 0.08] {
        pen.limb(&[(x, 0.34), (x, 0.48)], beak, 0.04);
    }
    let shade = pen.shade;
    pen.part(Polygon(&[(-0.24, 0.18), (-0.5, 0.02), (-0.46, 0.26)]), shade);
    pen.part(Polygon(&[(0.32, -0.1), (0.5, -0.01), (0.32, 0.06)]), beak);
    pen.body(&[Ellipse(-0.03, 0.18, 0.32, 0.22), Ellipse(0.18, -0.04, 0.2, 0.18)]);
    pen.part(Ellipse(-0.12, 0.18, 0.16, 0.1), shade);
    pen.eye(0.22, -0.07, 0.07);
    (0.18, -0.18)
}

fn backpack(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    for x in [-0.36, 0.36] {
        pen.part(Box(x - 0.07, 0.08, x + 0.07, 0.44, 0.06), shade);
    }
    pen.body(&[Box(-0.34, -0.22, 0.34, 0.5, 0.2)]);
    pen.part(Box(-0.22, 0.2, 0.22, 0.44, 0.05), shade);
    pen.canvas.line(&[(-0.14, 0.28), (0.14, 0.28)], [242, 232, 184], 0.04);
    (0.0, -0.22)
}

fn teapot(pen: &mut Pen) -> (f32, f32) {
    let shade = pen.shade;
    let handle = Ellipse(-0.36, 0.18, 0.13, 0.17);
    pen.canvas.ring(&handle, INK, 0.13);
    pen.canvas.ring(&handle, shade, 0.07);
    pen.part(
        Polygon(&[(0.24, 0.32), (0.28, 0.12), (0.42, -0.08), (0.5, -0.04), (0.42, 0.24)]),
        shade,
    );
    pen.body(&[Ellipse(0.0, 0.22, 0.36, 0.27)]);
    pen.part(Ellipse(0.0, -0.02, 0.22, 0.06), shade);
    pen.part(Ellipse(0.0, -0.1, 0.05, 0.05), shade);
    (0.0, -0.08)
}

fn accessory(pen: &mut Pen, x: f32, y: f32) {
    match pen.spec.accessory {
        Accessory::None => {}
        Accessory::Hat => {
            let felt = [40, 36, 52];
            pen.flat(Box(x - 0.17, y - 0.26, x + 0.17, y + 0.02, 0.03), felt);
            pen.flat(Box(x - 0.17, y - 0.1, x + 0.17, y - 0.02, 0.0), [214, 46, 52]);
            pen.flat(Ellipse(x, y + 0.02, 0.28, 0.05), felt);
        }
        Accessory::Crown => pen.part(
            Polygon(&[
                (x - 0.2, y + 0.05),
                (x - 0.24, y - 0.21),
                (x - 0.1, y - 0.08),
                (x, y - 0.25),
                (x + 0.1, y - 0.08),
                (x + 0.24, y - 0.21),
                (x + 0.2, y + 0.05),
            ]),
            [252, 208, 44],
        ),
        Accessory::Bow => {
            let (satin, knot) = ([244, 64, 140], [190, 36, 100]);
            pen.part(
                Polygon(&[(x, y - 0.05), (x - 0.24, y - 0.19), (x - 0.24, y + 0.09)]),
                satin,
            );
            pen.part(
                Polygon(&[(x, y - 0.05), (x + 0.24, y - 0.19), (x + 0.24, y + 0.09)]),
                satin,
            );
            pen.part(Ellipse(x, y - 0.05, 0.06, 0.07), knot);
        }
    }
}
