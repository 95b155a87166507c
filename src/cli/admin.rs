//! `coar admin`: inspection and repair by the operator, across all tenants. It needs the database and the blob store,
//! but neither a running server nor a model.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;

use super::local::{DataArgs, block_on, existing_registry};
use super::printable::printable;
use crate::registry::{BlobError, DataLock, Deletion, Job, JobId, JobStatus, Registry, RegistryError, now};
use coar_core::concept::ConceptFile;

#[derive(Debug, Subcommand)]
pub(super) enum AdminCommand {
    /// Show the queued and running jobs by tenant, and the processes that share the database.
    Queue {
        #[command(flatten)]
        data: DataArgs,
    },
    /// List the jobs of all tenants that have one status. Default: the dead letters.
    Jobs {
        /// queued, running, succeeded, failed or cancelled.
        #[arg(long, default_value = "failed")]
        status: JobStatus,
        /// Maximum number of jobs, newest first.
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: u32,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Requeue a failed job: a training, which resumes from its saved state, a generation or a webhook.
    Replay {
        /// As `coar admin jobs` shows it: training_…, generation_… or delivery_…
        id: JobId,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Read everything that is stored and compare it with its checksum. Concept files are parsed too.
    Verify {
        /// Check only concept files.
        #[arg(long)]
        concepts: bool,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Remove blobs that nothing refers to. Safe while processes that share a --database run. With SQLite, stop the
    /// server first; it also removes such blobs at startup.
    Gc {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Change the secret that signs image addresses and authenticates API processes to workers. It takes effect on
    /// running servers within seconds.
    RotateSecret {
        /// Hours for which the old secret is still accepted. If images are kept for longer, their addresses expire
        /// earlier. After a leak use 0: all existing addresses become invalid at once.
        #[arg(long, default_value_t = 24, value_name = "HOURS")]
        accept_old_for: u32,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Change the secret that signs a tenant's webhooks, and print the new one.
    RotateWebhookSecret {
        tenant: String,
        /// Hours for which webhooks are signed with both the old and the new secret.
        #[arg(long, default_value_t = 24, value_name = "HOURS")]
        keep_old_for: u32,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Delete a tenant with everything that belongs to it: keys, concepts, trainings, generations, images, webhooks.
    DeleteTenant {
        name: String,
        /// Delete. Without it, the command only shows what would be deleted.
        #[arg(long)]
        yes: bool,
        /// Delete the tenant even if it has the last valid key with the scope `admin`. Requests still need a key
        /// afterwards: create one with `coar keys create`.
        #[arg(long)]
        including_the_last_admin_key: bool,
        #[command(flatten)]
        data: DataArgs,
    },
}

impl AdminCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        block_on(async {
            match self {
                Self::Queue { data } => queue(&existing_registry(&data).await?).await,
                Self::Jobs { status, limit, data } => jobs(&existing_registry(&data).await?, status, limit).await,
                Self::Replay { id, data } => replay(&existing_registry(&data).await?, id).await,
                Self::Verify { concepts, data } => verify(&existing_registry(&data).await?, concepts).await,
                Self::Gc { data } => gc(&data).await,
                Self::RotateSecret { accept_old_for, data } => {
                    let registry = existing_registry(&data).await?;
                    registry.rotate_server_secret(hours(accept_old_for)).await?;
                    println!("the secret is changed; the one before it is accepted for {accept_old_for} hours");
                    Ok(())
                }
                Self::RotateWebhookSecret {
                    tenant,
                    keep_old_for,
                    data,
                } => {
                    let registry = existing_registry(&data).await?;
                    let changed = registry.rotate_webhook_secret(&tenant, hours(keep_old_for)).await?;
                    let changed = changed.ok_or_else(|| anyhow::anyhow!("there is no tenant `{tenant}`"))?;
                    eprintln!(
                        "webhooks of {tenant} are signed with both secrets for {keep_old_for} hours; the new one:"
                    );
                    println!("{}", changed.webhook_secret);
                    Ok(())
                }
                Self::DeleteTenant {
                    name,
                    yes,
                    including_the_last_admin_key,
                    data,
                } => {
                    let deletion = Deletion {
                        asked_with: None,
                        including_the_last_admin_key,
                    };
                    delete_tenant(&data, &name, yes, deletion).await
                }
            }
        })
    }
}

fn hours(hours: u32) -> Duration {
    Duration::from_secs(3600 * u64::from(hours))
}

/// A time as its age: `3m 20s`.
fn age(at: i64) -> String {
    let seconds = ((now() - at) / 1000).max(0);
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

async fn queue(registry: &Registry) -> anyhow::Result<()> {
    println!("{:<11} {:<20} {:<9} {:>7} OLDEST", "KIND", "TENANT", "STATUS", "JOBS");
    for row in registry.queue_counts().await? {
        println!(
            "{:<11} {:<20} {:<9} {:>7} {}",
            row.kind,
            row.tenant,
            row.status,
            row.count,
            age(row.oldest)
        );
    }
    println!();
    println!(
        "{:<41} {:<7} {:<9} {:<28} {:<9} LOAD",
        "PROCESS", "ROLE", "VERSION", "ADDRESS", "STATE"
    );
    for process in registry.processes().await? {
        let load: serde_json::Value = serde_json::from_str(&process.load).unwrap_or_default();
        let number = |key: &str| load[key].as_f64().unwrap_or(0.0);
        println!(
            "{:<41} {:<7} {:<9} {:<28} {:<9} {:.0} images, {:.0} tokens wait, {:.0} tokens/s",
            process.id,
            process.role,
            process.version,
            process.address.as_deref().unwrap_or("-"),
            if process.draining { "draining" } else { "live" },
            number("images"),
            number("waiting_tokens"),
            number("tokens_per_second"),
        );
    }
    Ok(())
}

/// A line of `coar admin jobs`.
fn line(job: &Job) -> String {
    let problem = job.error.as_deref().unwrap_or("");
    let json: serde_json::Value = serde_json::from_str(problem).unwrap_or_default();
    let problem = match (json["code"].as_str(), json["message"].as_str()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => problem.to_owned(),
    };
    let problem = printable(&problem);
    format!(
        "{:<44} {:<16} {:<9} {:>7} {:<8} {problem}",
        job.id,
        job.tenant,
        job.status,
        job.attempt,
        age(job.created_at)
    )
}

async fn jobs(registry: &Registry, status: JobStatus, limit: u32) -> anyhow::Result<()> {
    println!(
        "{:<44} {:<16} {:<9} {:>7} {:<8} PROBLEM",
        "ID", "TENANT", "STATUS", "ATTEMPT", "AGE"
    );
    for job in registry.jobs(status, limit).await? {
        println!("{}", line(&job));
    }
    Ok(())
}

async fn replay(registry: &Registry, id: JobId) -> anyhow::Result<()> {
    anyhow::ensure!(
        registry.replay(id).await?,
        "there is no such job that has failed, or images of it were kept; `coar admin jobs` shows what there is"
    );
    // Notifies workers at once, if the database supports it.
    for what in ["trainings", "generations"] {
        registry.signal(what).await?;
    }
    println!("queued again");
    Ok(())
}

async fn verify(registry: &Registry, concepts_only: bool) -> anyhow::Result<()> {
    let mut uses: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for used in registry.blob_uses().await? {
        if !concepts_only || used.role == "concept" {
            uses.entry(used.hash.clone()).or_default().push(used);
        }
    }
    let (mut bytes, mut faults) = (0, 0);
    for (hash, users) in &uses {
        let verdict = match registry.blobs.get(hash).await {
            Ok(blob) => {
                bytes += blob.len();
                let concept = users.iter().any(|used| used.role == "concept");
                match concept.then(|| ConceptFile::from_bytes(&blob)) {
                    Some(Err(error)) => Err(error.to_string()),
                    _ => Ok(()),
                }
            }
            Err(BlobError::Missing(_)) => Err("it is missing".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(problem) = verdict {
            for used in users {
                faults += 1;
                println!("FAIL  {} of {} (tenant {}): {problem}", used.role, used.of, used.tenant);
            }
        }
    }
    println!("{} blobs read, {bytes} bytes, {faults} faults", uses.len());
    anyhow::ensure!(
        faults == 0,
        "{faults} things cannot be read: bring their blobs back from a backup (each is named by its SHA-256), or delete them"
    );
    Ok(())
}

/// Locks the data folder: no other process may store blobs during garbage collection. A shared database needs no lock.
fn alone(data: &DataArgs) -> anyhow::Result<Option<DataLock>> {
    match data.database {
        Some(_) => Ok(None),
        None => Ok(Some(DataLock::take(&data.data).map_err(|error| {
            anyhow::anyhow!("{error}; it collects garbage itself when it starts")
        })?)),
    }
}

async fn gc(data: &DataArgs) -> anyhow::Result<()> {
    let registry = existing_registry(data).await?;
    let lock = alone(data)?;
    if lock.is_some() {
        registry.forget_holds().await?;
    }
    println!("{} blobs removed", registry.collect_garbage().await?);
    Ok(())
}

async fn delete_tenant(data: &DataArgs, name: &str, yes: bool, deletion: Deletion) -> anyhow::Result<()> {
    let registry = existing_registry(data).await?;
    let tenant = registry
        .tenant(name)
        .await?
        .ok_or_else(|| anyhow::anyhow!("there is no tenant `{name}`"))?;
    let usage = registry.usage(tenant.id).await?;
    anyhow::ensure!(
        yes,
        "this removes the tenant `{name}` with its {} concepts and all its images for good; say --yes to do it",
        usage.concepts
    );
    let _lock = alone(data).map_err(|_| {
        anyhow::anyhow!("a server uses this folder; stop it, or ask it: DELETE /v1/admin/tenants/{name}")
    })?;
    match registry.delete_tenant(tenant.id, deletion).await {
        Err(RegistryError::LastAdminKey) => anyhow::bail!(
            "{name} has the last valid key with the scope admin: make one for another tenant with `coar keys create`, or say \
             --including-the-last-admin-key"
        ),
        other => other?,
    };
    println!("{name} is deleted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_line_with_its_problem() {
        let job = Job {
            kind: "training".into(),
            id: "training_1".into(),
            tenant: "acme".into(),
            status: "failed".into(),
            attempt: 3,
            process: None,
            created_at: now() - 3_700_000,
            error: Some(r#"{"code": "training_failed", "message": "out of memory"}"#.into()),
        };
        let line = line(&job);
        assert!(line.contains("acme") && line.contains("1h 1m") && line.ends_with("training_failed: out of memory"));
        assert_eq!(line.lines().count(), 1);
    }
}
