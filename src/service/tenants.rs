//! Tenants and their quotas, for administrators.

use std::time::Duration;

use super::keys::{check_tenant_name, no_tenant};
use super::{Caller, Service};
use crate::registry::{Deletion, Listed, Page, Quotas, Tenant};
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::TenantId;

/// A change of quotas: `None` keeps a quota, `Some(None)` resets it to the server's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QuotaChange {
    pub concepts: Option<Option<u32>>,
    pub trainings: Option<Option<u32>>,
    pub requests_in_flight: Option<Option<u32>>,
    pub pictures_per_minute: Option<Option<u32>>,
    pub requests_per_minute: Option<Option<u32>>,
    pub bytes: Option<Option<u64>>,
}

impl QuotaChange {
    fn apply(self, to: Quotas) -> Quotas {
        Quotas {
            concepts: self.concepts.unwrap_or(to.concepts),
            trainings: self.trainings.unwrap_or(to.trainings),
            requests_in_flight: self.requests_in_flight.unwrap_or(to.requests_in_flight),
            pictures_per_minute: self.pictures_per_minute.unwrap_or(to.pictures_per_minute),
            requests_per_minute: self.requests_per_minute.unwrap_or(to.requests_per_minute),
            bytes: self.bytes.unwrap_or(to.bytes),
        }
    }
}

impl Service {
    /// Creates a tenant.
    ///
    /// # Errors
    /// When the name is malformed or taken.
    pub async fn add_tenant(&self, name: &str, quotas: QuotaChange) -> Result<Tenant, Error> {
        check_tenant_name(name)?;
        Ok(self.registry.add_tenant(name, quotas.apply(Quotas::default())).await?)
    }

    /// Tenants, newest first.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn tenants(&self, page: Page<TenantId>) -> Result<Listed<Tenant>, Error> {
        Ok(self.registry.tenants(page).await?)
    }

    /// A tenant by its name.
    ///
    /// # Errors
    /// When there is none.
    pub async fn tenant(&self, name: &str) -> Result<Tenant, Error> {
        self.registry.tenant(name).await?.ok_or_else(|| no_tenant(name))
    }

    /// Changes a tenant's quotas.
    ///
    /// # Errors
    /// When there is none.
    pub async fn change_quotas(&self, name: &str, change: QuotaChange) -> Result<Tenant, Error> {
        let quotas = change.apply(self.tenant(name).await?.quotas);
        let changed = self.registry.set_quotas(name, quotas).await?;
        changed.ok_or_else(|| no_tenant(name))
    }

    /// Gives a tenant a new webhook secret; the present one also signs for this many hours.
    ///
    /// # Errors
    /// When there is none.
    pub async fn rotate_webhook_secret(&self, name: &str, keep_old_hours: u32) -> Result<Tenant, Error> {
        let keep = Duration::from_secs(3600 * u64::from(keep_old_hours));
        let changed = self.registry.rotate_webhook_secret(name, keep).await?;
        changed.ok_or_else(|| no_tenant(name))
    }

    /// Deletes a tenant with everything that it has. The tenant `default` and the caller's own cannot be deleted, nor
    /// the one with the last valid key of an administrator: the server would be left without one.
    ///
    /// # Errors
    /// When there is none, or it cannot be deleted.
    pub async fn delete_tenant(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let tenant = self.tenant(name).await?;
        if tenant.id == TenantId::DEFAULT || tenant.id == caller.tenant {
            let message =
                format!("The tenant `{name}` cannot be deleted: it is the server's own or that of the key in use.");
            return Err(Error::new(ErrorKind::Conflict, "tenant_in_use", message));
        }
        let deletion = Deletion {
            asked_with: caller.key,
            including_the_last_admin_key: false,
        };
        self.registry.delete_tenant(tenant.id, deletion).await?;
        self.keys.forget();
        self.wake.now();
        Ok(())
    }
}
