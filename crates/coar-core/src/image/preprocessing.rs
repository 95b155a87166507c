//! Crop sizes and Pillow-exact resampling (`data/item_processor.py`).

use rand::{Rng, RngCore};

use super::RgbImage;

/// Largest ratio of an image's sides.
const MAX_RATIO: f64 = 4.0;

/// Sizes in pixels with at most `patches` patches of `patch` pixels and sides within `max_ratio`, in the reference's
/// order: wide first (`generate_crop_size_list`).
pub fn crop_sizes(patches: u32, patch: u32, max_ratio: f64) -> Vec<(u32, u32)> {
    let (mut sizes, mut w, mut h) = (Vec::new(), patches, 1);
    while w > 0 {
        if f64::from(w.max(h)) / f64::from(w.min(h)) <= max_ratio {
            sizes.push((w * patch, h * patch));
        }
        if (h + 1) * w <= patches {
            h += 1;
        } else {
            w -= 1;
        }
    }
    sizes
}

/// The position of the crop in a resized image.
pub enum CropOffset<'a> {
    /// The centre, as users expect for their references.
    Centre,
    /// As in the reference's training; left is sampled before upper.
    Random(&'a mut dyn RngCore),
    /// At given pixels.
    At(u32, u32),
}

impl std::fmt::Debug for CropOffset<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CropOffset").finish_non_exhaustive()
    }
}

/// The image sizes of a checkpoint, and how images are converted to one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CropPlan {
    sizes: Vec<(u32, u32)>,
}

/// The steps from an image's size to a crop size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CropSteps {
    /// The chosen size.
    pub size: (u32, u32),
    /// Sizes after each halving with the box filter.
    pub halvings: Vec<(u32, u32)>,
    /// The size of the bicubic resize.
    pub resized: (u32, u32),
    /// The largest possible offsets, left and upper.
    pub room: (u32, u32),
}

impl CropPlan {
    /// All sizes for a target side in pixels, whose sides are multiples of `unit` pixels (a grid of two codes).
    pub fn new(target: u32, unit: u32) -> Self {
        Self {
            sizes: crop_sizes((target / unit).pow(2), unit, MAX_RATIO),
        }
    }

    /// A plan over given sizes.
    pub fn of_sizes(sizes: Vec<(u32, u32)>) -> Self {
        Self { sizes }
    }

    /// `(width, height)` of every size, wide first.
    pub fn sizes(&self) -> &[(u32, u32)] {
        &self.sizes
    }

    /// The conversion of an image of `width` x `height`, both at least 1.
    pub fn steps(&self, width: u32, height: u32) -> CropSteps {
        let score = |&(cw, ch): &(u32, u32)| {
            let (a, b) = (f64::from(cw) / f64::from(width), f64::from(ch) / f64::from(height));
            a.min(b) / a.max(b)
        };
        let better = |a: &(u32, u32), b: &(u32, u32)| score(a).total_cmp(&score(b)).then(a.cmp(b));
        let size = self.sizes.iter().copied().max_by(better).unwrap_or((width, height));
        let (mut w, mut h, mut halvings) = (width, height, Vec::new());
        while w >= 2 * size.0 && h >= 2 * size.1 {
            (w, h) = (w / 2, h / 2);
            halvings.push((w, h));
        }
        let scale = (f64::from(size.0) / f64::from(w)).max(f64::from(size.1) / f64::from(h));
        let resized = (
            (f64::from(w) * scale).round_ties_even() as u32,
            (f64::from(h) * scale).round_ties_even() as u32,
        );
        let room = (resized.0.saturating_sub(size.0), resized.1.saturating_sub(size.1));
        CropSteps {
            size,
            halvings,
            resized,
            room,
        }
    }

    /// Halves, resizes and crops an image.
    pub fn prepare(&self, image: &RgbImage, offset: CropOffset) -> RgbImage {
        let steps = self.steps(image.width, image.height);
        let halved = halved(image, &steps.halvings);
        crop(halved.as_ref().unwrap_or(image), &steps, offset)
    }

