//! Webhooks (standardwebhooks.com): the end of a training or generation is posted to the address that the request
//! named. Each delivery is a row until it succeeds or is given up, so a restart loses none; receivers may get one
//! twice, with the same id.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Wake;
use super::address::{AddressPolicy, host_of};
use crate::registry::{
    Attempt, Delivery, Generation, NewDelivery, Receiver, Registry, RegistryError, StoredImage, Training, now,
};
use coar_core::ids::TenantId;

/// Delays after the first, second, … failed attempt: five attempts in all, the last within an hour of the first.
const WAITS: [Duration; 4] = [
    Duration::from_secs(5),
    Duration::from_secs(60),
    Duration::from_secs(10 * 60),
    Duration::from_secs(45 * 60),
];
/// From connecting to the last byte that is read.
const TIME: Duration = Duration::from_secs(5);
/// When a delivery whose outcome was lost in a crash is due again.
const LEASE: Duration = Duration::from_secs(30);
/// Maximum number of response bytes that are read.
const ANSWER_LIMIT: usize = 64 << 10;
/// Concurrent deliveries. Of one tenant and to one host there are fewer:
/// [`DELIVERIES_AT_ONCE`](crate::registry::DELIVERIES_AT_ONCE).
const AT_ONCE: usize = 8;
/// How long a receiver that did not answer in time gets no deliveries of the tenant. It is per tenant: otherwise one
/// tenant could stop the deliveries of all others to a host that they share.
const PAUSE: Duration = Duration::from_secs(30);
/// Poll interval without a notification.
const POLL: Duration = Duration::from_secs(30);
/// How far back ends of trainings are still delivered after the server was down.
const LOOK_BACK: Duration = Duration::from_secs(24 * 3600);

/// How objects look to receivers: as the API returns them. `api` implements it.
pub trait Describe: Send + Sync + std::fmt::Debug {
    /// A generation that has ended.
    fn generation(&self, generation: &Generation, images: &[StoredImage]) -> Value;
    /// A training that has ended.
    fn training(&self, training: &Training) -> Value;
}

/// Queues deliveries.
#[derive(Debug, Clone)]
pub struct Webhooks {
    registry: Registry,
    describe: Arc<dyn Describe>,
    policy: AddressPolicy,
    wake: Wake,
}

impl Webhooks {
    /// Stores deliveries in `registry`; [`deliver`] sends them.
    pub fn new(registry: Registry, describe: Arc<dyn Describe>, policy: AddressPolicy) -> Self {
        Self {
            registry,
            describe,
            policy,
            wake: Wake::default(),
        }
    }

    /// Which addresses callers may name.
    pub fn policy(&self) -> AddressPolicy {
        self.policy
    }

    /// Objects as receivers see them.
    pub fn describe(&self) -> &dyn Describe {
        self.describe.as_ref()
    }

    /// Queues deliveries for ended trainings that have none yet. It relies on the stored end, whichever process
    /// wrote it, and also if that process has ended since.
    ///
    /// # Errors
    /// When the database fails.
    async fn queue_training_deliveries(&self) -> Result<(), RegistryError> {
        for ended in self.registry.undelivered_trainings(LOOK_BACK).await? {
            let Some(url) = &ended.webhook_url else { continue };
            let event = format!("training.{}", ended.status.as_str());
            let data = self.describe.training(&ended);
            let delivery = message(ended.tenant, &ended.id.to_string(), &event, url, &data);
            self.registry.add_training_delivery(&delivery).await?;
        }
        Ok(())
    }

    /// The delivery for a generation's end, to be stored in the transaction that writes the end; `None` if no
    /// webhook was requested. Call [`Self::stored`] after it.
    pub(super) fn of_generation(&self, ended: &Generation, images: &[StoredImage]) -> Option<NewDelivery> {
        let url = ended.new.webhook_url.as_deref()?;
        let event = format!("generation.{}", ended.status.as_str());
        let data = self.describe.generation(ended, images);
        Some(message(ended.new.tenant, &ended.id.to_string(), &event, url, &data))
    }

    /// Deliveries have been stored.
    pub(super) fn stored(&self) {
        self.wake.now();
    }
}

fn message(tenant: TenantId, subject: &str, event: &str, url: &str, data: &Value) -> NewDelivery {
    NewDelivery {
        tenant,
        subject: subject.to_owned(),
        event: event.to_owned(),
        url: url.to_owned(),
        host: host_of(url),
        body: json!({"type": event, "timestamp": iso_8601(now() / 1000), "data": data}).to_string(),
    }
}

