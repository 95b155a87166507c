//! `coar keys create|list|revoke`

use clap::Subcommand;

use super::local::{DataArgs, block_on, existing_registry, keep_files_private, storage};
use super::remote::format::table;
use crate::registry::{Page, Registry, now};
use crate::service::{KeyRequest, Keys, Scopes};
use coar_core::ids::KeyId;

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Create a key and print it, once. From the first key on, every request needs one.
    ///
    /// Works while the server runs. If the tenant does not exist, it is created.
    Create {
        /// Tenant whose concepts and images the key gives access to: 1 to 63 of a-z, 0-9 and -.
        #[arg(long)]
        tenant: String,
        /// What the key is for.
        #[arg(long)]
        name: Option<String>,
        /// What the key allows, separated by commas: read, generate, train, admin, metrics.
        #[arg(long, default_value_t)]
        scopes: Scopes,
        /// Also print the secret that signs the tenant's webhooks. It is always printed for a new tenant.
        #[arg(long)]
        show_webhook_secret: bool,
        /// Days after which the key expires. Default: never.
        #[arg(long, value_name = "DAYS")]
        expires: Option<u32>,
        #[command(flatten)]
        data: DataArgs,
    },
    /// List all keys, including revoked and expired ones. Their secrets are not stored.
    List {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Revoke a key permanently. It takes effect on a running server within a second.
    Revoke {
        /// As `coar keys list` shows it: key_…
        id: String,
        #[command(flatten)]
        data: DataArgs,
    },
}

impl KeysCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        keep_files_private();
        block_on(async {
            match self {
                Self::Create {
                    tenant,
                    name,
                    scopes,
                    show_webhook_secret,
                    expires,
                    data,
                } => {
                    if data.database.is_none() && !data.data.join("coar.sqlite").exists() {
                        eprintln!("new database in {}", data.data.display());
                    }
                    let keys = Keys::new(Registry::connect(&storage(&data)).await?);
                    let (owner, is_new) = keys.tenant_or_new(&tenant).await?;
                    let request = KeyRequest {
                        tenant,
                        name,
                        scopes,
                        expires_in_days: expires,
                    };
                    let created = keys.create(request).await?;
                    // The key alone on standard output, for scripts.
                    eprintln!(
                        "{} of tenant {}, scopes {}; keep it, it is not shown again:",
                        created.key.id, owner.name, scopes
                    );
                    println!("{}", created.text);
                    if is_new || show_webhook_secret {
                        eprintln!("webhooks of this tenant are signed with {}", owner.webhook_secret);
                    }
                    Ok(())
                }
                Self::List { data } => list(&Keys::new(existing_registry(&data).await?)).await,
                Self::Revoke { id, data } => {
                    Keys::new(existing_registry(&data).await?).revoke(&id).await?;
                    println!("{id} is revoked");
                    Ok(())
                }
            }
        })
    }
}

async fn list(keys: &Keys) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let mut page: Page<KeyId> = Page {
        limit: 100,
        after: None,
    };
    loop {
        let listed = keys.list(page).await?;
        for key in &listed.rows {
            let state = match key.revoked_at {
                Some(_) => "revoked",
                None if key.is_valid(now()) => "valid",
                None => "expired",
            };
            rows.push(vec![
                key.id.to_string(),
                key.tenant_name.clone(),
                format!("coar_{}", key.public_id),
                state.to_owned(),
                key.scopes.to_string(),
                key.name.clone(),
            ]);
        }
        page.after = listed.rows.last().map(|key| key.id);
        if !listed.has_more {
            break;
        }
    }
    print!(
        "{}",
        table(&["ID", "TENANT", "BEGINS", "STATE", "SCOPES", "NAME"], &rows)
    );
    Ok(())
}