    /// Halves an image as often as [`Self::prepare`] does before it crops. A large image shrinks to less than a fourth,
    /// and the crops are the same.
    pub fn reduce(&self, image: RgbImage) -> ReducedImage {
        let size = (image.width, image.height);
        let pixels = halved(&image, &self.steps(size.0, size.1).halvings).unwrap_or(image);
        ReducedImage { pixels, size }
    }
}

/// An image that was halved before it is cropped: [`CropPlan::reduce`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReducedImage {
    pixels: RgbImage,
    /// `(width, height)` before the halvings.
    size: (u32, u32),
}

/// A source of crops.
pub trait Croppable {
    /// [`CropPlan::prepare`]
    fn prepare(&self, plan: &CropPlan, offset: CropOffset) -> RgbImage;
}

impl Croppable for RgbImage {
    fn prepare(&self, plan: &CropPlan, offset: CropOffset) -> RgbImage {
        plan.prepare(self, offset)
    }
}

impl Croppable for ReducedImage {
    fn prepare(&self, plan: &CropPlan, offset: CropOffset) -> RgbImage {
        let steps = plan.steps(self.size.0, self.size.1);
        let now = (self.pixels.width, self.pixels.height);
        let done = match now == self.size {
            true => Some(0),
            false => steps.halvings.iter().position(|size| *size == now).map(|at| at + 1),
        };
        // The image was reduced for the sizes of another plan.
        let Some(done) = done else {
            return plan.prepare(&self.pixels, offset);
        };
        let halved = halved(&self.pixels, &steps.halvings[done..]);
        crop(halved.as_ref().unwrap_or(&self.pixels), &steps, offset)
    }
}

fn halved(image: &RgbImage, sizes: &[(u32, u32)]) -> Option<RgbImage> {
    let mut halved = None;
    for &(w, h) in sizes {
        halved = Some(resize(halved.as_ref().unwrap_or(image), w, h, Filter::Box));
    }
    halved
}

/// The last steps, for an image that is already halved.
fn crop(halved: &RgbImage, steps: &CropSteps, offset: CropOffset) -> RgbImage {
    let (left, upper) = match offset {
        CropOffset::Centre => (steps.room.0 / 2, steps.room.1 / 2),
        CropOffset::Random(rng) => {
            let left = rng.random_range(0..=steps.room.0);
            (left, rng.random_range(0..=steps.room.1))
        }
        CropOffset::At(left, upper) => (left.min(steps.room.0), upper.min(steps.room.1)),
    };
    // Only the part that is kept is computed: otherwise an image one pixel wide would grow to gigabytes on the
    // way.
    let (w, h) = steps.size;
    let columns = Span {
        full: steps.resized.0,
        from: left,
        count: w,
    };
    let rows = Span {
        full: steps.resized.1,
        from: upper,
        count: h,
    };
    resize_part(halved, columns, rows, Filter::Bicubic)
}

/// Pillow's resampling filters that the pipeline uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Box,
    Bilinear,
    /// a = -0.5
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => {
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
        }
    }
}

/// Fixed-point digits of Pillow's 8-bit resampling.
const PRECISION: u32 = 32 - 8 - 2;

/// A run of output indices of one dimension.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// Length of the whole output, which decides the scale.
    full: u32,
    from: u32,
    count: u32,
}

/// First source index and fixed-point weights of one output index.
type Taps = (usize, Vec<i32>);

