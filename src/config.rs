//! The operator's configuration. Every field is a `--flag`, a `COAR_*` variable and a key of the TOML file in
//! `--config`, under the same name: `--training-share`, `COAR_TRAINING_SHARE`, `training_share`. A flag has precedence
//! over a variable, a variable over the file, the file over the default. The only secret is the password in the
//! database's URL, which is never shown: keys and signing secrets are in the database.

mod images;
mod listen;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Command, ValueEnum};
use coar_core::speculation::Speculation;
use serde::Serialize;

pub use images::{ImagesArgs, ModelAlias, ResponseFormat, SizePolicy};
pub use listen::ListenAddress;

/// The settings of `coar serve`.
#[derive(Debug, Clone, Args, Serialize)]
pub struct Config {
    /// TOML file with any of these settings.
    #[arg(long = "config", env = "COAR_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Address to listen on: HOST:PORT, [IPV6]:PORT, :PORT for all addresses, or unix:/PATH. Any address but loopback
    /// and a Unix socket requires an API key: `coar keys create`.
    #[arg(long, env = "COAR_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    pub listen: ListenAddress,
    /// `all`: everything in one process. `api`: serves HTTP and sends generations to workers; needs --database and no
    /// device. `worker`: generates and trains for the API processes that share its database, and serves only them.
    #[arg(long, env = "COAR_ROLE", default_value = "all")]
    pub role: Role,
    #[command(flatten)]
    #[serde(flatten)]
    pub storage: StorageArgs,
    /// Allow SQLite's database on a network file system (NFS, SMB, 9p, …), where it can lose data.
    #[arg(long, env = "COAR_DATA_ON_NETWORK", default_value = "off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub data_on_network: Switch,
    /// Address on which a worker listens for API processes. They authenticate with a secret from the database.
    #[arg(
        long,
        env = "COAR_WORKER_LISTEN",
        default_value = "0.0.0.0:8081",
        value_name = "ADDRESS"
    )]
    pub worker_listen: SocketAddr,
    /// Address at which API processes reach this worker, such as http://10.0.0.7:8081. Default: this machine's name and
    /// the port of --worker-listen.
    #[arg(long, env = "COAR_ADVERTISE", value_name = "URL")]
    pub advertise: Option<String>,
    /// Address at which clients reach the server, if it is behind a proxy: https://images.example.com. The addresses of
    /// images begin with it. Default: http:// and the Host header of each request.
    #[arg(long, env = "COAR_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Hours for which generated images are kept.
    #[arg(long, env = "COAR_KEEP_IMAGES", default_value_t = 24, value_name = "HOURS")]
    pub keep_images: u32,
    /// Write into the metadata of images how they were made: model, concepts, seed, settings; never the prompt.
    #[arg(long, env = "COAR_PROVENANCE", default_value = "on")]
    pub provenance: Switch,
    /// Allow webhooks to private, loopback and link-local addresses and to any port, for tests and closed networks.
    #[arg(long, env = "COAR_WEBHOOK_ALLOW_PRIVATE", default_value = "off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub webhook_allow_private: Switch,
    /// Origins whose pages may call the API from a browser (https://app.example.com, app://obsidian.md), separated by
    /// commas; `*`: all.
    #[arg(long, env = "COAR_CORS_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub images: ImagesArgs,
    /// Allow everyone to read /metrics. Otherwise, once there are keys, it needs one with the scope `metrics` or
    /// `admin`.
    #[arg(long, env = "COAR_METRICS_OPEN", default_value = "off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub metrics_open: Switch,
    #[command(flatten)]
    #[serde(flatten)]
    pub quotas: QuotaArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub queues: QueueArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelArgs,
}

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    All,
    Api,
    Worker,
}

impl Role {
    /// The role's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Api => "api",
            Self::Worker => "worker",
        }
    }
}

