//! The codebook of a tokenizer in training: moving averages of the latents assigned to each code.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use coar_engine::model::ModelError;
use coar_engine::model::vqgan::nearest;

/// Weight of the past in the moving averages.
const DECAY: f64 = 0.99;
/// Moving count below which a code counts as unused.
const UNUSED: f64 = 0.03;
/// Moving count of a reinitialised code.
const REVIVED: f64 = 0.3;
const KMEANS_ROUNDS: usize = 10;

/// The codebook's running statistics (exponential moving averages of assigned latents).
#[derive(Debug)]
pub(super) struct Codebook {
    /// `[codes, dim]`
    pub rows: Tensor,
    /// `[codes]`
    pub counts: Tensor,
    /// `[codes, dim]`
    pub sums: Tensor,
}

impl Codebook {
    pub(super) fn new(codes: i64, dim: i64, device: Device) -> Result<Self, ModelError> {
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, device));
        Ok(Self {
            rows: zeros(&[codes, dim])?,
            counts: zeros(&[codes])?,
            sums: zeros(&[codes, dim])?,
        })
    }

    /// k-means over latents `[m, dim]`.
    pub(super) fn cluster(&mut self, latents: &Tensor, rng: &mut ChaCha8Rng) -> Result<(), ModelError> {
        let (codes, device) = (self.rows.size()[0], latents.device());
        let mut pick = |n: i64| some_rows(latents, n, rng);
        let mut rows = pick(codes)?;
        for _ in 0..KMEANS_ROUNDS {
            let (counts, sums) = tally(latents, &nearest(latents, &rows)?, codes)?;
            let empty = counts.f_lt(0.5)?.f_unsqueeze(1)?;
            let means = sums.f_div(&counts.f_clamp_min(1.0)?.f_unsqueeze(1)?)?;
            rows = pick(codes)?.f_where_self(&empty, &means)?;
        }
        self.sums = rows.f_detach_copy()?;
        self.counts = Tensor::f_ones([codes], (Kind::Float, device))?;
        self.rows = rows;
        Ok(())
    }

    /// Updates the averages with a batch's latents `[m, dim]` and their codes `[m]`; with `revive`, unused codes are
    /// reinitialised from random latents of the batch.
    pub(super) fn update(
        &mut self,
        latents: &Tensor,
        codes: &Tensor,
        revive: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), ModelError> {
        let (counts, sums) = tally(latents, codes, self.rows.size()[0])?;
        let _ = self
            .counts
            .f_mul_scalar_(DECAY)?
            .f_add_(&counts.f_mul_scalar(1.0 - DECAY)?)?;
        let _ = self
            .sums
            .f_mul_scalar_(DECAY)?
            .f_add_(&sums.f_mul_scalar(1.0 - DECAY)?)?;
        self.rows = self.sums.f_div(&self.counts.f_clamp_min(1e-4)?.f_unsqueeze(1)?)?;
        if revive {
            let dead = self.counts.f_lt(UNUSED)?.f_nonzero()?.f_view([-1i64])?;
            let n = dead.size()[0];
            if n > 0 {
                let fresh = some_rows(latents, n, rng)?;
                let _ = self.rows.f_index_copy_(0, &dead, &fresh)?;
                let _ = self.sums.f_index_copy_(0, &dead, &fresh.f_mul_scalar(REVIVED)?)?;
                let _ = self.counts.f_index_fill_(0, &dead, REVIVED)?;
            }
        }
        Ok(())
    }

    /// Number of unused codes.
    pub(super) fn unused(&self) -> Result<i64, ModelError> {
        Ok(i64::try_from(&self.counts.f_lt(UNUSED)?.f_sum(Kind::Int64)?)?)
    }

    /// Everything except the rows, by name, for the training state.
    pub(super) fn statistics(&self) -> [(&'static str, Tensor); 2] {
        [
            ("codebook.counts", self.counts.shallow_clone()),
            ("codebook.sums", self.sums.shallow_clone()),
        ]
    }
}

/// `n` random rows. The choice does not depend on libtorch's generator, which all threads of the process share.
fn some_rows(latents: &Tensor, n: i64, rng: &mut ChaCha8Rng) -> Result<Tensor, ModelError> {
    let at: Vec<i64> = (0..n).map(|_| rng.random_range(0..latents.size()[0])).collect();
    Ok(latents.f_index_select(0, &Tensor::f_from_slice(&at)?.f_to_device(latents.device())?)?)
}

/// For each code: the number of its latents, and their sum.
fn tally(latents: &Tensor, codes: &Tensor, n: i64) -> Result<(Tensor, Tensor), ModelError> {
    let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, latents.device()));
    // `bincount` would synchronise with the device.
    let one = Tensor::f_ones([codes.size()[0]], (Kind::Float, latents.device()))?;
    let counts = zeros(&[n])?.f_index_add(0, codes, &one)?;
    let sums = zeros(&[n, latents.size()[1]])?.f_index_add(0, codes, latents)?;
    Ok((counts, sums))
}