fn coefficients(input: u32, output: Span, filter: Filter) -> Vec<Taps> {
    let scale = f64::from(input) / f64::from(output.full);
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let per_source = 1.0 / filter_scale;
    (output.from..output.from + output.count)
        .map(|index| {
            let centre = (f64::from(index) + 0.5) * scale;
            // Pillow truncates towards zero after adding a half, and clips to the image.
            let first = ((centre - support + 0.5) as i64).max(0);
            let last = ((centre + support + 0.5) as i64).min(i64::from(input));
            let weights: Vec<f64> = (first..last)
                .map(|x| filter.weight((x as f64 - centre + 0.5) * per_source))
                .collect();
            let sum: f64 = weights.iter().sum();
            let fixed = weights
                .iter()
                .map(|weight| {
                    let weight = if sum == 0.0 { *weight } else { weight / sum } * f64::from(1u32 << PRECISION);
                    (weight + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
                })
                .collect();
            (first as usize, fixed)
        })
        .collect()
}

fn clip(sum: i64) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Resizes as Pillow does: horizontally, then vertically, with 8 bits in between. Compared bit by bit with Pillow
/// 10.4, contemporary with the reference; Pillow 13 gives other values for some tall images.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let whole = |full| Span {
        full,
        from: 0,
        count: full,
    };
    resize_part(image, whole(width), whole(height), filter)
}

/// The part of [`resize`] to `full` at `(left, upper)` with `size`, all as `(width, height)`; only this part is
/// computed. It lies within `full`.
pub fn resize_and_cut(
    image: &RgbImage,
    full: (u32, u32),
    (left, upper): (u32, u32),
    size: (u32, u32),
    filter: Filter,
) -> RgbImage {
    let span = |full, from, count| Span { full, from, count };
    resize_part(image, span(full.0, left, size.0), span(full.1, upper, size.1), filter)
}

/// The given columns and rows of the result of [`resize`]. The passes are separable, so skipping the rest does not
/// change them.
fn resize_part(image: &RgbImage, columns: Span, rows: Span, filter: Filter) -> RgbImage {
    let vertical = coefficients(image.height, rows, filter);
    // Source rows that contribute to the output rows.
    let (first, last) = if rows.full == image.height {
        (rows.from as usize, (rows.from + rows.count) as usize)
    } else {
        let ends = vertical.iter().map(|(first, weights)| first + weights.len());
        (vertical.first().map_or(0, |taps| taps.0), ends.max().unwrap_or(0))
    };
    let stride = 3 * image.width as usize;
    let source = &image.rgb[first * stride..last * stride];
    let narrowed = horizontal_pass(source, image.width, columns, filter);
    let rgb = if rows.full == image.height {
        narrowed
    } else {
        vertical_pass(&narrowed, 3 * columns.count as usize, first, &vertical)
    };
    RgbImage {
        width: columns.count,
        height: rows.count,
        rgb,
    }
}

const HALF: i64 = 1 << (PRECISION - 1);

fn horizontal_pass(source: &[u8], width: u32, columns: Span, filter: Filter) -> Vec<u8> {
    let stride = 3 * width as usize;
    if columns.full == width {
        let (from, to) = (3 * columns.from as usize, 3 * (columns.from + columns.count) as usize);
        return source
            .chunks_exact(stride)
            .flat_map(|row| &row[from..to])
            .copied()
            .collect();
    }
    let taps = coefficients(width, columns, filter);
    let mut rgb = Vec::with_capacity(source.len() / stride * 3 * columns.count as usize);
    for row in source.chunks_exact(stride) {
        for (first, weights) in &taps {
            let mut sums = [HALF; 3];
            for (&weight, pixel) in weights.iter().zip(row[3 * first..].chunks_exact(3)) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i64::from(weight) * i64::from(value);
                }
            }
            rgb.extend(sums.map(clip));
        }
    }
    rgb
}