/// Where everything that must survive is kept.
#[derive(Debug, Clone, Args, Serialize)]
pub struct StorageArgs {
    /// Folder of the database, images and concepts.
    #[arg(long, env = "COAR_DATA", default_value = "data", value_name = "DIR")]
    pub data: PathBuf,
    /// postgres://user:password@host/database, for many processes. Default: SQLite in --data, for one process.
    #[arg(long, env = "COAR_DATABASE", value_name = "URL", hide_env_values = true)]
    #[serde(serialize_with = "without_password")]
    pub database: Option<String>,
    /// s3://bucket/prefix for images and concept files, with the usual AWS_* variables for keys, region and endpoint.
    /// Default: files in --data.
    #[arg(long, env = "COAR_BLOBS", value_name = "URL")]
    pub blobs: Option<String>,
}

/// Serializes a URL without its password.
fn without_password<S: serde::Serializer>(url: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    match url {
        None => serializer.serialize_none(),
        Some(url) => serializer.serialize_some(&shown(url)),
    }
}

/// A URL with stars in place of its password; a text that is no URL is replaced entirely.
fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return "***".to_owned();
    };
    // Parameters may contain a password too.
    let rest = rest.split('?').next().unwrap_or("");
    match rest.rsplit_once('@') {
        None => format!("{scheme}://{rest}"),
        Some((user, host)) => {
            let user = user.split(':').next().unwrap_or("");
            format!("{scheme}://{user}:***@{host}")
        }
    }
}

/// A number of MiB, or automatic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    Auto,
    #[serde(untagged)]
    Mebibytes(u32),
}

impl Memory {
    /// The size in bytes; `None` if it is automatic.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Auto => None,
            Self::Mebibytes(mebibytes) => Some(u64::from(mebibytes) << 20),
        }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Mebibytes(mebibytes) => write!(f, "{mebibytes}"),
        }
    }
}

fn mebibytes(text: &str) -> Result<Memory, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Memory::Auto),
        Ok(mebibytes) => Ok(Memory::Mebibytes(mebibytes)),
        Err(_) => Err("expected `auto` or a number of MiB".to_owned()),
    }
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    #[value(alias = "true", alias = "1")]
    On,
    #[value(alias = "false", alias = "0")]
    Off,
}

impl Switch {
    /// Whether it is `on`.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// How much each tenant may have and do at once; an administrator may say otherwise for one.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub struct QuotaArgs {
    /// Concepts of each tenant; 0: unlimited.
    #[arg(long, env = "COAR_QUOTA_CONCEPTS", default_value_t = 1000, value_name = "N")]
    pub quota_concepts: u32,
    /// Trainings of each tenant that are queued or running; 0: unlimited.
    #[arg(long, env = "COAR_QUOTA_TRAININGS", default_value_t = 100, value_name = "N")]
    pub quota_trainings: u32,
    /// Generations of each tenant that are queued or running; 0: unlimited.
    #[arg(long, env = "COAR_QUOTA_REQUESTS_IN_FLIGHT", default_value_t = 64, value_name = "N")]
    pub quota_requests_in_flight: u32,
    /// Images per minute of each tenant; 0: unlimited.
    #[arg(long, env = "COAR_QUOTA_PICTURES_PER_MINUTE", default_value_t = 0, value_name = "N")]
    pub quota_pictures_per_minute: u32,
    /// Requests per minute of each tenant that create, start, check or cancel something; 0: unlimited.
    #[arg(
        long,
        env = "COAR_QUOTA_REQUESTS_PER_MINUTE",
        default_value_t = 600,
        value_name = "N"
    )]
    pub quota_requests_per_minute: u32,
    /// MiB of reference images, concept files and stored images of each tenant, above which its uploads are refused; 0:
    /// unlimited.
    #[arg(long, env = "COAR_QUOTA_STORAGE", default_value_t = 10_240, value_name = "MIB")]
    pub quota_storage: u32,
}

/// How much of all tenants together may wait. Many times what one of them may have.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub struct QueueArgs {
    /// Trainings of all tenants that may wait. At this limit, only the tenant with the most waiting trainings is
    /// refused, with 429; at twice the limit, every tenant.
    #[arg(long, env = "COAR_QUEUED_TRAININGS", default_value_t = 1000, value_name = "N")]
    pub queued_trainings: u32,
    /// Generations of all tenants that may wait without a client; refused by the same rule.
    #[arg(long, env = "COAR_QUEUED_GENERATIONS", default_value_t = 10_000, value_name = "N")]
    pub queued_generations: u32,
}

