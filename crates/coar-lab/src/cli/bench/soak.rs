//! `coar-lab bench soak`: a long mixed load, its images, and the memory afterwards.

use std::time::{Duration, Instant};

use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use super::serve::concept;
use super::{megabytes, resident_memory};
use coar::config::{EngineArgs, ModelArgs};
use coar_core::concept::ConceptKind;
use coar_core::engine::{EngineHandle, GenerateRequest, GenerationEvent, ModelInfo, SamplingParams};

/// Send requests of mixed sizes, concepts, guidance and counts through the engine, and cancel some of them while
/// they wait or run; compare finished images with the same request alone; compare memory before and after. The exit
/// status is not 0 if an image differs, a request fails, rows stay in use, or memory has grown.
#[derive(Debug, Args)]
pub(in crate::cli) struct SoakArgs {
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// Distinct concepts in the requests.
    #[arg(long, default_value_t = 200)]
    concepts: usize,
    /// Send no more requests after this time; 0: no limit.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Concurrent requests.
    #[arg(long, default_value_t = 24)]
    at_once: usize,
    /// Finished requests that are generated again, alone. Default: all.
    #[arg(long)]
    check: Option<usize>,
    /// Seed of all requests.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Maximum growth in MiB of resident memory between the first tenth of the requests and the last.
    #[arg(long, default_value_t = 64)]
    growth: u64,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Requests of a mixed load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mix {
    pub requests: usize,
    /// Distinct concepts in the requests.
    pub concepts: usize,
    pub at_once: usize,
    /// Seed of all requests.
    pub seed: u64,
    /// Send no more after this time.
    pub time: Option<Duration>,
}

/// Results of a mixed load.
#[derive(Debug)]
pub(super) struct Sent {
    /// By request.
    ends: Vec<(usize, End)>,
    /// Resident memory after the first tenth of the requests.
    warm: Option<u64>,
}

impl Sent {
    fn count(&self, pick: fn(&End) -> bool) -> usize {
        self.ends.iter().filter(|(_, end)| pick(end)).count()
    }

    /// Requests that completed.
    pub fn finished(&self) -> usize {
        self.count(|end| matches!(end, End::Drawn(_)))
    }

    /// Every request that failed, and why.
    pub fn failed(&self) -> Vec<String> {
        let failed = self.ends.iter().filter_map(|(index, end)| match end {
            End::Failed(error) => Some(format!("request {index}: {error}")),
            _ => None,
        });
        failed.collect()
    }
}

impl Mix {
    /// Sends the requests and waits for all of them to end.
    pub async fn send(self, engine: &EngineHandle) -> anyhow::Result<Sent> {
        let begun = Instant::now();
        let (mut warm, mut ends) = (None, vec![]);
        let mut tasks = JoinSet::new();
        for index in 0..self.requests {
            if self.time.is_some_and(|time| begun.elapsed() >= time) {
                break;
            }
            let (request, fate) = request(engine.info(), self.seed, index, self.concepts);
            let own = engine.clone();
            tasks.spawn(async move { (index, send(&own, request, fate).await) });
            while tasks.len() >= self.at_once.max(1) {
                ends.extend(tasks.join_next().await.transpose()?);
            }
            if index == self.requests / 10 {
                warm = resident_memory();
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ends.push(ended?);
        }
        ends.sort_by_key(|(index, _)| *index);
        Ok(Sent { ends, warm })
    }

    /// Generates `wanted` of the finished requests again, one after the other, while `go_on` returns true: how many,
    /// and which ones differ.
    pub async fn compare(
        self,
        engine: &EngineHandle,
        sent: &Sent,
        wanted: usize,
        go_on: impl Fn() -> bool,
    ) -> (usize, Vec<usize>) {
        let drawn: Vec<_> = sent
            .ends
            .iter()
            .filter(|(_, end)| matches!(end, End::Drawn(_)))
            .collect();
        let wanted = wanted.min(drawn.len());
        let (mut compared, mut different) = (0, vec![]);
        for sample in (0..wanted).take_while(|_| go_on()) {
            // Evenly spread over all of them.
            let (index, end) = drawn[sample * drawn.len() / wanted];
            let (request, _) = request(engine.info(), self.seed, *index, self.concepts);
            compared += 1;
            if send(engine, request, Fate::Waits).await != *end {
                different.push(*index);
            }
        }
        (compared, different)
    }
}

/// What the sender does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waits,
    /// Cancels at once, while the request waits.
    GivesUp,
    /// Cancels after that many progress events.
    Leaves(u32),
}

/// Request `index` of a soak, independent of the others.
fn request(info: &ModelInfo, seed: u64, index: usize, concepts: usize) -> (GenerateRequest, Fate) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    let (width, height) = info.sizes[rng.random_range(0..info.sizes.len())];
    let mut used = vec![];
    let prompt = match rng.random_range(0..10) {
        0..3 => "a photo of a red cat on the beach".to_owned(),
        which => {
            used.push(concept(info, rng.random_range(0..concepts.max(1))));
            if which < 8 {
                "a photo of <it> cat on the beach".to_owned()
            } else {
                let mut style = concept(info, rng.random_range(0..concepts.max(1)));
                (style.name, style.kind) = ("ink".to_owned(), ConceptKind::Style);
                used.push(style);
                "<it> cat in <ink> style".to_owned()
            }
        }
    };
    let fate = match rng.random_range(0..20) {
        0..2 => Fate::GivesUp,
        2..5 => Fate::Leaves(rng.random_range(1..100)),
        _ => Fate::Waits,
    };
    let guidance = [1.0, info.default_guidance_scale, 3.5];
    let request = GenerateRequest {
        tenant: format!("tenant-{}", rng.random_range(0..3)),
        prompt,
        concepts: used,
        sampling: SamplingParams {
            width,
            height,
            seed: rng.random(),
            guidance_scale: guidance[rng.random_range(0..guidance.len())],
            temperature: rng.random_range(0.5..1.5),
            top_k: info.default_top_k,
            identity_mask: rng.random_bool(0.5),
        },
        count: rng.random_range(1..=3),
        first_index: 0,
        partial_images: rng.random_range(0..2),
    };
    (request, fate)
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// The hash of all its images.
    Drawn([u8; 32]),
    GivenUp,
    Failed(String),
}