/// Formats Unix seconds as RFC 3339 (`2026-11-27T10:30:45Z`).
pub fn iso_8601(seconds: i64) -> String {
    let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years that begin in March have their leap day at the end (Hinnant, "chrono-compatible low-level date
    // algorithms").
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, early) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + early;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// `v1,` and the base64 of HMAC-SHA256 over id, time and body. `None` if the secret is malformed.
fn signature(secret: &str, id: &str, timestamp: i64, body: &str) -> Option<String> {
    let key = STANDARD.decode(secret.strip_prefix("whsec_")?).ok()?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

fn client(policy: AddressPolicy) -> reqwest::Result<Client> {
    // Fails if a provider is already installed, which is then kept.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        Client::builder()
            .user_agent(concat!("coar/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // A proxy could connect to addresses that this process must not reach.
            .no_proxy()
            .dns_resolver(policy)
            .timeout(TIME)
    };
    builder().build().or_else(|error| {
        tracing::warn!(%error, "no root certificates found: webhooks to https addresses will fail");
        builder().tls_certs_only([]).build()
    })
}

/// Receivers that did not answer in time. Short: at most [`AT_ONCE`] of them are added in [`TIME`].
#[derive(Debug, Default)]
struct Pauses(HashMap<Receiver, Instant>);

impl Pauses {
    /// A delivery did not end in time.
    fn begin(&mut self, receiver: Receiver, now: Instant) {
        self.0.insert(receiver, now + PAUSE);
    }

    /// Those that are paused now.
    fn current(&mut self, now: Instant) -> Vec<Receiver> {
        self.0.retain(|_, end| *end > now);
        self.0.keys().cloned().collect()
    }

    /// Time until the first pause is over.
    fn first_end(&self, now: Instant) -> Option<Duration> {
        let end = self.0.values().min()?;
        Some(end.saturating_duration_since(now))
    }
}

/// Sends stored deliveries until `stop`; `trainings` notifies that one may have ended.
pub async fn deliver(webhooks: Webhooks, trainings: Wake, stop: CancellationToken) {
    let client = match client(webhooks.policy) {
        Ok(client) => client,
        Err(error) => return tracing::error!(%error, "cannot send webhooks"),
    };
    let registry = &webhooks.registry;
    let (mut sending, mut pauses) = (JoinSet::new(), Pauses::default());
    loop {
        // Subscribe before reading the rows, so no notification is missed.
        let (woken, ended) = (webhooks.wake.woken(), trainings.woken());
        if let Err(error) = webhooks.queue_training_deliveries().await {
            tracing::error!(%error, "cannot queue webhooks for ended trainings");
        }
        let free = AT_ONCE - sending.len();
        match registry
            .claim_deliveries(free, LEASE, &pauses.current(Instant::now()))
            .await
        {
            Ok(due) => {
                for delivery in due {
                    sending.spawn(send(client.clone(), webhooks.clone(), delivery));
                }
            }
            Err(error) => tracing::error!(%error, "cannot read webhook deliveries"),
        }
        let mut wait = POLL;
        if sending.len() < AT_ONCE {
            wait = wait
                .min(until_due(registry).await)
                .min(pauses.first_end(Instant::now()).unwrap_or(POLL));
        }
        tokio::select! {
            () = woken => {}
            () = ended => {}
            () = tokio::time::sleep(wait) => {}
            Some(sent) = sending.join_next() => {
                // A task that panicked has no outcome; its delivery is due again when its lease ends.
                if let Ok(Some(receiver)) = sent {
                    pauses.begin(receiver, Instant::now());
                }
            }
            () = stop.cancelled() => break,
        }
    }
    // A delivery that does not end in time is due again when the next process starts.
    while sending.join_next().await.is_some() {}
}

/// Time until the next delivery is due.
async fn until_due(registry: &Registry) -> Duration {
    let next = async {
        let present = registry.lease_time().await?;
        Ok::<_, RegistryError>(registry.next_delivery(present).await?.map(|at| at - present))
    };
    match next.await {
        Ok(Some(left)) => {
            Duration::from_millis(u64::try_from(left).unwrap_or(0)).clamp(Duration::from_millis(10), POLL)
        }
        _ => POLL,
    }
}

/// Sends one delivery and stores the outcome. Returns the receiver if it did not answer in time.
async fn send(client: Client, webhooks: Webhooks, delivery: Delivery) -> Option<Receiver> {
    let mut late = false;
    let (status, problem) = match attempt(&client, webhooks.policy, &delivery).await {
        Ok(status) if (200..300).contains(&status) => (Some(status), None),
        Ok(status) => (Some(status), Some(format!("the receiver returned {status}"))),
        Err(Failure { problem, timed_out }) => {
            late = timed_out;
            (None, Some(problem))
        }
    };
    // 410 Gone: the receiver wants no more deliveries.
    let wait = WAITS.get(delivery.attempt as usize - 1).filter(|_| status != Some(410));
    let outcome = Attempt {
        status,
        again_after: problem.as_ref().and(wait).copied(),
        problem,
    };
    match &outcome.problem {
        None => tracing::debug!(delivery = %delivery.id, "webhook delivered"),
        Some(problem) => {
            tracing::info!(delivery = %delivery.id, attempt = delivery.attempt, again = outcome.again_after.is_some(), problem, "webhook failed");
        }
    }
    if let Err(error) = webhooks.registry.record_attempt(delivery.id, &outcome).await {
        tracing::error!(%error, "cannot store the outcome of a webhook");
    }
    late.then_some(delivery.receiver)
}

/// Why there was no response.
#[derive(Debug)]
struct Failure {
    problem: String,
    timed_out: bool,
}

impl From<String> for Failure {
    fn from(problem: String) -> Self {
        Self {
            problem,
            timed_out: false,
        }
    }
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self {
            timed_out: error.is_timeout(),
            problem: described(&error.without_url()),
        }
    }
}

/// One attempt: the response status, or the reason for the failure.
async fn attempt(client: &Client, policy: AddressPolicy, delivery: &Delivery) -> Result<u16, Failure> {
    // The resolver is not called for literal IP addresses, so they are checked here.
    let url = policy.check(&delivery.url)?;
    let (id, timestamp) = (delivery.id.to_string(), now() / 1000);
    let sign = |secret: &String| signature(secret, &id, timestamp, &delivery.body);
    let mut signatures = sign(&delivery.secret).ok_or_else(|| "the secret is malformed".to_owned())?;
    // Receivers take any of several that is right.
    if let Some(before) = delivery.secret_before.as_ref().and_then(sign) {
        signatures = format!("{signatures} {before}");
    }
    let request = client
        .post(url)
        .header("content-type", "application/json")
        .header("webhook-id", &id)
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", signatures)
        .body(delivery.body.clone());
    let answer = request.send().await?;
    let status = answer.status().as_u16();
    read(answer).await;
    Ok(status)
}

/// Reads a bounded part of the response, so the connection closes cleanly. The content is ignored.
async fn read(mut answer: Response) {
    let mut left = ANSWER_LIMIT;
    while let Ok(Some(piece)) = answer.chunk().await {
        match left.checked_sub(piece.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

/// An error with its causes, which reqwest's own message leaves out. The URL is removed: it may contain the
/// receiver's secrets.
fn described(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |cause| cause.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sign_matches_the_specification() {
        let signed = signature(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            r#"{"test": 2432232314}"#,
        );
        assert_eq!(
            signed.as_deref(),
            Some("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")
        );
        assert_eq!(signature("secret", "msg", 1, ""), None);
    }

    #[test]
    fn iso_8601_formats_dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_614_265_330, "2021-02-25T15:02:10Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(iso_8601(seconds), text);
        }
    }

    #[test]
    fn pauses_end() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        assert_eq!(pauses.first_end(now), None);
        let receiver = Receiver {
            tenant: TenantId::DEFAULT,
            host: "example.com".to_owned(),
        };
        pauses.begin(receiver.clone(), now);
        assert_eq!(pauses.current(now), [receiver]);
        assert_eq!(pauses.first_end(now), Some(PAUSE));
        let later = now + PAUSE;
        assert!(pauses.current(later).is_empty());
        assert_eq!(pauses.first_end(later), None);
    }

    #[test]
    fn attempts_fit_into_an_hour() {
        let total: Duration = WAITS.iter().sum::<Duration>() + TIME * 5;
        assert!(total <= Duration::from_secs(3600));
        assert_eq!(WAITS.len() + 1, 5);
    }
}
