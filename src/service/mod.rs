//! The use cases, shared by HTTP and the command line. Access and limits are decided here.

mod archive;
mod concepts;
mod facts;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod generations;
mod image_set;
mod keys;
mod links;
mod placement;
mod quota;
mod reference_images;
mod shares;
mod size;
mod tenants;
mod trainings;
mod unpacking;
mod uploads;

use std::sync::Arc;

pub use concepts::{Change, ConceptView, Registered, Registration};
pub use facts::read_metadata;
pub use generate::{GenerateInput, INDEX_LIMIT, NamedConcept, Plan, SEED_LIMIT, Transient};
pub use generations::{Begun, GenerationInput, GenerationView};
pub use image_set::{ImageSet, caption_line};
pub use keys::{CreatedKey, KeyRequest, Keys};
pub use links::{Links, Signed};
pub use quota::{Admitted, Allowance, Standing, Tallies};
pub use reference_images::image_fault;
pub use shares::{Full, Pool, Share, Shares};
pub use tenants::QuotaChange;
pub use trainings::{Queued, TrainingQuery, TrainingSettings};
pub use unpacking::{Unpacked, too_many_images};
pub use uploads::{Receiving, Room, Upload};

use crate::cluster::Executor;
use crate::config::{Config, SizePolicy};
use crate::jobs::{Drawings, Wake};
use crate::registry::{Quotas, Registry};
pub use crate::registry::{Scope, Scopes};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::{KeyId, TenantId};
use coar_core::image::ImageLimits;

/// The caller of a use case. Objects of other tenants are invisible to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub tenant: TenantId,
    /// `None`: there are no keys, or the caller is the command line.
    pub key: Option<KeyId>,
    pub scopes: Scopes,
}

impl Caller {
    /// The tenant `default` with every scope: the command line, and every caller if there are no keys.
    pub const LOCAL: Self = Self {
        tenant: TenantId::DEFAULT,
        key: None,
        scopes: Scopes::ALL,
    };

    /// # Errors
    /// `missing_scope`
    pub fn require(&self, scope: Scope) -> Result<(), Error> {
        if self.scopes.contains(scope) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Forbidden,
            "missing_scope",
            format!(
                "This needs a key with the scope `{0}`; yours has {1}.",
                scope.as_str(),
                self.scopes
            ),
        ))
    }
}

/// The dependencies of the use cases.
#[derive(Debug, Clone)]
pub struct Service {
    pub registry: Registry,
    pub keys: Keys,
    pub executor: Executor,
    pub wake: Wake,
    pub limits: Arc<Limits>,
    pub tallies: Tallies,
    pub shares: Arc<Shares>,
    pub drawings: Drawings,
    pub links: Arc<Links>,
}

/// The highest priority that callers may give a job.
pub const PRIORITY_LIMIT: i32 = 100;

/// Maximum number of images of one generation.
pub const COUNT_LIMIT: u32 = 10;

/// Limits for callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub image: ImageLimits,
    /// Maximum number of reference images of one concept.
    pub images: usize,
    /// Maximum number of images of one generation.
    pub count: u32,
    /// Maximum characters of a prompt, before and after its concepts are placed in it.
    pub prompt: usize,
    /// Maximum number of concepts of one generation.
    pub concepts: usize,
    /// What happens with a size that the model does not support.
    pub size_policy: SizePolicy,
    /// Maximum size of a JSON body in bytes.
    pub json: usize,
    /// Quotas of a tenant for which an administrator has not set others.
    pub quotas: Quotas,
}

impl Limits {
    /// The limits of a configuration.
    pub fn of(config: &Config) -> Self {
        let default = Self::default();
        let quota = |number: u32| (number > 0).then_some(number);
        Self {
            image: ImageLimits {
                bytes: config.limits.picture_limit << 20,
                ..default.image
            },
            json: config.limits.json_limit << 10,
            size_policy: config.images.size_policy,
            quotas: Quotas {
                concepts: quota(config.quotas.quota_concepts),
                trainings: quota(config.quotas.quota_trainings),
                requests_in_flight: quota(config.quotas.quota_requests_in_flight),
                pictures_per_minute: quota(config.quotas.quota_pictures_per_minute),
                requests_per_minute: quota(config.quotas.quota_requests_per_minute),
                bytes: quota(config.quotas.quota_storage).map(|mebibytes| u64::from(mebibytes) << 20),
            },
            ..default
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            image: ImageLimits::default(),
            images: coar_core::training::spec::IMAGES_LIMIT,
            count: COUNT_LIMIT,
            prompt: 4000,
            concepts: 8,
            size_policy: SizePolicy::default(),
            json: 1 << 20,
            quotas: Quotas::default(),
        }
    }
}