async fn send(engine: &EngineHandle, request: GenerateRequest, fate: Fate) -> End {
    let mut pictures = vec![Vec::new(); request.count as usize];
    let mut stream = match engine.generate(request) {
        Ok(stream) => stream,
        Err(error) => return End::Failed(error.to_string()),
    };
    let mut progress = 0;
    if fate == Fate::GivesUp {
        return End::GivenUp;
    }
    while let Some(event) = stream.next().await {
        match event {
            GenerationEvent::Progress { .. } => progress += 1,
            GenerationEvent::Image { index, image } => pictures[index as usize] = image.rgb,
            GenerationEvent::Done { .. } => {
                let mut hash = Sha256::new();
                pictures.iter().for_each(|rgb| hash.update(rgb));
                return End::Drawn(hash.finalize().into());
            }
            GenerationEvent::Failed(error) => return End::Failed(error.to_string()),
            _ => {}
        }
        if fate == Fate::Leaves(progress) {
            return End::GivenUp;
        }
    }
    End::Failed("the engine stopped".to_owned())
}

/// Waits until the device thread reports that no rows are in use.
pub(super) async fn idle(engine: &EngineHandle) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let load = engine.load();
        if load.images == 0 && load.waiting_tokens == 0 {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl SoakArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        crate::cli::block_on(self.soak())
    }

    async fn soak(self) -> anyhow::Result<()> {
        let engine = super::start_engine(&self.model, &self.engine, self.at_once).await?;
        let (start, begun) = (resident_memory(), Instant::now());
        let mix = Mix {
            requests: self.requests,
            concepts: self.concepts,
            at_once: self.at_once,
            seed: self.seed,
            time: (self.seconds > 0).then_some(Duration::from_secs(self.seconds)),
        };
        let sent = mix.send(&engine).await?;
        let freed = idle(&engine).await;
        let (end, seconds, load) = (resident_memory(), begun.elapsed().as_secs_f64(), engine.load());
        let failed = sent.failed();
        let wanted = self.check.unwrap_or(usize::MAX);
        let (checked, different) = mix.compare(&engine, &sent, wanted, || true).await;
        let grown = sent.warm.zip(end).map(|(warm, end)| end.saturating_sub(warm));
        let report = json!({
            "requests": sent.ends.len(),
            "finished": sent.finished(),
            "given_up": sent.count(|end| *end == End::GivenUp),
            "failed": failed,
            "seconds": seconds,
            "concept_cache_hits": load.concept_hits,
            "concept_cache_misses": load.concept_misses,
            "checked_alone": checked,
            "different_alone": different,
            "all_rows_freed": freed,
            "resident_at_start_mb": megabytes(start),
            "resident_after_warm_up_mb": megabytes(sent.warm),
            "resident_at_the_end_mb": megabytes(end),
            "grown_mb": megabytes(grown),
            "growth_bound_mb": megabytes(Some(self.growth << 20)),
        });
        match self.json {
            true => println!("{}", serde_json::to_string_pretty(&report)?),
            false => {
                for (name, value) in report.as_object().into_iter().flatten() {
                    println!("{:<28} {value}", name.replace('_', " "));
                }
            }
        }
        anyhow::ensure!(failed.is_empty(), "{} requests failed", failed.len());
        anyhow::ensure!(
            different.is_empty(),
            "{} requests differ from the same alone",
            different.len()
        );
        anyhow::ensure!(freed, "rows are still in use after the last request");
        let flat = grown.is_none_or(|grown| grown <= self.growth << 20);
        anyhow::ensure!(flat, "resident memory has grown by more than {} MiB", self.growth);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coar_core::training::Preset;

    #[test]
    fn request_depends_on_seed_and_index_only() {
        let info = ModelInfo {
            id: "m".to_owned(),
            fingerprint: "f".to_owned(),
            layers: 2,
            hidden: 4,
            sizes: vec![(96, 96), (64, 128)],
            default_guidance_scale: 2.0,
            default_temperature: 1.0,
            default_top_k: 20,
            preset: Preset::Pocket,
        };
        let all: Vec<_> = (0..200).map(|index| request(&info, 7, index, 50)).collect();
        let again = request(&info, 7, 150, 50);
        assert_eq!((again.0.sampling.seed, again.1), (all[150].0.sampling.seed, all[150].1));
        for concepts in 0..=2 {
            assert!(all.iter().any(|(request, _)| request.concepts.len() == concepts));
        }
        let fates = |pick: fn(&Fate) -> bool| all.iter().filter(|(_, fate)| pick(fate)).count();
        assert!(fates(|fate| *fate == Fate::Waits) > 100);
        assert!(fates(|fate| *fate == Fate::GivesUp) > 5 && fates(|fate| matches!(fate, Fate::Leaves(_))) > 10);
        assert_ne!(request(&info, 8, 150, 50).0.sampling.seed, all[150].0.sampling.seed);
    }
}