/// What one request may be, and how long it may take.
#[derive(Debug, Clone, Copy, Args, Serialize)]
pub struct LimitArgs {
    /// Maximum size of a JSON body, in KiB.
    #[arg(long, env = "COAR_JSON_LIMIT", default_value_t = 1024, value_name = "KIB")]
    pub json_limit: usize,
    /// Maximum size of an uploaded image, in MiB.
    #[arg(long, env = "COAR_PICTURE_LIMIT", default_value_t = 20, value_name = "MIB")]
    pub picture_limit: usize,
    /// Maximum size of a request's head (method, path, headers), in KiB.
    #[arg(long, env = "COAR_HEADER_LIMIT", default_value_t = 32, value_name = "KIB")]
    pub header_limit: usize,
    /// Seconds for a connection to send the head of a request.
    #[arg(long, env = "COAR_HEADER_TIMEOUT", default_value_t = 30, value_name = "SECONDS")]
    pub header_timeout: u64,
    /// Seconds for which a connection may be idle between two requests. Keep it above the time for which a load
    /// balancer keeps idle connections, often 60.
    #[arg(long, env = "COAR_IDLE_TIMEOUT", default_value_t = 75, value_name = "SECONDS")]
    pub idle_timeout: u64,
    /// Seconds between two pieces of a body.
    #[arg(long, env = "COAR_BODY_TIMEOUT", default_value_t = 30, value_name = "SECONDS")]
    pub body_timeout: u64,
    /// Seconds from the head of a request to the head of its response, including the request's body and the generation.
    /// Streams may take longer.
    #[arg(long, env = "COAR_REQUEST_TIMEOUT", default_value_t = 600, value_name = "SECONDS")]
    pub request_timeout: u64,
    /// Seconds for which a client may read nothing of a response that is being sent.
    #[arg(long, env = "COAR_WRITE_TIMEOUT", default_value_t = 60, value_name = "SECONDS")]
    pub write_timeout: u64,
    /// Concurrent connections. A few more are accepted for health checks.
    #[arg(long, env = "COAR_CONNECTIONS", default_value_t = 1024, value_name = "N")]
    pub connections: usize,
    /// Concurrent event streams of each tenant, including requests that wait for the end of a generation.
    #[arg(long, env = "COAR_TENANT_STREAMS", default_value_t = 64, value_name = "N")]
    pub tenant_streams: u32,
    /// Memory in MiB for uploads and for decoding them. One tenant gets at most half.
    #[arg(long, env = "COAR_UPLOAD_MEMORY", default_value_t = 256, value_name = "MIB")]
    pub upload_memory: u32,
    /// Disk space in MiB for forms that are being received. One tenant gets at most half.
    #[arg(long, env = "COAR_UPLOAD_SPACE", default_value_t = 1024, value_name = "MIB")]
    pub upload_space: u32,
}

