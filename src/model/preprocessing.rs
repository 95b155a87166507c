//! Crop sizes and Pillow-exact resampling (`data/item_processor.py`).

use rand::{Rng, RngCore};

use crate::picture::RgbPicture;

/// Largest ratio of a picture's sides.
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

/// Where a resized picture is cut.
pub enum CropOffset<'a> {
    /// In the middle: what users expect of their references.
    Centre,
    /// As the reference's training does; left is drawn before upper.
    Random(&'a mut dyn RngCore),
    /// At given pixels.
    At(u32, u32),
}

/// The sizes that a checkpoint draws, and how pictures are brought to one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CropPlan {
    sizes: Vec<(u32, u32)>,
}

/// The steps from a picture's size to a crop size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CropSteps {
    /// The chosen size.
    pub size: (u32, u32),
    /// Sizes after each halving with the box filter.
    pub halvings: Vec<(u32, u32)>,
    /// The size of the bicubic resize.
    pub resized: (u32, u32),
    /// The largest offset, left and upper.
    pub room: (u32, u32),
}

impl CropPlan {
    /// All sizes for a target side in pixels, whose sides are multiples of `unit` pixels (a grid of two codes).
    pub fn new(target: u32, unit: u32) -> Self {
        Self { sizes: crop_sizes((target / unit).pow(2), unit, MAX_RATIO) }
    }

    /// A plan over given sizes.
    pub fn of_sizes(sizes: Vec<(u32, u32)>) -> Self {
        Self { sizes }
    }

    /// `(width, height)` of every size, wide first.
    pub fn sizes(&self) -> &[(u32, u32)] {
        &self.sizes
    }

    /// What happens to a picture of `width` x `height`, both at least 1.
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
        let resized = ((f64::from(w) * scale).round_ties_even() as u32, (f64::from(h) * scale).round_ties_even() as u32);
        let room = (resized.0.saturating_sub(size.0), resized.1.saturating_sub(size.1));
        CropSteps { size, halvings, resized, room }
    }

    /// Halves, resizes and cuts a picture.
    pub fn prepare(&self, picture: &RgbPicture, offset: CropOffset) -> RgbPicture {
        let steps = self.steps(picture.width, picture.height);
        let mut current = picture.clone();
        for &(w, h) in &steps.halvings {
            current = resize(&current, w, h, Filter::Box);
        }
        current = resize(&current, steps.resized.0, steps.resized.1, Filter::Bicubic);
        let (left, upper) = match offset {
            CropOffset::Centre => (steps.room.0 / 2, steps.room.1 / 2),
            CropOffset::Random(rng) => {
                let left = rng.random_range(0..=steps.room.0);
                (left, rng.random_range(0..=steps.room.1))
            }
            CropOffset::At(left, upper) => (left.min(steps.room.0), upper.min(steps.room.1)),
        };
        cut(&current, left, upper, steps.size)
    }
}

fn cut(picture: &RgbPicture, left: u32, upper: u32, (width, height): (u32, u32)) -> RgbPicture {
    let (stride, from, n) = (3 * picture.width as usize, 3 * left as usize, 3 * width as usize);
    let rows = picture.rgb.chunks_exact(stride).skip(upper as usize).take(height as usize);
    RgbPicture { width, height, rgb: rows.flat_map(|row| &row[from..from + n]).copied().collect() }
}

/// Pillow's resampling filters that the pipeline uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Box,
    /// a = -0.5
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
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

/// First source index and fixed-point weights for every output index.
fn coefficients(input: u32, output: u32, filter: Filter) -> Vec<(usize, Vec<i32>)> {
    let scale = f64::from(input) / f64::from(output);
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    (0..output)
        .map(|index| {
            let centre = (f64::from(index) + 0.5) * scale;
            // Pillow truncates towards zero after adding a half, and clips to the picture.
            let first = ((centre - support + 0.5) as i64).max(0);
            let last = ((centre + support + 0.5) as i64).min(i64::from(input));
            let weights: Vec<f64> = (first..last)
                .map(|x| filter.weight((x as f64 - centre + 0.5) / filter_scale))
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

/// Resizes as Pillow does: horizontally, then vertically, with 8 bits in between.
pub fn resize(picture: &RgbPicture, width: u32, height: u32, filter: Filter) -> RgbPicture {
    const HALF: i64 = 1 << (PRECISION - 1);
    let mut current = picture.clone();
    if width != current.width {
        let columns = coefficients(current.width, width, filter);
        let mut rgb = Vec::with_capacity(3 * width as usize * current.height as usize);
        for row in current.rgb.chunks_exact(3 * current.width as usize) {
            for (first, weights) in &columns {
                for channel in 0..3 {
                    let sum: i64 = weights
                        .iter()
                        .enumerate()
                        .map(|(k, &weight)| i64::from(weight) * i64::from(row[3 * (first + k) + channel]))
                        .sum();
                    rgb.push(clip(HALF + sum));
                }
            }
        }
        current = RgbPicture { width, height: current.height, rgb };
    }
    if height != current.height {
        let rows = coefficients(current.height, height, filter);
        let stride = 3 * width as usize;
        let mut rgb = Vec::with_capacity(stride * height as usize);
        let mut sums = vec![0i64; stride];
        for (first, weights) in &rows {
            sums.fill(HALF);
            for (k, &weight) in weights.iter().enumerate() {
                let row = &current.rgb[(first + k) * stride..][..stride];
                sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += i64::from(weight) * i64::from(value));
            }
            rgb.extend(sums.iter().map(|&sum| clip(sum)));
        }
        current = RgbPicture { width, height, rgb };
    }
    current
}