/// `source` starts at source row `offset`.
fn vertical_pass(source: &[u8], stride: usize, offset: usize, taps: &[Taps]) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(stride * taps.len());
    let mut sums = vec![0i64; stride];
    for (first, weights) in taps {
        sums.fill(HALF);
        let rows = source[(first - offset) * stride..].chunks_exact(stride);
        for (&weight, row) in weights.iter().zip(rows) {
            sums.iter_mut()
                .zip(row)
                .for_each(|(sum, &value)| *sum += i64::from(weight) * i64::from(value));
        }
        rgb.extend(sums.iter().map(|&sum| clip(sum)));
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The image that the fixtures' scripts generate with the same numbers.
    fn noise(width: u32, height: u32) -> RgbImage {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        RgbImage {
            width,
            height,
            rgb: (0..3 * width * height).map(|_| next()).collect(),
        }
    }

    fn cut(image: &RgbImage, left: u32, upper: u32, (width, height): (u32, u32)) -> Vec<u8> {
        let (stride, from, n) = (3 * image.width as usize, 3 * left as usize, 3 * width as usize);
        let rows = image
            .rgb
            .chunks_exact(stride)
            .skip(upper as usize)
            .take(height as usize);
        rows.flat_map(|row| &row[from..from + n]).copied().collect()
    }

    #[test]
    fn partial_resize_equals_cropping_the_whole() {
        for (width, height) in [(61, 47), (96, 130), (300, 96), (20, 33)] {
            let source = noise(width, height);
            for (full, part) in [
                ((96, 96), (64, 80)),
                ((width, 200), (9, 200)),
                ((200, height), (200, 9)),
            ] {
                let whole = resize(&source, full.0, full.1, Filter::Bicubic);
                for (left, upper) in [(0, 0), (full.0 - part.0, full.1 - part.1), ((full.0 - part.0) / 2, 0)] {
                    let columns = Span {
                        full: full.0,
                        from: left,
                        count: part.0,
                    };
                    let rows = Span {
                        full: full.1,
                        from: upper,
                        count: part.1,
                    };
                    let found = resize_part(&source, columns, rows, Filter::Bicubic);
                    assert_eq!(
                        found.rgb,
                        cut(&whole, left, upper, part),
                        "{width}x{height} to {full:?}, {part:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn thin_images_cost_no_more_than_their_crop() {
        let plan = CropPlan::new(512, 32);
        for (width, height) in [(1, 16_384), (16_384, 1), (1, 1)] {
            let prepared = plan.prepare(&noise(width, height), CropOffset::Centre);
            assert_eq!((prepared.width, prepared.height), plan.steps(width, height).size);
            assert!(prepared.is_consistent());
        }
    }

    #[test]
    fn random_offsets_stay_inside_and_follow_the_seed() {
        use rand::SeedableRng as _;
        let plan = CropPlan::new(96, 16);
        let source = noise(200, 96);
        let draw = |seed| {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            plan.prepare(&source, CropOffset::Random(&mut rng))
        };
        assert_eq!(draw(1), draw(1));
        assert!((2..20).any(|seed| draw(seed) != draw(1)));
    }

    #[test]
    fn reduced_images_give_the_same_crops() {
        use rand::SeedableRng as _;

        let plan = CropPlan::new(96, 32);
        // Odd sides are rounded at each halving; the last two lie between two crop sizes.
        for (width, height) in [
            (90, 70),
            (96, 96),
            (640, 400),
            (1001, 777),
            (391, 1999),
            (1030, 1031),
            (899, 597),
        ] {
            let image = noise(width, height);
            let reduced = plan.reduce(image.clone());
            assert!(
                reduced.pixels.rgb.len() <= 3 * (2 * 192) * (2 * 192),
                "{width} x {height}"
            );
            assert_eq!(
                reduced.prepare(&plan, CropOffset::Centre),
                plan.prepare(&image, CropOffset::Centre),
                "{width} x {height}"
            );
            let random = || rand::rngs::StdRng::seed_from_u64(7);
            assert_eq!(
                reduced.prepare(&plan, CropOffset::Random(&mut random())),
                plan.prepare(&image, CropOffset::Random(&mut random())),
                "{width} x {height}"
            );
            // With other sizes it is treated like any other image.
            let other = CropPlan::new(192, 32);
            let size = other.steps(reduced.pixels.width, reduced.pixels.height).size;
            let crop = reduced.prepare(&other, CropOffset::Centre);
            assert!(other.sizes().contains(&(crop.width, crop.height)), "{size:?}");
        }
    }
}