/// Which base model, and where it runs.
#[derive(Debug, Clone, Args, Serialize)]
pub struct ModelArgs {
    /// Checkpoint folder (config.json, safetensors, tokenizer files). Default: the pocket model inside this binary.
    #[arg(long, env = "COAR_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Folder of text_tokenizer.json, vqgan.yaml and vqgan.ckpt, if they are not in the checkpoint folder.
    #[arg(long, env = "COAR_TOKENIZER", value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Image size in pixels that the checkpoint was trained for (512, 768, 1024). Default: the value in config.json, or
    /// 512.
    #[arg(long, env = "COAR_TARGET_SIZE", value_name = "PIXELS")]
    pub target_size: Option<u32>,
    /// `auto`, `cpu` or `cuda:N`.
    #[arg(long, env = "COAR_DEVICE", default_value = "auto")]
    pub device: String,
    /// `f32`, `bf16`, `f16` or `auto`: bf16 on an accelerator, and for bf16 checkpoints on a CPU with bf16
    /// instructions; otherwise f32.
    #[arg(long, env = "COAR_DTYPE", default_value = "auto")]
    pub dtype: String,
    /// Let a GPU round f32 to TF32 in image encoding and decoding: faster, but image codes and pixels then differ
    /// slightly from the CPU's.
    #[arg(long, env = "COAR_TF32", default_value = "off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub tf32: Switch,
    /// Threads for libtorch on the CPU; 0: one per core, but no more than the CPU quota of its control groups.
    #[arg(long, env = "COAR_THREADS", default_value_t = 0)]
    pub threads: i32,
    /// Folder for the unpacked files of the pocket model. Default: the user's cache folder.
    #[arg(long, env = "COAR_CACHE", value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// How the device is shared among requests and trainings.
#[derive(Debug, Clone, Args, Serialize)]
pub struct EngineArgs {
    /// Share of the device's time for trainings while images wait, 0 to 1. If no images wait, trainings get all of it.
    #[arg(long, env = "COAR_TRAINING_SHARE", default_value_t = 0.5)]
    pub training_share: f64,
    /// Concurrent trainings; further ones wait. They share the device's time, and each needs memory of its own.
    #[arg(long, env = "COAR_TRAINING_SLOTS", default_value_t = 1, value_name = "N")]
    pub training_slots: usize,
    /// Images that are generated during a training, evenly spaced, the last at its end; 0: none.
    #[arg(long, env = "COAR_TRAINING_PREVIEWS", default_value_t = 4, value_name = "N")]
    pub training_previews: u32,
    /// Memory in MiB for the graph of one training step, or `auto`: half of what is free when a training begins. A
    /// training that needs more recomputes layers in its backward pass, which takes about a third longer and gives the
    /// same concept.
    #[arg(long, env = "COAR_TRAINING_MEMORY", default_value = "auto", value_name = "MIB", value_parser = mebibytes)]
    pub training_memory: Memory,
    /// Memory for keys and values in MiB, allocated once at startup. It limits how many images are generated
    /// concurrently. `auto`: on a GPU, the memory that is free after the model is loaded, less what image decoding and
    /// a training step that recomputes layers need, but no more than --rows can use; on the CPU 2048.
    #[arg(long, env = "COAR_KV_MEMORY", default_value = "auto", value_name = "MIB", value_parser = mebibytes)]
    pub kv_memory: Memory,
    /// Maximum rows of the batch, even if there is memory for more; an image with guidance takes two.
    #[arg(long, env = "COAR_ROWS", default_value_t = 64)]
    pub rows: usize,
    /// Requests that may wait for rows; further ones are refused with 429.
    #[arg(long, env = "COAR_QUEUE", default_value_t = 512)]
    pub queue: usize,
    /// Memory in MiB for concepts that stay on the device while no request uses them, and as much again for parsed
    /// concept files on the host.
    #[arg(long, env = "COAR_CONCEPT_MEMORY", default_value_t = 256, value_name = "MIB")]
    pub concept_memory: usize,
    /// Make images independent of the other images in the batch, also where libtorch's kernels are not (on a GPU, or on
    /// a CPU without AVX-512). Every step then has the shapes of the full batch, so choose --rows no larger than
    /// needed.
    #[arg(long, env = "COAR_DETERMINISTIC", default_value = "off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub deterministic: Switch,
    /// Speculative decoding: tokens of each row in a decode step, 2 to 64. `auto`: what pays at the current load, by
    /// step times measured at startup. `off`: one code per step. Images do not depend on it.
    #[arg(long, env = "COAR_SPECULATE", default_value = "off", value_name = "auto|off|N")]
    pub speculate: Speculation,
}

/// All faults of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used:\n  {}", .0.join("\n  "))]
pub struct Faults(pub Vec<String>);

/// Whether it is `http(s)://host[:port]`, with a path only if `path` is set.
fn is_origin(text: &str, path: bool) -> bool {
    let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else {
        return false;
    };
    let host = rest.split('/').next().unwrap_or("");
    let plain = rest.bytes().all(|b| b.is_ascii_graphic() && !b"?#@\"<>\\".contains(&b));
    !host.is_empty() && plain && (path || host == rest)
}

/// Whether it is `scheme://host[:port]`, as browsers send it. Applications and browser extensions have schemes of their
/// own: `app://obsidian.md`, `tauri://localhost`, `chrome-extension://…`.
fn is_page_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else {
        return false;
    };
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(letters)
        && !host.is_empty()
        && host
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"/?#@\"<>\\,".contains(&b))
}

impl Config {
    /// The settings that differ from their defaults, each as a line of TOML, including those from variables and the
    /// file.
    pub fn changed(&self) -> Vec<String> {
        let known = Self::augment_args(clap::Command::new("serve"));
        let is_default = |line: &str| {
            let Some((key, value)) = line.split_once(" = ") else {
                return false;
            };
            let Some(argument) = known.get_arguments().find(|argument| argument.get_id() == key) else {
                return false;
            };
            let defaults: Vec<_> = argument
                .get_default_values()
                .iter()
                .map(|default| default.to_string_lossy())
                .collect();
            let value = value.trim_matches('"');
            match (value.parse::<f64>(), defaults.concat().parse::<f64>()) {
                (Ok(value), Ok(default)) => value == default,
                _ => value == defaults.concat() || (value == "[]" && defaults.is_empty()),
            }
        };
        let all = self.to_toml();
        let lines = all.lines().filter(|line| !line.is_empty() && !is_default(line));
        lines.map(str::to_owned).collect()
    }

    /// Checks every value and reports all faults at once.
    ///
    /// # Errors
    /// [`Faults`]
    pub fn validate(&self) -> Result<(), Faults> {
        let mut faults = Vec::new();
        let mut check = |key: &str, good: bool, expected: &str, value: &dyn std::fmt::Display| {
            if !good {
                faults.push(format!("{key} is {value}; expected {expected}"));
            }
        };
        let share = self.engine.training_share;
        check(
            "training_share",
            (0.0..=1.0).contains(&share),
            "a number from 0 to 1",
            &share,
        );
        check(
            "kv_memory",
            self.engine.kv_memory.bytes() != Some(0),
            "`auto`, or 1 or more",
            &self.engine.kv_memory,
        );
        check("rows", self.engine.rows > 1, "2 or more", &self.engine.rows);
        check("queue", self.engine.queue > 0, "1 or more", &self.engine.queue);
        let slots = self.engine.training_slots;
        check("training_slots", (1..=64).contains(&slots), "1 to 64", &slots);
        let previews = self.engine.training_previews;
        check("training_previews", previews <= 20, "0 to 20", &previews);
        check("threads", self.model.threads >= 0, "0 or more", &self.model.threads);
        let device = self.model.device.as_str();
        let index = device
            .strip_prefix("cuda:")
            .is_some_and(|index| index.parse::<u16>().is_ok());
        let known = matches!(device, "auto" | "cpu" | "cuda") || index;
        check("device", known, "auto, cpu or cuda:N", &device);
        let dtype = self.model.dtype.as_str();
        check(
            "dtype",
            matches!(dtype, "auto" | "f32" | "bf16" | "f16"),
            "auto, f32, bf16 or f16",
            &dtype,
        );
        if let Some(url) = &self.storage.database {
            let good = url.starts_with("postgres://") || url.starts_with("postgresql://");
            check("database", good, "postgres://user:password@host/database", &shown(url));
        }
        if let Some(url) = &self.storage.blobs {
            let bucket = url
                .strip_prefix("s3://")
                .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
            check("blobs", bucket, "s3://bucket/prefix", url);
        }
        let alone = self.role != Role::All && self.storage.database.is_none();
        check(
            "role",
            !alone,
            "`all`, or a --database that both roles share",
            &self.role.as_str(),
        );
        if let Some(url) = &self.advertise {
            check("advertise", is_origin(url, true), "http(s)://host:port", url);
        }
        if let Some(url) = &self.public_url {
            let good = is_origin(url, true);
            check(
                "public_url",
                good,
                "http(s)://host, without user, query or fragment",
                url,
            );
        }
        for origin in &self.cors_origin {
            let good = origin == "*" || is_page_origin(origin);
            check("cors_origin", good, "scheme://host[:port] without a path, or *", origin);
        }
        let queues = &self.queues;
        for (key, number) in [
            ("queued_trainings", queues.queued_trainings),
            ("queued_generations", queues.queued_generations),
        ] {
            check(key, (1..=1_000_000).contains(&number), "1 to 1000000", &number);
        }
        // A hundred years in hours, which still fit into milliseconds.
        check(
            "keep_images",
            (1..=876_000).contains(&self.keep_images),
            "1 to 876000",
            &self.keep_images,
        );
        let limits = &self.limits;
        check(
            "json_limit",
            (1..=65_536).contains(&limits.json_limit),
            "1 to 65536",
            &limits.json_limit,
        );
        check(
            "picture_limit",
            (1..=1024).contains(&limits.picture_limit),
            "1 to 1024",
            &limits.picture_limit,
        );
        check(
            "header_limit",
            (8..=1024).contains(&limits.header_limit),
            "8 to 1024",
            &limits.header_limit,
        );
        check("connections", limits.connections > 0, "1 or more", &limits.connections);
        for (key, number) in [
            ("tenant_streams", limits.tenant_streams),
            ("upload_memory", limits.upload_memory),
            ("upload_space", limits.upload_space),
        ] {
            check(key, number > 0, "1 or more", &number);
        }
        let day = 1..=86_400;
        for (key, seconds) in [
            ("header_timeout", limits.header_timeout),
            ("idle_timeout", limits.idle_timeout),
            ("body_timeout", limits.body_timeout),
            ("request_timeout", limits.request_timeout),
            ("write_timeout", limits.write_timeout),
        ] {
            check(key, day.contains(&seconds), "1 to 86400", &seconds);
        }
        if faults.is_empty() { Ok(()) } else { Err(Faults(faults)) }
    }

    /// The effective configuration as TOML, defaults included. Unset fields are absent.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# cannot be shown: {error}\n"))
    }

    /// How long generated images are kept.
    pub fn keep_images(&self) -> Duration {
        Duration::from_secs(3600 * u64::from(self.keep_images))
    }
}

/// The settings of a TOML file, as texts in the form of flags' values. They become the defaults of the command line.
///
/// # Errors
/// [`Faults`]: the file cannot be read, unknown keys, values of another type.
pub fn read_file(path: &Path) -> Result<Vec<(String, Vec<String>)>, Faults> {
    let fault = |problem: &dyn std::fmt::Display| Faults(vec![format!("{}: {problem}", path.display())]);
    let text = std::fs::read_to_string(path).map_err(|error| fault(&error))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| fault(&error))?;
    // Variables are ignored: only the file is checked.
    let command = Config::augment_args(Command::new("config").no_binary_name(true))
        .mut_args(|arg| arg.env(clap::builder::Resettable::Reset));
    let (mut settings, mut faults) = (Vec::new(), Vec::new());
    for (key, value) in table {
        let known = key != "file" && command.get_arguments().any(|arg| arg.get_id() == key.as_str());
        let Some(values) = texts(&value).filter(|_| known) else {
            let problem = if known {
                "has a value of another type"
            } else {
                "is not a setting"
            };
            faults.push(format!("{}: `{key}` {problem}", path.display()));
            continue;
        };
        let flag = key.replace('_', "-");
        let arguments = values.iter().map(|value| format!("--{flag}={value}"));
        match command.clone().try_get_matches_from(arguments) {
            Ok(_) => settings.push((key, values)),
            Err(_) => faults.push(format!("{}: `{key}` cannot be {value}", path.display())),
        }
    }
    if faults.is_empty() {
        Ok(settings)
    } else {
        Err(Faults(faults))
    }
}

/// A value in the form of a flag's value; a list as several.
fn texts(value: &toml::Value) -> Option<Vec<String>> {
    Some(match value {
        toml::Value::String(text) => vec![text.clone()],
        toml::Value::Integer(number) => vec![number.to_string()],
        toml::Value::Float(number) => vec![number.to_string()],
        toml::Value::Boolean(on) => vec![if *on { "on" } else { "off" }.to_owned()],
        toml::Value::Array(values) => values.iter().map(texts).collect::<Option<Vec<_>>>()?.concat(),
        toml::Value::Datetime(_) | toml::Value::Table(_) => return None,
    })
}
